"""DINOv2 against transformers, its resize against Pillow, its positions against PyTorch."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import convert
from diffusion.metrics import dinov2
from tests.conftest import AS_SHIPPED, GOLDEN

# Origin: transformers 5.24.0 on torch 2.13.0, Dinov2Model of the configurations of
# facebook/dinov2-base and facebook/dinov2-large (518x518, patches of 14), in float64, with the
# weights of `recipe` and the images of `pixels`. "position.N...": torch's F.interpolate of the unit
# vectors of 37 positions to N, bicubic, by size (offset 0) and by scale_factor (N + 0.1) / 37.
TRUTH = dict(np.load(GOLDEN / "dinov2.npz"))


def recipe(name, shape):
    """The weights that the reference results were computed with: float32, by name and shape."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    z = (2 * rng.random_sample(shape) - 1) * np.sqrt(3)
    match name.split(".")[-1]:
        case "cls_token" | "position_embeddings":
            pass
        case "bias":
            z = 0.1 * z
        case _ if len(shape) == 1:
            z = 1 + 0.2 * z
        case _:
            z = z / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def pixels(h, w):
    """Returns two images uint8[2, h, w, 3] of noise."""
    return np.random.RandomState(h * w).randint(0, 256, (2, h, w, 3)).astype(np.uint8)


@functools.cache
def features_of(kind):
    """Returns float32[b, h, w, 3] -> features, with positions read as transformers reads them."""
    shapes = json.loads(str(TRUTH[f"{kind}.shapes_json"]))["memory"]
    params = convert.from_dinov2({name: recipe(name, shape) for name, shape in shapes.items()})
    network = dinov2.DinoV2(*dinov2.DINOV2_SIZES[kind], position_offset=0.0)
    return functools.partial(jax.jit(network.apply), {"params": params})


def check_features(kind, size):
    h, w = map(int, size.split("x"))
    x = (pixels(h, w) / 255 - np.array(dinov2.MEAN)) / np.array(dinov2.STD)
    ours, theirs = features_of(kind)(x.astype(np.float32)), TRUTH[f"{kind}.{size}"]
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    # Float32 against float64; and what tells the two images apart, which is a part of it.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())
    apart = theirs[0] - theirs[1]
    np.testing.assert_allclose(ours[0] - ours[1], apart, rtol=0, atol=3e-5 * np.abs(apart).max())


@pytest.mark.parametrize("size", ["28x42", "98x126", "100x60", "224x224"])
def test_features_of_vit_b_are_those_of_transformers(size):
    """Of odd sizes too; 100x60 has pixels beyond the last patch, which are cut off."""
    check_features("dinov2_b14", size)


@pytest.mark.slow
def test_features_of_vit_l_are_those_of_transformers():
    """The other sizes were compared once, to 2e-6; its 304 million weights take ten seconds."""
    check_features("dinov2_l14", "28x42")
    features_of.cache_clear()


def test_positions_are_read_as_pytorch_reads_them():
    sizes = {int(name.split(".")[1]) for name in TRUTH if name.startswith("position")}
    assert {1, 3, 16, 36, 40} < sizes
    for n in sizes:
        for offset in (0, 0.1):  # transformers', and the original code's
            theirs = TRUTH[f"position.{n}.offset{offset}"]
            np.testing.assert_allclose(dinov2.position_weights(n, offset), theirs, atol=3e-5)


def test_published_positions_have_the_offset_of_the_original_code():
    """Learned positions that PyTorch reads alike in both ways give the same features."""
    network = dinov2.DinoV2(4, 1, 1)
    x = jnp.asarray(pixels(28, 42) / 255, jnp.float32)
    params = network.init(jax.random.key(0), x)["params"]
    params["position"] = 3 * np.random.RandomState(0).randn(1370, 4).astype(np.float32)
    rows, columns = (
        np.linalg.pinv(TRUTH[f"position.{n}.offset0"]) @ TRUTH[f"position.{n}.offset0.1"]
        for n in (2, 3)
    )
    grid = np.einsum("ip,jq,pqc->ijc", rows, columns, params["position"][1:].reshape(37, 37, 4))
    moved = np.concatenate([params["position"][:1], grid.reshape(-1, 4)]).astype(np.float32)
    ours = network.apply({"params": params}, x)
    exact = network.clone(position_offset=0.0)
    theirs = exact.apply({"params": params | {"position": moved}}, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - exact.apply({"params": params}, x)).max() > 1e-2


