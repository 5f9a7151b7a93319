"""Tests samplers step by step against the schedulers of diffusers.

tests/golden/schedulers*.npz: diffusers 0.42.1 on PyTorch 2.13.0, linear betas, T = 1000, the exact
eps of data N(0.3, 0.5^2) in every pixel. Each run visits the times that diffusers visits, which are
not always a grid: its DDIM steps down to one time and evaluates the network at another.
"""

import functools
import itertools
import zlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import process, schedules, targets
from diffusion.samplers import ancestral, dpm_solver, guidance, heun_langevin
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian, official

LINEAR = process.from_betas(schedules.linear(1000))
DATA = Gaussian(0.3, 0.25)
APPLY = DATA.network(LINEAR, "eps", learned=False)

# The transforms of x_0, by their names in the runs.
CLIPS = {
    "clip0": False,
    "clip1": True,
    "cliprange0.5": lambda x_0: jnp.clip(x_0, -0.5, 0.5),
    "threshold": guidance.dynamic_threshold(0.98, maximum=1.5),
}


def make_predict(p, clip, variance="fixed_small", eps_follows=True, apply=APPLY):
    """diffusers keeps the network's eps, while ours follows from the clipped x_0."""
    predict = targets.make_predict(p, apply, TARGETS["eps"], VARIANCES[variance], clip=CLIPS[clip])

    def unclipped_eps(x, t):
        model_t = process.gather(p.model_t, jnp.broadcast_to(t, x.shape[:1]))
        return predict(x, t)._replace(eps=apply(x, model_t))

    return predict if eps_follows else unclipped_eps


class Runner:
    """Runs a sampler with several models side by side, compiled once for all times and noises.

    make: (final_times) -> Sampler. predicts: {name: Predict}.
    """

    def __init__(self, make, predicts):
        self.make, self.names = make, list(predicts)
        self.predict = oracle.side_by_side(list(predicts.values()))
        self.step = jax.jit(self._step)

    def _step(self, state, t, s, z, final_times):
        with mock.patch.object(process, "sample_noise", lambda keys, t, like: z):
            return self.make(final_times).step(self.predict, None, state, t, s)

    def _tile(self, x):
        return jnp.tile(jnp.asarray(x, jnp.float32), (len(self.names), 1, 1, 1))

    def __call__(self, x_T, pairs, noise, final_times=()):
        """Returns {name: x [n, b, ...]} after each step (t, s), with noise [b, ...] per step."""
        state, xs = self.make(()).init(self._tile(x_T)), []
        for (t, s), z in zip(pairs, noise, strict=False):
            state = self.step(state, int(t), int(s), self._tile(z), final_times)
            xs.append(np.split(np.asarray(state.x), len(self.names)))
        return dict(zip(self.names, np.stack(xs, axis=1), strict=True))


def steps_down(timesteps, end=0):
    """Returns our (t, s) of timesteps that count from 0; the last step leads to end."""
    return itertools.pairwise([*(timesteps + 1).tolist(), end])


def compare(full, run, x, atol, at=slice(None)):
    """Compares the end, the middle and one plane of the trajectory with schedulers_full.npz."""
    full.close(f"{run}/out", x[-1], atol=atol)
    full.close(f"{run}/mid", x[full[f"{run}/mid_step"]], atol=atol)
    full.close(f"{run}/traj_s0c0", x[at, 0, 0], atol=atol)


def runs_of(full, *kinds):
    return sorted({key.split("/")[0] for key in full.file if key.startswith(kinds)})


def of_run(*patterns):
    return [f"{p}/{what}" for p in patterns for what in ("out", "mid", "traj_s0c0")]


@functools.cache
def ancestral_runner():
    each = itertools.product(("fixed_small", "fixed_large"), CLIPS)
    predicts = {(v, c): make_predict(LINEAR, c, v) for v, c in each}
    return Runner(lambda final_times: ancestral.ancestral(LINEAR), predicts)


@official("schedulers_full", *of_run("ddpm50*"))
def test_ddpm_50(full):
    x = {}
    for spacing in ("", "_trailing"):
        timesteps = full[f"ddpm50_fixed_small{spacing}_clip0/timesteps"]
        paths = ancestral_runner()(full["x_T"], steps_down(timesteps), full["noise"])
        x |= {f"ddpm50_{v}{spacing}_{c}": path for (v, c), path in paths.items()}
    # Where its last time is not the first of the chain, diffusers draws noise in the last step too.
    x["ddpm50_fixed_large_trailing_clip0"][-1] += (
        np.sqrt(1 - LINEAR.alpha_bar[20]) * full["noise"][-1]
    )
    for run in runs_of(full, "ddpm50"):
        compare(full, run, x[run], 5e-5)


