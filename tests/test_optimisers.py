"""optimisers.py: schedules and first updates in closed form; resuming on any number of devices."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from diffusion import experiment, gradients, optimisers, train_step
from diffusion.checkpoint import Checkpoints
from diffusion.optimisers import LR_SCHEDULES, OPTIMISERS
from diffusion.runtime.config import with_overrides
from diffusion.runtime.validation import validate
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils.errors import ConfigError
from tests.test_configs import config_of
from tests.test_train_step import OFFICIAL, optax_promotes  # noqa: F401 (for every test)

# A network's names; what Muon takes as matrices are the two inner kernels.
SHAPES = {
    "class_emb": {"embedding": (3, 6)},
    "conv_in": {"kernel": (3, 3, 2, 6), "bias": (6,)},
    "down_0": {"conv1": {"kernel": (3, 3, 6, 5), "bias": (5,)}, "temb_proj": {"kernel": (4, 7)}},
    "norm_out": {"scale": (5,)},
    "conv_out": {"kernel": (3, 3, 5, 2)},
}
MATRICES = {"down_0/conv1/kernel": (54, 5), "down_0/temb_proj/kernel": (4, 7)}
RATE, DECAY = 0.01, 0.1


def random_tree(seed, *batch):
    """Numbers far from 0, so that Adam's epsilon and signs do not matter."""
    rng = np.random.default_rng(seed)

    def of(shape):
        x = rng.uniform(0.5, 1.5, batch + shape) * rng.choice([-1, 1], batch + shape)
        return jnp.asarray(x, "float32")

    return jax.tree.map(of, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(x) for k, x in leaves}


def first_update(name, gradient, decay=0.0, clip=1e9):
    tx = optimisers.make_optimizer(name, lambda step: RATE, clip, decay)
    params = random_tree(1)
    update, _ = jax.jit(lambda: tx.update(gradient, tx.init(params), params))()
    return flat(update), flat(params)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_s_first_update_is_the_sign_of_the_gradient(name, size):
    """Whatever the gradient's size, behind the clip or not."""
    gradient = jax.tree.map(lambda g: size * g, random_tree(0))
    update, _ = first_update(name, gradient, clip=1.0)
    for leaf, g in flat(gradient).items():
        np.testing.assert_allclose(update[leaf], -RATE * np.sign(g), rtol=1e-3, err_msg=leaf)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_weight_decay_takes_its_share_of_every_parameter(name):
    gradient = random_tree(0)
    (without, params), (update, _) = (first_update(name, gradient, d) for d in (0.0, DECAY))
    for leaf, p in params.items():
        expected = -RATE * DECAY * p
        np.testing.assert_allclose(update[leaf] - without[leaf], expected, atol=2e-8, err_msg=leaf)


def test_radam_s_first_update_is_the_gradient_s():
    gradient = random_tree(0)
    for leaf, update in first_update("radam", gradient)[0].items():
        np.testing.assert_allclose(update, -RATE * flat(gradient)[leaf], rtol=1e-5)


def test_muon_s_updates_are_nearly_orthogonal_and_have_adam_s_size():
    """U S V' becomes U S' V' with S' near 1, times 0.2 sqrt(max(in, out)).

    Newton-Schulz leaves S' within 0.68..1.14 (Jordan et al. 2024), down to small singular values.
    """
    gradient = random_tree(0)
    update, _ = first_update("muon", gradient)
    for leaf, shape in MATRICES.items():
        u, s, v = np.linalg.svd(flat(gradient)[leaf].reshape(shape), full_matrices=False)
        core = -u.T @ update[leaf].reshape(shape) @ v.T / (0.2 * RATE * np.sqrt(max(shape)))
        values = np.diag(core)
        assert s[0] / s[-1] > 1.3 and np.all((values > 0.65) & (values < 1.2)), (leaf, values)
        np.testing.assert_allclose(core - np.diag(values), 0, atol=2e-5)
        assert 0.65 < np.sqrt(np.mean(values**2)) < 1.2
        rest = update[leaf].reshape(shape) + u @ core @ v * 0.2 * RATE * np.sqrt(max(shape))
        np.testing.assert_allclose(rest, 0, atol=1e-7)
    # All else is Adam's with Nesterov's momentum: g (0.1 / (1 - 0.9) + 0.9 * 0.1 / (1 - 0.9^2)).
    for leaf, g in flat(gradient).items():
        if leaf not in MATRICES:
            expected = -RATE * np.sign(g) * (1 + 0.09 / 0.19)
            np.testing.assert_allclose(update[leaf], expected, rtol=1e-4, err_msg=leaf)


