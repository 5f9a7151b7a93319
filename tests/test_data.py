"""Sources, and batches as a function of (key, step): orders are permutations, nothing is lost."""

import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import data, train
from tests import tiny_tfds
from tests.conftest import ROOT


def order(key, n):
    i = jnp.arange(n, dtype=jnp.uint32)
    return np.asarray(jax.jit(data.shuffled, static_argnums=2)(key, i, n))


@pytest.mark.parametrize("n", [*range(1, 20), 63, 64, 65, 255, 256, 257, 300, 1797, 50_000])
def test_an_order_has_every_number_once(n):
    assert np.array_equal(np.sort(order(random.key(n), n)), np.arange(n))


def test_the_largest_set_stays_within_its_bounds():
    n = 2**31 - 1
    i = jnp.arange(n - 1000, n, dtype=jnp.uint32)
    values = np.asarray(data.shuffled(random.key(0), i, n))
    assert len(np.unique(values)) == 1000 and values.max() < n


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_orders_are_evenly_likely(n):
    """Chi-square of (place, number) counts over 20,000 keys; fails by chance at 1e-6 a test."""
    keys = random.split(random.key(1), 20_000)
    i = jnp.arange(n, dtype=jnp.uint32)
    orders = np.asarray(jax.jit(jax.vmap(lambda k: data.shuffled(k, i, n)))(keys))
    counts = np.array([np.bincount(orders[:, j], minlength=n) for j in range(n)])
    expected = len(keys) / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi_square, (n - 1) ** 2) > 1e-6


def test_an_order_is_not_near_the_identity_nor_near_the_next():
    """Rank correlations of 1,797 independent places: standard deviation 1/sqrt(n - 1), 0.024."""
    orders = [order(random.fold_in(random.key(2), epoch), 1797) for epoch in range(3)]
    for a, b in [(np.arange(1797), orders[0]), (orders[0], orders[1]), (orders[1], orders[2])]:
        assert abs(stats.spearmanr(a, b).statistic) < 5 / math.sqrt(1796)


@pytest.mark.parametrize("n", [1, 7, 1797, 50_000, 2**31 - 1])
@pytest.mark.parametrize("b", [1, 128, 2**20 - 1])
@pytest.mark.parametrize("step", [0, 1, 799_999, 2**31 - 1])
def test_positions_are_those_of_whole_numbers(n, b, step):
    """Against Python's integers, which do not overflow."""
    epoch, place = data.positions(jnp.int32(step), b, n)
    for j in {0, b // 2, b - 1}:
        e, i = divmod(step * b + j, n)
        assert (int(epoch[j]), int(place[j])) == (e % 2**32, i)


def marked(n, h=2, w=3):
    """n images that tell who they are and whether they are mirrored."""
    image = np.zeros((n, h, w, 1), np.uint8)
    image[:, 0, 0, 0], image[:, 0, -1, 0] = np.arange(n), 255
    return jnp.asarray(image), jnp.arange(n, dtype=jnp.int32) % 10


def draws(n, b, steps, flip=False, key=0):
    image, label = marked(n)
    draw = jax.jit(
        lambda step: data.draw(image, label, random.key(key), step, b, flip), inline=True
    )
    x, y = zip(*(draw(jnp.int32(step)) for step in range(steps)), strict=True)
    return np.asarray(data.unscale(jnp.concatenate(x))), np.concatenate(y)


def who(x):
    """The image that each x is of: its number stands in a corner, 255 in the other."""
    mirrored = x[:, 0, 0, 0] == 255
    return np.where(mirrored, x[:, 0, -1, 0], x[:, 0, 0, 0]), mirrored


def test_an_epoch_shows_every_image_once():
    """A batch size that does not divide the set: batches straddle epochs, nothing is dropped."""
    n, b = 50, 8
    x, label = draws(n, b, 25, flip=True)
    number, _ = who(x)
    epochs = number.reshape(4, n)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.array_equal(label, number % 10)


def test_half_of_the_images_are_mirrored_and_not_always_the_same():
    n, b = 50, 50
    number, mirrored = who(draws(n, b, 40, flip=True)[0])
    share = mirrored.mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(40 * n)  # five standard deviations
    by_image = np.array([mirrored[number == i].mean() for i in range(n)])
    assert by_image.min() > 0 and by_image.max() < 1
    assert not who(draws(n, b, 2, flip=False)[0])[1].any()


def test_a_mirrored_image_is_the_exact_mirror():
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), np.uint8))
    label = jnp.zeros(1, jnp.int32)
    x, _ = data.draw(image, label, random.key(0), jnp.int32(0), 32, True)
    one = np.asarray(data.scale(image[0]))
    same = [np.array_equal(a, one) for a in x]
    mirror = [np.array_equal(a, one[:, ::-1]) for a in x]
    assert all(np.array(same) ^ np.array(mirror)) and any(same) and any(mirror)