@official("schedulers_full", *of_run("ddpm1000*"))
def test_ddpm_1000(full):
    def z(i):
        state = np.random.RandomState(zlib.crc32(f"sched/noise1000/{i}".encode()))
        return state.randn(4, 3, 8, 8)[:2]

    paths = ancestral_runner()(full["x_T"], steps_down(np.arange(999, -1, -1)), map(z, range(1000)))
    for v, c in itertools.product(("fixed_small", "fixed_large"), ("clip0", "clip1")):
        run = f"ddpm1000_{v}_{c}"
        compare(full, run, paths[v, c], 2e-4, full[f"{run}/traj_steps"])


@official("schedulers", "ddpm.*.x_0")
def test_ddpm_first(first):
    timesteps = first["ddpm.fixed_small.50.clip.timesteps"]
    paths = ancestral_runner()(first["x_T"], steps_down(timesteps), first["noise"])
    for v, (theirs, ours) in itertools.product(
        ("fixed_small", "fixed_large"), {"clip": "clip1", "noclip": "clip0"}.items()
    ):
        first.close(f"ddpm.{v}.50.{theirs}.x_0", paths[v, ours][-1], atol=1e-4)


@functools.cache
def ddim_runner(eta):
    predicts = {c: make_predict(LINEAR, c, eps_follows=False) for c in CLIPS}
    predicts |= {f"{c}_useclipped": make_predict(LINEAR, c) for c in ("clip1", "cliprange0.5")}
    return Runner(lambda final_times: ancestral.ddim(LINEAR, eta), predicts)


def ddim_pairs(timesteps, end=0):
    """diffusers steps down by 1000 // n, whatever the next timestep is."""
    k = 1000 // len(timesteps)
    return [(t + 1, t + 1 - k if t >= k else end) for t in timesteps.astype(int)]


@official("schedulers_full", *of_run("ddim*"))
def test_ddim(full):
    known = {}
    for run in runs_of(full, "ddim"):
        clip = next((c for c in CLIPS if c in run), "clip1" if "useclipped" in run else "clip0")
        clip += "_useclipped" * ("useclipped" in run)
        eta = float(run.split("_")[1][3:])
        timesteps, end = full[f"{run}/timesteps"], int("alpha10" in run)
        start = (eta, timesteps.tobytes(), end)
        if start not in known:
            pairs = ddim_pairs(timesteps, end)
            known[start] = ddim_runner(eta)(full["x_T"], pairs, full["noise"])
        compare(full, run, known[start][clip], 2e-5)


@official("schedulers", "ddim.*.x_0")
def test_ddim_first(first):
    for key in [key for key in first.file if key.startswith("ddim") and key.endswith("x_0")]:
        run = key.removesuffix(".x_0")
        pairs = ddim_pairs(first[f"{run}.timesteps"], int("alpha10" in run))
        paths = ddim_runner(float("eta1" in run))(first["x_T"], pairs, first["noise"])
        first.close(key, paths["clip0" if "noclip" in run else "clip1"][-1], atol=1e-4)


# The sampler of a run, by the longest matching prefix of its name.
SOLVERS = {
    "dpmpp1": lambda p, final_times: ancestral.ddim(p),
    "dpmpp2": lambda p, final_times: dpm_solver.dpmpp_2m(p, final_times=final_times),
    "dpmpp2_10_heun": lambda p, final_times: dpm_solver.dpmpp_2m(p, "heun", final_times),
    "dpmpp3": lambda p, final_times: dpm_solver.dpmpp_3m(p, final_times=final_times),
    "dpmpp_singlestep": lambda p, final_times: dpm_solver.dpmpp_2s(p),
    "unipc2_bh1": lambda p, final_times: dpm_solver.unipc(
        p, variant="bh1", final_times=final_times
    ),
    "unipc2_bh2": lambda p, final_times: dpm_solver.unipc(p, final_times=final_times),
    "unipc2_bh2_10_nocorrector": lambda p, final_times: dpm_solver.unipc(
        p, corrector=False, final_times=final_times
    ),
    "unipc3_bh2": lambda p, final_times: dpm_solver.unipc(p, 3, final_times=final_times),
}


@functools.cache
def solver_runner(name):
    predicts = {c: make_predict(LINEAR, c) for c in ("clip0", "threshold")}
    return Runner(functools.partial(SOLVERS[name], LINEAR), predicts)


def of_name(run):
    return max((name for name in SOLVERS if run.startswith(name)), key=len)


def run_solver(run, x_T, timesteps, runner):
    """diffusers lowers the order of the last two steps: of DPM-Solver++ below 15, UniPC always."""
    end = int("sigmamin" in run)
    pairs, nothing = list(steps_down(timesteps, end)), itertools.repeat(np.zeros_like(x_T))
    lowered = (len(pairs) < 15 or "unipc" in run) and "lof0" not in run
    final_times = (end, pairs[-1][0]) if lowered else (-1, -1)
    name = "threshold" if "threshold" in run else "clip0"
    return runner(x_T, pairs, nothing, final_times)[name]


