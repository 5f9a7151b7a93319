"""Two-alternative forced choice: files of answers, error rates and their intervals.

A pair is a real picture and a generated one, and a person says which is real. An error is a
generated picture that was called real: 50 % of them is chance, a generator that people cannot tell
from the data. Rates of people stand for quality as in Zhou et al. 2019 (arXiv:1904.01121), there of
single pictures. All people see all pairs, so that answers are an array [people, pairs].
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from diffusion.utils.errors import one_line

NOMINAL_COVERAGE = 0.95  # of all intervals
RESAMPLES = 10_000  # of a bootstrap: an end then varies by about 1 % of the interval's length
MAX_ANSWER_BYTES = 2**20
MAX_SECONDS = 1e9  # that an answer may have taken
PERSON = re.compile(r"[A-Za-z0-9_-]{1,32}")
ANSWER_FIELDS = ("pair", "left", "choice", "seconds")

Interval = tuple[float, float]


class Answers(NamedTuple):
    """One person's answers to all n pairs of a study, by pair.

    choice, left: int8[n], which of a pair's two pictures was called real, and which was on the
    left; seconds: float64[n] from the picture to the answer.
    """

    study: str
    person: str
    choice: np.ndarray
    left: np.ndarray
    seconds: np.ndarray


# Files of answers


def parse_answers(content: bytes, studies: Mapping[str, int]) -> Answers:
    """Reads the JSON file that a study's page writes, which anyone may have changed.

    Args:
      content: of the file, at most MAX_ANSWER_BYTES.
      studies: {identifier of a study: number of its pairs}.

    Raises ValueError `expected X, found Y` for whatever the page would not have written.
    """
    if len(content) > MAX_ANSWER_BYTES:
        raise _mismatch(f"at most {MAX_ANSWER_BYTES:,} bytes", "more")
    try:
        text = content.decode("utf-8-sig")  # editors add a mark where answers were copied
        file = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _mismatch("complete JSON", one_line(error, 100)) from None
    study, person, answers = _fields(file, ("study", "person", "answers"))
    if not isinstance(study, str) or study not in studies:
        raise _mismatch(f"study {' or '.join(studies)}", _short(study))
    if not isinstance(person, str) or not PERSON.fullmatch(person):
        raise _mismatch("person of 1 to 32 letters, digits, - and _", _short(person))
    n = studies[study]
    if not isinstance(answers, list) or len(answers) != n:
        found = f"{len(answers)} of them" if isinstance(answers, list) else _short(answers)
        raise _mismatch(f"answers to all {n} pairs", found)
    integers, seconds, seen = np.zeros((2, n), np.int8), np.zeros(n), set()
    for answer in answers:
        pair, left, choice, time = _fields(answer, ANSWER_FIELDS)
        if not _is_number(pair, (int,)) or not 0 <= pair < n:
            raise _mismatch(f"pair in 0..{n - 1}", _short(pair))
        if pair in seen:
            raise _mismatch("one answer to each pair", f"another one to pair {pair}")
        for name, value in (("left", left), ("choice", choice)):
            if not _is_number(value, (int,)) or value not in (0, 1):
                raise _mismatch(f"{name} 0 or 1", _short(value))
        if not _is_number(time, (int, float)) or not 0 <= time <= MAX_SECONDS:
            raise _mismatch("seconds of 0 or more", _short(time))
        seen.add(pair)
        integers[:, pair], seconds[pair] = (choice, left), time
    return Answers(study, person, *integers, seconds)


def _fields(x: Any, names: Sequence[str]) -> list[Any]:
    """Returns the values of an object that has exactly these names."""
    if not isinstance(x, dict) or x.keys() != {*names}:
        found = ", ".join(map(str, x)) or "none" if isinstance(x, dict) else _short(x)
        raise _mismatch(f"an object of {', '.join(names)}", one_line(found, 60))
    return [x[name] for name in names]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name twice in one object")
    return found


def _is_number(x: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(x, kinds) and not isinstance(x, bool)


def _short(x: Any) -> str:
    return type(x).__name__ if isinstance(x, dict | list) else one_line(repr(x), 60)


def _mismatch(expected: str, found: str) -> ValueError:
    return ValueError(f"expected {expected}, found {found}")


# Rates and intervals


class ErrorRate(NamedTuple):
    """A rate of errors and its intervals at NOMINAL_COVERAGE, fractions.

    Attributes:
      errors, answers: their counts.
      exact: Clopper-Pearson's, as if all answers were independent and equally hard: for the people
        and the pictures of this study, too narrow for others where these differ.
      over_people: for other people who see the same pictures.
      over_pictures: for other pictures that the same people see.
      over_both: for other people and other pictures.

    An interval of a bootstrap is None where its people, or pictures, are fewer than two or all have
    the same rate, from which no spread follows.
    """

    errors: int
    answers: int
    exact: Interval
    over_people: Interval | None
    over_pictures: Interval | None
    over_both: Interval | None

    @property
    def rate(self) -> float:
        return self.errors / self.answers


def clopper_pearson(errors: int, answers: int) -> Interval:
    """Returns the exact interval of a binomial proportion (Clopper and Pearson 1934)."""
    found = stats.binomtest(errors, answers).proportion_ci(NOMINAL_COVERAGE, "exact")
    return float(found.low), float(found.high)


def estimate_rates(groups: Sequence[np.ndarray], seed: int = 0) -> list[ErrorRate]:
    """Returns the rate of each group of pairs.

    groups: errors bool[people, pairs] of each group, of the same people.
    """
    replicates = _all_replicates(groups, seed)
    rates = []
    for i, wrong in enumerate(groups):
        people, pictures = wrong.shape
        rates.append(
            ErrorRate(
                int(wrong.sum()),
                wrong.size,
                clopper_pearson(int(wrong.sum()), wrong.size),
                *_intervals([each[i] for each in replicates], people, pictures),
            )
        )
    return rates


def estimate_difference(
    first: np.ndarray, second: np.ndarray, seed: int = 0
) -> tuple[float, Interval | None, Interval | None]:
    """Returns by how much the rate of `second` exceeds that of `first`, over people and over both.

    first, second: errors bool[people, pairs] of two groups of pairs, of the same people, whose own
    leanings cancel.
    """
    replicates = [each[1] - each[0] for each in _all_replicates([first, second], seed)]
    people, pictures = len(first), min(first.shape[1], second.shape[1])
    over_people, _, over_both = _intervals(replicates, people, pictures)
    return float(second.mean() - first.mean()), over_people, over_both


def _all_replicates(groups: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Returns the rates float64[groups, RESAMPLES] over people, over pictures and over both."""
    kinds = ((True, False), (False, True), (True, True))
    return [bootstrap_rates(groups, *kind, np.random.default_rng(seed)) for kind in kinds]