def test_a_batch_is_a_function_of_key_and_step():
    image, label = marked(50)
    batch = [data.draw(image, label, random.key(k), jnp.int32(s), 8, True)[0] for k, s in
             [(0, 3), (0, 3), (1, 3), (0, 4)]]  # fmt: skip
    assert np.array_equal(batch[0], batch[1])
    assert not np.array_equal(batch[0], batch[2]) and not np.array_equal(batch[0], batch[3])


def test_four_devices_draw_what_one_draws():
    image, label = marked(50)

    def draw(image, label, step):
        return data.draw(image, label, random.key(0), step, 8, True)

    one = jax.jit(draw)(image, label, jnp.int32(7))
    mesh = train.data_mesh()
    many = jax.jit(draw, out_shardings=train.sharded(mesh))(image, label, jnp.int32(7))
    assert len(many[0].sharding.device_set) == 4
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize("bad", ["float", "flat", "labels"])
def test_what_is_no_set_of_images_is_refused(bad):
    image, label = marked(4)
    image = {"float": image.astype(jnp.float32), "flat": image[0]}.get(bad, image)
    label = label[:2] if bad == "labels" else label
    with pytest.raises(ValueError, match="expected image uint8"):
        data.draw(image, label, random.key(0), jnp.int32(0), 2, False)


def test_scaling_is_exact_there_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8)
    x = data.scale(levels)
    assert x.dtype == jnp.float32 and x[0] == -1 and x[255] == 1
    assert np.array_equal(data.unscale(x), levels)
    # Official code (github.com/hojonathanho/diffusion, commit 1e0dceb), normalize_data.
    official = np.load(ROOT / "tests" / "golden" / "misc.npz")
    np.testing.assert_allclose(x, official["norm.x"], atol=1e-7)
    # It truncates where we round, and so loses a level where float32 fell short of it.
    lost = official["norm.roundtrip_uint8"].astype(int) - np.arange(256)
    assert set(lost) == {0, -1} and (lost == -1).sum() == 63
    assert np.array_equal(data.unscale(jnp.asarray([-9.0, -1.0, 0.0, 9.0])), [0, 0, 128, 255])


