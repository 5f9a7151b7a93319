"""Tests that features order real images, do not depend on the batch, and match a second program."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffusion import data
from diffusion.metrics import METRICS, applicable_metrics, evaluate
from diffusion.metrics.features import FEATURES, pixels, random_convolutions
from tests.metrics.feature_sets import collect

DIGIT = (8, 8, 1)
BATCH = 150


def random_images(shape, n=6, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def load_digits(split):
    dataset = data.open_dataset("digits", split)
    return dataset.read(range(dataset.n))[0]


@pytest.fixture(scope="module")
def digits():
    """Real images in random order, uint8[1501, 8, 8, 1]."""
    images = load_digits("train")
    return images[np.random.RandomState(0).permutation(len(images))]


@pytest.fixture(scope="module", params=FEATURES)
def feature_set_of(request):
    """A function from images to their FeatureSet, compiled for one batch size."""
    features = jax.jit(FEATURES[request.param](DIGIT))

    def feature_set_of(images):
        blocks = np.split(images, range(BATCH, len(images), BATCH))
        padded = (np.resize(block, (BATCH, *DIGIT)) for block in blocks)
        outputs = (np.asarray(features(block)) for block in padded)
        batches = ((x[: len(block)], None) for x, block in zip(outputs, blocks, strict=True))
        return collect(batches, len(images))

    return feature_set_of


def add_noise(images, deviation):
    noise = deviation * np.random.RandomState(3).randn(*images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def test_distance_orders_real_images(digits, feature_set_of):
    """Another half < slight noise < blur < pure noise, and more noise is farther."""
    half, other = digits[:750], feature_set_of(digits[750:1500])

    def fd(images):
        return evaluate("fd", feature_set_of(images), other)["fd"].value

    levels = [fd(add_noise(half, deviation)) for deviation in (0, 16, 32, 64, 128)]
    assert np.all(np.diff(levels) > 0) and levels[0] == fd(half)
    blurred = fd(ndimage.gaussian_filter(half, (0, 1, 1, 0)))
    assert levels[0] < levels[1] < blurred < fd(random_images(DIGIT, 750))
    # What a failing model generates: few classes, negatives, black images.
    for wrong in (digits[:750][np.argsort(half.mean((1, 2, 3)))[:200]], 255 - half, 0 * half):
        assert fd(wrong) > 2 * levels[0]


def test_test_images_are_nearer_than_any_change_of_them(feature_set_of):
    """Against all training images, as a model is scored."""
    train, test = map(load_digits, ("train", "test"))
    reference = feature_set_of(train)
    changed = (test, add_noise(test, 32), add_noise(test, 64), random_images(DIGIT, len(test)))
    fd = [evaluate("fd", feature_set_of(images), reference)["fd"].value for images in changed]
    assert np.all(np.diff(fd) > 0)


def test_every_metric_orders_real_images(digits, feature_set_of):
    """Real images score better than noise against other real images."""
    half, other, noise = map(
        feature_set_of, (digits[:400], digits[400:800], random_images(DIGIT, 400))
    )
    for name in applicable_metrics(half, other):
        good, bad = (evaluate(name, generated, other) for generated in (half, noise))
        for score in good:
            gain = bad[score].value - good[score].value
            assert gain > 0 if METRICS[name].lower else gain < 0, score
    assert set(applicable_metrics(half, other)) == METRICS.keys() - {"is", "classes"}


@pytest.mark.parametrize("shape", [(4, 4, 1), (5, 7, 3), (8, 8, 1), (33, 20, 3)])
@pytest.mark.parametrize("name", FEATURES)
def test_an_image_does_not_depend_on_its_batch(name, shape):
    features, images = jax.jit(FEATURES[name](shape)), random_images(shape)
    expected = features(images)
    assert expected.dtype == jnp.float32
    assert expected.shape[0] == 6 and expected.shape[1] <= 768
    assert np.all(np.isfinite(expected))
    # Other shapes may be vectorised with other roundings.
    np.testing.assert_allclose(features(images[4:5]), expected[4:5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features(images[::-1]), expected[::-1], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(np.asarray(expected), axis=0)).max(1).min() > 1e-3


def test_devices_split_the_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.NamedSharding(mesh, jax.P("data"))
    images = random_images(DIGIT, 8)
    features = jax.jit(random_convolutions(DIGIT))
    sharded = features(jax.device_put(images, shards))
    assert sharded.sharding.is_equivalent_to(shards, 2)
    np.testing.assert_allclose(sharded, features(images), rtol=1e-5, atol=1e-6)


def test_random_convolutions_equal_a_float64_network():
    """One pixel at a time, with weights from the names of the layers."""

    def normal(name, *shape):
        return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

    x, out = random_images((6, 5, 1), 1)[0] / 127.5 - 1, []
    for i in range(4):
        z = normal(f"random_convolutions/0/{i}", 9 * x.shape[2], 16)
        # Gram-Schmidt, one column after the other; one channel in has too many columns for it.
        if i:
            columns = []
            for v in z.T:
                for u in columns:
                    v = v - (u @ v) * u
                columns.append(v / np.linalg.norm(v))
            z = np.stack(columns, -1) * np.sqrt(len(z))
        kernel = z.reshape(3, 3, -1, 16) * np.sqrt(2 / 1.04 / len(z))
        bias = 0.5 * normal(f"random_convolutions/0/{i}/bias", 16)
        if i:
            h, w = max(1, x.shape[0] // 2), max(1, x.shape[1] // 2)
            rows = [slice(2 * r, 2 * r + 2) for r in range(h)]
            cols = [slice(2 * c, 2 * c + 2) for c in range(w)]
            x = np.array([[x[r, c].mean((0, 1)) for c in cols] for r in rows])
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        x = np.array(
            [
                [
                    np.einsum("abi,abio->o", padded[r : r + 3, c : c + 3], kernel) + bias
                    for c in range(x.shape[1])
                ]
                for r in range(x.shape[0])
            ]
        )
        x = np.where(x > 0, x, 0.2 * x)
        out += [x.mean((0, 1)), (x**2).mean((0, 1))]
    ours = jax.jit(random_convolutions((6, 5, 1)))(random_images((6, 5, 1), 1))
    np.testing.assert_allclose(ours[0], np.concatenate(out), rtol=1e-5, atol=1e-6)


def test_pixels_of_small_images_are_unchanged():
    images = random_images((5, 7, 3))
    np.testing.assert_allclose(pixels((5, 7, 3))(images), images.reshape(6, -1) / 255, rtol=1e-6)


def test_pixels_of_large_images_are_averages():
    images = random_images((64, 24, 3))
    # 4 rows make one, and 3 columns two, half of the middle one each.
    rows = images.reshape(6, 16, 4, 24, 3).mean(2) / 255
    triples = rows.reshape(6, 16, 8, 3, 3)
    left, right = (triples[..., i, :] + triples[..., 1, :] / 2 for i in (0, 2))
    truth = np.stack([left, right], 3) / 1.5
    np.testing.assert_allclose(pixels((64, 24, 3))(images), truth.reshape(6, -1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 1), (8, 3, 3), (8, 8, 2), (8, 8, 4)])
def test_unsupported_shapes_raise(shape):
    with pytest.raises(ValueError, match=r"expected \(h >= 4, w >= 4, 1 or 3\), found"):
        random_convolutions(shape)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), "f4")],
    ids=["colour", "one image", "floats"],
)
def test_other_images_raise(name, images):
    with pytest.raises(ValueError, match=r"images: expected uint8\[b, 8, 8, 1\], found"):
        FEATURES[name](DIGIT)(jnp.asarray(images))
