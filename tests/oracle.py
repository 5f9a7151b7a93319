"""Truths for the tests: arrays of the official code, and data whose denoiser is known."""

import functools
import inspect
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import process, targets
from diffusion.samplers import base
from tests.conftest import GOLDEN

# The official code's names of targets and variances.
TARGETS = {"eps": "eps", "xstart": "x0", "xprev": "mu"}
VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}

# file -> the keys that some test compares; filled as the test modules are imported.
COMPARED = defaultdict(set)


@functools.cache
def arrays(file):
    """Returns the arrays of one golden file, by key."""
    # Official TensorFlow 1 code, github.com/hojonathanho/diffusion, commit 1e0dceb, if a test says
    # nothing else.
    with np.load(GOLDEN / f"{file}.npz") as npz:
        return {key: npz[key] for key in npz.files}


class Official:
    """Arrays of the official code: `official[key]` reads one, `official.close` compares it."""

    def __init__(self, file):
        self.file = arrays(file)
        self.compared = set()

    def __getitem__(self, key):
        return self.file[key]

    def close(self, key, ours, *, rtol=0.0, atol=0.0, at=..., of_largest=False):
        """Asserts the same shape and values; `at` restricts the comparison to some entries.

        of_largest: differences are measured by the largest entry of each example.
        """
        ours, theirs = np.asarray(ours), self[key]
        assert ours.shape == theirs.shape, f"{key}: {ours.shape}, official {theirs.shape}"
        if of_largest:
            largest = np.abs(theirs).max(tuple(range(1, theirs.ndim)), keepdims=True)
            ours, theirs = ours / largest, theirs / largest
        np.testing.assert_allclose(ours[at], theirs[at], rtol, atol, err_msg=key)
        self.compared.add(key)


def official(file, *patterns):
    """Passes the `Official` arrays of `file` to a test, which must compare all of `patterns`.

    The keys are registered in COMPARED when the test is defined and checked when it has run, so
    that a forgotten array is found whichever part of the suite is run.
    """
    keys = {key for key in arrays(file) if any(fnmatchcase(key, p) for p in patterns)}
    COMPARED[file] |= keys

    def decorate(test):
        @functools.wraps(test)
        def run(**fixtures):
            given = Official(file)
            test(given, **fixtures)
            assert given.compared == keys, f"registered, not compared: {keys ^ given.compared}"

        _, *fixtures = inspect.signature(test).parameters.values()
        run.__signature__ = inspect.Signature(fixtures)
        return run

    return decorate


def toy(x, t, learned=False):
    """The network without parameters behind the official arrays; t counts from 0."""
    output = 0.5 * jnp.tanh(x) + 0.1 * jnp.sin(t / 1000).reshape(-1, 1, 1, 1)
    return jnp.concatenate([output, -5 + 0.1 * jnp.cos(x)], -1) if learned else output


def toy_b(x, t, learned=False):
    """The second one: as an x_0 or mu it is near x_t, so the decoder is not in its far tail."""
    output = x - 0.005 * jnp.tanh(x)
    return jnp.concatenate([output, -5 + 0.1 * jnp.cos(x)], -1) if learned else output


def official_predict(p, m, v, clip=True, network=toy):
    """Returns the model of the official names: mean type m, variance type v."""
    return targets.make_predict(
        p,
        lambda x, t: network(x, t, v == "learned"),
        targets.TARGETS[TARGETS[m]],
        targets.VARIANCES[VARIANCES[v]],
        clip=bool(clip),
    )


def network(x, t, outputs):
    """Some function of x and t, and a log-variance if outputs is 2."""
    output = 0.8 * jnp.tanh(x) + 0.1 * jnp.cos(t).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.concatenate([output, 0.5 * jnp.sin(x) - 3][:outputs], -1)


def poor_denoiser(x, t):
    """A denoiser that is biased, nonlinear and dependent on t."""
    return 0.6 * jnp.tanh(x) + 0.2 + 0.1 * jnp.sin(t).reshape(-1, 1, 1, 1)


def images():
    """Returns images [24, 6, 6, 1] on the 256 levels."""
    x = jax.random.normal(jax.random.key(0), (24, 6, 6, 1))
    x = jnp.clip(0.3 * x + jax.random.normal(jax.random.key(1), (24, 1, 1, 1)), -1, 1)
    return jnp.round((x + 1) * 127.5) / 127.5 - 1


def column(x):
    """Returns x [b] as [b, 1, 1, 1]."""
    return jnp.asarray(x).reshape(-1, 1, 1, 1)


def path_cost(costs, ts):
    """Returns the sum of the costs[s, t] of the steps of a grid."""
    return float(costs[ts[1:], ts[:-1]].sum())


