"""The U-Net against the official TensorFlow code's numbers, and its own invariants."""

import functools
import json
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import random

from diffusion import convert, unet
from diffusion.kernels import winograd
from diffusion.kernels.group_norm import group_norm, group_norm_with_vjp
from diffusion.unet import UNet

# Origin: computed by the official TensorFlow 1.15 code, unedited, on a CPU in float32:
# github.com/hojonathanho/diffusion, commit 1e0dceb, diffusion_tf/models/unet.py and nn.py.
# unet_dropout.npz: its `tiny` network again, with the reproducible masks of the test below.
GOLDEN = pathlib.Path(__file__).parent / "golden"
OFFICIAL = np.load(GOLDEN / "unet.npz")
DROPOUT = np.load(GOLDEN / "unet_dropout.npz")

# Each: the network, its image size, and its official number of parameters.
NETWORKS = {
    "tiny": (dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,)), 16, 702_499),
    "cifar10": ({}, 32, 35_746_307),
    "cifar10_outch6": (dict(out_ch=6), 32, 35_749_766),
    "c256": (dict(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0), 256, 113_673_219),
}
TINY = NETWORKS["tiny"][0]
SMALL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1)  # where any network will do
ONE_LEVEL = SMALL | {"ch_mult": (1,)}

# What training and evaluation compute with.
TRAINING = dict(conv=winograd.conv_with_vjp, norm=group_norm_with_vjp)
EVALUATION = dict(conv=winograd.conv, norm=group_norm)

# Two float32 runs of one network differ by rounding: 6e-8 relative, through some sixty layers of
# values up to ten, makes a few 1e-6. The official output itself is that far from float64's.
ROUNDING = dict(rtol=0, atol=2e-5)


def recipe(name, shape):
    """Returns a weight that the official network was run with."""
    z = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).randn(*shape)
    word = name.split("/")[-1]
    if word == "gamma":
        w = 1 + 0.1 * z
    elif word in ("beta", "b"):
        w = 0.1 * z
    else:
        w = z / np.sqrt(float(np.prod(shape[:-1])))
    return w.astype(np.float32)


def shapes(net, height, width):
    """Returns the tree of shapes of the network's parameters, without computing any."""
    x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.random.key(0)
    return jax.eval_shape(lambda x, t: net.init(key, x, t, train=False), x, t)["params"]


def official_shapes(net, height, width):
    """Returns the shapes by official names."""
    tree = shapes(net, height, width)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)
    return {name: array.shape for name, array in convert.to_official(zeros).items()}


def weights(net, height, width):
    names = official_shapes(net, height, width)
    return convert.from_official({name: recipe(name, shape) for name, shape in names.items()})


def images(*shape):
    x = np.random.RandomState(0).uniform(-1, 1, shape)
    return jnp.asarray(x, jnp.float32), jnp.arange(shape[0]) * 300 + 7


def run(net, params, x, t, train=False):
    return jax.jit(lambda params: net.apply({"params": params}, x, t, train=train))(params)


def jit_per_shape(conv, norm):
    """Compiles each kernel once per shape, instead of once per layer in a program of the whole."""
    names = ("dimension_numbers", "lhs_dilation", "rhs_dilation", "feature_group_count")
    names += ("precision", "preferred_element_type")
    conv = jax.jit(conv, static_argnums=(2, 3), static_argnames=names)
    return dict(conv=conv, norm=jax.jit(norm, static_argnums=(3, 4, 5, 6)))


def official_loss(config, **options):
    """Returns (loss function, parameters) of the official run; options: of `UNet`.

    The loss function returns (loss, (output, activations)).
    """
    net = UNet(**NETWORKS[config][0] | {"dropout": 0.0} | options)
    x, t, target = (jnp.asarray(OFFICIAL[f"{config}.{name}"]) for name in ("x", "t", "target"))

    def loss(params):
        out, state = net.apply({"params": params}, x, t, train=False, capture_intermediates=True)
        acts = {}
        for name in OFFICIAL[f"{config}.act_names"]:
            node = state["intermediates"]
            for part in name.split("/")[1:]:
                node = node[part]
            acts[str(name)] = node["__call__"][0]
        # Officially recorded ahead of the swish, which our normalisation includes.
        last = list(acts)[-2]
        acts["model/norm_out"] = unet.GroupNorm().apply({"params": params["norm_out"]}, acts[last])
        return jnp.mean((out - target) ** 2), (out, acts)

    return loss, weights(net, *x.shape[1:3])


