"""Winograd's convolutions against sums in float64, against their adjoints, and their dispatch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.kernels import winograd
from diffusion.kernels.winograd import F2, F4
from diffusion.sharding import batch_sharded, replicated


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def windows(x):
    """The 3x3 shifted images [b, h, w, c], float64, that a 'SAME' convolution multiplies."""
    _, height, width, _ = x.shape
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[x[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]


def exact(x, kernel):
    shifted = windows(x)
    return sum(shifted[i][j] @ kernel[i, j] for i in range(3) for j in range(3))


def exact_input_gradient(g, kernel):
    """Convolves with the kernel rotated by 180 degrees, its channels exchanged."""
    return exact(g, kernel[::-1, ::-1].swapaxes(2, 3))


def exact_kernel_gradient(x, g):
    """sum(g * conv(x, k)) = sum(k * gradient(x, g)), for the kernels that are 1 at one place."""
    pixels = -1, g.shape[-1]
    rows = ([a.reshape(-1, x.shape[-1]).T @ g.reshape(pixels) for a in row] for row in windows(x))
    return np.array(list(rows))


# --- The transforms ------------------------------------------------------------------------------

# Distance from the exact sum, relative to the largest: float32 rounds sums of up to 288 products,
# of up to 1,280 where they are over the pixels.
SUMS, SUMS_OVER_PIXELS = {F2: 2e-6, F4: 3e-5}, {F2: 3e-6, F4: 3e-5}
SHAPES = [
    *((F2, *shape) for shape in [(1, 2, 2, 1, 1), (2, 4, 6, 3, 5), (3, 8, 2, 16, 8)]),
    *((F4, *shape) for shape in [(1, 4, 4, 1, 1), (2, 4, 12, 3, 5), (3, 8, 4, 16, 8)]),
    *((f, 5, 16, 16, 32, 64) for f in (F2, F4)),
]


@pytest.mark.parametrize("f, b, height, width, c, o", SHAPES)
def test_convolution_and_gradients_are_the_exact_sums(f, b, height, width, c, o):
    x, kernel, g = (
        normal(0, b, height, width, c),
        normal(1, 3, 3, c, o),
        normal(2, b, height, width, o),
    )
    expected = exact(x, kernel), exact_input_gradient(g, kernel), exact_kernel_gradient(x, g)
    # The expected gradients are adjoints: <g, conv(x, k)> = <grad_x, x> = <grad_k, k>.
    product = (g * expected[0]).sum()
    np.testing.assert_allclose((expected[1] * x).sum(), product, rtol=1e-6)
    np.testing.assert_allclose((expected[2] * kernel).sum(), product, rtol=1e-6)

    @jax.jit
    def ours(x, kernel, g):
        gradients = winograd.input_gradient(g, kernel, f), winograd.kernel_gradient(x, g, f)
        return winograd.conv_3x3(x, kernel, f), *gradients

    tolerances = SUMS[f], SUMS[f], SUMS_OVER_PIXELS[f]
    for found, sums, tolerance in zip(ours(x, kernel, g), expected, tolerances, strict=True):
        np.testing.assert_allclose(found, sums, rtol=0, atol=tolerance * np.abs(sums).max())


@pytest.mark.parametrize("f", [F2, F4])
def test_the_matrices_are_exact(f):
    """sum_k A[p, k] G[k, q] B[k, s] is 1 where s = p + q, and else 0, to float64's digits."""
    a, g, b = (np.float64(matrix) for matrix in (f.A, f.G, f.B))
    found = np.einsum("pk,kq,ks->pqs", a, g, b)
    p, q, s = np.indices((f.m, 3, f.m + 2))
    np.testing.assert_allclose(found, s == p + q, atol=1e-14)


