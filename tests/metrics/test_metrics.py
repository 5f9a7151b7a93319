"""The table of metrics: order, invariance, names; what is kept of a set; the Inception Score."""

import numpy as np
import pytest

from diffusion import metrics
from diffusion.metrics import METRICS, Score, applicable_metrics, evaluate, metric_name, rows
from diffusion.metrics.feature_set import (
    FeatureSet,
    add,
    begin,
    collect,
    from_arrays,
    from_stats,
    to_arrays,
    warnings_for,
)
from diffusion.metrics.frechet import finalize, moments_from
from diffusion.metrics.inception_score import (
    add_class_stats,
    empty_class_stats,
    inception_score,
    merge_class_stats,
)
from tests.oracle import official

# These read parts of a set, drawn or in order: another order is another reading.
OF_PARTS = {"kid", "fd_infinity", "is"}


def classes_of(logits, splits=10):
    return add_class_stats(empty_class_stats(logits.shape[1], splits), logits, 0, len(logits))




@official("metrics", "isc.splits*")
def test_official_inception_score(official):
    """torch-fidelity's: ten splits in order, population deviation; and one."""
    logits = official["isc.logits"]
    splits = inception_score(classes_of(logits))
    official.close("isc.splits10.mean", splits.mean(), rtol=1e-12)
    official.close("isc.splits10.std", splits.std(), rtol=1e-12)
    official.close("isc.splits1", inception_score(classes_of(logits, 1))[0], rtol=1e-12)


@official("inception_math", "is", "is_f32in", "is_1008")
def test_official_inception_score_of_all_at_once(official):
    """tfgan's, which the official code calls."""

    def at_once(logits):
        return inception_score(merge_class_stats(classes_of(logits)))[0]

    official.close("is", at_once(official["logits"]), rtol=1e-12)
    official.close("is_f32in", at_once(official["logits"].astype(np.float32)), rtol=1e-6)
    official.close("is_1008", at_once(np.random.RandomState(10).randn(64, 1008)), rtol=1e-12)


def test_inception_score_of_known_classes():
    """Nothing known: 1. Each image surely of one of c classes in turn: c. Of one class only: 1."""
    ask = [
        np.zeros((60, 6)),
        1e4 * np.eye(6)[np.arange(60) % 6],
        1e4 * np.eye(6)[np.zeros(60, int)],
    ]
    for logits, truth in zip(ask, (1, 6, 1), strict=True):
        np.testing.assert_allclose(inception_score(classes_of(logits)), truth, rtol=1e-12)
        # A constant changes no probability, and overflows nothing.
        np.testing.assert_allclose(inception_score(classes_of(logits + 1e6)), truth, rtol=1e-9)


