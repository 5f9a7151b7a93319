"""The FID network against torch-fidelity's, and its parts against closed forms."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import convert
from diffusion.metrics import inception
from tests.conftest import AS_SHIPPED, GOLDEN

# Origin: torch-fidelity 0.4.0 (feature_extractor_inceptionv3.py) on torch 2.13.0, in float64, with
# the weights of `recipe`. "spatial" by a hook on Mixed_6d.branch1x1, its first 7 channels, NHWC.
TRUTH = dict(np.load(GOLDEN / "inception.npz"))
SIZES = (32, 256, 299)
FEATURES = ("64", "192", "768", "2048", "logits", "logits_unbiased", "spatial")


def recipe(name, shape):
    """The weights that the reference results were computed with: float32, by name and shape."""
    z = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
    match name.split(".")[-1]:
        case "running_var":
            z = np.exp(0.2 * z)
        case "running_mean" | "bias":
            z = 0.1 * z
        case _ if len(shape) == 1:
            z = 1 + 0.1 * z
        case _:
            z = z * np.sqrt(2 / np.prod(shape[1:]))
    return z.astype(np.float32)


@functools.cache
def weights():
    """Returns {torch-fidelity's name: array} of the network."""
    shapes = json.loads(str(TRUTH["shapes_json"]))
    pairs = zip(map(str, TRUTH["names"]), shapes, strict=True)
    return {name: recipe(name, shape) for name, shape in pairs}


def test_the_weights_are_the_reference_s():
    sums = [array.sum(dtype=np.float64) for array in weights().values()]
    np.testing.assert_allclose(sums, TRUTH["w_sum"], rtol=1e-6, atol=1e-6)


@functools.cache
def features():
    """Returns {name: [n, ...]} for the images of all sizes in one batch."""
    params = inception.fold(convert.from_inception(weights()))
    x = jnp.concatenate([inception.preprocess(TRUTH[f"x{size}"]) for size in SIZES])
    return jax.jit(inception.Inception().apply)({"params": params}, x)


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_the_reference_s(name):
    theirs = np.concatenate([TRUTH[f"out{size}.{name}"] for size in SIZES])
    ours = features()[name]
    assert ours.dtype == jnp.float32 and ours.shape == theirs.shape
    # Float32 against float64 through 20 layers; PyTorch's own float32 is off by 1e-6 of the scale.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_there_are_no_other_features():
    assert features().keys() == set(FEATURES)
    assert features()["spatial"].shape[1:] == (17 * 17 * 7,)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_resized_as_by_tensorflow(size):
    ours = inception.preprocess(TRUTH[f"x{size}"])
    assert ours.shape[1:] == (299, 299, 3) and ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours[:, ::13, ::13], TRUTH[f"pre{size}.sub"])


@pytest.mark.parametrize("h, w", [(1, 1), (2, 5), (32, 32), (300, 27), (601, 298)])
def test_a_ramp_stays_a_ramp(h, w):
    """Bilinear interpolation is exact up to the last pixel, beyond which the border is repeated."""
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    ramp = (y + 0.25 * x)[None, :, :, None].astype(np.float32)
    at_y = np.minimum(np.arange(299) * h / 299, h - 1)[:, None]
    at_x = np.minimum(np.arange(299) * w / 299, w - 1)[None, :]
    ours = inception.preprocess(ramp)
    expected = np.broadcast_to((at_y + 0.25 * at_x - 128)[None, :, :, None] / 128, ours.shape)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * 8)  # float32 of up to 751, over 128


def test_grey_images_are_repeated():
    grey = np.random.RandomState(0).randint(0, 256, (2, 28, 20, 1)).astype(np.uint8)
    colour = inception.preprocess(np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(inception.preprocess(grey), colour)
    np.testing.assert_array_equal(inception.preprocess(grey.astype(np.float32)), colour)
    compiled = jax.jit(inception.preprocess, compiler_options=AS_SHIPPED)
    np.testing.assert_array_equal(compiled(grey), colour)


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 32, 32, 4), (2, 3, 32, 32), (0, 8, 8, 3)])
def test_preprocess_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=r"images: expected \[b, h, w, 3\].*found uint8\["
    ) as error:
        inception.preprocess(np.zeros(shape, np.uint8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 3, 299, 299), (299, 299, 3)])
def test_images_that_were_not_preprocessed_are_refused(shape):
    with pytest.raises(ValueError, match="of `preprocess`, found float32") as error:
        inception.Inception().apply({"params": {}}, jnp.zeros(shape))
    assert "\n" not in str(error.value)


def test_fold_includes_the_batch_norm():
    rng = np.random.RandomState(0)
    layer = {"kernel": rng.randn(1, 1, 5, 4), "scale": rng.randn(4), "bias": rng.randn(4)}
    layer |= {"mean": rng.randn(4), "var": rng.rand(4)}
    x = rng.randn(7, 5)
    y = x @ layer["kernel"][0, 0]
    normal = (y - layer["mean"]) / np.sqrt(layer["var"] + 0.001) * layer["scale"] + layer["bias"]
    logits = {"kernel": rng.randn(4, 2), "bias": rng.randn(2)}
    folded = inception.fold({"block": {"branch": layer}, "fc": logits})
    ours = folded["block"]["branch"]
    assert ours.keys() == {"kernel", "bias"} and ours["kernel"].dtype == np.float32
    np.testing.assert_allclose(x @ ours["kernel"][0, 0] + ours["bias"], normal, atol=1e-5)
    assert folded["fc"] is logits


def test_parameters_are_those_of_the_weights():
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    ours = jax.eval_shape(inception.Inception().init, jax.random.key(0), x)["params"]
    theirs = inception.fold(convert.from_inception(weights()))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)


def test_the_average_does_not_count_the_padding():
    x = np.zeros((1, 4, 5, 2), np.float32)
    x[0, 0, 0] = 36
    x[0, 3, 2] = 36, 18
    ours = inception.average_pool(jnp.asarray(x))
    counts = np.array([[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]])
    first = np.zeros((4, 5))
    first[:2, :2] = 36
    first[2:, 1:4] = 36
    np.testing.assert_allclose(ours[0, :, :, 0], first / counts, rtol=1e-6)
    np.testing.assert_allclose(ours[0, 3, 1:4, 1], [18 / 6] * 3, rtol=1e-6)


def test_the_maximum_of_negative_numbers_is_negative():
    x = -1 - jnp.arange(25.0).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(inception.max_pool(x)[0, :, :, 0], [[-1, -3], [-11, -13]])
    assert inception.max_pool(x, stride=1).shape == x.shape
    np.testing.assert_array_equal(
        inception.max_pool(x, stride=1)[0, 4, :, 0], [-16, -16, -17, -18, -19]
    )