@pytest.mark.parametrize("f, side, atol", [(F2, 4, 1e-5), (F4, 8, 1e-3)])
def test_the_size_of_the_chunks_changes_nothing(monkeypatch, f, side, atol):
    """The numbers are the same, and a chunk has as many images as there is room for."""
    x, g = normal(0, 6, side, side, 8), normal(2, 6, side, side, 8)
    kernel = normal(1, 3, 3, 8, 8)
    split_batch, sizes, first = winograd._split_batch, [], None

    def recording_split_batch(*args):
        chunks = split_batch(*args)
        sizes.append(chunks[0].shape[1])
        return chunks

    monkeypatch.setattr(winograd, "_split_batch", recording_split_batch)
    image = 8 * (side // f.m) ** 2  # tiles of one, once per channel
    for tiles, kernel_tiles in ((1, image), (2 * image, 4 * image), (10**6, 10**6)):
        monkeypatch.setattr(winograd, "TILES_PER_CHUNK", tiles)
        monkeypatch.setattr(winograd, "TILES_PER_KERNEL_CHUNK", kernel_tiles)
        found = jax.jit(
            lambda x, kernel, g: (
                winograd.conv_3x3(x, kernel, f),
                winograd.kernel_gradient(x, g, f),
            )
        )(x, kernel, g)
        first = first or found
        for a, b in zip(found, first, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    assert sizes == [1, 1, 2, 3, 6, 6]  # divisors of six images


@pytest.mark.parametrize("f, side, rtol", [(F2, 6, 0), (F4, 8, 1e-6)])
def test_constants(f, side, rtol):
    """A pixel far from the border gives 9 c, a corner 4 c; by F2, of small integers, exactly."""
    x, kernel = jnp.ones((1, side, side, 4)), jnp.ones((3, 3, 4, 2))
    y = jax.jit(winograd.conv_3x3, static_argnums=2)(x, kernel, f)
    np.testing.assert_allclose(y[0, 1:-1, 1:-1], 36, rtol=rtol)
    np.testing.assert_allclose(y[0, 0, 0], 16, rtol=rtol)


@pytest.mark.parametrize(
    "f, height, width", [(F2, 1, 1), (F2, 4, 3), (F2, 5, 4), (F4, 6, 4), (F4, 4, 2)]
)
def test_sizes_that_tiles_do_not_cover_are_refused(f, height, width):
    x, kernel = jnp.ones((1, height, width, 2)), jnp.ones((3, 3, 2, 2))
    message = f"height and width that {f.m} divides, found {height}x{width}"
    for call in (winograd.conv_3x3, winograd.input_gradient):
        with pytest.raises(ValueError, match=message):
            call(x, kernel, f)
    with pytest.raises(ValueError, match=message):
        winograd.kernel_gradient(x, x, f)


# --- The dispatch --------------------------------------------------------------------------------

OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def evaluation(x, kernel, strides=(1, 1), mesh=None):
    return winograd.conv(x, kernel, strides, "SAME", mesh=mesh, **OPTIONS)


def training(x, kernel, strides=(1, 1), mesh=None):
    return winograd.conv_with_vjp(x, kernel, strides, "SAME", mesh=mesh, **OPTIONS)


both = pytest.mark.parametrize("conv", [evaluation, training])


def jaxpr(f, x_shape, kernel_shape, dtype="float32"):
    shapes = (jax.ShapeDtypeStruct(s, dtype) for s in (x_shape, kernel_shape))
    return str(jax.make_jaxpr(f)(*shapes))


def with_gradients(conv):
    def run(x, kernel, g):
        y, vjp = jax.vjp(conv, x, kernel)
        return y, *vjp(g)

    return jax.jit(run)


def assert_exact(found, x, kernel, g, tolerance):
    expected = exact(x, kernel), exact_input_gradient(g, kernel), exact_kernel_gradient(x, g)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_images_larger_than_the_cache_use_xla():
    shapes = (1, 128, 128, 128), (3, 3, 128, 128)
    for conv in (evaluation, training):
        assert "dot_general" not in jaxpr(conv, *shapes)
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    text = jax.jit(jax.grad(lambda *a: training(*a).sum(), 1)).lower(x, kernel).as_text()
    products = re.findall(r"dot_general.*-> tensor<6x128x128xf32>", text)
    assert len(products) >= 6  # the kernel's gradient does not: 36 products, in rows of six


@pytest.mark.parametrize(
    "height, width, f",
    [(16, 16, F4), (32, 16, F4), (8, 8, F2), (18, 16, F2), (16, 18, F2), (16, 8, F2)],
)
def test_training_uses_f4_where_it_fits(monkeypatch, height, width, f):
    """Where there are four tiles or more along each side; F2 gives the right numbers elsewhere."""
    monkeypatch.setattr(winograd, "MIN_WORK_WITH_VJP", 0)
    x, kernel = normal(0, 2, height, width, 32), normal(1, 3, 3, 32, 32) / 17
    g = normal(2, 2, height, width, 32)
    rows = f"f32[{f.m + 2},32,32]"  # of the transformed kernel
    assert rows in jaxpr(training, x.shape, kernel.shape)
    assert_exact(with_gradients(training)(x, kernel, g), x, kernel, g, tolerance=3e-5)


@pytest.fixture(scope="module")
def large():
    """x, kernel and g of a convolution that both transforms apply to."""
    x, kernel = normal(0, 8, 16, 16, 128), normal(1, 3, 3, 128, 128) / 34
    g = normal(2, 8, 16, 16, 128)
    return x, kernel, g


@pytest.mark.parametrize(
    "conv, devices",
    [(evaluation, None), (evaluation, 1), (evaluation, 4), (training, 1), (training, 4)],
)
def test_large_convolutions_and_their_gradients(monkeypatch, large, conv, devices):
    """On one device, and sharded over the devices of a mesh."""
    for name in ("TILES_PER_CHUNK", "TILES_PER_KERNEL_CHUNK"):
        monkeypatch.setattr(winograd, name, 1)  # an image at a time
    x, kernel, g = large
    is_training = conv is training
    if devices:
        chosen = jax.devices()[:devices]
        mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=chosen)
        x, g = jax.device_put((x, g), batch_sharded(mesh))
        kernel = jax.device_put(kernel, replicated(mesh))
        conv = functools.partial(conv, mesh=mesh)
    assert "dot_general" in jaxpr(conv, x.shape, kernel.shape)  # or XLA's is compared with itself
    compiled = with_gradients(conv).lower(x, kernel, g).compile()
    if devices == 4 and is_training:  # only the kernel's gradient is summed
        assert "all-gather" not in compiled.as_text()
    # Sums of 1,152 products forwards, of 2,048 backwards.
    tolerance = 3e-5 if is_training else 5e-6
    assert_exact(compiled(x, kernel, g), *large, tolerance)


def test_a_batch_that_the_mesh_does_not_divide():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    shapes = (1, 16, 16, 128), (3, 3, 128, 128)
    for conv in (evaluation, training):
        assert "shard_map" not in jaxpr(functools.partial(conv, mesh=mesh), *shapes)
        assert "shard_map" in jaxpr(functools.partial(conv, mesh=mesh), (4, 16, 16, 128), shapes[1])


def test_the_convolution_of_evaluation_has_a_jvp(large):
    """The divergence of the probability flow is made of these."""
    x, kernel, v = large[0][:1], large[1], large[2][:1]
    found = jax.jit(lambda x, v: jax.jvp(lambda x: evaluation(x, kernel), (x,), (v,))[1])(x, v)
    expected = exact(v, kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "shape, kernel, stride, dtype",
    [
        ((1, 8, 8, 128), (3, 3, 128, 128), 1, "float32"),  # a small image
        ((1, 32, 32, 32), (3, 3, 32, 32), 1, "float32"),  # few channels
        ((1, 64, 64, 256), (3, 3, 256, 16), 1, "float32"),  # few channels of the output
        ((1, 33, 64, 128), (3, 3, 128, 128), 1, "float32"),  # an odd height
        ((1, 64, 64, 128), (3, 3, 128, 128), 2, "float32"),
        ((1, 64, 64, 128), (1, 1, 128, 128), 1, "float32"),
        ((1, 64, 64, 128), (3, 3, 128, 128), 1, "bfloat16"),
    ],
)
@both
def test_every_other_convolution_is_xla_s(conv, shape, kernel, stride, dtype):
    assert "dot_general" in jaxpr(conv, (1, 64, 64, 128), (3, 3, 128, 128))
    f = functools.partial(conv, strides=(stride, stride))
    assert "dot_general" not in jaxpr(f, shape, kernel, dtype)


@pytest.mark.parametrize("option", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 2}])
def test_dilated_and_grouped_convolutions_are_xla_s(option):
    groups = option.get("feature_group_count", 1)
    x, kernel = (1, 64, 64, 128 * groups), (3, 3, 128, 128)
    for conv in (winograd.conv, winograd.conv_with_vjp):
        f = functools.partial(conv, strides=(1, 1), padding="SAME", **OPTIONS, **option)
        assert "dot_general" not in jaxpr(f, x, kernel)


def test_only_cpus_use_winograd():
    shape = jax.ShapeDtypeStruct((1, 16, 16, 128), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    gradient = jax.jit(jax.grad(lambda *a: training(*a).sum(), (0, 1)))

    def lowered(*platforms):
        return jax.export.export(gradient, platforms=platforms)(shape, kernel).mlir_module()

    accelerators = lowered("tpu", "cuda")
    assert "dot_general" not in accelerators and "stablehlo.convolution" in accelerators
    assert "stablehlo.convolution" not in lowered("cpu")