@pytest.fixture(scope="module")
def tiny():
    """(loss, output, activations, gradients)."""
    loss, params = official_loss("tiny")
    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, *aux, convert.to_official(grads)


@pytest.fixture(scope="module")
def cifar10():
    """(loss, output, activations), with the kernels of evaluation."""
    loss, params = official_loss("cifar10", **jit_per_shape(**EVALUATION))
    value, aux = loss(params)
    return value, *aux


# --- The network against the official code --------------------------------------------------------


@pytest.mark.parametrize("config", NETWORKS)
def test_every_variable_is_the_official_one(config):
    kwargs, size, count = NETWORKS[config]
    ours = official_shapes(UNet(**kwargs), size, size)
    names = OFFICIAL[f"{config}.var_names"]
    theirs = json.loads(str(OFFICIAL[f"{config}.var_shapes_json"]))
    assert ours == {name: tuple(shape) for name, shape in zip(names, theirs, strict=True)}
    assert sum(math.prod(shape) for shape in ours.values()) == count


@pytest.mark.parametrize("config", ["tiny", "cifar10"])
def test_the_weights_are_those_the_official_network_ran_with(config):
    of_shape = json.loads(str(OFFICIAL[f"{config}.var_shapes_json"]))
    for i, name in enumerate(OFFICIAL[f"{config}.var_names"]):
        if config == "cifar10" and i % 7:  # all 36 million take a second
            continue
        w = recipe(str(name), of_shape[i]).astype(np.float64).ravel()
        expected = [OFFICIAL[f"{config}.w_{of}"][i] for of in ("sum", "first", "last")]
        # The same numbers; only the order in which float64 sums them is free.
        np.testing.assert_allclose([w.sum(), w[0], w[-1]], expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("config", ["tiny", "cifar10"])
def test_output_and_loss(config, request):
    loss, out, *_ = request.getfixturevalue(config)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, OFFICIAL[f"{config}.out"], **ROUNDING)
    # A mean of thousands: their rounding averages out, that of the float32 sum is some 1e-7.
    np.testing.assert_allclose(loss, OFFICIAL[f"{config}.loss"], rtol=1e-6)


def test_activations_of_every_block(tiny):
    for name in OFFICIAL["tiny.act_names"]:
        found, expected = tiny[2][name], OFFICIAL[f"tiny.act.{name}"]
        # Rounding, relative to the largest value. In the time embedding the angles, up to 993, are
        # rounded to 6e-5, which a dense layer of 32 inputs turns into a few 1e-6.
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("config", ["tiny", "cifar10"])
def test_statistics_of_activations(config, request):
    acts = request.getfixturevalue(config)[2]
    for i, name in enumerate(OFFICIAL[f"{config}.act_names"]):
        act = np.asarray(acts[name], np.float64)
        mean, std, largest = (OFFICIAL[f"{config}.act_{of}"][i] for of in ("mean", "std", "absmax"))
        # As above.
        np.testing.assert_allclose(act.std(), std, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(act.mean(), mean, rtol=0, atol=1e-5 * std, err_msg=name)
        np.testing.assert_allclose(np.abs(act).max(), largest, rtol=1e-5, err_msg=name)


def check_gradients(config, grads):
    names = [str(name) for name in OFFICIAL[f"{config}.var_names"]]
    assert sorted(names) == sorted(grads)
    total = OFFICIAL[f"{config}.grad_global_norm"]
    # A bias of `k` shifts all logits of a softmax alike, a constant ahead of a normalisation is
    # taken out again: such gradients are zero but for rounding, some 1e-8 of the whole gradient.
    floor = 1e-7 * total
    squares = 0.0
    for i, name in enumerate(names):
        grad = np.asarray(grads[name], np.float64)
        norm, sum_ = OFFICIAL[f"{config}.grad_norm"][i], OFFICIAL[f"{config}.grad_sum"][i]
        squares += np.sum(grad**2)
        # Rounding forwards and backwards, a few 1e-6 of the gradient.
        np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=1e-5, atol=floor, err_msg=name)
        # Cauchy-Schwarz: the errors' sum is at most sqrt(n) times their norm, 2e-6 of the gradient.
        atol = 2e-6 * norm * math.sqrt(grad.size) + floor
        np.testing.assert_allclose(grad.sum(), sum_, rtol=0, atol=atol, err_msg=name)
        if f"{config}.grad.{name}" in OFFICIAL:
            full = OFFICIAL[f"{config}.grad.{name}"]
            atol = 1e-5 * np.abs(full).max()
            np.testing.assert_allclose(grad, full, rtol=0, atol=atol, err_msg=name)
    assert sum(f"{config}.grad.{name}" in OFFICIAL for name in names) == 5
    np.testing.assert_allclose(math.sqrt(squares), total, rtol=1e-6)


