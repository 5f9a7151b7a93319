"""What a study's answers say: reading of the files, error rates and their intervals."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffusion.metrics import forced_choice
from diffusion.metrics.forced_choice import MAX_ANSWER_BYTES, Answers, ErrorRate, Interval
from diffusion.plotting.error_rates import ErrorRateRow, plot_error_rates
from diffusion.utils import io, logging
from diffusion.utils.errors import DataError, WorkdirError, error_text, one_line

CHECK = -1  # in place of a pair's condition
CHANCE = 0.5


class Study(NamedTuple):
    """The key of a study.

    Attributes:
      folder: with its study.json.
      names: of its conditions.
      real: int[n], which picture of a pair is real.
      condition: int[n] of each pair, CHECK for an attention check.
      max_failed: largest share of failed checks with which a person counts.
    """

    folder: epath.Path
    names: list[str]
    real: np.ndarray
    condition: np.ndarray
    max_failed: float


def evaluate_answers(workdir: epath.Path, inputs: Sequence[str]) -> None:
    """Prints the rates of every study that files answer, and writes results.{json,png} beside it.

    A file that cannot be used is one line on stderr, and is left out. Raises DataError if none can
    be used, WorkdirError without a study.

    inputs: files, and folders of json files.
    """
    studies = load_studies(workdir)
    answers, refused = load_answers(inputs, {k: len(each.real) for k, each in studies.items()})
    if not answers:
        found = f"found {len(refused)} that cannot be used" if refused else "found none"
        names = ", ".join(inputs)
        raise DataError(f"--input={names}: expected files of answers, {found}; see docs/study.md")
    for name, study in studies.items():
        if own := [each for each in answers if each.study == name]:
            summarise(study, own, refused)


def load_studies(workdir: epath.Path) -> dict[str, Study]:
    """Reads workdir/study/STEP/study.json of every step. Raises WorkdirError."""
    studies = {}
    for path in sorted((workdir / "study").glob("*/study.json")):
        try:
            key = json.loads(path.read_text())
            columns = [[int(pair[name]) for pair in key["pairs"]] for name in ("real", "condition")]
            about = path.parent, [*key["names"]], *map(np.array, columns), float(key["max_failed"])
            studies[str(key["study"])] = Study(*about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"cannot be read: {type(error).__name__}: {one_line(error, 100)}"
            raise WorkdirError(f"{path}: {what}; copy it anew") from error
    if not studies:
        what = "expected a study, found none; make one by --mode=study without --input"
        raise WorkdirError(f"{workdir}/study: {what}")
    return studies


def load_answers(
    inputs: Sequence[str], studies: dict[str, int]
) -> tuple[list[Answers], dict[str, str]]:
    """Reads files of answers, warns of those that cannot be used and returns both.

    studies: {identifier: number of pairs}. Returns the answers, of every person the first file,
    and {name of a file: what is wrong with it}.
    """
    answers: dict[tuple[str, str], Answers] = {}
    refused: dict[str, str] = {}
    for path in answer_files(inputs):
        try:
            with io.open_binary(path) as file:
                found = forced_choice.parse_answers(file.read(MAX_ANSWER_BYTES + 1), studies)
            if (found.study, found.person) in answers:
                raise ValueError(f"expected other people's, found {found.person} again")
            answers[found.study, found.person] = found
        except (OSError, ValueError) as error:
            refused[str(path)] = error_text(error)
            logging.warning(one_line(f"{path}: {error_text(error)}; left out"))
    return [*answers.values()], refused


def answer_files(inputs: Sequence[str]) -> list[epath.Path]:
    """Returns the files of --input, and of each folder among them its json files."""
    paths = []
    for path in map(io.to_path, inputs):
        paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return paths


# Results


def summarise(study: Study, answers: Sequence[Answers], refused: dict[str, str]) -> None:
    """Prints and writes the results of a study. Raises DataError if nobody passed its checks."""
    wrong = np.stack([each.choice for each in answers]) != study.real
    is_check = study.condition == CHECK
    failed = wrong[:, is_check].sum(1)
    passed = failed <= study.max_failed * is_check.sum() + 1e-9
    what = f"more than {100 * study.max_failed:g} % of {is_check.sum()} checks failed"
    logging.info(f"people     {passed.sum()}, and {(~passed).sum()} left out ({what})")
    if not passed.any():
        found = f"found {len(answers)} who did not"
        raise DataError(f"--input: expected people who passed the checks, {found}; ask more people")
    seconds = np.stack([each.seconds for each in answers])[passed]
    groups = [wrong[passed][:, study.condition == i] for i in range(len(study.names))]
    rates = forced_choice.estimate_rates(groups)
    conditions, rows = [], []
    for i, (name, rate) in enumerate(zip(study.names, rates, strict=True)):
        median = float(np.median(seconds[:, study.condition == i]))
        of_people = groups[i].mean(1).tolist()
        about = {"name": name, "pairs": groups[i].shape[1], "rate": rate.rate, **rate._asdict()}
        conditions.append(about | {"of_people": of_people, "median_seconds": median})
        intervals = {text: getattr(rate, key) for key, text in INTERVALS.items()}
        rows.append(ErrorRateRow(one_line(name, 60), rate.rate, intervals, of_people))
        for line in rate_lines(name, groups[i].shape, rate, median):
            logging.info(line)
    people = [each.person for each in answers]
    content = {
        "people": [person for person, ok in zip(people, passed, strict=True) if ok],
        "left_out": [person for person, ok in zip(people, passed, strict=True) if not ok],
        "refused": refused,
        "confidence": forced_choice.NOMINAL_COVERAGE,
        "max_failed": study.max_failed,
        "left_share": left_share(answers),
        "conditions": conditions,
        "differences": differences_of(study.names, groups),
    }
    io.save_json(study.folder / "results.json", content)
    plot_error_rates(study.folder / "results.png", rows)
    logging.info(f"done       {study.folder}/results.json, results.png")


INTERVALS = {
    "exact": "as if all alike (Clopper-Pearson)",
    "over_people": "over people",
    "over_pictures": "over pictures",
    "over_both": "over people and pictures",
}


def rate_lines(name: str, shape: tuple[int, int], rate: ErrorRate, seconds: float) -> list[str]:
    """Returns what the answers say of a condition; shape: people and pairs."""
    people, pairs = shape
    counts = f"{people} people, {pairs} pairs, {seconds:.1f} s for the median answer"
    level = f"{100 * forced_choice.NOMINAL_COVERAGE:g} % intervals"
    what = f"of the generated pictures were called real; 50 % is chance; {level}:"
    lines = [
        f"{one_line(name, 80)}: {counts}",
        f"           {100 * rate.rate:.1f} % {what}",
    ]
    for key, text in INTERVALS.items():
        lines.append(f"           {describe_interval(getattr(rate, key)):18} {text}")
    return [*lines, f"           {conclusion(rate)}"]


def conclusion(rate: ErrorRate) -> str:
    """Returns what follows for other people and pictures."""
    if rate.over_both is None:
        return (
            "too few people or pictures, or all alike: Clopper-Pearson's interval is all there is"
        )
    low, high = rate.over_both
    if high < CHANCE:
        return "other people would tell other such pictures from real ones"
    if low > CHANCE:
        return "other people would take other such pictures for real rather than real ones"
    return "the answers do not show that people can tell such pictures from real ones, or cannot"


def describe_interval(interval: Interval | None) -> str:
    """Returns an interval in per cent, `[31.2, 45.0] %`."""
    return "[{:.1f}, {:.1f}] %".format(*(100 * x for x in interval)) if interval else "no interval"


def differences_of(names: Sequence[str], groups: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Prints and returns how the rate of every other condition differs from that of the first."""
    found = []
    for name, wrong in zip(names[1:], groups[1:], strict=True):
        value, people, both = forced_choice.estimate_difference(groups[0], wrong)
        found.append({"first": names[0], "second": name, "difference": value})
        found[-1] |= {"over_people": people, "over_both": both}
        compared = f"{one_line(name, 40)} - {one_line(names[0], 40)}"
        logging.info(f"difference {compared}: {100 * value:+.1f} %")
        logging.info(f"           {describe_interval(both):18} over people and pictures")
    return found


def left_share(answers: Sequence[Answers]) -> float:
    """Returns the share of answers that name the picture on the left."""
    return float(np.mean([each.choice == each.left for each in answers]))
