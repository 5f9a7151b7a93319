"""Tests classifier-free guidance and dynamic thresholding."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules, targets
from diffusion.samplers.guidance import classifier_free_guidance, dynamic_threshold
from diffusion.targets import TARGETS, VARIANCES
from tests.oracle import Gaussian

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
NULL, LABEL = 3, jnp.array([0, 2, 1])
# Data N(mean, 0.25) for each label, and for none: NULL's.
MEANS = jnp.array([-0.5, 0.1, 0.6, 0.0])
X = random.normal(random.key(0), (3, 2, 2, 1))
T = jnp.array([3, 11, 20])


def network(target):
    """Returns the perfect (x, model_t, label) -> output for the label's data."""

    def apply(x, model_t, label):
        each = [
            Gaussian(float(mean), 0.25).network(SHORT, target, learned=False)(x, model_t)
            for mean in MEANS
        ]
        return jnp.stack(each, 1)[jnp.arange(len(x)), label]

    return apply


def predict(apply, target, clip=False):
    predict = targets.make_predict(
        SHORT, apply, TARGETS[target], VARIANCES["fixed_small"], clip=clip
    )
    return predict(X, T)


@pytest.mark.parametrize("target", TARGETS)
def test_guidance_of_gaussian_data(target):
    """eps is linear in the mean, so guidance is the perfect denoiser of an extrapolated mean."""
    w = jnp.array([0.0, 2.0, -1.0])
    ours = predict(classifier_free_guidance(network(target), LABEL, NULL, w), target)
    shifted = (1 + w) * MEANS[LABEL] - w * MEANS[NULL]
    for i, mean in enumerate(shifted):
        apply = Gaussian(float(mean), 0.25).network(SHORT, target, learned=False)
        theirs = predict(apply, target)
        # Float32, times 1 / weight_0 and sqrt(1 / alpha_bar) of T, some ten each.
        np.testing.assert_allclose(ours.x_0[i], theirs.x_0[i], atol=2e-5)
        np.testing.assert_allclose(ours.eps[i], theirs.eps[i], atol=2e-5)


def test_guidance_comes_before_clipping():
    """The x_0 of the guided eps is clipped once."""
    apply = classifier_free_guidance(network("eps"), LABEL, NULL, 9.0)
    free, clipped = predict(apply, "eps"), predict(apply, "eps", clip=True)
    assert np.abs(free.x_0).max() > 1.5
    np.testing.assert_allclose(clipped.x_0, np.clip(free.x_0, -1, 1), atol=1e-6)


def test_guidance_leaves_the_variance():
    """A learned log-variance is that of the label, here the label's number."""

    def apply(x, model_t, label):
        number = jnp.broadcast_to(label.astype(x.dtype).reshape(-1, 1, 1, 1), x.shape)
        return jnp.concatenate([number * x, -number], -1)

    output = classifier_free_guidance(apply, LABEL, NULL, 4.0)(X, T.astype(X.dtype))
    of, log_var = np.split(np.asarray(output), 2, axis=-1)
    number = np.asarray(LABEL, np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(of, (5 * number - 4 * NULL) * np.asarray(X), rtol=1e-6)
    np.testing.assert_array_equal(log_var, np.broadcast_to(-number, X.shape))


def test_guidance_is_one_evaluation():
    """Of a doubled batch, in which both outputs of an example are neighbours."""
    seen = []

    def apply(x, model_t, label):
        seen.append((x, model_t, label))
        return x

    classifier_free_guidance(apply, LABEL, NULL, 1.0)(X, jnp.array([5.0, 6.0, 7.0]))
    ((x, model_t, label),) = seen
    np.testing.assert_array_equal(x[::2], X)
    np.testing.assert_array_equal(x[1::2], X)
    np.testing.assert_array_equal(model_t, [5, 5, 6, 6, 7, 7])
    np.testing.assert_array_equal(label, [0, 3, 2, 3, 1, 3])


def test_threshold():
    """The quantile of each image's own values, by hand."""
    x_0 = jnp.array([[0.0, -4.0, 2.0, 1.0, 3.0], [0.1, 0.2, -0.3, 0.0, 0.9]]).reshape(2, 5, 1)
    # |x_0| of the first in order: 0, 1, 2, 3, 4, whose quantile 0.75 is 3.
    ours = np.asarray(dynamic_threshold(0.75)(x_0))[:, :, 0]
    np.testing.assert_allclose(ours[0], [0, -1, 2 / 3, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_array_equal(ours[1], x_0[1, :, 0])  # all within [-1, 1]: untouched
    # A maximum below the quantile: clipped there, and no more is divided by.
    ours = np.asarray(dynamic_threshold(0.75, maximum=2.0)(x_0))[:, :, 0]
    np.testing.assert_allclose(ours[0], [0, -1, 1, 0.5, 1], rtol=1e-6)


def test_threshold_in_place_of_clipping():
    """x_0 is within [-1, 1], and eps follows from it; with a maximum of 1 it is clipping."""
    apply = classifier_free_guidance(network("eps"), LABEL, NULL, 9.0)
    free = predict(apply, "eps")
    ours = predict(apply, "eps", clip=dynamic_threshold(0.5))
    assert np.abs(free.x_0).max() > 1.5 and np.abs(ours.x_0).max() <= 1
    np.testing.assert_allclose(ours.x_0, dynamic_threshold(0.5)(free.x_0), atol=1e-6)
    again = process.q_sample(SHORT, ours.x_0, T, ours.eps)
    np.testing.assert_allclose(again, X, atol=1e-5)
    clipped, ours = (
        predict(apply, "eps", clip=True),
        predict(apply, "eps", clip=dynamic_threshold(0.5, 1)),
    )
    np.testing.assert_array_equal(ours.x_0, clipped.x_0)


@pytest.mark.parametrize("options", [(0.0,), (1.1,), (0.9, 0.5)])
def test_threshold_is_checked(options):
    with pytest.raises(ValueError, match="threshold: expected 0 < ratio <= 1 <= maximum"):
        dynamic_threshold(*options)
