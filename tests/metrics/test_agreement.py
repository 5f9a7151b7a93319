"""Rank correlations against SciPy's, and their intervals against simulated truths."""

import numpy as np
import pytest
from scipy import stats

from diffusion.metrics import agreement
from diffusion.metrics.agreement import rank_agreement

CELLS = np.random.RandomState(0).randn(12)
SCORES = {
    "fd": CELLS + 0.5 * np.random.RandomState(1).randn(12),
    "with ties": np.round(CELLS),
    "answers": -CELLS + np.random.RandomState(2).randn(12),
    "two values": (CELLS > 0).astype(int),
}


def scipy_of(scores):
    """Returns (rho, tau-b) of all pairs, [k, k]."""
    return tuple(
        np.array([[f(a, b).statistic for b in scores] for a in scores])
        for f in (stats.spearmanr, stats.kendalltau)
    )


def test_coefficients_are_those_of_scipy():
    found = rank_agreement(SCORES, resamples=10)
    assert found.names == tuple(SCORES)
    for ours, theirs in zip(found[1:3], scipy_of(SCORES.values()), strict=True):
        np.testing.assert_allclose(ours.value, theirs, atol=1e-12)
        assert ours.low.shape == ours.high.shape == (4, 4)


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("size", [1, 2**22])
def test_resamples_are_those_of_scipy(size, monkeypatch):
    """Each cell as often as it was drawn; the ends are quantiles of the coefficients.

    In two of the resamples "two values" has one value only, and SciPy's coefficients are NaN.
    """
    monkeypatch.setattr(agreement, "MAX_NUMBERS_PER_BLOCK", size)
    found = rank_agreement(SCORES, confidence=0.8, resamples=40, seed=5)
    counts = np.random.RandomState(5).multinomial(12, np.full(12, 1 / 12), 40)
    drawn = [scipy_of([np.repeat(s, n) for s in SCORES.values()]) for n in counts]
    assert np.isnan(np.array(drawn)[:, 0, 3, 0]).any()
    for k, ours in enumerate(found[1:3]):
        low, high = np.nanquantile([each[k] for each in drawn], [0.1, 0.9], axis=0)
        np.testing.assert_allclose(ours.low, low, atol=1e-12)
        np.testing.assert_allclose(ours.high, high, atol=1e-12)


def test_orders_and_their_reverse():
    """Any rising function agrees fully, any falling one not at all."""
    scores = {"x": CELLS, "rising": np.exp(CELLS), "falling": -(CELLS**3)}
    found = rank_agreement(scores, resamples=50)
    signs = np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    for each in found[1:3]:
        for ends in each:
            np.testing.assert_allclose(ends, signs, atol=1e-12)


def test_few_cells_have_no_intervals():
    """Where a bootstrap of five cells in one order would say from 1 to 1."""
    x = np.arange(5.0)
    for each in rank_agreement({"x": x, "y": x**3})[1:3]:
        np.testing.assert_allclose(each.value, np.ones((2, 2)))
        assert np.isnan(each.low).all() and np.isnan(each.high).all()


@pytest.mark.parametrize("r", [0.0, 0.7])
def test_intervals_hold_the_truth(r):
    """Of draws of a bivariate normal distribution of correlation r, by Kendall 1949.

    rho = 6 / pi asin(r / 2), tau = 2 / pi asin(r).
    """
    truth, held, runs = (6 / np.pi * np.arcsin(r / 2), 2 / np.pi * np.arcsin(r)), [], 250
    rng = np.random.RandomState(3)
    for i in range(runs):
        x, noise = rng.randn(2, 25)
        y = r * x + np.sqrt(1 - r**2) * noise
        found = rank_agreement({"x": x, "y": y}, resamples=300, seed=i)
        held.append(
            [e.low[0, 1] <= t <= e.high[0, 1] for e, t in zip(found[1:3], truth, strict=True)]
        )
    # Of 95; 250 draws tell that to 1.4.
    assert np.all(np.mean(held, 0) > 0.9) and np.all(np.mean(held, 0) < 0.995)


def test_intervals_shrink_as_cells_are_added():
    """As the root of their number, for a fixed correlation; the mean of six draws."""
    rng, widths = np.random.RandomState(4), []
    for n in (60, 240):
        draws = []
        for x, noise in rng.randn(6, 2, n):
            found = rank_agreement({"x": x, "y": x + noise}, resamples=400)
            draws.append([e.high[0, 1] - e.low[0, 1] for e in found[1:3]])
        widths.append(np.mean(draws, 0))
    ratio = widths[0] / widths[1]
    assert np.all(ratio > 1.6) and np.all(ratio < 2.5)


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"a": CELLS[:3], "b": CELLS[:3]}, r"a: expected values of 4 or more cells.*found \[3\]"),
        ({"a": CELLS, "b": CELLS[:-1]}, r"b: expected values .* the same number for each.*\[11\]"),
        ({"a": CELLS, "b": CELLS[None]}, r"b: expected values .*found \[1, 12\]"),
        ({"a": np.where(CELLS == CELLS[3], np.nan, CELLS)}, "a: expected finite.*nan in cell 3"),
        ({"a": CELLS, "b": np.full(12, 0.5)}, "b: expected values that differ, found 0.5 in every"),
        ({}, "agreement: expected scores, found none"),
    ],
)
def test_what_has_no_order_is_refused(scores, message):
    with pytest.raises(ValueError, match=message) as error:
        rank_agreement(scores)
    assert "\n" not in str(error.value)
