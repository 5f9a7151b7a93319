"""Contract tests over METRICS: order, invariance, errors and names of all scores."""

import numpy as np
import pytest

from diffusion.metrics import (
    CLASSIFIER_SCORES,
    METRICS,
    Score,
    applicable_metrics,
    evaluate,
    metric_name,
)
from diffusion.metrics.feature_set import add, begin, from_stats
from diffusion.metrics.frechet import finalize, moments_from
from tests.metrics.feature_sets import collect_split, draw_features, logits_of
from tests.metrics.test_inception_score import class_stats_of, inception_score

# Random subsets and slices of a set: another order of the images gives another estimate.
ORDER_DEPENDENT = {"kid", "fd_infinity", "is"}

X = draw_features(400, 0)
HALF, OTHER = collect_split(X[:200]), collect_split(X[200:])
NOISE = collect_split(np.random.RandomState(1).randn(200, 6))


@pytest.fixture(scope="module")
def half_scores():
    """{name of a metric: scores of one half against the other}."""
    return {name: evaluate(name, HALF, OTHER) for name in METRICS}


@pytest.mark.parametrize("name", METRICS)
def test_half_of_a_set_scores_better_than_noise(name, half_scores):
    good, bad = half_scores[name], evaluate(name, NOISE, OTHER)
    assert good.keys() == bad.keys() and good
    for score in good:
        assert isinstance(good[score], Score) and type(good[score].value) is float
        better = good[score].value < bad[score].value
        assert better if METRICS[name].lower else good[score].value > bad[score].value


