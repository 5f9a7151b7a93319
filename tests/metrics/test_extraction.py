"""Sets of images: read as they are, once, in any batches, and gone on with after a kill."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.metrics import extraction, features, frechet
from diffusion.sharding import data_mesh
from diffusion.utils.errors import DDPMError
from diffusion.utils.io import save_npz

NOISE = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), np.uint8)


@pytest.fixture(scope="module")
def extractor():
    return extraction.make_extractor(("random", "pixels"), (6, 5, 3), data_mesh())


def images_of(some, size):
    batches = some.batches(size, slice(None), 0)
    return np.concatenate(list(batches))[: some.n]


def folder_of(path, images, suffix="png"):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.{suffix}")
    return path


@pytest.mark.parametrize("kind", ["folder", "npz", "array"])
def test_every_image_comes_as_it_is_and_in_order(tmp_path, kind):
    if kind == "folder":
        some = extraction.image_set_from_files(str(folder_of(tmp_path / "x", NOISE)))
    elif kind == "npz":
        save_npz(tmp_path / "x.npz", NOISE)
        some = extraction.image_set_from_files(str(tmp_path / "x.npz"))
    else:
        some = extraction.image_set_from_array("x", NOISE)
    assert some.n == 23 and some.shape == (6, 5, 3) and not some.concern
    for size in (4, 23, 40):
        np.testing.assert_array_equal(images_of(some, size), NOISE)
    last = list(some.batches(4, slice(None), 4))  # from the fifth batch on, rows of it
    np.testing.assert_array_equal(last[0], NOISE[16:20])
    assert last[-1].shape == (4, 6, 5, 3)
    np.testing.assert_array_equal(next(some.batches(4, np.array([2, 3]), 1)), NOISE[6:8])


def test_the_first_image_says_whether_they_are_grey(tmp_path):
    grey = folder_of(tmp_path / "grey", NOISE[..., 0])
    assert extraction.image_set_from_files(str(grey)).shape == (6, 5, 1)
    assert extraction.image_set_from_files(str(grey), channels=3).shape == (6, 5, 3)
    save_npz(tmp_path / "x.npz", NOISE[..., :1])
    assert extraction.image_set_from_files(str(tmp_path / "x.npz")).shape == (6, 5, 1)


def test_jpeg_is_a_concern(tmp_path):
    assert "JPEG" in extraction.image_set_from_files(str(folder_of(tmp_path / "x", NOISE, "jpg"))).concern


def mixed(path):
    folder_of(path, NOISE)
    Image.fromarray(NOISE[0, :4]).save(path / "small.png")


def floats(path):
    np.savez(path.with_suffix(".npz"), arr_0=np.full((3, 6, 5, 3), np.nan, np.float32))
    path.with_suffix(".npz").rename(path)


def broken(path):
    folder_of(path, NOISE)
    (path / "broken.png").write_bytes(b"not a picture")


WRONG = {
    "sizes": (mixed, "one size, 6x5 like the first, found 4x5 (small.png)"),
    "floats": (floats, "float32[3, 6, 5, 3]"),
    "broken": (broken, "broken.png"),
    "empty": (lambda path: path.mkdir(), "expected images"),
    "absent": (lambda path: None, "no file or folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_scored_gets_one_line(tmp_path, name):
    make, words = WRONG[name]
    make(tmp_path / "images")
    with pytest.raises(DDPMError) as error:
        images_of(extraction.image_set_from_files(str(tmp_path / "images")), 8)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_kept_depends_on_no_batches(extractor):
    mesh, some = data_mesh(), extraction.image_set_from_array("noise", NOISE)
    one, other = (extraction.extract(some, extractor, size, 9, mesh, silent=True) for size in (4, 12))
    assert one.keys() == {"random", "pixels"}
    for kind in one:
        mean, covariance = frechet.finalize(one[kind].stats)
        np.testing.assert_allclose(frechet.finalize(other[kind].stats)[0], mean, atol=1e-6)
        np.testing.assert_allclose(
            frechet.finalize(other[kind].stats)[1], covariance, atol=1e-5 * covariance.max()
        )
        np.testing.assert_allclose(other[kind].features, one[kind].features, atol=1e-4)
    pixels = features.pixels((6, 5, 3))(NOISE)
    np.testing.assert_allclose(
        frechet.finalize(one["pixels"].stats)[1], np.cov(pixels.T), atol=1e-5
    )


def test_a_pass_that_was_killed_goes_on_and_keeps_the_same(extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "KEEP_S", 0)
    mesh, some = data_mesh(), extraction.image_set_from_array("noise", NOISE)
    read = lambda s, kept: extraction.extract(s, extractor, 4, 9, mesh, kept, silent=True)  # noqa: E731
    whole = read(some, None)

    def until_killed(size, rows, first):
        yield from itertools.islice(some.batches(size, rows, first), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(some._replace(batches=until_killed), tmp_path / "kept.npz")
    asked = []

    def rest(size, rows, first):
        asked.append(first)
        return some.batches(size, rows, first)

    again = read(some._replace(batches=rest), tmp_path / "kept.npz")
    assert asked == [3] and not (tmp_path / "kept.npz").exists()
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), whole, again)
    assert all(jax.tree.leaves(same))


def test_what_was_kept_of_another_set_is_not_gone_on_with(extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "KEEP_S", 0)
    mesh, kept = data_mesh(), tmp_path / "kept.npz"
    some = extraction.image_set_from_array("noise", NOISE)

    def two(size, rows, first):
        yield from itertools.islice(some.batches(size, rows, first), 2)
        raise KeyboardInterrupt

    for content in (None, b"torn"):
        with pytest.raises(KeyboardInterrupt):
            extraction.extract(some._replace(batches=two), extractor, 4, 9, mesh, kept, silent=True)
        if content:
            kept.write_bytes(kept.read_bytes()[:100])
        other = extraction.image_set_from_array("other" if not content else "noise", NOISE[:8])
        out = extraction.extract(other, extractor, 4, 9, mesh, kept, silent=True)
        assert out["pixels"].stats.n == 8