def test_norms_add_a_millionth_to_the_variance():
    """Of a network that adds nothing to a class token of variance 1e-6: 1e-3 / sqrt(2e-6)."""
    network, x = dinov2.DinoV2(4, 1, 1), jnp.zeros((1, 28, 28, 3))
    params = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0), x)["params"])
    params["norm"]["scale"] = jnp.ones(4)
    params["cls_token"] = 1e-3 * jnp.array([1.0, -1.0, 1.0, -1.0])
    expected = np.sqrt(0.5) * np.array([[1, -1, 1, -1]])
    np.testing.assert_allclose(network.apply({"params": params}, x), expected, rtol=1e-5)


SIDES = [(8, 8), (32, 32), (224, 224), (28, 90), (300, 225), (640, 41), (1, 2), (700, 1025)]


@pytest.mark.parametrize("h, w", SIDES)
def test_images_are_resized_as_by_pillow(h, w):
    """Bit for bit, as torchvision's transforms of Pillow images do it; then ImageNet's statistics.

    The columns first, which Pillow did of all images before version 13, and does of most.
    """
    images = pixels(h, w)
    images[0] = 255 * (images[0] > 127)  # so that the filter overshoots and is clipped
    ours = np.asarray(
        jax.jit(dinov2.prepare_images, compiler_options=AS_SHIPPED)(images), np.float64
    )
    assert ours.shape == (2, 224, 224, 3)
    levels = (ours * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406])) * 255

    def resize(image, *sizes):
        image = Image.fromarray(image)
        for size in sizes:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image)

    by_columns = [resize(image, (224, h), (224, 224)) for image in images]
    np.testing.assert_allclose(levels, np.stack(by_columns), atol=1e-4)
    if h <= max(w, 224):
        at_once = [resize(image, (224, 224)) for image in images]
        np.testing.assert_allclose(levels, np.stack(at_once), atol=1e-4)


def test_grey_images_are_repeated():
    grey = pixels(28, 20)[..., :1]
    colour = dinov2.prepare_images(np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(dinov2.prepare_images(grey), colour)


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 32, 32, 4), (2, 3, 32, 32)])
def test_preprocess_refuses_other_images(shape):
    for dtype in (np.uint8, np.float32):
        with pytest.raises(ValueError, match=r"images: expected uint8\[b, h, w, 3\].*found") as e:
            dinov2.prepare_images(np.zeros(shape, dtype))
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"found float32\[2, 32, 32, 3\]"):
        dinov2.prepare_images(np.zeros((2, 32, 32, 3), np.float32))


@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (224, 224, 3), (1, 13, 28, 3)])
def test_images_that_were_not_preprocessed_are_refused(shape):
    with pytest.raises(
        ValueError, match="of `prepare_images`, of 14x14 or more, found float32"
    ) as e:
        dinov2.DinoV2(*dinov2.DINOV2_SIZES["dinov2_b14"]).apply({"params": {}}, jnp.zeros(shape))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind, count", [("dinov2_b14", 86_579_712), ("dinov2_l14", 304_367_616)])
def test_parameters_are_those_of_the_files(kind, count):
    """The counts are those of transformers' state dicts, without the mask token."""
    network = dinov2.DinoV2(*dinov2.DINOV2_SIZES[kind])
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    ours = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    shapes = json.loads(str(TRUTH[f"{kind}.shapes_json"]))["file"]
    theirs = convert.from_dinov2(
        {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    )
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)
    assert sum(a.size for a in jax.tree.leaves(ours)) == count
    assert dinov2.kind_of(theirs) == kind
