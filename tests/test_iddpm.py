"""Learned ranges, the hybrid loss, respaced chains and bounds against OpenAI's improved-diffusion.

Origin: github.com/openai/improved-diffusion, commit 1bc7bbb, run with given networks and noise. The
arrays `.f64` are the same code's, of the same inputs widened, with its tables in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, losses, process, schedules, targets
from diffusion.samplers import ancestral, base, timesteps
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import column, official

RANGE = VARIANCES["learned_range"]
NAMES = oracle.TARGETS  # of targets: theirs, ours
P = oracle.arrays("iddpm")["toy.params"]
F64 = ".f64"  # the end of the keys of their float64 arrays


def toy(name, x, t):
    """Their networks "a" and "b", whose second half leaves [-1, 1] on purpose; t counts from 0."""
    p = [jnp.asarray(value, x.dtype) for value in P]
    output = p[0] * jnp.tanh(p[1] * x) + p[2] * jnp.sin(column(t).astype(x.dtype) / p[3])
    if name == "b":
        output = x - p[4] * jnp.tanh(p[1] * x)
    return jnp.concatenate([output, p[5] + p[6] * jnp.cos(p[7] * x)], -1)


def linear(T):
    """Their linear schedule, which ends at about the same alpha_bar for every T."""
    return schedules.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)


SCHEDULES = {"cosine": schedules.cosine, "linear": linear}


def process_of(official, schedule, T):
    """The process of their two keys."""
    return process.from_betas(SCHEDULES[str(official[schedule])](int(official[T])))


@pytest.fixture(autouse=True)
def trace_once(monkeypatch):
    """Traces the longer functions of a process once, which is most of what these tests take."""
    kept = {}

    def once(function):
        def call(p, *args):
            if not isinstance(args[-1], jax.Array):  # a time on the host: tables in float64
                return function(p, *args)
            key = function, id(p.alpha_bar)
            kept[key] = kept.get(key) or (p, jax.jit(functools.partial(function, p)))
            return kept[key][1](*args)

        return call

    for name in ("posterior", "q_posterior", "p_mean_log_variance"):
        function = getattr(targets, name)
        for module in (process, targets, likelihood, timesteps, ancestral):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, once(function))


# Their betas are given, ours follow from alpha_bar: 1e-16 of a logarithm, of a beta of 1e-5.
TABLES = 2e-11


def check_tables(official, key, p, rtol=1e-14):
    t = np.arange(1, p.T + 1)
    official.close(key + "alphas_cumprod", p.alpha_bar[1:], rtol=rtol)
    variance = process.posterior(p, t - 1, t).variance
    official.close(key + "posterior_variance", variance, rtol=TABLES)
    log_var = targets.posterior_log_var(p, t)
    official.close(key + "posterior_log_variance_clipped", log_var, rtol=TABLES)


@official("iddpm", "sched.*.*.*")
def test_schedules(official):
    for i, (name, schedule) in itertools.product(range(3), SCHEDULES.items()):
        T, key = int(official[f"sched.{i}.T"]), f"sched.{i}.{name}."
        betas, t = schedule(T), np.arange(1, T + 1)
        p = process.from_betas(betas)
        c = process.posterior(p, t - 1, t)
        official.close(key + "betas", betas, atol=3e-16)  # 1 minus a quotient
        official.close(key + "posterior_mean_coef1", c.weight_0, rtol=TABLES)
        official.close(key + "posterior_mean_coef2", c.weight_t, rtol=1e-14)
        check_tables(official, key, p)


def test_the_linear_schedule_of_twenty_steps_ends_in_pure_noise_and_of_fewer_is_none():
    assert process.from_betas(linear(20)).alpha_bar[-1] == 0
    with pytest.raises(ValueError, match="betas: expected"):
        process.from_betas(linear(19))


# One schedule at eight times, from the first to the last


@official("iddpm", "c0.x_t", "c0.q_post*[!4]", "c0.*variance", "c0.?.net_out", "c0.*.?.*[!4]")
def test_the_longest_chain_in_float32(official, monkeypatch):
    check_case(official, 0, jnp.float32, monkeypatch)


@official("iddpm", "c?.x_t*", "c?.q_post*", "c?.*variance*", "c?.?.net_out*", "c?.*.?.*")
def test_cases_in_float64(official, x64, monkeypatch):
    """Their float32 arrays too are nearest to it."""
    for i in range(3):
        check_case(official, i, jnp.float64, monkeypatch)


# In float32 and float64, by the last word of a key: relative, or absolute below 1. At T = 4000 the
# first beta, 1e-7, is good to 4e-12, and 1 / weight_0 amplifies roundings up to a thousandfold.
TOLERANCES = {
    **dict.fromkeys(("x_t", "net_out"), (1e-6, 2e-15)),
    **dict.fromkeys(("q_post_mean", "q_post_log_variance", "log_variance"), (6e-6, 2e-11)),
    **dict.fromkeys(("mean", "p_sample", "variance"), (6e-6, 2e-11)),
    "pred_xstart": (1e-3, 2e-11),
}
BITS = 2e-4, 2e-9  # of terms and losses, absolute below 0.01
GRADIENTS = 2e-3, 1e-8  # of the largest of the example


def check_case(official, i, dtype, monkeypatch):
    """Compares all that they computed with a schedule.

    Network a as an x_0 or a mean is so far from the image that the first decoder gives it masses of
    1e-12 and below, which float32 cannot see. Nor does their float32 see, late in the chain, the
    difference of the two logarithms between which the variance lies, and so its gradient.
    """
    p = process_of(official, f"c{i}.schedule", f"c{i}.T")
    given = [jnp.asarray(official[k], dtype) for k in ("x_start", "noise", "p_noise")]
    t = jnp.asarray(official[f"c{i}.t"]) + 1  # they count from 0

    @jax.jit
    def run(x_0, eps, noise):
        x_t = process.q_sample(p, x_0, t, eps)
        output = {y: toy(y, x_t, t - 1) for y in "ab"}
        log_var = RANGE.log_var(p, jnp.split(output["a"], 2, -1)[1], t)
        ours = {"x_t": x_t, "log_variance": log_var, "variance": jnp.exp(log_var)}
        ours["q_post_mean"] = process.q_posterior(p, x_0, x_t, t - 1, t)[0]
        ours["q_post_log_variance"] = targets.posterior_log_var(p, t)
        ours |= {f"{y}.net_out": output[y] for y in "ab"}
        for group in (("eps", "xstart"), ("xprev",)):  # without and with a mean of its own
            models = [*itertools.product(group, "ab")]
            outputs = jnp.concatenate([output[y] for _, y in models])
            rest = [jnp.concatenate([v] * len(models)) for v in (x_0, eps, x_t, t)]
            found = run_models(p, side_by_side(group), outputs, *rest, monkeypatch)
            for i, (m, y) in enumerate(models):
                ours |= {f"{m}.{y}.{name}": v[8 * i : 8 * i + 8] for name, v in found.items()}
        for m, target in NAMES.items():
            drawn = draw(p, TARGETS[target], output["a"], x_t, noise, t, monkeypatch)
            ours[f"{m}.a.p_sample"] = drawn
        return ours

    ours = run(*given)
    for (name, values), twin in itertools.product(ours.items(), twins(dtype)):
        double = twin == F64
        kind, tail = name.split(".")[-1], name.startswith(("xstart.a.", "xprev.a."))
        at = slice(1 if tail and not double else 0, 4 if kind == "grad_var" and not double else 8)
        if kind in TOLERANCES:
            tolerance = TOLERANCES[kind][double]
            options = {"rtol": tolerance, "atol": tolerance}
        elif "grad" in kind:
            options = {"atol": 2e-4 if tail and double else GRADIENTS[double], "of_largest": True}
        else:
            tolerance = 5e-7 if tail and double else BITS[double]
            least = 0.01 * (p.T if "RESCALED_KL" in name else 1)
            options = {"rtol": tolerance, "atol": tolerance * least}
        official.close(f"c{i}.{name}{twin}", values, at=at, **options)


def twins(dtype):
    """The ends of the keys of the arrays that are compared with ours of this type."""
    return ("",) if dtype == jnp.float32 else ("", F64)


def side_by_side(names):
    """Joins targets into one, each for its part of the batch, so that one program has them all."""

    def call(method, p, *arrays):
        parts = zip(names, *(jnp.split(a, len(names)) for a in arrays), strict=True)
        found = [getattr(TARGETS[NAMES[name]], method)(p, *part) for name, *part in parts]
        return jnp.concatenate(found)

    (is_mean,) = {TARGETS[NAMES[name]].is_mean for name in names}
    methods = (functools.partial(call, method) for method in ("from_x0", "to_x0"))
    return targets.Target(*methods, is_mean=is_mean)


def run_models(p, target, output, x_0, eps, x_t, t, monkeypatch):
    """Returns {their name of a value: ours}."""
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: (t, eps, x_t))
    # Their losses are the mean squared error and 1, or T / 1000, times a term; the last is to see
    # the error alone.
    hybrids = {"MSE": 1 / p.T, "RESCALED_MSE": 0.001, "": 0.0}
    found, model = {}, (target, RANGE)

    def loss(output, make, **options):
        values, metrics = make(p, *model, **options)(lambda *_: output, None, x_0)
        return values.sum(), (values, metrics["bpd"] - likelihood.prior_bits(p, x_0))

    def hybrid(weight):
        return jax.grad(loss, has_aux=True)(output, losses.hybrid, vlb_weight=weight)

    gradients, (values, bounds) = jax.vmap(hybrid)(jnp.asarray([*hybrids.values()], x_0.dtype))
    for i, (name, weight) in enumerate(hybrids.items()):
        if name:
            found |= {f"{name}.loss": values[i], f"{name}.mse": values[-1]}
            found[f"{name}.vb"] = weight * bounds[i]
            found[f"{name}.grad_var"] = jnp.split(gradients[i], 2, -1)[1]
    found["MSE.grad_out"] = jnp.split(gradients[0], 2, -1)[0]
    gradient, (values, _) = jax.grad(loss, has_aux=True)(output, losses.vlb)
    found["KL.grad_out"], found["KL.grad_var"] = jnp.split(gradient, 2, -1)
    found |= {"KL.loss": values, "clip0.vb_bpd": values, "RESCALED_KL.loss": p.T * values}
    for clip in (0, 1):
        prediction = targets.make_predict(p, lambda *_: output, *model, clip=bool(clip))(x_t, t)
        mean, _ = targets.p_mean_log_variance(p, prediction, x_t, t - 1, t)
        found |= {f"clip{clip}.mean": mean, f"clip{clip}.pred_xstart": prediction.x_0}
    found["clip1.vb_bpd"] = likelihood.vlb_term(p, prediction, x_0, x_t, t)

    return found


def draw(p, target, output, x_t, noise, t, monkeypatch):
    """Returns one step of Algorithm 2 from each x_t with its own t."""

    def step(output, x_t, z, t):
        monkeypatch.setattr(process, "sample_noise", lambda *_: z[None])
        predict = targets.make_predict(p, lambda *_: output[None], target, RANGE)
        state = base.init_state(x_t[None])
        return ancestral.ancestral(p).step(predict, None, state, t, t - 1).x[0]

    return jax.vmap(step)(output, x_t, noise, t)


# Respaced chains


def respaced(official, i):
    """Returns a schedule's process, the times that the shorter chain keeps, and those compared."""
    T, name = int(official["spaced.T"][i]), str(official["spaced.schedule"][i])
    ts, t = official[f"spaced.{i}.timestep_map"] + 1, official[f"spaced.{i}.tidx"] + 1
    return process.from_betas(SCHEDULES[name](T)), ts, t


