"""diffusion.utils.errors: exit codes, and messages of one printable line."""

import pickle

import pytest

from diffusion.utils import errors


def test_every_kind_has_its_exit_code():
    kinds = {kind.__name__: kind.code for kind in errors.DDPMError.__subclasses__()}
    assert kinds == {
        "ConfigError": 2,
        "DataError": 3,
        "WorkdirError": 4,
        "NonFiniteError": 5,
        "IntegrityError": 6,
        "LostPeerError": 7,
    }
    assert (errors.LOST, errors.STOPPED) == (7, 75)


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: expected 1,\n  found\t2", "a: expected 1, found 2"),
        (" \x1b[2J\x07name\x00 ", "[2J name"),
        ("\u202eevil\udcff", "evil"),  # writes from right to left; a byte that is no UTF-8
        (ValueError("\u03b5 \u2265 0"), "\u03b5 \u2265 0"),
        ("", ""),
    ],
)
def test_a_message_is_one_printable_line(text, line):
    assert errors.one_line(text) == line
    assert str(errors.DataError(text)) == line


@pytest.mark.parametrize("numbers", [50, 10**3, 10**5])
def test_a_long_message_keeps_its_key_and_what_to_do(numbers):
    """Whatever the value that it quotes, it has at most 300 characters."""
    assert errors.one_line("x" * 300) == "x" * 300
    value = [0.001 * i for i in range(numbers)]
    message = str(errors.ConfigError(f"process.betas: expected one, found {value!r}; give another"))
    assert message.startswith("process.betas: expected one, found [0.0, 0.001,")
    assert message.endswith("]; give another") and " ... " in message and len(message) == 300


def test_an_error_crosses_processes():
    error = pickle.loads(pickle.dumps(errors.WorkdirError("run: is locked")))
    assert type(error) is errors.WorkdirError and str(error) == "run: is locked"