def cheap_noise(keys, t, like):
    """Replaces `process.sample_noise` where any noise will do: threefry is slow to compile."""
    phase = 5 * jnp.asarray(t, like.dtype)
    return 1.4 * jnp.cos(phase + jnp.arange(like.size, dtype=like.dtype)).reshape(like.shape)


def side_by_side(predicts):
    """Joins models into one, each for its part of the batch, so that one program runs them all."""

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
    """Data N(mean, var), independent in every pixel, whose perfect network is known.

    The closed forms do not use the code's posteriors: x_s and x_t are jointly Gaussian, so x_s
    given x_t follows from their variances and covariance, for any s < t, s = 0 included.
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
        """The perfect network for `target`; with `learned` its second half is the log-variance.

        learned="range": its position between the bounds, from eq. 15 of arXiv:2102.09672 itself.
        """
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
        }
        # Karras et al. 2022 (arXiv:2206.00364), Table 1; the network is given c_in x_t / sqrt(a).
        level, s = np.sqrt((1 - a) / a), 0.5
        c_in, c_skip = (level**2 + s**2) ** -0.5, s**2 / (level**2 + s**2)
        c_out = level * s * c_in
        lines["edm"] = intercept / c_out, (slope * np.sqrt(a) - c_skip) / c_out / c_in
        # Any other target is linear in x_0 and eps too, so its mean is the target of their means.
        means = *lines.get(target, lines["x0"]), *lines["eps"]
        log_var = np.log(step[2]) if learned else 0 * t
        if learned == "range":
            lower, beta = np.log((1 - a[:-1]) / (1 - a[1:])), np.log(1 - a / p.alpha_bar[:-1])
            lower = lower + beta[1:]
            lower = np.append(lower[:1], lower)  # at t = 1 that of t = 2
            log_var = 2 * (log_var - lower) / (beta - lower) - 1
        tables = [np.append(0.0, table) for table in (*means, log_var)]

        def apply(x, model_t):
            t = jnp.round(model_t).astype(int) + 1  # the network is told t - 1
            c_0, c_1, e_0, e_1, log_var = (
                jnp.asarray(table, x.dtype)[t].reshape(-1, *(1,) * (x.ndim - 1)) for table in tables
            )
            output = c_0 + c_1 * x
            if target not in lines:
                output = targets.TARGETS[target].from_x0(p, output, e_0 + e_1 * x, x, t)
            if not learned:
                return output
            return jnp.concatenate([output, jnp.broadcast_to(log_var, x.shape)], -1)

        return apply

    def consistency_predict(self, p):
        """The map along the ODE to its end, which is linear: x_T's quantiles become x_0's."""
        mean, var = (np.asarray(v) for v in self.marginal(p, np.arange(p.T + 1)))

        def predict(x, t):
            t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
            shift, scale = (
                jnp.asarray(table, x.dtype)[t].reshape(-1, *(1,) * (x.ndim - 1))
                for table in (mean, np.sqrt(self.var / var))
            )
            x_0, nothing = self.mean + scale * (x - shift), jnp.zeros_like(shift)
            return targets.Prediction(x_0, targets.eps_from_x0(p, x_0, x, t), nothing, nothing)

        return predict

    def predict(self, p, target="eps", variance="learned"):
        """The perfect model, not clipped."""
        chosen = targets.VARIANCES[variance]
        learned = "range" if chosen.is_range else chosen.outputs == 2
        apply = self.network(p, target, learned)
        return targets.make_predict(p, apply, targets.TARGETS[target], chosen, clip=False)


def check_marginals(sampler, predict, known, p, ts, monkeypatch):
    """Asserts that each x_s of the chain has q(x_s)'s mean and variance, for a perfect model.

    The chain is linear in x_T and in the noise of each step, so its mean is the chain without noise
    and its variance the sum of the squared derivatives: no draws, no standard errors.
    """

    def chain(x_T, z):
        monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: z[t].reshape(like.shape))
        x_T = x_T.reshape(1, 1)
        return base.trajectory(sampler, predict, jax.random.key(0), x_T, np.array(ts)).x[:, 0, 0]

    mean_T, var_T = known.marginal(p, p.T)

    @jax.jit
    def moments(x_T, z):
        by_x, by_z = jax.jacfwd(chain, (0, 1))(x_T, z)
        return chain(x_T, z), by_x**2 * var_T + (by_z**2).sum(1)

    mean, var = moments(jnp.asarray(mean_T), jnp.zeros(p.T + 1))
    mean_s, var_s = known.marginal(p, np.array(ts[1:]))
    # The last step draws no noise: x_0 is the conditional mean, without Var[x_0 | x_t].
    var_s[-1] -= known.given(p, 0, ts[-2])[2]
    # Float64; x0_variance comes out of log_var with an amplification of up to 2e3.
    np.testing.assert_allclose(mean, mean_s, atol=1e-11)
    np.testing.assert_allclose(var, var_s, atol=1e-11)
