"""Analytic-DPM: the optimal reverse variances of a trained network, measured on training images.

Bao et al. 2022 (arXiv:2201.06503). One pass measures how well the network predicts x_0 at every t.
This gives the variances with the least bound, for steps of any length, and the bound that any grid
of timesteps would have.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion import process, targets
from diffusion.likelihood import decoder_log_likelihood, meanflat
from diffusion.process import Process, broadcast_right, example_keys, gather
from diffusion.samplers.ancestral import check_eta, ddim_coefficients, ddim_mean
from diffusion.samplers.base import Sampler, SamplerState, init_state
from diffusion.targets import Predict, Variance

# Ratios of 2^(1/8) cost at most ln(2)^2 / 16^2 nats = 0.0027 bits/dim against the best decoder, as
# E[-log N] has the second derivative 2 in log sigma at its minimum.
DECODER_STDS = 2.0 ** (np.arange(-80, 1) / 8)


def decoder_stds(p: Process) -> np.ndarray:
    """Returns the decoder's candidate standard deviations, the last that of fixed variances."""
    return np.append(DECODER_STDS, np.exp(0.5 * targets.posterior_log_var(p, 1)))


class TimestepErrors(NamedTuple):
    """Measurements of each image at each t of the trained chain, in column t - 1."""

    mse: Array  # [b, T], mean squared error of the x_0 predicted from x_t, on [-1, 1]
    decoder: Array  # [b, T, 82], -log2 p(x_0 | x_t) in bits/dim for each of `decoder_stds`