@official(
    "iddpm", "spaced.?.betas", "spaced.?.alphas*", "spaced.?.posterior*", "spaced.?.*.model_t"
)
def test_respaced_tables(official):
    for i in range(4):
        p, ts, t = respaced(official, i)
        q, steps = process.respace(p, ts), np.arange(1, len(ts) + 1)
        betas = process.beta_between(q, steps - 1, steps)
        official.close(f"spaced.{i}.betas", betas, rtol=TABLES)
        # Theirs is multiplied up again from 1 - beta, the last of which is 1e-6.
        check_tables(official, f"spaced.{i}.", q, rtol=5e-10)
        for scale, factor in enumerate((1, 1000 / p.T)):
            told = q.model_t[t] * factor  # float32, theirs
            official.close(f"spaced.{i}.resc{scale}.model_t", told, rtol=1e-7)


@official(
    "iddpm",
    *("spaced.?.x_t*", "spaced.?.log_variance*", "spaced.?.resc?.RESCALED_MSE.*"),
    *("spaced.?.resc?.mean*", "spaced.?.resc?.pred_xstart*"),
)
def test_respaced_chains_in_float64(official, x64, monkeypatch):
    for i in range(4):
        check_respaced(official, i, jnp.float64, monkeypatch)


@official(
    "iddpm",
    *("spaced.1.x_t", "spaced.1.log_variance", "spaced.1.resc?.RESCALED_MSE.*[!4]"),
    *("spaced.1.resc?.mean", "spaced.1.resc?.pred_xstart"),
)
def test_the_longest_respaced_chain_in_float32(official, monkeypatch):
    check_respaced(official, 1, jnp.float32, monkeypatch)


