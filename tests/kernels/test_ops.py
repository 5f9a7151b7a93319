"""Normalisation, convolution and attention: closed forms in float64, and their gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffusion import unet
from diffusion.kernels import ops, winograd
from diffusion.kernels.winograd import F2, F4
from diffusion.sharding import batch_sharded, replicated
from diffusion.unet import UNet


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


# --- Normalisation -------------------------------------------------------------------------------


def normalised(x, scale, bias, groups):
    """The textbook: mean and variance of a group, each by itself, in the dtype of x."""
    b, h, w, c = x.shape
    g = x.reshape(b, h * w, groups, c // groups)
    mean = g.mean(axis=(1, 3), keepdims=True)
    variance = ((g - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    y = ((g - mean) / (variance + 1e-6) ** 0.5).reshape(x.shape)
    return nn.swish(y * scale[None, None, None] + bias[None, None, None])


def in_float64(f, *args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, f(*(jnp.asarray(a, jnp.float64) for a in args)))


@pytest.mark.parametrize("norm", [ops.group_norm, ops.group_norm_in_training])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_gradients_of_the_normalisation_are_those_of_the_textbook(groups, norm):
    x, scale, bias, g = (
        normal(0, 2, 6, 4, 8) + 3,
        normal(1, 8) + 1,
        normal(2, 8),
        normal(3, 2, 6, 4, 8),
    )

    def ours(x, scale, bias):
        return norm(x, scale, bias, groups, nn.swish, jnp.float32)

    def theirs(x, scale, bias):
        return normalised(x, scale, bias, groups)

    def gradients(f):
        return lambda x, scale, bias, g: jax.vjp(f, x, scale, bias)[1](g)

    args = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias, g)]
    found = jax.jit(gradients(ours))(*args)
    expected = in_float64(gradients(theirs), x, scale, bias, g)
    for a, b in zip(found, expected, strict=True):
        # Sums of up to 192 float32 products.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    if norm is ops.group_norm_in_training:
        return
    # The way forward too: the divergence of the probability flow is made of these.
    tangent = jax.jvp(lambda x: ours(x, *args[1:3]), (args[0],), (args[3],))[1]
    expected = in_float64(
        lambda x, s, b, g: jax.jvp(lambda x: theirs(x, s, b), (x,), (g,))[1], x, scale, bias, g
    )
    np.testing.assert_allclose(tangent, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_pixel_far_from_the_others_costs_no_digits():
    """The middle pixel, around which the moments are taken, 30 standard deviations off."""
    x = normal(0, 1, 16, 16, 8)
    x[:, 8, 8] = 30
    ones, zeros = np.ones(8), np.zeros(8)
    args = [jnp.asarray(a, jnp.float32) for a in (x, ones, zeros)]
    found = ops.group_norm(*args, 2, nn.swish, jnp.float32)
    expected = in_float64(lambda *a: normalised(*a, 2), x, ones, zeros)
    # E[d²] - E[d]² is then 900 times the variance: 900 * 6e-8 of it is lost, half of that of y.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_only_the_input_and_two_numbers_a_channel_are_kept():
    x, c = jnp.zeros((2, 8, 8, 16), jnp.bfloat16), jnp.ones(16)
    f = lambda x, s, b: ops.group_norm_in_training(x, s, b, 4, nn.swish, jnp.bfloat16)  # noqa: E731
    kept = [a.size for a in jax.tree.leaves(jax.vjp(f, x, c, c)[1])]
    assert kept.count(x.size) == 1 and sorted(kept)[-2] <= 2 * 16


# --- Convolution ---------------------------------------------------------------------------------

OPTIONS = {"dimension_numbers": ops.DIMENSIONS}


def of_xla(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **OPTIONS)


def ours(x, kernel, strides=(1, 1)):
    return ops.convolve(x, kernel, strides, "SAME", **OPTIONS)


def in_training(x, kernel, strides=(1, 1)):
    return ops.convolve_in_training(x, kernel, strides, "SAME", **OPTIONS)


def traced(f, shape, kernel, dtype="float32"):
    return str(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, dtype) for s in (shape, kernel))))


def with_gradients(f, g):
    def run(x, kernel):
        y, pull = jax.vjp(f, x, kernel)
        return y, *pull(g)

    return jax.jit(run)


def test_an_image_beyond_the_cache_is_xla_s():
    shapes = (1, 128, 128, 128), (3, 3, 128, 128)
    for convolve in (ours, in_training):
        assert "dot_general" not in traced(convolve, *shapes)
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    text = jax.jit(jax.grad(lambda *a: in_training(*a).sum(), 1)).lower(x, kernel).as_text()
    products = re.findall(r"dot_general.*-> tensor<6x128x128xf32>", text)
    assert len(products) >= 6  # the gradient by the kernel is not: 36 products, in rows of six


@pytest.mark.parametrize(
    "height, width, f",
    [(16, 16, F4), (32, 16, F4), (8, 8, F2), (18, 16, F2), (16, 18, F2), (16, 8, F2)],
)
def test_training_takes_large_tiles_where_they_fit_and_pay(height, width, f):
    """Four along each side, of four pixels; else two pixels, and the right numbers all the same."""
    x, kernel = normal(0, 2, height, width, 256), normal(1, 3, 3, 256, 256) / 48
    g = normal(2, 2, height, width, 256)
    x, kernel, g = (jnp.asarray(a, jnp.float32) for a in (x, kernel, g))
    rows = f"f32[{f.m + 2},256,256]"  # of the transformed kernel
    assert rows in traced(in_training, x.shape, kernel.shape)
    found, expected = (with_gradients(h, g)(x, kernel) for h in (in_training, of_xla))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(a).max())


@pytest.mark.parametrize("convolve", [ours, in_training])
@pytest.mark.parametrize("devices", [0, 1, 4])
def test_a_large_convolution_is_xla_s_with_its_gradients(monkeypatch, convolve, devices):
    """Also where the images are cut over devices, and the caller has said so."""
    for name in ("TILES", "TILES_BY_KERNEL"):
        monkeypatch.setattr(winograd, name, 1)  # an image at a time
    x, kernel = normal(0, 8, 16, 16, 128), normal(1, 3, 3, 128, 256) / 34
    g = normal(2, 8, 16, 16, 256)
    x, kernel, g = (jnp.asarray(a, jnp.float32) for a in (x, kernel, g))
    expected = with_gradients(of_xla, g)(x, kernel)
    assert "dot_general" in traced(convolve, x.shape, kernel.shape)  # or nothing is compared
    if devices:
        chosen = jax.devices()[:devices]
        mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=chosen)
        x, g = jax.device_put((x, g), batch_sharded(mesh))
        kernel = jax.device_put(kernel, replicated(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = with_gradients(convolve, g).lower(x, kernel)
        compiled = program.compile()
        found = compiled(x, kernel)
        if convolve is in_training and devices > 1:  # the gradient's sum, and nothing else
            assert "all-gather" not in compiled.as_text()
    else:
        found = with_gradients(convolve, g)(x, kernel)
    for a, b in zip(expected, found, strict=True):
        # Sums of 1,152 and 2,304 products forwards, of 2,048 backwards, in another order.
        atol = 3e-5 if convolve is in_training else 5e-6  # F4, F2
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(a).max())


def test_the_way_forward_too():
    """The divergence of the probability flow is made of these."""
    x, kernel, v = normal(0, 1, 16, 16, 128), normal(1, 3, 3, 128, 128), normal(2, 1, 16, 16, 128)
    x, kernel, v = (jnp.asarray(a, jnp.float32) for a in (x, kernel, v))
    found = jax.jvp(lambda x: ours(x, kernel), (x,), (v,))[1]
    expected = of_xla(v, kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "shape, kernel, stride, dtype",
    [
        ((1, 8, 8, 128), (3, 3, 128, 128), 1, "float32"),  # a small image
        ((1, 32, 32, 32), (3, 3, 32, 32), 1, "float32"),  # few channels
        ((1, 64, 64, 256), (3, 3, 256, 16), 1, "float32"),  # few come out
        ((1, 33, 64, 128), (3, 3, 128, 128), 1, "float32"),  # of an odd height
        ((1, 64, 64, 128), (3, 3, 128, 128), 2, "float32"),
        ((1, 64, 64, 128), (1, 1, 128, 128), 1, "float32"),
        ((1, 64, 64, 128), (3, 3, 128, 128), 1, "bfloat16"),
    ],
)
@pytest.mark.parametrize("convolve", [ours, in_training])
def test_every_other_convolution_is_left_alone(convolve, shape, kernel, stride, dtype):
    assert "dot_general" in traced(convolve, (1, 64, 64, 128), (3, 3, 128, 128))
    f = functools.partial(convolve, strides=(stride, stride))
    assert "dot_general" not in traced(f, shape, kernel, dtype)


def test_only_a_cpu_takes_winograd_s_way():
    def lowered(platform):
        shape = jax.ShapeDtypeStruct((1, 32, 32, 128), jnp.float32)
        kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
        gradient = jax.jit(jax.grad(lambda *a: in_training(*a).sum(), (0, 1)))
        return gradient.trace(shape, kernel).lower(lowering_platforms=(platform,)).as_text()

    for platform in ("tpu", "cuda"):
        text = lowered(platform)
        assert "dot_general" not in text and "stablehlo.convolution" in text
    assert "stablehlo.convolution" not in lowered("cpu")


# --- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_attention_is_the_formula(dtype, atol):
    q, k, v = (jnp.asarray(normal(i, 2, 6, 8), dtype) for i in range(3))
    found = ops.attention(q, k, v)
    assert found.dtype == dtype
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    weights = np.exp(np.einsum("bic,bjc->bij", q, k) / np.sqrt(8))
    expected = (weights / weights.sum(axis=2, keepdims=True)) @ v
    # float32: some roundings of values up to two; bfloat16: weights and result are rounded to 2^-9.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=atol)


# --- The whole network with an option on, and off ------------------------------------------------


def test_rematerialisation_changes_memory_and_nothing_else():
    x = jnp.asarray(normal(0, 2, 8, 8, 3), jnp.float32)
    t, key = jnp.asarray([3, 500]), jax.random.key(1, impl="rbg")
    params = None
    found = []
    for remat in (False, True):
        net = UNet(ch=8, ch_mult=(1, 2), num_res_blocks=1, dropout=0.3, remat=remat)
        made = jax.jit(lambda key, net=net: net.init(key, x, t, train=False))(key)
        params = params or made
        assert jax.tree.structure(made) == jax.tree.structure(params)

        def loss(params, net=net):
            out = net.apply(params, x, t, train=True, rngs={"dropout": key})
            return jnp.sum((out - x) ** 2)

        found.append(jax.jit(jax.value_and_grad(loss))(params))
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        found[-1] += (text.count("conv_general_dilated"),)
    (plain, gradients, n), (again, same, more) = found
    assert more > n  # the blocks' convolutions are there twice
    np.testing.assert_allclose(again, plain, rtol=1e-6)  # the same dropout, summed in another order
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), same, gradients)


def test_same_is_nothing():
    x = jnp.arange(3.0)
    assert unet.same(x) is x
