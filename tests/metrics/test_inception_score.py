"""Tests the Inception Score against other programs, closed forms and slices of its logits."""

import numpy as np
import pytest

from diffusion.metrics.inception_score import (
    ClassStats,
    add_class_stats,
    class_distance,
    empty_class_stats,
    inception_score,
    share_unsure,
)
from tests.oracle import official


def class_stats_of(logits, splits=10):
    return add_class_stats(empty_class_stats(logits.shape[1], splits), logits, 0, len(logits))


@official("metrics", "isc.splits*")
def test_score_equals_torch_fidelity(official):
    """Ten splits in order with their population deviation, and one split."""
    logits = official["isc.logits"]
    splits = inception_score(class_stats_of(logits))
    official.close("isc.splits10.mean", splits.mean(), rtol=1e-12)
    official.close("isc.splits10.std", splits.std(), rtol=1e-12)
    official.close("isc.splits1", inception_score(class_stats_of(logits, 1))[0], rtol=1e-12)


@official("inception_math", "is", "is_f32in", "is_1008")
def test_score_of_merged_splits_equals_tfgan(official):
    """The function that the official code calls."""

    def unsplit_score(logits):
        merged = ClassStats(*(x.sum(0, keepdims=True) for x in class_stats_of(logits)))
        return inception_score(merged)[0]

    official.close("is", unsplit_score(official["logits"]), rtol=1e-12)
    official.close("is_f32in", unsplit_score(official["logits"].astype(np.float32)), rtol=1e-6)
    official.close("is_1008", unsplit_score(np.random.RandomState(10).randn(64, 1008)), rtol=1e-12)


@pytest.mark.parametrize(
    "logits, truth",
    [
        (np.zeros((60, 6)), 1),
        (1e4 * np.eye(6)[np.arange(60) % 6], 6),
        (1e4 * np.eye(6)[np.zeros(60, int)], 1),
    ],
    ids=["uniform", "each class surely", "one class only"],
)
def test_score_of_known_classes(logits, truth):
    np.testing.assert_allclose(inception_score(class_stats_of(logits)), truth, rtol=1e-12)
    # A constant changes no probability, and overflows nothing.
    np.testing.assert_allclose(inception_score(class_stats_of(logits + 1e6)), truth, rtol=1e-9)


@pytest.mark.parametrize("n", [10, 17, 99])
def test_splits_are_slices(n):
    """Image r is in the slice [n i // 10, n (i + 1) // 10) of the published code."""
    logits = np.random.RandomState(n).randn(n, 3)
    slices = [logits[n * i // 10 : n * (i + 1) // 10] for i in range(10)]
    each = [inception_score(class_stats_of(part, 1))[0] for part in slices]
    np.testing.assert_allclose(inception_score(class_stats_of(logits)), each, rtol=1e-12)


def test_empty_split_raises():
    with pytest.raises(ValueError, match="an image or more per split of 10, found 7"):
        inception_score(class_stats_of(np.zeros((7, 3))))


def test_share_of_images_of_which_the_classifier_is_unsure():
    """Two classes: the larger probability is 0.9 at a difference of logits of log 9."""
    difference = np.log(9) * np.array([1 - 1e-9, 1 + 1e-9, 0.0, 3.0, -0.5, -1.5])
    logits = np.stack([difference, np.zeros(6)], 1)
    assert share_unsure(class_stats_of(logits)) == 3 / 6
    assert share_unsure(class_stats_of(7 - logits)) == 3 / 6


def test_distance_of_classes_is_the_share_that_has_to_change():
    """Of certain images: 30, 10, 0 against 20, 10, 10 of 40 exchange a quarter."""

    def sure(*counts):
        return class_stats_of(1e4 * np.eye(3)[np.repeat(np.arange(3), counts)])

    np.testing.assert_allclose(class_distance(sure(30, 10, 0), sure(20, 10, 10)), 0.25, rtol=1e-12)
    np.testing.assert_allclose(class_distance(sure(10, 0, 0), sure(0, 5, 5)), 1, rtol=1e-12)
    assert class_distance(sure(30, 10, 0), sure(60, 20, 0)) < 1e-12
