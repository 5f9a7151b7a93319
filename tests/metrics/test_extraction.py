"""Tests image sets and feature extraction: order, batches, resuming, errors."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from diffusion.data import ImageDataset
from diffusion.data.prepare.image_decoding import ImageSpec
from diffusion.metrics import inception
from diffusion.metrics.extraction import (
    extract,
    features_of,
    image_set_from_array,
    image_set_from_files,
    image_set_from_split,
    make_extractor,
)
from diffusion.metrics.feature_set import kept_indices
from diffusion.metrics.frechet import finalize
from diffusion.sharding import data_mesh
from diffusion.utils import partial_results
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), np.uint8)


@pytest.fixture(scope="module")
def extractor():
    return make_extractor(("random", "pixels"), (6, 5, 3), data_mesh())


def read_all(image_set, batch_size):
    batches = image_set.batches(batch_size, slice(None), 0)
    return np.concatenate(list(batches))[: image_set.n]


def save_folder(path, images, suffix="png"):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.{suffix}")
    return path


@pytest.mark.parametrize("kind", ["folder", "npz", "array"])
def test_images_come_unchanged_and_in_order(tmp_path, kind):
    if kind == "folder":
        image_set = image_set_from_files(str(save_folder(tmp_path / "x", IMAGES)))
    elif kind == "npz":
        save_npz(tmp_path / "x.npz", IMAGES)
        image_set = image_set_from_files(str(tmp_path / "x.npz"))
    else:
        image_set = image_set_from_array("x", IMAGES)
    assert image_set.n == 23 and image_set.shape == (6, 5, 3) and not image_set.warning
    for batch_size in (4, 23, 40):
        np.testing.assert_array_equal(read_all(image_set, batch_size), IMAGES)
    last = list(image_set.batches(4, slice(None), 4))
    np.testing.assert_array_equal(last[0], IMAGES[16:20])
    np.testing.assert_array_equal(last[-1], IMAGES[[20, 21, 22, 22]])
    np.testing.assert_array_equal(next(image_set.batches(4, np.array([2, 3]), 1)), IMAGES[6:8])


@pytest.mark.parametrize("n, indices", [(0, range(23)), (23, range(23)), (4, (0, 5, 11, 17))])
def test_some_images_of_a_split_are_evenly_spaced(n, indices):
    split = ImageDataset(23, (6, 5, 3), 0, lambda i: (IMAGES[list(i)], np.zeros(len(i), np.int32)))
    image_set = image_set_from_split(split, "train", n)
    assert image_set.n == len(indices) and image_set.name == "train"
    np.testing.assert_array_equal(read_all(image_set, 4), IMAGES[list(indices)])


def test_channels_are_those_of_the_first_image(tmp_path):
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    save_folder(grey, IMAGES[..., 0])
    save_folder(colour, IMAGES)
    save_npz(tmp_path / "x.npz", IMAGES[..., :1])
    for path, channels, expected, warning in (
        (grey, 0, 1, ""),
        (grey, 3, 3, "grey images"),
        (colour, 1, 1, "colour images, read as grey"),
        (tmp_path / "x.npz", 0, 1, ""),
    ):
        image_set = image_set_from_files(str(path), channels)
        assert image_set.shape == (6, 5, expected) and image_set.warning == warning


def test_jpeg_files_are_warned_of(tmp_path):
    assert "JPEG" in image_set_from_files(str(save_folder(tmp_path / "x", IMAGES, "jpg"))).warning


def save_mixed_sizes(path):
    save_folder(path, IMAGES)
    Image.fromarray(IMAGES[0, :4]).save(path / "small.png")


def test_form_is_pillows_crop_and_filter(tmp_path):
    """For 3x2, the centre of 6x5 is 6x4, and that of 4x5 is 4x3."""
    save_mixed_sizes(tmp_path / "x")
    image_set = image_set_from_files(str(tmp_path / "x"), form=ImageSpec(3, 2, 3))
    assert image_set.shape == (3, 2, 3) and image_set.warning.startswith("resized from 6x5")
    cropped = [*IMAGES[:, :, :4], IMAGES[0, :4, 1:4]]
    expected = [Image.fromarray(x).resize((2, 3), Resampling.LANCZOS) for x in cropped]
    np.testing.assert_array_equal(read_all(image_set, 5), np.stack(expected))


def save_floats(path):
    np.savez(path.with_suffix(".npz"), arr_0=np.full((3, 6, 5, 3), np.nan, np.float32))
    path.with_suffix(".npz").rename(path)


def save_damaged(path):
    save_folder(path, IMAGES)
    (path / "broken.png").write_bytes(b"not a picture")


UNUSABLE = {
    "sizes": (save_mixed_sizes, "one size, 6x5 like the first, found 4x5 (small.png)"),
    "floats": (save_floats, "float32[3, 6, 5, 3]"),
    "damaged": (save_damaged, "broken.png"),
    "one": (lambda path: save_folder(path, IMAGES[:1]), "2 or more images, found 1"),
    "empty": (lambda path: path.mkdir(), "expected images"),
    "absent": (lambda path: None, "no file or folder"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images_raise_one_line(tmp_path, name):
    make, message = UNUSABLE[name]
    make(tmp_path / "images")
    with pytest.raises(DataError) as error:
        read_all(image_set_from_files(str(tmp_path / "images")), 8)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_unfit_features_raise():
    with pytest.raises(ValueError, match="'vgg' is not known; there are: inception, dinov2, cl"):
        make_extractor(("pixels", "vgg"), (6, 5, 3), data_mesh())
    with pytest.raises(ValueError, match=r"expected \(h >= 4, w >= 4, 1 or 3\)"):
        make_extractor(("random",), (3, 3, 3), data_mesh())


def test_inception_gives_two_kinds_of_features():
    """2048 features with 1008 logits, and 17 x 17 x 7 spatial ones; weights have a fingerprint."""
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(inception.Inception().init, jax.random.key(0), images)["params"]
    extractors = [
        make_extractor(
            ("pixels", "inception"),
            (8, 8, 1),
            data_mesh(),
            {
                "inception": jax.tree.map(
                    lambda a, value=value: np.full(a.shape, value, a.dtype), shapes
                )
            },
        )
        for value in (0, 1)
    ]
    for found in extractors:
        assert list(found.kinds) == ["pixels", "inception", "spatial"]
        assert found.kinds["inception"] == (2048, 1008)
        assert found.kinds["spatial"] == (2023, 0) and found.kinds["pixels"] == (64, 0)
        assert list(found.fingerprints) == ["inception", "spatial"]
        assert all(len(digest) == 8 for digest in found.fingerprints.values())
    assert extractors[0].fingerprints != extractors[1].fingerprints


def test_statistics_do_not_depend_on_the_batch_size(extractor):
    image_set, done = image_set_from_array("noise", IMAGES), []
    four = extract(image_set, extractor, 4, 9, data_mesh(), on_batch=done.append)
    twelve = extract(image_set, extractor, 12, 9, data_mesh())
    assert four.keys() == twelve.keys() == {"random", "pixels"}
    assert done == [4, 8, 12, 16, 20, 23]
    for kind in four:
        (mean, cov), (mean_12, cov_12) = (finalize(x[kind].stats) for x in (four, twelve))
        np.testing.assert_allclose(mean_12, mean, atol=1e-6)
        np.testing.assert_allclose(cov_12, cov, atol=1e-5 * cov.max())
        np.testing.assert_allclose(twelve[kind].features, four[kind].features, atol=1e-4)
    pixels = IMAGES.reshape(23, -1) / 255
    np.testing.assert_allclose(finalize(four["pixels"].stats)[1], np.cov(pixels.T), atol=1e-5)
    found = features_of(image_set, extractor, 4, data_mesh())
    np.testing.assert_allclose(found["pixels"], pixels, rtol=1e-6)
    kept = kept_indices(23, 9)
    np.testing.assert_array_equal(found["random"][kept], four["random"].features)


def interrupt_after(image_set, count):
    """Returns the set with a KeyboardInterrupt after `count` batches."""

    def batches(batch_size, rows, first):
        yield from itertools.islice(image_set.batches(batch_size, rows, first), count)
        raise KeyboardInterrupt

    return image_set._replace(batches=batches)


@pytest.fixture
def partial(tmp_path, monkeypatch):
    """The file of a pass that saves after every batch."""
    monkeypatch.setattr(partial_results, "SAVE_EVERY_S", -1)
    return tmp_path / "partial.npz"


def test_interrupted_pass_resumes_bit_for_bit(extractor, partial):
    image_set, mesh = image_set_from_array("noise", IMAGES), data_mesh()
    uninterrupted = extract(image_set, extractor, 4, 9, mesh)
    with pytest.raises(KeyboardInterrupt):
        extract(interrupt_after(image_set, 3), extractor, 4, 9, mesh, partial)
    done = []
    resumed = extract(image_set, extractor, 4, 9, mesh, partial, done.append)
    assert done == [16, 20, 23] and not partial.exists()
    same = jax.tree.map(np.array_equal, uninterrupted, resumed)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("damage", ["another set", "torn file"])
def test_unusable_partial_file_starts_anew(extractor, partial, damage):
    image_set, mesh = image_set_from_array("noise", IMAGES), data_mesh()
    with pytest.raises(KeyboardInterrupt):
        extract(interrupt_after(image_set, 2), extractor, 4, 9, mesh, partial)
    if damage == "another set":
        image_set = image_set_from_array("other", IMAGES[:8])
    else:
        partial.write_bytes(partial.read_bytes()[:100])
    done = []
    found = extract(image_set, extractor, 4, 9, mesh, partial, done.append)
    assert done[0] == 4 and found["pixels"].stats.n == image_set.n
