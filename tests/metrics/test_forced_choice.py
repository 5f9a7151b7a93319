"""diffusion.metrics.forced_choice: intervals against exact coverage, simulations and SciPy."""

import json

import numpy as np
import pytest
from scipy import special, stats

from diffusion.metrics import forced_choice
from diffusion.metrics.forced_choice import (
    bootstrap_rates,
    clopper_pearson,
    estimate_difference,
    estimate_rates,
    parse_answers,
    percentile_interval,
)

STUDIES = {"abc": 3}
GOOD = {
    "study": "abc",
    "person": "p_1",
    "answers": [
        {"pair": 2, "left": 0, "choice": 1, "seconds": 1.5},
        {"pair": 0, "left": 1, "choice": 0, "seconds": 0},
        {"pair": 1, "left": 1, "choice": 1, "seconds": 20.25},
    ],
}


# Clopper and Pearson


@pytest.mark.parametrize("n", [1, 5, 40, 200])
def test_clopper_pearson_covers_at_least_95_per_cent_exactly(n):
    """Summed over all outcomes, for proportions everywhere."""
    k, p = np.arange(n + 1), np.linspace(0.001, 0.999, 333)[:, None]
    low, high = np.array([clopper_pearson(int(i), n) for i in k]).T
    covered = (stats.binom.pmf(k, n, p) * ((low <= p) & (p <= high))).sum(1)
    assert covered.min() >= 0.95 and covered.max() <= 1 + 1e-9


def test_clopper_pearson_inverts_the_binomial_tails():
    for k, n in ((1, 5), (20, 40), (3, 200)):
        low, high = clopper_pearson(k, n)
        np.testing.assert_allclose(stats.binom.sf(k - 1, n, low), 0.025, rtol=1e-9)
        np.testing.assert_allclose(stats.binom.cdf(k, n, high), 0.025, rtol=1e-9)
    np.testing.assert_allclose(clopper_pearson(0, 10), (0, 1 - 0.025 ** (1 / 10)), rtol=1e-9)
    np.testing.assert_allclose(clopper_pearson(10, 10), (0.025 ** (1 / 10), 1), rtol=1e-9)


def test_clopper_pearson_covers_known_rates_in_1000_simulations():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.3, 0.5):
        errors = rng.binomial(40, rate, 1000)
        intervals = np.array([clopper_pearson(k, 40) for k in range(41)])[errors]
        assert np.mean((intervals[:, 0] <= rate) & (rate <= intervals[:, 1])) >= 0.95


# Bootstraps


@pytest.mark.parametrize(
    "mean, concentration, people", [(0.3, 10, 10), (0.5, 30, 20), (0.1, 20, 40)]
)
def test_bootstrap_over_people_covers_92_to_98_per_cent_of_1000_studies(
    mean, concentration, people
):
    """People differ: the error rate of each is drawn from a beta distribution."""
    rng = np.random.default_rng(0)
    rates = rng.beta(mean * concentration, (1 - mean) * concentration, (1000, people, 1))
    studies = rng.random((1000, people, 40)) < rates
    replicates = bootstrap_rates(studies, True, False, rng, 1000)
    ends = np.array([percentile_interval(each, people) for each in replicates])
    covered = (ends[:, 0] <= mean) & (mean <= ends[:, 1])
    assert 0.92 <= covered.mean() <= 0.98


@pytest.mark.parametrize("of_people, of_pictures", [(0.5, 0.5), (0.3, 1.0)])
def test_only_the_bootstrap_over_both_covers_where_people_and_pictures_differ(
    of_people, of_pictures
):
    """A probit model, whose mean over people and pictures is known in closed form."""
    rng, mean, people, n = np.random.default_rng(0), 0.3, 20, 40
    shift = special.ndtri(mean) * np.sqrt(1 + of_people**2 + of_pictures**2)
    each = of_people * rng.normal(size=(500, people, 1)) + of_pictures * rng.normal(
        size=(500, 1, n)
    )
    studies = rng.random((500, people, n)) < special.ndtr(shift + each)

    def coverage(people, pictures, units):
        replicates = bootstrap_rates(studies, people, pictures, rng, 1000)
        ends = np.array([percentile_interval(each, units) for each in replicates])
        return np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1]))

    assert coverage(True, True, 0) >= 0.92
    assert coverage(True, False, people) < 0.92 and coverage(False, True, n) < 0.95


def test_variances_of_the_bootstraps_in_closed_form():
    rng = np.random.default_rng(0)
    wrong = rng.random((7, 12)) < rng.random((7, 1))
    people, pictures, both = (
        bootstrap_rates([wrong], *kinds, rng, 200_000)[0].var()
        for kinds in ((True, False), (False, True), (True, True))
    )
    np.testing.assert_allclose(people, wrong.mean(1).var() / 7, rtol=0.02)
    np.testing.assert_allclose(pictures, wrong.mean(0).var() / 12, rtol=0.02)
    # Of multinomial counts w of n things, E[w_i w_j] = 1 - 1/n, and one more for i = j.
    moments = [np.eye(n) + 1 - 1 / n for n in wrong.shape]
    second = (wrong * (moments[0] @ wrong @ moments[1])).sum() / wrong.size**2
    np.testing.assert_allclose(both, second - wrong.mean() ** 2, rtol=0.02)