@pytest.mark.parametrize("name", METRICS)
def test_batches_change_nothing(name, half_scores):
    for edges in [(1,), (3, 3, 170), range(1, 200)]:
        for score, (value, error) in evaluate(name, collect_split(X[:200], *edges), OTHER).items():
            expected = half_scores[name][score]
            np.testing.assert_allclose(value, expected.value, rtol=1e-10)
            np.testing.assert_allclose(error or 0, expected.error or 0, rtol=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_order_of_images_changes_nothing(name, half_scores):
    shuffled = collect_split(X[:200][np.random.RandomState(2).permutation(200)])
    for score, (value, error) in evaluate(name, shuffled, OTHER).items():
        expected = half_scores[name][score]
        tolerance = 4 * np.hypot(error, expected.error) if score in ORDER_DEPENDENT else 0
        np.testing.assert_allclose(value, expected.value, rtol=1e-10, atol=tolerance)


@pytest.mark.parametrize("name", METRICS)
def test_set_against_itself_scores_best(name):
    found = evaluate(name, HALF, HALF)
    best = {"fd": 0, "precision": 1, "recall": 1, "density": 1, "coverage": 1}
    for score, value in best.items():
        if score in found:
            np.testing.assert_allclose(found[score].value, value, atol=1e-10)
    if name in ("kid", "mmd"):  # two draws of one distribution would have 0; copies have less
        full = found.get("kid_full") or found["mmd"]
        assert full.value < 0 < full.error


def test_error_of_the_inception_score(half_scores):
    """The published +- is the population deviation of 10 splits: 3 of these standard errors."""
    logits = logits_of(X[:200].astype(np.float32))
    splits = [inception_score(class_stats_of(part, 1))[0] for part in np.split(logits, 10)]
    score = half_scores["is"]["is"]
    np.testing.assert_allclose(score.value, np.mean(splits), rtol=1e-12)
    np.testing.assert_allclose(3 * score.error, np.std(splits), rtol=1e-12)


def test_error_of_the_distance_is_that_of_all_images():
    """It is estimated from the kept rows, whose own error would be sqrt(8) times as large."""
    sets = [draw_features(800, 10 + i) for i in range(12)]
    all_kept, few_kept = (
        np.mean([evaluate("fd", collect_split(x, keep=keep), OTHER)["fd"].error for x in sets])
        for keep in (800, 100)
    )
    assert 0.5 < few_kept / all_kept < 1.8


def test_published_statistics_serve_as_reference(half_scores):
    """A reference of (mu, sigma) alone gives the same distances."""
    mean, cov = finalize(OTHER.stats)
    published = from_stats(moments_from(mean, cov, 200))
    assert applicable_metrics(HALF, published) == ["fd", "fd_infinity", "is"]
    assert applicable_metrics(HALF) == ["is"] and applicable_metrics(published, published) == ["fd"]
    assert applicable_metrics(HALF, OTHER, "classifier") == list(METRICS)
    assert {*METRICS} - {*applicable_metrics(HALF, OTHER, "inception")} == {"classes"}
    for name in ("fd", "fd_infinity"):
        for score, (value, _) in evaluate(name, HALF, published).items():
            np.testing.assert_allclose(value, half_scores[name][score].value, rtol=1e-9)


def test_kid_says_what_it_is_computed_from():
    """100 subsets of 1,000 are torch-fidelity's defaults; it refuses sets of fewer."""

    def about(m, n):
        sets = (HALF._replace(features=np.zeros((size, 6))) for size in (m, n))
        return METRICS["kid"].about(*sets)

    assert about(10_000, 1001) == "100 random subsets of 1,000 images"
    fewer = "(torch-fidelity's with --kid-subset-size=200)"
    assert about(1000, 200) == f"100 random subsets of 200 images {fewer}"
    assert about(200, 200) == f"all 200 images {fewer}"


def test_mmd_is_as_wide_as_the_median_of_the_reference():
    """In any unit of the features, so the score has none; and not of the generated ones."""
    score = evaluate("mmd", HALF, OTHER)["mmd"]
    scaled = [each._replace(features=100 * each.features) for each in (HALF, OTHER)]
    np.testing.assert_allclose(evaluate("mmd", *scaled)["mmd"], score, rtol=1e-5)
    far = HALF._replace(features=HALF.features + np.float32(1e4))
    # Far apart, the sets' own sums remain, of which the reference's has this bandwidth.
    own = OTHER.features.astype(np.float64)
    squares = np.square(own[:, None] - own).sum(-1)[~np.eye(len(own), dtype=bool)]
    within = [np.square(x[:, None] - x).sum(-1) for x in (HALF.features.astype(np.float64), own)]
    kernels = [np.exp(-w[~np.eye(len(w), dtype=bool)] / (2 * np.median(squares))) for w in within]
    expected = sum(kernel.mean() for kernel in kernels)
    np.testing.assert_allclose(evaluate("mmd", far, OTHER)["mmd"].value, expected, rtol=1e-4)


MOMENTS_ONLY = from_stats(OTHER.stats)
INCOMPLETE = add(begin(9, 6, 9), X[:8])
SEVEN_FEATURES = from_stats(moments_from(np.zeros(7), np.eye(7), 9))


@pytest.mark.parametrize(
    "name, generated, reference, message",
    [
        ("kid", HALF, MOMENTS_ONLY, "expected features of the reference images, found none kept"),
        ("is", MOMENTS_ONLY, None, "expected classes of the generated images, found none kept"),
        ("fd", HALF, None, "expected stats of the reference images, found none kept"),
        ("fd", INCOMPLETE, OTHER, "expected all generated images, found 8 of 9; add the rest"),
        ("fd", HALF, SEVEN_FEATURES, "expected features of one kind, found 6 and 7"),
    ],
)
def test_incomparable_sets_raise(name, generated, reference, message):
    with pytest.raises(ValueError) as error:
        evaluate(name, generated, reference)
    assert str(error.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    "score, kind, n, name",
    [
        ("fd", "inception", 50_000, "fid"),
        ("fd", "inception", 60_000, "fid"),
        ("fd", "inception", 49_999, "fid@49999"),
        ("fd", "spatial", 50_000, "sfid"),
        ("fd", "spatial", 300, "sfid@300"),
        ("fd_infinity", "inception", 5000, "fid_infinity"),
        ("fd_infinity", "spatial", 5000, "sfid_infinity"),
        ("is", "inception", 5000, "is"),
        ("kid", "inception", 5000, "kid"),
        ("fd", "random", 5000, "fd_random"),
        ("fd", "pixels", 50_000, "fd_pixels"),
        ("fd_infinity", "random", 50_000, "fd_infinity_random"),
        ("kid_full", "pixels", 10, "kid_full_pixels"),
        ("precision", "spatial", 10, "precision_spatial"),
        ("fd", "dinov2_l14", 50_000, "fd_dinov2_l14"),
        ("fd", "dinov2_l14", 5000, "fd_dinov2_l14@5000"),
        ("fd", "dinov2_b14", 5000, "fd_dinov2_b14@5000"),
        ("fd_infinity", "dinov2_b14", 5000, "fd_infinity_dinov2_b14"),
        ("mmd", "inception", 10, "mmd"),
        ("mmd", "dinov2_l14", 10, "mmd_dinov2_l14"),
    ],
)
def test_metric_name(score, kind, n, name):
    assert metric_name(score, kind, n) == name


def test_only_inception_features_have_a_fid(half_scores):
    scores = [k for name, found in half_scores.items() for k in found if name != "classes"]
    for score in CLASSIFIER_SCORES:
        assert metric_name(score, "classifier", 9) == score and score in half_scores["classes"]
    kinds = ("inception", "spatial", "random", "pixels", "clip")
    names = [
        metric_name(score, kind, n) for score in scores for kind in kinds for n in (10, 50_000)
    ]
    assert {name for name in names if name.startswith("fid")} == {"fid", "fid@10", "fid_infinity"}
    assert len(set(names)) == len(scores) * len(kinds) + 2  # fid@10 and sfid@10 come on top
