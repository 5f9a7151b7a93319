"""What scores rank: images with rising degrees of one defect (ladders.py says how)."""

import jax
import numpy as np
import pytest

from diffusion import metrics
from tests.metrics import ladders


@pytest.fixture(scope="module")
def found():
    """{ladder: {score: float64[1, degrees]}} of 1,000 digits, by distances and fidelity."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        kept = {k: metrics.METRICS[k] for k in ("fd", "density_coverage", "classes")}
        patch.setattr(metrics, "METRICS", kept)
        return ladders.measure_ladders(1000, 1, ("classifier",))


def test_classifier_features_order_every_loss_of_fidelity(found):
    """The higher the degree the higher the distance: Kendall's tau is 1."""
    for ladder in (*ladders.FIDELITY, "solver"):
        scores = found[ladder]["fd_classifier"][0]
        assert ladders.kendall_tau(scores) == 1, f"{ladder}: {scores}"


def test_classifier_features_order_every_loss_of_modes(found):
    for ladder in ladders.COVERAGE:
        for score in ("fd_classifier", "coverage_classifier"):
            scores = found[ladder][score][0]
            assert ladders.kendall_tau(scores) == 1, f"{ladder}: {score} {scores}"
    assert ladders.kendall_tau(found["dropped"]["class_distance"][0]) == 1


def test_exact_denoiser_draws_its_mixture():
    """In many steps the samples are the mixture's components with its deviation."""
    centres = ladders.load_digits().reference[:50]
    x = ladders.exact_samples(centres, 200, 200, 0).reshape(200, 1, -1).astype(float)
    nearest = np.abs(x - centres.reshape(1, 50, -1)).mean(-1).min(-1)
    # The mean of |N(0, std)| is 0.8 std; half of it is left of pixels that are black or white.
    deviation = 0.8 * ladders.SOLVER_STD * 127.5
    assert 0.25 * deviation < nearest.min() and nearest.max() < 1.5 * deviation