@official("schedulers_full", *of_run("dpmpp?_?0_*", "unipc*"))
def test_solvers(full):
    for run in runs_of(full, "dpmpp", "unipc"):
        timesteps, runner, atol = full[f"{run}/timesteps"], solver_runner(of_name(run)), 2e-5
        if "karras" in run:
            # Noise levels between the trained times; the network gets the nearest time.
            p = process.at_levels(
                LINEAR, 1 / (1 + full[f"{run}/sigmas"][-2::-1].astype(float) ** 2)
            )
            np.testing.assert_array_equal(np.round(p.model_t[:0:-1]), timesteps)
            timesteps, atol = np.arange(p.T - 1, -1, -1), 1e-4
            predicts = {"clip0": make_predict(p, "clip0")}
            runner = Runner(functools.partial(SOLVERS["dpmpp2"], p), predicts)
        compare(full, run, run_solver(run, full["x_T"], timesteps, runner), atol)


@official("schedulers", "dpmpp*.x_0", "unipc*.x_0")
def test_solvers_first(first):
    for key in [key for key in first.file if key[:5] in ("dpmpp", "unipc") and ".x_0" in key]:
        run = key.removesuffix(".x_0")
        kind, *_, order, _ = run.split(".")
        name = {
            "dpmpp_multistep": f"dpmpp{order[1:]}",
            "dpmpp_singlestep": "dpmpp_singlestep",
            "unipc": "unipc2_bh2",
        }[kind]
        x = run_solver(run, first["x_T"], first[f"{run}.timesteps"], solver_runner(name))
        first.close(key, x[-1], atol=1e-4)


@official("schedulers_full", *of_run("heun*"))
def test_heun(full):
    """diffusers works in x / alpha, and has a state between the two halves of a step too."""
    for run in runs_of(full, "heun"):
        sigmas = np.append(full[f"{run}/sigmas"][::2], 0.0).astype(float)
        sigmas = sigmas[: np.argmin(sigmas) + 1]  # each twice but the first, and 0
        q = process.at_levels(LINEAR, 1 / (1 + sigmas[-2::-1] ** 2))
        q = q._replace(model_t=np.arange(-1.0, q.T))  # for the exact denoiser of these levels
        clip = next(c for c in CLIPS if c in run)
        apply = DATA.network(q, "eps", learned=False)
        runner = Runner(
            lambda final_times, q=q: heun_langevin.heun(q),
            {run: make_predict(q, clip, apply=apply)},
        )
        x_T = full["x_T"] * np.sqrt(1 - q.alpha_bar[-1])
        nothing = itertools.repeat(np.zeros_like(x_T))
        (x,) = runner(x_T, steps_down(np.arange(q.T - 1, -1, -1)), nothing).values()
        full.close(f"{run}/out", x[-1], atol=2e-5)
        # Compared in x, as x / alpha there is up to 157 times as large.
        scale = np.sqrt(q.alpha_bar[-2::-1]).astype(np.float32)
        middle = full[f"{run}/mid_step"] // 2
        np.testing.assert_allclose(x[middle], scale[middle] * full[f"{run}/mid"], atol=2e-5)
        path = scale[:, None, None] * full[f"{run}/traj_s0c0"][[*range(1, 2 * q.T - 2, 2), -1]]
        np.testing.assert_allclose(x[:, 0, 0], path, atol=2e-5)
        full.compared |= {f"{run}/mid", f"{run}/traj_s0c0"}


@official("schedulers_full", "exact_ode_from_t999")
def test_exact_flow(full):
    """A thousand steps of Heun against the flow's closed form in float64."""
    runner = Runner(
        lambda final_times: heun_langevin.heun(LINEAR), {"": make_predict(LINEAR, "clip0")}
    )
    pairs, nothing = (
        steps_down(np.arange(999, -1, -1)),
        itertools.repeat(np.zeros_like(full["x_T"])),
    )
    x = runner(full["x_T"], pairs, nothing)[""][-1]
    # The step to t = 0 takes Var[x_0 | x_1] = 1e-4 away from 0.25, so 2e-4 of how far x_0 is from
    # the mean, up to 2.
    full.close("exact_ode_from_t999", x, atol=5e-4)


@official("schedulers_full", "add_noise/x0", "ddpm_variance/*")
def test_forward(full):
    t = jnp.asarray(full["add_noise/t"] + 1)
    x_0 = TARGETS["v"].to_x0(LINEAR, full["add_noise/velocity"], full["add_noise/out"], t)
    full.close("add_noise/x0", x_0, atol=5e-6)
    t = np.arange(1, 1001)
    small, large = (
        process.posterior(LINEAR, t - 1, t).variance,
        process.beta_between(LINEAR, t - 1, t),
    )
    # Float32 there: the difference of two numbers near 1.
    full.close("ddpm_variance/fixed_small", small, atol=1e-19, rtol=2e-3)
    full.close("ddpm_variance/fixed_large", large, rtol=2e-3)