def check_respaced(official, i, dtype, monkeypatch):
    """The shorter chain's own model, the longer one's carried over, and its long steps."""
    key, model = f"spaced.{i}.", (TARGETS["eps"], RANGE)
    p, ts, t = respaced(official, i)
    q, times, t = process.respace(p, ts), np.append(0, ts), jnp.asarray(t)
    given = [jnp.asarray(official[k], dtype) for k in ("x_start", "noise")]

    def run(x_0, eps, factor):
        def apply(x, told):
            return toy("a", x, told * factor)

        x_t = process.q_sample(q, x_0, t, eps)
        monkeypatch.setattr(losses, "draw_x_t", lambda *_: (t, eps, x_t))
        longer = targets.make_predict(p, apply, *model)
        own = targets.make_predict(q, apply, *model)(x_t, t)
        carried = timesteps.respace_predict(p, longer, RANGE, ts)(x_t, t)
        reverse = [targets.p_mean_log_variance(q, made, x_t, t - 1, t) for made in (own, carried)]
        s_t = jnp.asarray(times)[t - 1], jnp.asarray(times)[t]
        reverse.append(targets.p_mean_log_variance(p, longer(x_t, s_t[1]), x_t, *s_t))
        mse, loss = (
            losses.hybrid(q, *model, vlb_weight=w)(apply, None, x_0)[0] for w in (0.0, 0.001)
        )
        return x_t, own.x_0, reverse, {"mse": mse, "vb": loss - mse, "loss": loss}

    factors = jnp.asarray([1, 1000 / p.T], given[0].dtype)
    x_t, predicted, reverse, terms = jax.jit(jax.vmap(run, (None, None, 0)))(*given, factors)
    for twin in twins(dtype):
        tables, loose = (2e-11, 2e-11) if twin else (5e-6, 5e-5)
        close = {"rtol": tables, "atol": tables}
        official.close(f"{key}x_t{twin}", x_t[0], **close)
        for scale in (0, 1):
            name = f"{key}resc{scale}."
            official.close(f"{name}pred_xstart{twin}", predicted[scale], rtol=loose, atol=loose)
            for (mean, log_var), first in zip(reverse, (0, 0, 1), strict=True):
                official.close(f"{name}mean{twin}", mean[scale], **close)
                # A long step to the image itself has no decoder.
                at = slice(first, None)
                official.close(f"{key}log_variance{twin}", log_var[scale], at=at, **close)
            for term, values in terms.items():
                tolerance = BITS[twin == F64]
                bits = {"rtol": tolerance, "atol": tolerance * 0.01}
                official.close(f"{name}RESCALED_MSE.{term}{twin}", values[scale], **bits)