def _intervals(
    replicates: Sequence[np.ndarray], people: int, pictures: int
) -> tuple[Interval | None, Interval | None, Interval | None]:
    over_people, over_pictures, over_both = replicates
    both = people > 1 and pictures > 1
    return (
        percentile_interval(over_people, people),
        percentile_interval(over_pictures, pictures),
        percentile_interval(over_both) if both else None,
    )


def bootstrap_rates(
    groups: Sequence[np.ndarray],
    people: bool,
    pictures: bool,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Draws people, or pairs, or both with replacement; returns rates float64[groups, resamples].

    A resample has the same people in all groups. Both at once are the pigeonhole bootstrap (Owen
    2007, doi:10.1214/07-AOAS122), which somewhat overestimates the variance.

    groups: errors bool[people, pairs] of each group.
    """

    def counts(n, drawn):
        drawn = rng.multinomial(n, np.full(n, 1 / n), resamples) if drawn else [[1] * n]
        return np.asarray(drawn, np.float64)

    of_people, rates = counts(len(groups[0]), people), []
    for wrong in groups:
        of_pairs = counts(wrong.shape[1], pictures)
        rates.append((of_people @ wrong * of_pairs).sum(1) / wrong.size)
    return np.stack(rates)


def percentile_interval(replicates: np.ndarray, units: int = 0) -> Interval | None:
    """Returns the interval between two quantiles of a bootstrap, or None without any spread.

    units: things that were drawn. A bootstrap of n things is too narrow by sqrt((n - 1) / n) and by
    what a normal quantile is below Student's; quantiles further out make up for it (Hesterberg
    2015, doi:10.1080/00031305.2015.1089789). 0: the plain quantiles, for a bootstrap that is wide
    enough.
    """
    if units == 1 or np.ptp(replicates) == 0:
        return None
    tail = (1 - NOMINAL_COVERAGE) / 2
    if units:
        wide = math.sqrt(units / (units - 1)) * stats.t.ppf(tail, units - 1)
        tail = float(special.ndtr(wide))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)
