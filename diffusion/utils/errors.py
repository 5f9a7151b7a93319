"""The errors a user can mend: one family, one exit code for each kind.

A message is one line of the form `key: expected X, found Y; do Z`. Libraries raise these errors or
ValueError; only `runtime.cli` catches the family, prints the line and exits with the code.
"""

MAX_LENGTH = 300  # characters: values and names that a message quotes have no bound


class DDPMError(Exception):
    """Base class. Its message is one printable line; `code` is the process's exit code."""

    code = 1

    def __init__(self, message: object):
        super().__init__(one_line(message, MAX_LENGTH))


class ConfigError(DDPMError):
    """A flag or a configuration key has a value that cannot be used."""

    code = 2


class DataError(DDPMError):
    """A data set, an image or a source of images is missing, damaged or unfit."""

    code = 3


class WorkdirError(DDPMError):
    """A work directory or a checkpoint cannot be written, read or used."""

    code = 4


class NonFiniteError(DDPMError):
    """A loss, a gradient or a weight became NaN or infinite."""

    code = 5


class IntegrityError(DDPMError):
    """A file is damaged, hostile or not what its digest says."""

    code = 6


class LostPeerError(DDPMError):
    """Another process of the run was lost."""

    code = 7


LOST = LostPeerError.code  # also of a process that made no progress (runtime.watchdog)
STOPPED = 75  # exit code after SIGINT or SIGTERM: the same command resumes (EX_TEMPFAIL)


def error_text(error: BaseException) -> str:
    """Returns what a library's error says, on one line of at most 200 characters, or its type."""
    text = getattr(error, "strerror", None) or error
    return one_line(text, 200) or type(error).__name__


def one_line(text: object, limit: int = MAX_LENGTH) -> str:
    """Returns the text on one line of printable characters, `limit` of them at most.

    A longer text loses its middle: a message begins with its key and ends in what to do.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in f"{text}").split())
    end = limit // 4
    return line if len(line) <= limit else f"{line[: limit - end - 5]} ... {line[-end:]}"