def test_gradients(tiny):
    check_gradients("tiny", tiny[3])


def test_gradients_with_the_kernels_of_training():
    loss, params = official_loss("tiny", **TRAINING)
    check_gradients("tiny", convert.to_official(jax.jit(jax.grad(lambda p: loss(p)[0]))(params)))


@pytest.mark.slow
def test_gradients_of_the_cifar10_network():
    loss, params = official_loss("cifar10", **jit_per_shape(**TRAINING))
    check_gradients("cifar10", convert.to_official(jax.grad(lambda p: loss(p)[0])(params)))


# --- The layers against the official code ---------------------------------------------------------


@pytest.mark.parametrize("dim", [128, 32, 33])
def test_time_embedding(dim):
    found = unet.time_embedding(jnp.asarray(OFFICIAL["temb.t"]), dim)
    # A frequency off by one rounding, 6e-8, is an angle off by 6e-5 at t = 999.
    np.testing.assert_allclose(found, OFFICIAL[f"temb.dim{dim}"], rtol=0, atol=1e-4)


def test_time_embedding_of_fractions():
    t, half = np.array([0.25, 17.5, 998.75]), 16
    angles = t[:, None] * np.exp(-math.log(10000) * np.arange(half) / (half - 1))
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    found = unet.time_embedding(jnp.asarray(t, jnp.float32), 2 * half)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # as above


def test_group_norm():
    x = jnp.asarray(OFFICIAL["gn.x"])
    found, _ = unet.GroupNorm().init_with_output(jax.random.key(0), x)
    # Values up to 4, summed over the 32 of a group: a few roundings of 2e-7.
    np.testing.assert_allclose(found, OFFICIAL["gn.out_default_init"], rtol=0, atol=3e-6)
    half, _ = unet.GroupNorm(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))  # rounded once, at the end


@pytest.mark.parametrize("channels, groups", [(64, 32), (32, 32), (48, 12), (8, 2), (6, 1)])
def test_group_norm_far_from_zero(channels, groups):
    x = (np.random.RandomState(0).randn(2, 6, 4, channels) + 1000).astype(np.float32)
    found, _ = unet.GroupNorm().init_with_output(jax.random.key(0), jnp.asarray(x))
    g = x.astype(np.float64).reshape(2, 6, 4, groups, channels // groups)
    axes = (1, 2, 4)
    expected = (g - g.mean(axes, keepdims=True)) / np.sqrt(g.var(axes, keepdims=True) + 1e-6)
    # The mean, near 1000, is known to 6e-5 in float32 and subtracted from values of size one.
    # E[x²] - E[x]² would leave a variance known to no better than 0.06.
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=0, atol=5e-4)


def test_downsampling_pads_at_the_bottom_and_right():
    kernel, bias = OFFICIAL["down.W"], np.zeros(4, np.float32)
    params = {"params": {"conv": {"kernel": kernel, "bias": bias}}}
    conv = lambda features, **options: nn.Conv(4, (3, 3), **options)  # noqa: E731
    found = unet.Downsample(conv).apply(params, jnp.asarray(OFFICIAL["down.x"]))
    # Sums of 18 products of values up to two.
    np.testing.assert_allclose(found, OFFICIAL["down.conv_stride2"], rtol=0, atol=2e-6)