@pytest.mark.parametrize("n", [10, 17, 99])
def test_splits_are_slices(n):
    """Image r is in the slice [n i // 10, n (i + 1) // 10) of the published code."""
    logits = np.random.RandomState(n).randn(n, 3)
    slices = [logits[n * i // 10 : n * (i + 1) // 10] for i in range(10)]
    each = [inception_score(classes_of(part, 1))[0] for part in slices]
    np.testing.assert_allclose(inception_score(classes_of(logits)), each, rtol=1e-12)


def test_a_split_without_images():
    with pytest.raises(ValueError, match="an image or more per split of 10, found 7"):
        inception_score(classes_of(np.zeros((7, 3))))




CENTRES = 4 * np.random.RandomState(9).randn(5, 6)


def logits_of(x):
    """Sure of the class whose centre is near, at a loss where all are alike far."""
    return -((x[:, None] - CENTRES) ** 2).sum(-1) / 20


def real(n, seed):
    """Five groups in six dimensions."""
    draw = np.random.RandomState(seed)
    return CENTRES[draw.randint(5, size=n)] + draw.randn(n, 6)


def sample_of(x, *edges, keep=10_000):
    parts = np.split(np.asarray(x, np.float32), edges)
    return collect(((part, logits_of(part)) for part in parts), len(x), keep)


DATA = real(400, 0)
HALF, OTHER = sample_of(DATA[:200]), sample_of(DATA[200:])
NOISE = sample_of(np.random.RandomState(1).randn(200, 6))


@pytest.mark.parametrize("name", METRICS)
def test_order(name):
    """Half of a set is nearer to the other half than noise is."""
    good, bad = (evaluate(name, generated, OTHER) for generated in (HALF, NOISE))
    assert good.keys() == bad.keys() and good
    for score in good:
        assert isinstance(good[score], Score) and type(good[score].value) is float
        better = good[score].value < bad[score].value
        assert better if METRICS[name].lower else good[score].value > bad[score].value


@pytest.mark.parametrize("name", METRICS)
def test_batches_change_nothing(name):
    for edges in [(1,), (3, 3, 170), range(1, 200)]:
        for score, (value, error) in evaluate(name, sample_of(DATA[:200], *edges), OTHER).items():
            one = evaluate(name, HALF, OTHER)[score]
            np.testing.assert_allclose(value, one.value, rtol=1e-10)
            np.testing.assert_allclose(error or 0, one.error or 0, rtol=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_order_of_images_changes_nothing(name):
    moved = sample_of(DATA[:200][np.random.RandomState(2).permutation(200)])
    for score, (value, error) in evaluate(name, moved, OTHER).items():
        one = evaluate(name, HALF, OTHER)[score]
        tolerance = 4 * np.hypot(error, one.error) if score in OF_PARTS else 0
        np.testing.assert_allclose(value, one.value, rtol=1e-10, atol=tolerance)


@pytest.mark.parametrize("name", METRICS)
def test_a_set_against_itself(name):
    """Nothing is nearer: 0 for distances, up to their errors; all of it is precise and covered."""
    found = evaluate(name, HALF, HALF)
    best = {"fd": 0, "precision": 1, "recall": 1, "density": 1, "coverage": 1}
    for score, value in best.items():
        if score in found:
            np.testing.assert_allclose(found[score].value, value, atol=1e-10)
    if name == "kid":  # two draws of one law would have 0; copies have less
        assert found["kid_full"].value < 0 < found["kid_full"].error


def test_error_of_the_inception_score():
    """The published +- is the population deviation of 10 splits: 3 of these standard errors."""
    logits = logits_of(DATA[:200].astype(np.float32))
    splits = [inception_score(classes_of(part, 1))[0] for part in np.split(logits, 10)]
    score = evaluate("is", HALF)["is"]
    np.testing.assert_allclose(score.value, np.mean(splits), rtol=1e-12)
    np.testing.assert_allclose(3 * score.error, np.std(splits), rtol=1e-12)


def test_published_statistics_serve_as_reference():
    """Of (mu, sigma) alone, as others publish them: what needs no more is the same."""
    mean, cov = finalize(OTHER.stats)
    published = from_stats(moments_from(mean, cov, 200))
    assert applicable_metrics(HALF, published) == ["fd", "fd_infinity", "is"]
    assert applicable_metrics(HALF) == ["is"] and applicable_metrics(published, published) == ["fd"]
    assert applicable_metrics(HALF, OTHER) == list(METRICS)
    for name in ("fd", "fd_infinity"):
        for score, (value, _) in evaluate(name, HALF, published).items():
            np.testing.assert_allclose(value, evaluate(name, HALF, OTHER)[score].value, rtol=1e-9)


def test_what_cannot_be_compared():
    bare = from_stats(OTHER.stats)
    part = add(begin(9, 6), DATA[:8])
    wide = from_stats(moments_from(np.zeros(7), np.eye(7), 9))
    for name, generated, reference, said in [
        ("kid", HALF, bare, "kid: expected features of the reference images, found none kept"),
        ("is", bare, None, "is: expected classes of the generated images, found none kept"),
        ("fd", HALF, None, "fd: expected stats of the reference images, found none kept"),
        ("fd", part, OTHER, "fd: expected all generated images, found 8 of 9; collect the rest"),
        ("fd", HALF, wide, "fd: expected features of one kind, found 6 and 7"),
    ]:
        with pytest.raises(ValueError) as error:
            evaluate(name, generated, reference)
        assert str(error.value) == said




def test_kept_rows_do_not_depend_on_batches():
    x = DATA.astype(np.float32)
    chosen = rows(400, 30)
    assert len(set(chosen)) == 30 and np.all(np.diff(chosen) > 0)
    for edges in [(), (1, 2, 399), (130, 260)]:
        np.testing.assert_array_equal(sample_of(x, *edges, keep=30).features, x[chosen])
    np.testing.assert_array_equal(sample_of(x).features, x)
    assert sample_of(x, keep=0).features.shape == (0, 6)
    assert sample_of(x, keep=30).stats.n == 400


def test_kept_rows_are_spread():
    """Over a sorted set, and over one whose classes come in turn."""
    chosen = rows(50_000, 10_000)
    for part in (chosen // 5000, chosen % 10):
        counts = np.bincount(part)  # of 1000 each, with a deviation of 27
        assert len(counts) == 10 and np.abs(counts - 1000).max() < 5 * 27


@pytest.mark.parametrize("stop", [0, 57, 200])
def test_a_saved_sample_goes_on(tmp_path, stop):
    x = DATA[:200].astype(np.float32)
    sample = begin(200, 6, keep=50, classes=5)
    for part in np.split(x[:stop], 3) if stop % 3 == 0 else [x[:stop]]:
        sample = add(sample, part, logits_of(part))
    np.savez(tmp_path / "sample.npz", **to_arrays(sample))
    with np.load(tmp_path / "sample.npz") as file:
        again = from_arrays(dict(file))
    again = add(again, x[stop:], logits_of(x[stop:]))
    whole = to_arrays(sample_of(x, keep=50))
    for name, value in to_arrays(again).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-10, atol=1e-10)
        assert value.dtype == whole[name].dtype
    assert to_arrays(from_stats(HALF.stats)).keys() == whole.keys() - {
        "classes.n",
        "classes.p",
        "classes.plogp",
    }


def test_what_is_no_saved_sample():
    arrays = to_arrays(HALF)
    with pytest.raises(ValueError, match=r"expected \['features', 'n', 'stats.n'.* found \['mu'\]"):
        from_arrays({"mu": np.zeros(2)})
    with pytest.raises(ValueError, match=r"found \[200, 6\], sum \[6\], outer \[2, 2\]"):
        from_arrays(arrays | {"stats.outer": np.eye(2)})


def test_images_and_logits_are_counted():
    x, z = DATA[:8], logits_of(DATA[:8])
    for n, found in ((7, "8 or more"), (9, "8")):
        with pytest.raises(ValueError, match=f"expected {n} images, found {found}"):
            collect([(x[:4], z[:4]), (x[4:], z[4:])], n)
    with pytest.raises(ValueError, match="expected 3 images, found 0"):
        collect([], 3)
    with pytest.raises(ValueError, match="found n = 0"):
        begin(0, 6)
    with pytest.raises(ValueError, match="logits of 8 images, found none"):
        add(begin(9, 6, classes=5), x)
    with pytest.raises(ValueError, match="logits of 8 images, found 7"):
        add(begin(9, 6, classes=5), x, z[:7])
    with pytest.raises(ValueError, match="logits of none images, found 8"):
        add(begin(9, 6), x, z)


def test_nan_images_are_named():
    x = DATA[:20].astype(np.float32)
    x[[13, 15], 0] = np.nan
    with pytest.raises(ValueError, match="2 of 10 rows with NaN or infinities, the first is 13"):
        sample_of(x, 10)
    with pytest.raises(ValueError, match=r"logits: .* the first is 7"):
        add(
            begin(9, 6, classes=5),
            DATA[:9],
            np.where(np.arange(9)[:, None] == 7, np.inf, 1 + 0 * logits_of(DATA[:9])),
        )


def test_concerns():
    assert warnings_for(HALF) == []
    few = sample_of(DATA[:6])
    assert warnings_for(few) == [
        "6 images for 6 features: the covariance is singular, and the Frechet distance biased"
        " upwards",
        "6 images for 5 classes: the Inception Score is biased downwards",
    ]
    assert warnings_for(few._replace(classes=None)) == warnings_for(few)[:1]


@pytest.mark.parametrize(
    "score, space, n, name",
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
    ],
)
def test_label(score, space, n, name):
    assert metric_name(score, space, n) == name


def test_only_inception_has_a_fid():
    scores = [score for name in METRICS for score in evaluate(name, HALF, OTHER)]
    spaces = ("inception", "spatial", "random", "pixels", "clip")
    names = [metric_name(score, space, n) for score in scores for space in spaces for n in (10, 50_000)]
    assert {name for name in names if name.startswith("fid")} == {"fid", "fid@10", "fid_infinity"}
    assert len(set(names)) == len(scores) * len(spaces) + 2  # fid@10 and sfid@10 are names besides


def test_seam():
    """The names that DESIGN promises of this module."""
    for name in ("Stats", "init", "update", "merge", "finalize", "METRICS"):
        assert hasattr(metrics, name)
    assert FeatureSet._fields[:2] == ("stats", "features")
