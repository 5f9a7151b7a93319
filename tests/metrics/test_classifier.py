"""classifier: learns what can be learnt, says how much, and is a function of its arguments."""

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.metrics import classifier

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax multiplies its int32 step counter with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def quick(monkeypatch):
    """Sixty small steps instead of all."""
    monkeypatch.setattr(classifier, "STEPS", 60)
    monkeypatch.setattr(classifier, "BATCH_SIZE", 32)


def bars(n, size, channels):
    """Images with a bright bar along rows (class 0) or columns (class 1), in noise."""
    label = RNG.integers(0, 2, n)
    image = RNG.integers(0, 100, (n, size, size, channels)).astype(np.uint8)
    for x, k, at in zip(image, label, RNG.integers(0, size, n), strict=True):
        x[(at, slice(None)) if k == 0 else (slice(None), at)] = 255
    return image, label


@pytest.mark.parametrize("size, channels", [(4, 1), (9, 3), (34, 1)])
def test_learns_classes_that_no_pixel_tells(quick, size, channels):
    image, label = bars(400, size, channels)
    done = []
    found = classifier.train(image, label, 2, on_step=done.append)
    assert found.held_out == 40 and found.accuracy >= 0.9
    assert done == list(range(1, 61))
    new, new_label = bars(200, size, channels)
    features, logits = jax.jit(classifier.apply)(found.params, new)
    assert features.shape == (200, 64) and logits.shape == (200, 2)
    assert (logits.argmax(1) == new_label).mean() >= 0.9


def test_says_how_few_labels_it_gets_right_where_they_mean_nothing(quick):
    """Labels at random: a quarter of them, within the error of 60 draws."""
    image, label = bars(600, 8, 1)[0], RNG.integers(0, 4, 600)
    accuracy = classifier.train(image, label, 4).accuracy
    assert abs(accuracy - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 60)


def test_depends_on_its_arguments_alone(quick, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 5)
    image, label = bars(300, 8, 1)
    first, same = (classifier.train(image, label, 2).params for _ in range(2))
    other = classifier.train(image, label, 2, seed=1).params
    for name in first:
        np.testing.assert_array_equal(first[name], same[name])
    assert any((first[name] != other[name]).any() for name in first)


def test_knows_the_test_digits():
    """Of the 296 digits that it has not seen, the judge of another program knew 98.6 %."""
    train, test = (data.digits(split) for split in ("train", "test"))
    found = classifier.train(*train.read(range(train.n)), 10)
    image, label = test.read(range(test.n))
    right = jax.jit(classifier.apply)(found.params, image)[1].argmax(1) == label
    assert right.mean() >= 0.97 and found.accuracy >= 0.96


def test_what_cannot_be_learnt_raises():
    for shape, classes in (((40, 3, 8, 1), 2), ((40, 8, 8, 1), 1)):
        with pytest.raises(ValueError, match="expected 4x4 or more and 2 classes or more"):
            classifier.train(np.zeros(shape, np.uint8), np.zeros(40, int), classes)
    with pytest.raises(ValueError, match="expected 20 images or more, found 19"):
        classifier.train(np.zeros((19, 8, 8, 1), np.uint8), np.zeros(19, int), 2)