# The bound


@official("iddpm", "bpd.?.*_bpd*", "bpd.?.*.clip?.*")
def test_bounds_in_float64(official, x64, monkeypatch):
    for i in (0, 1):
        check_bound(official, i, jnp.float64, monkeypatch)


@official("iddpm", "bpd.0.*_bpd", "bpd.0.*.clip?.*[!4]")
def test_a_bound_in_float32(official, monkeypatch):
    check_bound(official, 0, jnp.float32, monkeypatch)


def check_bound(official, i, dtype, monkeypatch):
    """All models of a chain; the columns of theirs fall from t = T to 1."""
    p = process.from_betas(official[f"bpd.{i}.betas"])
    noise = jnp.asarray(official["bpd.q_noise"], dtype)
    b = noise.shape[1]
    x_0 = jnp.asarray(official["x_start"][:b], dtype)
    for twin in twins(dtype):
        prior = likelihood.prior_bits(p, x_0)
        official.close(f"bpd.{i}.prior_bpd{twin}", prior, rtol=1e-4, atol=1e-9)
    for group in (("eps", "xstart"), ("xprev",)):  # without and with a mean of its own
        models = [*itertools.product(group, "ab", (0, 1))]
        terms, errors = run_bound(p, models, x_0, noise, monkeypatch)
        bits, mse, errors = (np.asarray(v) for v in (*terms, errors))
        for (row, (m, y, clip)), twin in itertools.product(enumerate(models), twins(dtype)):
            key, rows = f"bpd.{i}.{m}.{y}.clip{clip}.", slice(b * row, b * row + b)
            found, tail = bits[rows].copy(), y == "a" and m != "eps"  # as in check_case
            if tail and not twin:
                found[:, 0] = official[key + "vb"][:, -1]
            tolerance = 5e-7 if tail and twin else BITS[twin == F64]
            close = {"rtol": tolerance, "atol": tolerance * 0.01}
            official.close(f"{key}vb{twin}", found[:, -2::-1], **close)
            official.close(f"{key}total_bpd{twin}", found.sum(1), **close)
            official.close(f"{key}xstart_mse{twin}", mse[rows, ::-1], **close)
            official.close(f"{key}mse{twin}", errors[rows, ::-1], **close)