def test_upsampling_repeats_pixels():
    kernel = np.zeros((3, 3, 2, 2), np.float32)
    kernel[1, 1] = np.eye(2)  # leaves the image as it is
    params = {"params": {"conv": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}}
    conv = functools.partial(nn.Conv, kernel_size=(3, 3))
    found = unet.Upsample(conv).apply(params, jnp.asarray(OFFICIAL["up.x"]))
    np.testing.assert_array_equal(found, OFFICIAL["up.noconv"])


def test_dropout_has_the_official_places():
    net = UNet(**TINY)  # its dropout is the default, the paper's
    params = {"params": weights(net, 16, 16)}
    seen = []

    def intercept(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dropout):
            return call(*args, **kwargs)
        assert context.module.rate == DROPOUT["rate"] and not kwargs["deterministic"]
        path = "/".join(["model", *context.module.path])
        seen.append(path.removesuffix("/dropout"))
        random = np.random.RandomState(zlib.crc32(path.encode()) % 2**32)
        (h,) = args
        return jnp.where(random.uniform(size=h.shape) >= DROPOUT["rate"], h / 0.9, 0)

    with nn.intercept_methods(intercept):
        out = run(net, params["params"], DROPOUT["x"], DROPOUT["t"], train=True)
    assert seen == list(DROPOUT["scopes"])
    np.testing.assert_allclose(out, DROPOUT["out"], **ROUNDING)


# --- Initialisation -------------------------------------------------------------------------------


def check_initialisation(config):
    kwargs, size, _ = NETWORKS[config]
    net = UNet(**kwargs)
    x, t = images(2, size, size, 3)
    key = jax.random.key(0, impl="rbg")  # compiles in a fourth of threefry's time
    params = jax.jit(lambda key: net.init(key, x, t, train=False))(key)["params"]
    ours = convert.to_official(params)
    limits = OFFICIAL[f"{config}.init.limit"]
    for name, limit in zip(OFFICIAL[f"{config}.var_names"], limits, strict=True):
        w = ours[str(name)].astype(np.float64)
        if limit == 0:
            np.testing.assert_array_equal(w, float(name.endswith("gamma")), err_msg=name)
            continue
        assert np.abs(w).max() <= limit * (1 + 1e-6), name  # the limit itself is rounded to float32
        # The standard deviation of n uniform numbers scatters by 0.45 / sqrt(n); five of these.
        rtol = 5 * 0.45 / math.sqrt(w.size)
        np.testing.assert_allclose(w.std(), limit / math.sqrt(3), rtol=rtol, err_msg=name)
        # Their mean scatters by the standard deviation / sqrt(n).
        assert abs(w.mean()) <= 5 * limit / math.sqrt(3 * w.size), name
    return net, params, x, t


def test_initialisation():
    out = run(*check_initialisation("tiny"))
    # One unseeded official draw, of other images: only the order of magnitude can be compared.
    rms, official = math.sqrt(np.mean(np.square(out))), OFFICIAL["tiny.init.output_rms"]
    assert official / 3 < rms < 3 * official


@pytest.mark.slow
def test_initialisation_of_the_cifar10_network():
    check_initialisation("cifar10")


# --- Invariants -----------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch():
    net = UNet(**SMALL)
    params = {"params": weights(net, 8, 8)}
    x, t = images(3, 8, 8, 3)
    apply = jax.jit(lambda x, t: net.apply(params, x, t, train=False))
    out = apply(x, t)
    # Its neighbours' values are no part of its sums: not even the last bit may change.
    others = apply(x.at[::2].set(jnp.nan), t.at[::2].set(0))
    np.testing.assert_array_equal(others[1], out[1])
    assert np.isnan(others[::2]).all()
    # Alone, its sums may be taken in another order.
    np.testing.assert_allclose(apply(x[1:2], t[1:2])[0], out[1], **ROUNDING)


