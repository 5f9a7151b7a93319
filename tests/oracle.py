"""What the tests compare with: arrays of the official code, and data whose denoiser is known."""

import functools
import inspect
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import GOLDEN

# The official code's names for our targets and variances.
TARGETS = {"eps": "eps", "xstart": "x0", "xprev": "mu"}
VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}

# file -> the keys that some test compares; filled as the test modules are imported.
COMPARED = defaultdict(set)


@functools.cache
def arrays(file):
    """The arrays of one golden file, by key."""
    # Official TensorFlow 1 code, github.com/hojonathanho/diffusion, commit 1e0dceb.
    with np.load(GOLDEN / f"{file}.npz") as npz:
        return {key: npz[key] for key in npz.files}


class Official:
    """Arrays of the official code: `official[key]` reads, `official.close` compares and notes."""

    def __init__(self, file):
        self.file = arrays(file)
        self.compared = set()

    def __getitem__(self, key):
        return self.file[key]

    def close(self, key, ours, *, rtol=0.0, atol=0.0, at=...):
        """Asserts the same shape and values; `at` restricts the comparison to some entries."""
        ours, theirs = np.asarray(ours), self[key]
        assert ours.shape == theirs.shape, f"{key}: {ours.shape}, official {theirs.shape}"
        np.testing.assert_allclose(ours[at], theirs[at], rtol, atol, err_msg=key)
        self.compared.add(key)


def official(file, *patterns):
    """Gives a test the `Official` arrays of `file` and demands that it compares all of `patterns`.

    The claim is noted in COMPARED when the test is defined and held to when it runs, so that a
    forgotten array shows whatever part of the suite is run.
    """
    keys = {key for key in arrays(file) if any(fnmatchcase(key, p) for p in patterns)}
    COMPARED[file] |= keys

    def decorate(test):
        @functools.wraps(test)
        def run(**fixtures):
            given = Official(file)
            test(given, **fixtures)
            assert given.compared == keys, f"claimed, not compared: {keys ^ given.compared}"

        _, *fixtures = inspect.signature(test).parameters.values()
        run.__signature__ = inspect.Signature(fixtures)
        return run

    return decorate


def toy(x, t, learned=False):
    """The network without parameters that the official vectors were made with; t counts from 0."""
    output = 0.5 * jnp.tanh(x) + 0.1 * jnp.sin(t / 1000).reshape(-1, 1, 1, 1)
    return jnp.concatenate([output, -5 + 0.1 * jnp.cos(x)], -1) if learned else output


def toy_b(x, t, learned=False):
    """The second one: as an x_0 or mu it is near x_t, so the decoder is not in its far tail."""
    output = x - 0.005 * jnp.tanh(x)
    return jnp.concatenate([output, -5 + 0.1 * jnp.cos(x)], -1) if learned else output


def cheap_noise(keys, t, like):
    """In place of `process.noise` where any noise will do: threefry is most of a compilation."""
    phase = 5 * jnp.asarray(t, like.dtype)
    return 1.4 * jnp.cos(phase + jnp.arange(like.size, dtype=like.dtype)).reshape(like.shape)


def side_by_side(predicts):
    """Several models as one, each for its part of the batch: compiling costs more than all else."""

    def predict(x, t):
        n = len(predicts)
        t = jnp.broadcast_to(t, x.shape[:1])
        parts = [f(*xt) for f, *xt in zip(predicts, jnp.split(x, n), jnp.split(t, n), strict=True)]
        shape = parts[0].x_0.shape
        return jax.tree.map(
            lambda *leaves: jnp.concatenate([jnp.broadcast_to(v, shape) for v in leaves]), *parts
        )

    return predict


class Gaussian(NamedTuple):
    """Data N(mean, var) in every pixel, alone: all that a perfect network says is known.

    Nothing here uses the code's posteriors: x_s and x_t are jointly Gaussian, so x_s given x_t
    follows from their two variances and their covariance, for any s < t, s = 0 included.
    """

    mean: float
    var: float

    def marginal(self, p, t):
        """Mean and variance of x_t."""
        a = p.alpha_bar[t]
        return np.sqrt(a) * self.mean, a * self.var + 1 - a

    def given(self, p, s, t):
        """x_s | x_t ~ N(intercept + slope x_t, variance): float64 host numbers (or arrays)."""
        (mean_s, var_s), (mean_t, var_t) = self.marginal(p, s), self.marginal(p, t)
        slope = np.sqrt(p.alpha_bar[t] / p.alpha_bar[s]) * var_s / var_t
        return mean_s - slope * mean_t, slope, var_s - slope**2 * var_t

    def network(self, p, target, learned=True):
        """The perfect network for `target`; with `learned` its second half is the log-variance."""
        t = np.arange(1, p.T + 1)
        a = p.alpha_bar[1:]
        intercept, slope, _ = self.given(p, 0, t)  # of E[x_0 | x_t]
        step = self.given(p, t - 1, t)
        # E[eps | x_t] and E[v | x_t] follow from eq. 4 and from v's definition, both linear.
        lines = {
            "x0": (intercept, slope),
            "mu": step[:2],
            "eps": (-np.sqrt(a / (1 - a)) * intercept, (1 - np.sqrt(a) * slope) / np.sqrt(1 - a)),
            "v": (-intercept / np.sqrt(1 - a), (np.sqrt(a) - slope) / np.sqrt(1 - a)),
        }[target]
        log_var = np.log(step[2]) if learned else 0 * t
        tables = [np.append(0.0, table) for table in (*lines, log_var)]  # no step at t = 0

        def apply(x, model_t):
            t = jnp.round(model_t).astype(int) + 1  # the network is told t - 1
            c_0, c_1, log_var = (
                jnp.asarray(table, x.dtype)[t].reshape(-1, *(1,) * (x.ndim - 1)) for table in tables
            )
            output = c_0 + c_1 * x
            if not learned:
                return output
            return jnp.concatenate([output, jnp.broadcast_to(log_var, x.shape)], -1)

        return apply