def run_bound(p, models, x_0, noise, monkeypatch):
    """Returns the terms of all models, one after the other, and their errors of eps [b, T]."""
    n, b = len(models), len(x_0)
    clips = column(np.repeat([bool(clip) for *_, clip in models], b))

    def apply(x, told):
        parts = zip(models, jnp.split(x, n), jnp.split(told, n), strict=True)
        return jnp.concatenate([toy(y, *part) for (_, y, _), *part in parts])

    def clip(x_0):
        return jnp.where(clips, jnp.clip(x_0, -1, 1), x_0)

    target = side_by_side([*dict.fromkeys(m for m, *_ in models)])
    predict = targets.make_predict(p, apply, target, RANGE, clip)

    @jax.jit
    def run(x_0, noise):
        def again(keys, t, like):
            return jnp.concatenate([noise[t - 1]] * n)

        monkeypatch.setattr(process, "sample_noise", again)
        images = jnp.concatenate([x_0] * n)

        def error(t, eps):
            eps = jnp.concatenate([eps] * n)
            x_t = process.q_sample(p, images, t, eps)
            return likelihood.meanflat((predict(x_t, t).eps - eps) ** 2)

        errors = jax.lax.map(lambda pair: error(*pair), (jnp.arange(1, p.T + 1), noise))
        return likelihood.vlb_terms(p, predict, jax.random.key(0), images), errors.T

    return run(x_0, noise)