def test_interval_over_people_is_scipy_s_bootstrap_at_the_expanded_level():
    rng = np.random.default_rng(0)
    wrong = rng.random((15, 40)) < rng.beta(3, 7, (15, 1))
    level = 1 - 2 * stats.norm.cdf(np.sqrt(15 / 14) * stats.t.ppf(0.025, 14))
    arguments = {"confidence_level": level, "method": "percentile", "n_resamples": 50_000}
    wanted = stats.bootstrap((wrong.mean(1),), np.mean, rng=rng, **arguments).confidence_interval
    found = percentile_interval(bootstrap_rates([wrong], True, False, rng, 50_000)[0], 15)
    np.testing.assert_allclose(found, wanted, atol=0.02 * (wanted.high - wanted.low))


def test_rates_are_counts_and_intervals_without_a_spread_are_none():
    wrong = np.zeros((4, 10), bool)
    wrong[:, :3] = True  # all people agree
    (rate,) = estimate_rates([wrong])
    assert (rate.errors, rate.answers, rate.rate) == (12, 40, 0.3)
    assert rate.over_people is None and rate.over_pictures[0] < 0.3 < rate.over_pictures[1]
    (rate,) = estimate_rates([wrong[:1]])
    assert rate.over_people is None and rate.over_both is None
    (rate,) = estimate_rates([wrong[:, :1]])
    assert rate.over_pictures is None and rate.over_both is None and rate.exact[1] == 1
    (rate,) = estimate_rates([np.zeros_like(wrong)])
    assert rate.over_people is None and rate.over_both is None and rate.exact[0] == 0


def test_leanings_of_people_cancel_in_a_difference():
    """Everyone errs in a fifth more of the second group, and people differ by much more."""
    rates = np.linspace(0, 0.8, 9)
    first, second = (np.arange(10) < 10 * r[:, None] - 1e-9 for r in (rates, rates + 0.2))
    value, over_people, over_both = estimate_difference(first, second)
    assert value == pytest.approx(0.2) and over_people == pytest.approx((0.2, 0.2))
    assert over_both[0] < 0.2 < over_both[1]
    low, high = estimate_rates([first])[0].over_people
    assert high - low > 0.3


# Files of answers


def test_answers_come_back_by_pair():
    found = parse_answers(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), STUDIES)
    assert (found.study, found.person) == ("abc", "p_1")
    assert found.choice.tolist() == [0, 1, 1] and found.left.tolist() == [1, 1, 0]
    assert found.seconds.tolist() == [0, 20.25, 1.5]


def changed(**fields):
    """The good file with other fields of its first answer."""
    first, *rest = GOOD["answers"]
    return json.dumps(GOOD | {"answers": [first | fields, *rest]}).encode()


TEXT = json.dumps(GOOD)
HOSTILE = {
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 500_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "deep in an answer": TEXT.replace("20.25", "[" * 900 + "]" * 900).encode(),
    "large": TEXT.encode() + b" " * forced_choice.MAX_ANSWER_BYTES,
    "a list": b"[]",
    "null": b"null",
    "repeated name": TEXT.replace('"left": 0', '"left": 0, "left": 0').encode(),
    "no person": json.dumps({k: v for k, v in GOOD.items() if k != "person"}).encode(),
    "one field more": json.dumps(GOOD | {"correct": 40}).encode(),
    "other study": json.dumps(GOOD | {"study": "abd"}).encode(),
    "study of lists": json.dumps(GOOD | {"study": []}).encode(),
    "markup": json.dumps(GOOD | {"person": "<img src=x onerror=alert(1)>"}).encode(),
    "lines": json.dumps(GOOD | {"person": "a\nddpm: error[0]: b"}).encode(),
    "line at the end": json.dumps(GOOD | {"person": "a\n"}).encode(),
    "long person": json.dumps(GOOD | {"person": "a" * 33}).encode(),
    "number for answers": json.dumps(GOOD | {"answers": 3}).encode(),
    "fewer answers": json.dumps(GOOD | {"answers": GOOD["answers"][:2]}).encode(),
    "more answers": json.dumps(GOOD | {"answers": GOOD["answers"] * 2}).encode(),
    "answer is a number": json.dumps(GOOD | {"answers": [1, 2, 3]}).encode(),
    "pair twice": changed(pair=0),
    "unknown pair": changed(pair=3),
    "negative pair": changed(pair=-1),
    "pair is a fraction": changed(pair=2.0),
    "pair is true": changed(pair=True),
    "pair is text": changed(pair="2"),
    "choice 2": changed(choice=2),
    "choice true": changed(choice=True),
    "choice null": changed(choice=None),
    "left -1": changed(left=-1),
    "huge choice": changed(choice=10**400),
    "huge integer": TEXT.replace("20.25", "1" + "0" * 4000).encode(),
    "huger integer": TEXT.replace("20.25", "1" + "0" * 9000).encode(),
    "infinite": TEXT.replace("20.25", "1e999").encode(),
    "Infinity": TEXT.replace("20.25", "Infinity").encode(),
    "NaN": TEXT.replace("20.25", "NaN").encode(),
    "negative": changed(seconds=-0.1),
    "text for seconds": changed(seconds="1"),
    **{f"cut at {i}": TEXT[:i].encode() for i in range(1, len(TEXT), 9)},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_the_page_would_not_write_is_refused_in_one_line(content):
    with pytest.raises(ValueError, match=r"^expected .*, found ") as refused:
        parse_answers(content, STUDIES)
    message = str(refused.value)
    assert len(message) < 250 and message.isprintable()