def timestep_errors(
    p: Process,
    predict: Predict,
    key: Array,
    x_0: Array,
    ts: Array | None = None,
    levels: int = 256,
) -> TimestepErrors:
    """Measures one draw of x_t for each t, the draws of `likelihood.vlb_terms` for the same key.

    ts: int[k], the times of the columns; None: 1..T. levels: of x_0, see data.augment.scale.
    """
    keys = example_keys(key, x_0.shape[0])
    log_stds = jnp.asarray(np.log(decoder_stds(p)), x_0.dtype)

    def measure(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        x_t = process.q_sample(p, x_0, t_b, process.sample_noise(keys, t, x_0))
        prediction = predict(x_t, t_b)
        mean, _ = targets.p_mean_log_variance(p, prediction, x_t, 0, t_b)

        def bits(log_std):
            nats = -decoder_log_likelihood(x_0, mean, log_std, levels).reshape(len(x_0), -1)
            # A dot product, since XLA does not vectorise tanh inside of a reduction on CPUs.
            weights = jnp.full(nats.shape[1], 1 / nats.shape[1] / np.log(2), nats.dtype)
            return jnp.dot(nats, weights, precision="highest")

        mse = meanflat((prediction.x_0 - x_0) ** 2)
        return None, TimestepErrors(mse, lax.map(bits, log_stds).T)

    _, out = lax.scan(measure, None, jnp.arange(1, p.T + 1) if ts is None else ts)
    return TimestepErrors(out.mse.T, out.decoder.swapaxes(0, 1))


class OptimalVariance(NamedTuple):
    """The variances of least bound for each t of the trained chain, float64[T+1], 0 at t = 0."""

    x0_variance: np.ndarray  # E||x_0 - x^_0||^2 / d, the optimal Var[x_0 | x_t]
    decoder: np.ndarray  # the variance of p(x_0 | x_t), the square of the best of `decoder_stds`
    decoder_bits: np.ndarray  # E[-log2 p(x_0 | x_t)] in bits/dim


def optimal_variance(p: Process, batches: Iterable[TimestepErrors]) -> OptimalVariance:
    """Computes the optimal variances for all images of the batches.

    For one variance sigma^2 of all pixels and images, a step t -> s > 0 costs, in nats/dim,

        E KL = 0.5 (log(sigma^2 / beta~) + (beta~ + weight_0^2 E||x_0 - x^_0||^2 / d) / sigma^2 - 1)

    which is least at sigma^2 = beta~ + weight_0^2 E||x_0 - x^_0||^2 / d. The estimate of Bao et
    al., (1 - alpha_bar) / alpha_bar (1 - E||eps^||^2 / d), supposes a perfect network without
    clipping; this one is optimal for the imperfect mean (Bao et al. 2022, arXiv:2206.07309), except
    for a clipped mu-network, whose single steps do not use x_0.
    """
    n, mse, decoder = 0, 0.0, 0.0
    for batch in batches:
        n += len(batch.mse)
        mse = mse + np.asarray(batch.mse, np.float64).sum(0)
        decoder = decoder + np.asarray(batch.decoder, np.float64).sum(0)
    best = decoder.argmin(1)
    tables = mse / n, decoder_stds(p)[best] ** 2, decoder.min(1) / n
    return OptimalVariance(*(np.append(0.0, table) for table in tables))


def step_costs(p: Process, optimum: OptimalVariance) -> np.ndarray:
    """Returns costs[s, t], the optimal bound's term of a step t -> s in bits/dim; inf unless s < t.

    For s > 0 this is 0.5 log2(sigma^2 / beta~), where weight_0^2 / beta~ = SNR(s) - SNR(t) with
    SNR = alpha_bar / (1 - alpha_bar) (Kingma et al. 2021, arXiv:2107.00630).
    """
    costs = np.full((p.T + 1, p.T + 1), np.inf)
    costs[0, 1:] = optimum.decoder_bits[1:]
    snr = p.alpha_bar[1:] / (1 - p.alpha_bar[1:])
    s, t = np.triu_indices(p.T, 1)
    costs[s + 1, t + 1] = 0.5 * np.log2(1 + (snr[s] - snr[t]) * optimum.x0_variance[t + 1])
    return costs


def analytic_variance(x0_variance: np.ndarray, decoder: np.ndarray | None = None) -> Variance:
    """Builds the Variance beta~ + weight_0^2 x0_variance[t] (Thm. 1), for all respaced chains.

    Args:
        x0_variance: float64[T+1], of the trained chain; entry 0 is not read.
        decoder: float64[T+1], the variance of p(x_0 | x_t) for a chain with t as its first time;
            entry 0 is not read. None: that of the fixed variances.
    """
    x0_variance = np.asarray(x0_variance, np.float64)
    decoder = None if decoder is None else np.asarray(decoder, np.float64)
    for table in (x0_variance, x0_variance if decoder is None else decoder):
        if table.ndim != 1 or table.shape != x0_variance.shape or not np.all(table[1:] >= 0):
            raise ValueError(f"analytic: expected T + 1 numbers, none below 0; found {table}")

    def trained_times(p: Process) -> np.ndarray:
        times = np.round(p.model_t).astype(int) + 1
        if times[-1] >= len(x0_variance):
            found = f"found {len(x0_variance)}"
            raise ValueError(f"analytic: expected variances for t = 0..{times[-1]}, {found}")
        return times

    def log_var(p: Process, extra: Array | None, t: Array) -> Array:
        steps, times = np.arange(1, p.T + 1), trained_times(p)[1:]
        c = process.posterior(p, steps - 1, steps)
        variance = c.variance + c.weight_0**2 * x0_variance[times]
        first = None if decoder is None else decoder[times[0]]
        return targets.clipped_log_var(p, variance, t, first)

    def x0_variance_of(p: Process, log_var: Array, t: Array) -> Array:
        return broadcast_right(gather(x0_variance[trained_times(p)], t), log_var)

    return Variance(1, log_var, x0_variance_of)


def analytic_ddim(p: Process, eta: float = 0.0) -> Sampler:
    """Builds Analytic-DDIM: DDIM with the variance that is optimal for the model's x0_variance.

    It is `ddim` for an x0_variance of 0 (fixed_small). The last step draws no noise.
    """
    check_eta(eta)

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        prediction = predict(state.x, t)
        a, b, variance = ddim_coefficients(p, t, s, eta)
        # x_0 occurs in eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t) as well.
        weight = a - b * jnp.sqrt(gather(p.alpha_bar, t) / process.beta_between(p, 0, t))
        variance = broadcast_right(variance, state.x)
        variance = variance + broadcast_right(weight**2, state.x) * prediction.x0_variance
        z = jnp.sqrt(variance) * process.sample_noise(keys, t, state.x)
        return SamplerState(ddim_mean(prediction, a, b) + jnp.where(s > 0, z, 0), prediction.x_0)

    return Sampler(init_state, step)