def test_muon_s_matrices_of_the_network():
    """Every kernel between the first and the last layer, from all inputs to the outputs."""
    exp = experiment.build(config_of("digits", "tiny,conditional"))
    params = exp.abstract_state.params
    found = optimisers.muon_dimensions(params)
    is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=is_leaf)
    names = {jax.tree_util.keystr(k, simple=True, separator="/"): d for k, d in leaves}
    shapes = {
        jax.tree_util.keystr(k, simple=True, separator="/"): x.shape
        for k, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert names.keys() == shapes.keys()
    for name, dimensions in names.items():
        inner = name.endswith("/kernel") and not name.startswith(("conv_in/", "conv_out/"))
        assert (dimensions is not None) == inner, name
        if inner:
            axes = (*dimensions.reduction_axis, dimensions.output_axis)
            assert axes == tuple(range(len(shapes[name]))), name
    assert names["mid/attn_1/q/kernel"] and names["temb/dense0/kernel"]
    assert "class_emb/embedding" in names


@pytest.mark.parametrize("name", OPTIMISERS)
def test_resuming_and_devices_change_nothing(name, tmp_path):
    """With warm-up, cosine, clip, accumulation and averages of three kinds.

    Four steps in one go, and from a checkpoint after the second, bit for bit; on one device and on
    four, whose sums are rounded in another order.
    """
    schedule = LR_SCHEDULES["cosine"](RATE, 1, 6)
    decay = DECAY if name in ("adamw", "muon") else 0.0
    tx = optimisers.make_optimizer(name, schedule, 1.0, decay)

    def apply(params, key, x, t, label):
        pairs = zip(*map(jax.tree.leaves, (x, params)), strict=True)
        return sum(jnp.einsum("b...,...->b", *pair) for pair in pairs)

    def loss(apply, key, x_0, *times):
        return apply(x_0, None) ** 2 / 100, {}

    grad_fn = gradients.make_grad_fn(loss, apply, accumulate=2, clip_groups=2, clip=0.5)
    step = train_step.make_train_step(grad_fn, tx, 0.9, lengths=(0.05, 0.2))
    batches = [random_tree(10 + i, 16) for i in range(4)]

    @functools.cache
    def compiled(devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        whole, split = replicated(mesh), batch_sharded(mesh)
        return jax.jit(step, in_shardings=(whole, whole, split), out_shardings=whole), whole

    def train(devices, state=None):
        state = state or train_step.create_train_state(random_tree(2), tx, averages=2)
        update, whole = compiled(devices)
        for batch in batches[int(state.step) :]:
            state, _ = update(jax.device_put(state, whole), jax.random.key(0), (batch, None))
            yield state

    _, second, _, last = train(1)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(2, second)
        checkpoints.wait()
        restored = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), second
            )
        )
    *_, resumed = train(1, restored)
    *_, shared = train(4)
    moved = flat(random_tree(2))
    assert jax.tree.structure(resumed) == jax.tree.structure(last) == jax.tree.structure(shared)
    for leaf, x in flat(last).items():
        np.testing.assert_array_equal(flat(resumed)[leaf], x, err_msg=leaf)
        np.testing.assert_allclose(flat(shared)[leaf], x, rtol=2e-4, atol=2e-6, err_msg=leaf)
    assert all(np.any(flat(last.params)[leaf] != x) for leaf, x in moved.items())
    assert not np.array_equal(*(a["conv_in"]["bias"] for a in last.averages))


# Schedules


def test_the_official_learning_rates():
    lr = LR_SCHEDULES["constant"](2e-4, 5000, 10)
    for step, expected in zip(OFFICIAL["lr_table.step"], OFFICIAL["lr_table.lr"], strict=True):
        np.testing.assert_allclose(lr(int(step)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 40])
def test_a_schedule_warms_up_and_reaches_its_rate(name, warmup):
    lr = LR_SCHEDULES[name](0.5, warmup, 1040)
    np.testing.assert_allclose(
        [float(lr(step)) for step in range(0, warmup, 10)],
        [0, 0.125, 0.25, 0.375][: warmup // 10],
        rtol=1e-6,
    )
    np.testing.assert_allclose(float(lr(warmup)), 0.5, rtol=1e-6)
    rates = [float(jax.jit(lr)(jnp.int32(step))) for step in (warmup, 500, 1039)]
    assert rates == sorted(rates, reverse=True)


def test_a_cosine_in_closed_form():
    """At a half, a third and the end of what follows the warm-up."""
    lr = LR_SCHEDULES["cosine"](0.5, 40, 640)
    np.testing.assert_allclose(
        [float(lr(t)) for t in (340, 240, 440)], [0.25, 0.375, 0.125], rtol=1e-6
    )
    np.testing.assert_allclose([float(lr(t)) for t in (640, 9999)], 0, atol=1e-8)


@pytest.mark.parametrize("steps", [10, 40])
def test_a_training_within_its_warm_up_has_the_rates_of_the_warm_up(steps):
    lr, warm = LR_SCHEDULES["cosine"](0.5, 40, steps), LR_SCHEDULES["constant"](0.5, 40, steps)
    for t in range(steps):
        assert float(lr(t)) == float(warm(t)) == pytest.approx(0.5 * t / 40)


# Refusals

WRONG = {
    "optim.name: 'mun' is not known; nearest: muon": {"optim.name": "mun"},
    "optim.schedule: 'cos' is not known; nearest: .*cosine": {"optim.schedule": "cos"},
    r"optim: weight_decay: expected 0 for adam, found 0.1; use adamw": {
        "optim.weight_decay": 0.1,
        "optim.name": "adam",
    },
    "optim: weight_decay: expected 0 for radam": {"optim.weight_decay": 0.1, "optim.name": "radam"},
    "optim.weight_decay: expected a number of 0 or more": {"optim.weight_decay": -0.1},
}


@pytest.mark.parametrize("match", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_compiled(match):
    config = with_overrides(config_of("digits"), WRONG[match])
    with pytest.raises(ConfigError, match=f"^{match}"):
        validate(config)
        experiment.make_config_optimizer(config)
