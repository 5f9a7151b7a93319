"""Features without a network: what they must tell apart, and what must not change them."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffusion import data
from diffusion.data import loader
from diffusion.metrics import METRICS, applicable_metrics, evaluate
from diffusion.metrics.feature_set import collect
from diffusion.metrics.features import FEATURES, pixels, random_convolutions

DIGIT = (8, 8, 1)


def images_of(shape, n=6, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def digits():
    """Real images in an order that is no order: uint8[1501, 8, 8, 1]."""
    images = loader.load_dataset(data.open_dataset("digits", "train")).image
    return images[np.random.RandomState(0).permutation(len(images))]


@pytest.fixture(scope="module", params=FEATURES)
def sample(request):
    """images -> Sample of their features, one of each kind; compiled once a shape."""
    features = jax.jit(FEATURES[request.param](DIGIT))
    return lambda images: collect([(features(jnp.asarray(images)), None)], len(images))


def noisy(images, deviation):
    noise = deviation * np.random.RandomState(3).randn(*images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def test_order_on_real_images(digits, sample):
    """Half against half < slightly noised < blurred < noise; and noise shows by its level."""
    half, other = digits[:750], sample(digits[750:1500])

    def fd(images):
        return evaluate("fd", sample(images), other)["fd"].value

    levels = [fd(noisy(half, deviation)) for deviation in (0, 16, 32, 64, 128)]
    assert np.all(np.diff(levels) > 0) and levels[0] == fd(half)
    blurred = fd(ndimage.gaussian_filter(half, (0, 1, 1, 0)))
    assert levels[0] < levels[1] < blurred < fd(images_of(DIGIT, 750))
    # What a model that fails often does: one class only, negatives, black images.
    for wrong in (digits[:750][np.argsort(half.mean((1, 2, 3)))[:200]], 255 - half, 0 * half):
        assert fd(wrong) > 2 * levels[0]


def test_test_images_are_nearer_than_any_change_of_them(sample):
    """As a model is scored: against all training images, with the few test images as the mark."""
    train, test = (loader.load_dataset(data.open_dataset("digits", split)).image for split in ("train", "test"))
    reference = sample(train)
    fd = [
        evaluate("fd", sample(images), reference)["fd"].value
        for images in (test, noisy(test, 32), noisy(test, 64), images_of(DIGIT, len(test)))
    ]
    assert np.all(np.diff(fd) > 0)


def test_every_metric_orders_real_images(digits, sample):
    """A half of the training images against the other one, and noise against it."""
    half, other, noise = (
        sample(images) for images in (digits[:400], digits[400:800], images_of(DIGIT, 400))
    )
    for name in applicable_metrics(half, other):
        good, bad = (evaluate(name, generated, other) for generated in (half, noise))
        for score in good:
            gain = bad[score].value - good[score].value
            assert gain > 0 if METRICS[name].lower else gain < 0, score
    assert set(applicable_metrics(half, other)) == METRICS.keys() - {"is"}


@pytest.mark.parametrize("shape", [(4, 4, 1), (5, 7, 3), (8, 8, 1), (33, 20, 3)])
@pytest.mark.parametrize("name", FEATURES)
def test_an_image_does_not_depend_on_its_batch(name, shape):
    features, images = jax.jit(FEATURES[name](shape)), images_of(shape)
    whole = features(images)
    assert whole.dtype == jnp.float32 and whole.shape[0] == 6 and whole.shape[1] <= 768
    assert np.all(np.isfinite(whole))
    # Float32; other shapes may be vectorised with other roundings.
    np.testing.assert_allclose(features(images[4:5]), whole[4:5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features(images[::-1]), whole[::-1], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(np.asarray(whole), axis=0)).max(1).min() > 1e-3


def test_devices_share_the_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.NamedSharding(mesh, jax.P("data"))
    images = images_of(DIGIT, 8)
    features = jax.jit(random_convolutions(DIGIT))
    shared = features(jax.device_put(images, shards))
    assert shared.sharding.is_equivalent_to(shards, 2)
    np.testing.assert_allclose(shared, features(images), rtol=1e-5, atol=1e-6)




def test_random_convolutions_by_hand():
    """The same network in float64, one pixel at a time, with the weights that the names give."""

    def normal(name, *shape):
        return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

    x, out = images_of((6, 5, 1), 1)[0] / 127.5 - 1, []
    for i in range(4):
        z = normal(f"random_convolutions/0/{i}", 9 * x.shape[2], 4)
        # The nearest orthonormal columns are not meant: Gram-Schmidt, one column after the other.
        columns = []
        for v in z.T:
            for u in columns:
                v = v - (u @ v) * u
            columns.append(v / np.linalg.norm(v))
        kernel = np.stack(columns, -1).reshape(3, 3, -1, 4) * np.sqrt(2 / 1.04)
        bias = 0.5 * normal(f"random_convolutions/0/{i}/bias", 4)
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
    ours = random_convolutions((6, 5, 1), d=32)(images_of((6, 5, 1), 1))
    np.testing.assert_allclose(ours[0], np.concatenate(out), rtol=1e-5, atol=1e-6)


def test_seeds_are_different_networks():
    images = images_of(DIGIT)
    one, again, other = (np.asarray(random_convolutions(DIGIT, seed=s)(images)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).mean() > 0.1
    assert one.shape == (6, 128) and random_convolutions(DIGIT, d=64)(images).shape == (6, 64)




def test_pixels_of_small_images_are_themselves():
    images = images_of((5, 7, 3))
    np.testing.assert_allclose(pixels((5, 7, 3))(images), images.reshape(6, -1) / 255, rtol=1e-6)


def test_pixels_of_large_images_are_averages():
    images = images_of((64, 24, 3))
    # 4 rows make one, and 3 columns two: halves of the middle one go to either side.
    rows = images.reshape(6, 16, 4, 24, 3).mean(2) / 255
    triples = rows.reshape(6, 16, 8, 3, 3)
    left, right = (triples[..., i, :] + triples[..., 1, :] / 2 for i in (0, 2))
    truth = np.stack([left, right], 3) / 1.5
    np.testing.assert_allclose(pixels((64, 24, 3))(images), truth.reshape(6, -1), rtol=1e-5)




@pytest.mark.parametrize("shape", [(3, 8, 1), (8, 3, 3), (8, 8, 2), (8, 8, 4)])
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match=r"expected \(h >= 4, w >= 4, 1 or 3\), found"):
        random_convolutions(shape)


@pytest.mark.parametrize("d", [0, -8, 12])
def test_sizes_are_checked(d):
    with pytest.raises(ValueError, match=f"expected d in 8, 16, ..., found {d}"):
        random_convolutions(DIGIT, d=d)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), "f4")],
    ids=["colour", "one image", "floats"],
)
def test_images_are_checked(name, images):
    with pytest.raises(ValueError, match=r"images: expected uint8\[b, 8, 8, 1\], found"):
        FEATURES[name](DIGIT)(jnp.asarray(images))