@pytest.mark.parametrize("height, width", [(12, 20), (16, 24)])
def test_a_transposed_image_and_transposed_kernels_give_the_transposed_output(height, width):
    """Height and width are padded alike and never exchanged, at any even size."""
    net = UNet(**SMALL, attn_resolutions=(width // 2,))
    params = weights(net, height, width)
    assert "attn_0" in params["down_1"] and "attn_0" not in params["down_0"]
    transposed = jax.tree.map(lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w, params)
    x, t = images(2, height, width, 3)
    out = run(net, params, x, t)
    assert out.shape == (2, height, width, 3)
    other = run(net, transposed, x.swapaxes(1, 2), t)
    np.testing.assert_allclose(other.swapaxes(1, 2), out, **ROUNDING)


@pytest.mark.parametrize(
    "height, width, level", [(16, 16, 1), (32, 24, 2), (24, 32, 2), (8, 4, 0), (64, 8, None)]
)
def test_attention_is_where_the_longer_side_is_listed_and_always_in_the_middle(
    height, width, level
):
    params = shapes(UNet(ch=8, ch_mult=(1, 1, 1), attn_resolutions=(8,)), height, width)
    found = {name for name in params if any("attn" in part for part in params[name])}
    assert found == {"mid"} | ({f"down_{level}", f"up_{level}"} if level is not None else set())


def test_dropout_depends_on_its_key_and_only_in_training():
    net = UNet(**ONE_LEVEL)
    params = weights(net, 8, 8)
    x, t = images(2, 8, 8, 3)
    drop = jax.jit(lambda k: net.apply({"params": params}, x, t, train=True, rngs={"dropout": k}))
    a, b = jax.random.split(jax.random.key(0, impl="rbg"))
    out = run(net, params, x, t)  # without a key
    np.testing.assert_array_equal(drop(a), drop(a))
    assert np.abs(drop(a) - drop(b)).max() > 0.01 and np.abs(drop(a) - out).max() > 0.01
    without = run(UNet(**ONE_LEVEL, dropout=0.0), params, x, t, train=True)
    np.testing.assert_array_equal(without, out)


def test_the_output_depends_on_the_time_and_not_on_its_dtype():
    net = UNet(**ONE_LEVEL)
    x, t = images(2, 8, 8, 3)
    params = {"params": weights(net, 8, 8)}
    apply = jax.jit(lambda t: net.apply(params, x, t, train=False))
    np.testing.assert_array_equal(apply(t.astype(jnp.float32)), apply(t))
    # Groups of one channel would take out all that the time adds, and leave float32 rounding.
    assert np.abs(apply(t + 50) - apply(t)).max() > 0.1


@pytest.mark.parametrize("option", ["conv", "norm"])
def test_every_layer_uses_the_given_function(option):
    """By the numbers of kernels of three pixels and of normalisations in the parameter tree."""
    calls = []

    def counting(*args, **options):
        calls.append(args)
        return getattr(UNet, option)(*args, **options)

    net = UNet(**SMALL, attn_resolutions=(8,), **{option: counting})
    tree = jax.tree_util.tree_leaves_with_path(shapes(net, 8, 8))
    paths = [jax.tree_util.keystr(path) for path, _ in tree]
    expected = {
        "conv": lambda path, a: a.shape[:2] == (3, 3),
        "norm": lambda path, a: "scale" in path,
    }
    layers = [path for path, (_, a) in zip(paths, tree, strict=True) if expected[option](path, a)]
    assert len(calls) == len(layers) > 10


def test_remat_changes_memory_and_nothing_else():
    """In training: loss and gradients are the same, and the blocks are computed twice."""
    x, t = images(2, 8, 8, 3)
    key = jax.random.key(1, impl="rbg")
    options = ONE_LEVEL | {"dropout": 0.3} | jit_per_shape(**TRAINING)
    assert shapes(UNet(**options, remat=True), 8, 8) == shapes(UNet(**options), 8, 8)
    params = weights(UNet(**options), 8, 8)
    found = []
    for remat in (False, True):

        def loss(params, net=UNet(**options, remat=remat)):  # noqa: B008
            out = net.apply({"params": params}, x, t, train=True, rngs={"dropout": key})
            return jnp.sum((out - x) ** 2)

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
        found.append((*jax.value_and_grad(loss)(params), jaxpr.count("conv_with_vjp")))
    (value, gradients, n), (value_remat, gradients_remat, n_remat) = found
    assert n_remat > n  # the blocks' convolutions are there twice
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)  # summed in another order
    atol = 1e-6 * max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    for a, b in zip(*map(jax.tree.leaves, (gradients_remat, gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


# --- bfloat16 -------------------------------------------------------------------------------------


def operations(jaxpr):
    """Every primitive with the dtypes of its operands, those inside nested functions too."""
    for eqn in jaxpr.eqns:
        nested = [p for p in eqn.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
        for inner in nested:
            yield from operations(getattr(inner, "jaxpr", inner))
        if not nested:
            yield eqn.primitive.name, {str(v.aval.dtype) for v in eqn.invars}


def test_bfloat16():
    net = UNet(**TINY, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes(net, 16, 16))} == {"float32"}
    params = weights(net, 16, 16)
    x, t = jnp.asarray(OFFICIAL["tiny.x"]), jnp.asarray(OFFICIAL["tiny.t"])

    # Everything that sums many numbers or has a large range is float32 …
    apply = lambda params: net.apply({"params": params}, x, t, train=False)  # noqa: E731
    ops = list(operations(jax.make_jaxpr(apply)(params).jaxpr))
    for name in ("reduce_sum", "reduce_max", "exp", "rsqrt", "sin", "cos"):
        assert (found := [dtypes for op, dtypes in ops if op == name]), name
        assert all(dtypes == {"float32"} for dtypes in found), name
    # … convolutions but the last, and products but those of the time embedding, are not.
    convs = [dtypes for op, dtypes in ops if op == "conv_general_dilated"]
    assert convs[-1] == {"float32"} and all(dtypes == {"bfloat16"} for dtypes in convs[:-1])
    dots = [dtypes for op, dtypes in ops if op == "dot_general"]
    assert dots[:2] == [{"float32"}] * 2 and all(dtypes == {"bfloat16"} for dtypes in dots[2:])

    out = run(net, params, x, t)
    assert out.dtype == jnp.float32
    # Some sixty roundings of 2^-9 in a row: sqrt(60) * 2^-9 = 1.5 % of the output; twice that.
    # Less than 0.1 % would mean that nothing was computed in bfloat16.
    error, size = (math.sqrt(np.mean(a**2)) for a in (out - OFFICIAL["tiny.out"], out))
    assert 0.001 < error / size < 0.03


def test_bfloat16_gradients_are_float32():
    net = UNet(**SMALL, dtype=jnp.bfloat16)
    params = weights(net, 8, 8)
    x, t = images(1, 8, 8, 3)
    loss = lambda params: jnp.sum(net.apply({"params": params}, x, t, train=False))  # noqa: E731
    grads = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


# --- Classes --------------------------------------------------------------------------------------


def test_a_class_adds_its_row_to_the_time_embedding():
    """Which equals a larger bias in the last layer of the time embedding."""
    classes = 4
    plain, conditional = UNet(**ONE_LEVEL), UNet(**ONE_LEVEL, num_classes=classes)
    params = weights(plain, 8, 8)
    x, t = images(2, 8, 8, 3)
    table = np.random.RandomState(1).randn(classes + 1, 32).astype(np.float32)
    assert shapes(conditional, 8, 8)["class_emb"]["embedding"].shape == table.shape
    params = params | {"class_emb": {"embedding": table}}

    @jax.jit
    def biased(row):
        dense1 = params["temb"]["dense1"]
        temb = params["temb"] | {"dense1": dense1 | {"bias": dense1["bias"] + row}}
        return plain.apply({"params": params | {"temb": temb}}, x, t, train=False)

    apply = jax.jit(lambda y: conditional.apply({"params": params}, x, t, y, train=False))
    two, none = apply(jnp.array([2, 2])), run(conditional, params, x, t)
    assert np.abs(two - none).max() > 0.1  # an ignored label would pass all that follows
    np.testing.assert_allclose(two, biased(table[2]), **ROUNDING)
    np.testing.assert_allclose(none, biased(table[classes]), **ROUNDING)
    # In a batch each image has its own class; a label out of range is not taken for another.
    mixed = apply(jnp.array([classes, 2]))
    np.testing.assert_allclose(mixed[0], none[0], **ROUNDING)
    np.testing.assert_array_equal(mixed[1], two[1])
    assert np.isnan(apply(jnp.array([classes + 1, 2]))[0]).all()


def test_scale_and_shift_are_those_of_the_second_normalisation():
    """With constant scale s and shift b, norm2 has its own scale times 1 + s, and its bias with b.

    The reference is the block that adds an embedding of 0.
    """
    key, c = random.key(0), 8
    layers = {
        "conv": functools.partial(nn.Conv, kernel_size=(3, 3)),
        "dense": nn.Dense,
        "dropout": 0.0,
    }
    blocks = [unet.ResBlock(c, norm=unet.GroupNorm, scale_shift=on, **layers) for on in (0, 1)]
    x, temb = random.normal(key, (2, 4, 4, c)), random.normal(key, (2, 16))
    plain, scaled = (block.init(key, x, temb, False)["params"] for block in blocks)
    assert scaled["temb_proj"]["kernel"].shape == (16, 2 * c)
    s, b, scale, bias = random.normal(random.key(1), (4, c))
    kernel2 = random.normal(random.key(2), plain["conv2"]["kernel"].shape)
    shared = {name: plain[name] for name in ("norm1", "conv1")} | {"conv2": {"kernel": kernel2}}
    shared["conv2"]["bias"] = plain["conv2"]["bias"]
    constant = {"kernel": jnp.zeros((16, 2 * c)), "bias": jnp.concatenate([s, b])}
    scaled = shared | {"temb_proj": constant, "norm2": {"scale": scale, "bias": bias}}
    nothing = {"kernel": jnp.zeros((16, c)), "bias": jnp.zeros(c)}
    changed = {"scale": scale * (1 + s), "bias": bias * (1 + s) + b}
    plain = shared | {"temb_proj": nothing, "norm2": changed}
    found, expected = (
        block.apply({"params": params}, x, temb, False)
        for block, params in zip(blocks[::-1], (scaled, plain), strict=True)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_class_and_time_embedding_start_at_the_same_scale():
    net = UNet(**SMALL | {"ch": 128}, num_classes=10)
    x, t = images(64, 8, 8, 3)

    @jax.jit
    def embeddings(key):
        params = net.init(key, x, t, train=False)["params"]
        temb = unet.TimeEmbedding(128).apply({"params": params["temb"]}, t)
        return temb, params["class_emb"]["embedding"]

    temb, table = embeddings(jax.random.key(0))
    # Neither dominates their sum; there is no better reference for the ratio.
    assert 1 / 2 < np.std(table) / np.std(temb) < 2


# --- Errors ---------------------------------------------------------------------------------------

IMAGE, TIME = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)


@pytest.mark.parametrize(
    "config, x, t, y, message",
    [
        ({}, IMAGE[:, :, :7], TIME, None, "divisible by 2 for 2 levels, found 8x7; resize"),
        ({}, IMAGE[:, :7], TIME, None, "divisible by 2 for 2 levels, found 7x8; resize"),
        ({"ch_mult": (1, 1, 1, 1)}, IMAGE[:, :4], TIME, None, "divisible by 8.*found 4x8; resize"),
        ({}, IMAGE[0], TIME, None, r"\[b, h, w, c\].*found float32\[8, 8, 3\]"),
        ({}, IMAGE.astype(np.uint8), TIME, None, r"float.*in \[-1, 1\], found uint8"),
        ({}, IMAGE, np.zeros(2, np.int32), None, r"one time per image, \[1\], found \[2\]"),
        ({}, IMAGE, 5, None, r"one time per image, \[1\], found \[\]"),
        ({}, IMAGE, TIME, TIME, "y: expected None without classes, found labels; set num_classes"),
        ({"num_classes": 2}, IMAGE, TIME, np.zeros(2, np.int32), r"\[1\], found int32\[2\]"),
        ({"num_classes": 2}, IMAGE, TIME, np.zeros(1), r"integer label.*, found float64\[1\]"),
        ({"ch": 2}, IMAGE, TIME, None, "4 channels or more, found 2; use a larger ch"),
        ({"attention_head_dim": 3}, IMAGE, TIME, None, "expected a divisor of 16, found 3"),
    ],
)
def test_errors_say_what_was_expected_in_one_line(config, x, t, y, message):
    net = UNet(**SMALL | config)
    with pytest.raises(ValueError, match=message) as error:
        net.init(jax.random.key(0), x, t, y, train=False)
    assert "\n" not in str(error.value)
