"""Better bounds from the same weights, and cheaper readings of them; nothing is trained.

One pass over some training images measures, at every t, how well x_0 is known. From that follow the
variance that makes every term least (Bao et al. 2022, arXiv 2201.06503) and, since the terms of all
longer steps follow as well, the best K times to visit (Watson et al. 2021, arXiv 2106.03802). The
last part reads the whole bound at some of the times only, without bias, for use during training.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion.likelihood import decoder_log_likelihood, meanflat, prior_bits, vlb_term
from diffusion.process import (
    Process,
    beta_between,
    broadcast_right,
    example_keys,
    gather,
    posterior,
    q_sample,
    sample_noise,
)
from diffusion.samplers.ancestral import check_eta, ddim_coefficients, ddim_mean
from diffusion.samplers.base import Sampler, SamplerState, initial_state
from diffusion.targets import (
    Predict,
    Variance,
    _log_table,
    implied_var_0,
    p_mean_log_variance,
    posterior_log_var,
)

# Standard deviations that are tried for the decoder, on the [-1, 1] scale: from an eighth of a
# level's width, which holds such a Gaussian whole, to half the range, in ratios of 2^(1/8). The
# best of them is at most ln(2)^2 / 16^2 nats = 0.0027 bits/dim from the best of all, where levels
# are fine: E[-log N] has the second derivative 2 in log sigma at its minimum.
LADDER = 2.0 ** (np.arange(-80, 1) / 8)


def decoder_scales(p: Process) -> np.ndarray:
    """The standard deviations tried: LADDER, and last that of the fixed variances at t = 1."""
    return np.append(LADDER, np.exp(0.5 * posterior_log_var(p, 1)))


class TimestepErrors(NamedTuple):
    """What one pass says of each image, on the trained chain of T steps.

    mse:     [b, T], column t - 1: squared error of the x_0 predicted from x_t, [-1, 1] scale.
    decoder: [b, T, 82], column t - 1: -log2 p(x_0 | x_t) in bits/dim for a chain whose first step
             is from t, with each of `decoder_scales`.
    """

    mse: Array
    decoder: Array


def timestep_errors(p: Process, predict: Predict, key: Array, x_0: Array) -> TimestepErrors:
    """Reads errors and decoders at a fresh x_t for each t: T network evaluations.

    key: one key, or one per example [b]; x_0: [b, ...] on the levels k/127.5 - 1. The draws are
    those that `likelihood.terms` makes of the same key.
    """
    keys = example_keys(key, x_0.shape[0])
    log_scales = jnp.asarray(np.log(decoder_scales(p)), x_0.dtype)

    def one(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        x_t = q_sample(p, x_0, t_b, sample_noise(keys, t, x_0))
        prediction = predict(x_t, t_b)
        mean, _ = p_mean_log_variance(p, prediction, x_t, 0, t_b)

        def bits(log_scale):
            nats = -decoder_log_likelihood(x_0, mean, log_scale).reshape(len(x_0), -1)
            # The mean as a product: XLA on a processor computes the masses many at a time for it,
            # but one by one, ten times slower, inside of a reduction.
            weights = jnp.full(nats.shape[1], 1 / nats.shape[1] / np.log(2), nats.dtype)
            return jnp.dot(nats, weights, precision="highest")

        mse = meanflat((prediction.x_0 - x_0) ** 2)
        return None, TimestepErrors(mse, lax.map(bits, log_scales).T)

    _, out = lax.scan(one, None, jnp.arange(1, p.T + 1))
    return TimestepErrors(out.mse.T, out.decoder.swapaxes(0, 1))


class OptimalVariance(NamedTuple):
    """What makes the bound least, for each t of the trained chain: float64[T+1], 0 at t = 0.

    `targets.analytic(optimum.var_0, optimum.decoder)` is the Variance that it amounts to.
    var_0:        Var[x_0 | x_t] as measured, E||x_0 - x^_0||^2 / d.
    var_0_error:  its standard error.
    decoder:      the variance of p(x_0 | x_t), the square of the best of `decoder_scales`.
    decoder_bits: E[-log2 p(x_0 | x_t)] with it, in bits/dim.
    decoder_bits_error: its standard error.
    n: how many images were read.
    """

    var_0: np.ndarray
    var_0_error: np.ndarray
    decoder: np.ndarray
    decoder_bits: np.ndarray
    decoder_bits_error: np.ndarray
    n: int


def optimal_variance(p: Process, batches: Iterable[TimestepErrors]) -> OptimalVariance:
    """The optimal variances of the images in all `batches`, which need not be of one size.

    With x_0 predicted as x^_0 the term of a step t -> s is, in nats per dimension, for a variance
    sigma^2 that all pixels and images share,

        E KL = 0.5 (log(sigma^2 / beta~) + (beta~ + weight_0^2 E||x_0 - x^_0||^2 / d) / sigma^2 - 1)

    whose least value is at sigma^2 = beta~ + weight_0^2 E||x_0 - x^_0||^2 / d. So var_0 is this
    mean and not the paper's (1 - alpha_bar) / alpha_bar (1 - E||eps^||^2 / d), which is the same
    only for a perfect network without clipping: a biased mean costs too, and the variance must pay
    for it (arXiv 2206.07309 calls it the optimum for an imperfect mean). On the images and draws
    that were read, no other variance of this kind has a smaller bound. A mu-network whose x_0 is
    clipped is the exception: its single steps go by a mean that is not; read it without clipping.
    The decoder's variance is the best of those measured; those of the fixed variances are among
    them.
    Raises ValueError for fewer than two images in all.
    """
    n, sums, squares = 0, 0.0, 0.0
    for batch in batches:
        mse, decoder = (np.asarray(a, np.float64) for a in batch)
        both = np.concatenate([mse[..., None], decoder], -1)
        n, sums, squares = n + len(both), sums + both.sum(0), squares + (both**2).sum(0)
    if n < 2:
        raise ValueError(f"optimum: expected two or more images, found {n}")
    mean = sums / n
    error = np.sqrt(np.maximum(squares / n - mean**2, 0) / (n - 1))
    best = 1 + mean[:, 1:].argmin(1)
    each = np.arange(p.T)

    def from_zero(table):
        return np.append(0.0, table)

    return OptimalVariance(
        var_0=from_zero(mean[:, 0]),
        var_0_error=from_zero(error[:, 0]),
        decoder=from_zero(decoder_scales(p)[best - 1] ** 2),
        decoder_bits=from_zero(mean[each, best]),
        decoder_bits_error=from_zero(error[each, best]),
        n=n,
    )


def step_costs(p: Process, optimum: OptimalVariance) -> np.ndarray:
    """costs[s, t], in bits/dim: the bound's term of a step t -> s with the optimal variance.

    float64[T+1, T+1], inf unless s < t. For s > 0 it is 0.5 log2(sigma^2 / beta~), what the least
    E KL of `optimum` comes to; weight_0^2 / beta~ = SNR(s) - SNR(t) with SNR = alpha_bar / (1 -
    alpha_bar), as in Kingma et al. 2021, arXiv 2107.00630. For s = 0 it is the decoder's.
    """
    costs = np.full((p.T + 1, p.T + 1), np.inf)
    costs[0, 1:] = optimum.decoder_bits[1:]
    snr = p.alpha_bar[1:] / (1 - p.alpha_bar[1:])
    s, t = np.triu_indices(p.T, 1)
    costs[s + 1, t + 1] = 0.5 * np.log2(1 + (snr[s] - snr[t]) * optimum.var_0[t + 1])
    return costs


def path_cost(costs: np.ndarray, ts: np.ndarray) -> float:
    """The bound without L_T, in bits/dim, on the chain that visits ts: falling int[K+1], T to 0."""
    return float(costs[ts[1:], ts[:-1]].sum())


def least_cost(costs: np.ndarray, K: int) -> np.ndarray:
    """The K steps from T to 0 that cost least, by dynamic programming (arXiv 2106.03802).

    costs: float64[T+1, T+1], costs[s, t] of a step t -> s. Returns falling int32[K+1], T to 0, as
           samplers.GRIDS do; `process.respace` takes ts[:-1]. Time O(K T^2), once for all shorter.
    More steps may cost more, where the network errs or the decoder does better: compare several K.
    Raises ValueError unless 1 <= K <= T.
    """
    T = len(costs) - 1
    if not 1 <= K <= T:
        raise ValueError(f"least_cost: expected 1 to {T} steps (the trained chain), found {K}")
    # The best of each number of steps goes on from the best of one step less: best[t] is the least
    # cost from t down to 0, below[k][t] where its first step leads.
    best, below = costs[0], [np.zeros(T + 1, np.int32)]
    for _ in range(K - 1):
        through = best[:, None] + costs
        below.append(through.argmin(0).astype(np.int32))
        best = through.min(0)
    ts = [T]
    for table in reversed(below):
        ts.append(table[ts[-1]])
    return np.array(ts, np.int32)


def timestep_strata(T: int, n: int) -> np.ndarray:
    """Edges of n parts of the times 1..T: part i is edges[i] <= t < edges[i + 1]; int32[n + 1].

    t = 1 is a part of its own: its term is the decoder's, of another size. The others fall about as
    1/t, whatever the schedule, so parts grow as t does and cost the same: single times first.
    Raises ValueError unless 2 <= n <= T, or n = T = 1.
    """
    if not min(2, T) <= n <= T:
        raise ValueError(f"strata: expected {min(2, T)} to {T} (the trained chain), found {n}")
    edges = [1, 2]
    for left in range(n - 1, 0, -1):
        low = edges[-1]
        edges.append(max(low + 1, round(low * ((T + 1) / low) ** (1 / left))))
    return np.array(edges, np.int32)


def stratified_vlb(p: Process, predict: Predict, key: Array, x_0: Array, edges: np.ndarray) -> Array:
    """An unbiased reading of each image's whole bound at n times, in bits/dim [b].

    edges: int[n+1], `strata` of the chain; n network evaluations instead of T. In each part every
    image draws its own t, weighted by the part's size. Were t shared by the batch, its error would
    not fall with more images, nor show in how they differ; drawn apart, independent images give
    independent readings: `likelihood.average` has the bound's mean and its honest standard error,
    for the data that the images are a sample of (as the error of these very images' bound it is too
    large: how much images differ is part of it).
    key: one key, or one per example [b]; x_0: [b, ...] on the levels k/127.5 - 1. The draw of x_t
    is that of `likelihood.terms` for the same key and t: n = T gives its sum.
    """
    keys = example_keys(key, x_0.shape[0])
    keys_t = jax.vmap(random.fold_in, (0, None))(keys, 0)  # t = 0 has no noise: no draw is shared

    def one(total, part):
        i, low, high = part

        def draw(key_t, key, x):
            t = random.randint(random.fold_in(key_t, i), (), low, high)
            return t, sample_noise(key[None], t, x[None])[0]

        t, eps = jax.vmap(draw)(keys_t, keys, x_0)
        x_t = q_sample(p, x_0, t, eps)
        bits = vlb_term(p, predict(x_t, t), x_0, x_t, t)
        return total + (high - low).astype(bits.dtype) * bits, None

    edges = jnp.asarray(edges)
    parts = (jnp.arange(len(edges) - 1), edges[:-1], edges[1:])
    return lax.scan(one, prior_bits(p, x_0), parts)[0]


def analytic_ddim(p: Process, eta: float = 0.0) -> Sampler:
    """DDIM with the variance that is best for it: Analytic-DDIM, arXiv 2201.06503, Theorem 1.

    Its mean knows x_0 only as well as the model does, so the variance of x_0 given x_t (targets:
    var_0; measured, with targets.analytic) is added, times the square of x_0's weight in the mean.
    Where x_0 counts as known (fixed_small), it is `ddim`. No noise in the last step. Raises
    ValueError unless 0 <= eta <= 1.
    """
    check_eta(eta)

    def step(predict: Predict, keys: Array, carry: SamplerState, t: Array, s: Array) -> SamplerState:
        prediction = predict(carry.x, t)
        signal, direction, variance = ddim_coefficients(p, t, s, eta)
        mean, var_0 = ddim_mean(prediction, signal, direction), prediction.var_0
        if var_0 is None:
            t_b = jnp.broadcast_to(t, carry.x.shape[:1])
            var_0 = implied_var_0(p, prediction.log_var, t_b)
        # eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t) falls as x_0 rises.
        weight = signal - direction * jnp.sqrt(gather(p.alpha_bar, t) / beta_between(p, 0, t))
        variance = broadcast_right(variance, carry.x) + broadcast_right(weight**2, carry.x) * var_0
        z = jnp.sqrt(variance) * sample_noise(keys, t, carry.x)
        return SamplerState(mean + jnp.where(s > 0, z, 0), prediction.x_0)

    return Sampler(initial_state, step)


def analytic_variance(var_0: np.ndarray, decoder: np.ndarray | None = None) -> Variance:
    """The isotropic variance that makes the bound least: beta~ + weight_0^2 var_0[t].

    Bao et al. 2022, arXiv 2201.06503, Theorem 1, with a measured Var[x_0 | x_t] (bounds.optimum).

    var_0:   float64[T+1], one for each t of the trained chain; entry 0 is not read.
    decoder: float64[T+1], the variance of p(x_0 | x_t) for a chain whose first step is t -> 0;
             entry 0 is not read. None: that of the fixed variances.
    Entries are found by what the network is told, t - 1, so they hold for every respaced chain.
    Raises ValueError for tables of other shapes or with negative entries.
    """
    var_0 = np.asarray(var_0, np.float64)
    decoder = None if decoder is None else np.asarray(decoder, np.float64)
    for table in (var_0, var_0 if decoder is None else decoder):
        if table.ndim != 1 or table.shape != var_0.shape or not np.all(table[1:] >= 0):
            raise ValueError(f"analytic: expected T + 1 numbers, none below 0; found {table}")

    def trained(p: Process) -> np.ndarray:
        times = np.round(p.model_t).astype(int) + 1
        if times[-1] >= len(var_0):
            raise ValueError(f"analytic: the table ends at t = {len(var_0) - 1} < {times[-1]}")
        return times

    def log_var(p: Process, extra: Array | None, t: Array) -> Array:
        steps, times = np.arange(1, p.T + 1), trained(p)
        c = posterior(p, steps - 1, steps)
        table = np.append(0, c.variance + c.weight_0**2 * var_0[times[1:]])
        if decoder is None:
            return gather(_log_table(p, table), t)
        table[:2] = decoder[times[1]]
        return gather(np.log(table), t)

    def of_x_0(p: Process, log_var: Array, t: Array) -> Array:
        return broadcast_right(gather(var_0[trained(p)], t), log_var)

    return Variance(1, log_var, of_x_0)