def test_digits_are_the_bundled_ones():
    from sklearn.datasets import load_digits

    bundled = load_digits()
    splits = [data.load("digits", split) for split in ("train", "test")]
    # A sixth of each class, rounded down.
    assert len(splits[1].image) == sum(np.bincount(bundled.target) // 6)
    rows = [np.rint(s.image.reshape(-1, 64) / 255 * 16) for s in splits]
    both = sorted(map(tuple, np.concatenate(rows)))
    assert both == sorted(map(tuple, bundled.data))
    for s in splits:
        assert s.image.dtype == np.uint8 and s.image.shape[1:] == (8, 8, 1)
        assert s.image.min() == 0 and s.image.max() == 255 and s.num_classes == 10
        share = np.bincount(s.label, minlength=10) / len(s.label)
        assert abs(share - 0.1).max() < 0.01


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return folder, {
        "colour": tiny_tfds.write(folder, "colour", (8, 6, 3), n=20),
        "grey": tiny_tfds.write(folder, "grey", (5, 5, 1), n=7),
    }


@pytest.mark.parametrize("name", ["colour", "grey"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_stored_set_is_read_as_it_was_written(stored, name, split):
    """TFDS stores examples in an order of its own: compared as sets of (pixels, label)."""
    folder, written = stored
    dataset = data.load("tfds", split, name=name, data_dir=str(folder))
    image, label = written[name][split]
    found = sorted((x.tobytes(), int(y)) for x, y in zip(*dataset[:2], strict=True))
    assert found == sorted((x.tobytes(), int(y)) for x, y in zip(image, label, strict=True))
    assert dataset.image.shape == image.shape and dataset.num_classes == 10


def test_the_fingerprint_notices_any_change():
    dataset = data.load("digits", "test")
    changed = dataset.image.copy()
    changed[5, 3, 3, 0] ^= 1
    prints = {
        data.fingerprint(d)
        for d in (
            dataset,
            dataset._replace(image=changed),
            dataset._replace(label=(dataset.label + 1) % 10),
            dataset._replace(image=dataset.image.reshape(-1, 4, 16, 1)),
            dataset._replace(num_classes=11),
        )
    }
    assert len(prints) == 5
    assert data.fingerprint(data.load("digits", "test")) == data.fingerprint(dataset)


def error(source="tfds", split="train", **config):
    with pytest.raises(data.DataError) as caught:
        data.load(source, split, **config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_name_what_is_wrong_and_what_there_is(stored, tmp_path):
    folder, _ = stored
    there = {"data_dir": str(folder)}
    assert "nearest: digits" in error("digit")
    assert "train" in error("digits", "validation")
    assert "nme" in error("digits", nme="x") and "name" in error("digits", nme="x")
    assert "data_dir" in error(name="colour", data_dir="")
    assert "no-such-folder" in error(name="colour", data_dir="no-such-folder")
    assert "nearest: colour" in error(name="color", **there)
    assert "holds no TFDS data set" in error(name="colour", data_dir=str(tmp_path))
    assert "test, train" in error("tfds", "validation", name="colour", **there)


def test_a_set_larger_than_memory_allows_is_refused_unread(stored, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 20 * 8 * 6 * 3 - 1)
    message = error(name="colour", data_dir=str(stored[0]))
    assert "20x8x6x3" in message and "at most" in message


def test_a_damaged_set_is_one_line(tmp_path):
    tiny_tfds.write(tmp_path, "hurt", (4, 4, 3), n=6)
    (file,) = tmp_path.glob("hurt/*/hurt-train.array_record*")
    file.write_bytes(b"\x55" * file.stat().st_size)
    assert "hurt" in error(name="hurt", data_dir=str(tmp_path))


def test_an_image_of_another_size_is_named(tmp_path, monkeypatch):
    encode, sizes = tiny_tfds.png, iter([8] * 9 + [4] + [8] * 14)
    monkeypatch.setattr(tiny_tfds, "png", lambda image: encode(image[: next(sizes)]))
    tiny_tfds.write(tmp_path, "mixed", (8, 8, 3), n=12)
    message = error(name="mixed", data_dir=str(tmp_path))
    assert "train image" in message and "8x8 RGB" in message and "4x8 RGB" in message


TFDS_DIR = pathlib.Path(os.environ.get("DDPM_TFDS_DIR", ROOT.parent / "shared" / "tfds"))


@pytest.mark.skipif(
    not (TFDS_DIR / "cifar10").is_dir(),
    reason="DDPM_TFDS_DIR names no folder with a TFDS data set cifar10",
)
def test_a_real_cifar10_has_all_its_images():
    dataset = data.load("tfds", "test", name="cifar10", data_dir=str(TFDS_DIR))
    assert dataset.image.shape == (10_000, 32, 32, 3) and dataset.num_classes == 10
    assert np.array_equal(np.bincount(dataset.label), [1000] * 10)
    assert 60 < dataset.image.std() < 66 and abs(dataset.image.mean() - 121) < 3
