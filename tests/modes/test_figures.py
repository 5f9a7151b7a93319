"""illustrate.py: what each picture shows, looked at before it is drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import data, experiment, process
from diffusion.data import augment, loader
from diffusion.modes import figures
from diffusion.plotting import labelled_grid
from diffusion.samplers import ancestral, base
from diffusion.sharding import replicated
from diffusion.utils.errors import DDPMError
from tests.modes.test_trajectories import SAID, make, make_studio


@pytest.fixture(scope="module")
def one():
    return make_studio()


@pytest.fixture
def shown(monkeypatch):
    """What sheets.sheet was given, in place of the page."""
    given = []

    def sheet(images, columns=(), rows=(), title="", note="", breaks=()):
        given.append((np.asarray(images), list(columns), list(rows)))
        return np.zeros([1, 1, 3], np.uint8)

    monkeypatch.setattr(labelled_grid, "sheet", sheet)
    return given




def test_progressive_and_denoising_show_the_same_walk(one, shown):
    figures.progressive(one, columns=5)
    figures.denoising(one, columns=5)
    (x_0, x_0_times, _), (x, x_times, _) = shown
    # x_0 is predicted from x_20 first and from x_1 last, x is seen from x_20 to the image.
    assert x_0_times == ["20", "15", "11", "6", "1"]
    assert x_times == ["20", "15", "10", "5", "0"]
    assert x_0.shape == x.shape == (2, 5, 8, 8, 1)
    # The last step adds no noise: the prediction is the sample.
    np.testing.assert_array_equal(x_0[:, -1], x[:, -1])
    T = np.asarray(
        process.sample_noise(process.example_keys(jax.random.key(3), 2), 0, jnp.zeros((2, 8, 8, 1)))
    )
    np.testing.assert_array_equal(x[:, 0], augment.unscale(T))


def test_shared_draws_differ_and_share_more_the_smaller_t(one, shown):
    figures.shared(one, depths=(1, 0.5, 0.1), draws=6)
    [(images, columns, rows)] = shown
    assert images.shape == (3, 7, 8, 8, 1) and columns[0] == "xₜ"
    assert rows == ["t = 20", "t = 10", "t = 2"]
    spread = images[:, 1:].astype(float).std(1).mean((1, 2, 3))
    assert spread[0] > spread[2] > 0 and spread[1] > spread[2]


def test_shared_says_so_where_a_sampler_draws_no_noise(shown, monkeypatch):
    s = make_studio()

    def step(predict, keys, carry, t, s):
        found = predict(carry.x, t)
        b = jnp.broadcast_to(s, carry.x.shape[:1])
        return base.SamplerState(process.q_sample(p, found.x_0, b, found.eps), found.x_0)

    p = s.x.p
    quiet = base.Sampler(ancestral.ancestral(p).init, step)
    monkeypatch.setattr(experiment, "make_sampler", lambda config, x: (quiet, s.ts))
    SAID.clear()
    figures.shared(make_studio(), draws=2)
    assert "draws no noise" in SAID[0]


def test_interpolation_is_of_pairs_of_real_images(one, shown):
    figures.interpolation(one)
    [(images, columns, _)] = shown
    real = loader.load_dataset(data.open_dataset("digits", "test")).image
    assert images.shape == (2, 13, 8, 8, 1) and columns[0] == columns[-1] == "source"
    found = {tuple(np.flatnonzero((real == source).all((1, 2, 3)))) for source in images[:, 0]}
    found |= {tuple(np.flatnonzero((real == source).all((1, 2, 3)))) for source in images[:, -1]}
    assert len(found) == 4 and () not in found


def test_coarse_to_fine_ends_in_mixed_pixels(one, shown):
    """Without noise there is nothing to decode: the row of t = 0 is (1 - lambda) x + lambda y."""
    figures.coarse_to_fine(one)
    [(images, columns, rows)] = shown
    assert rows == [f"t = {t}" for t in (20, 18, 15, 13, 10, 8, 5, 3, 0)]
    assert columns[1:12] == ["λ = 0", *(f"0.{i}" for i in range(1, 10)), "λ = 1"]
    x, y = images[-1, 0].astype(float), images[-1, -1].astype(float)
    for share, image in zip(np.linspace(0, 1, 11), images[-1, 1:-1], strict=True):
        # Bytes are rounded once, in float32.
        np.testing.assert_allclose(image, (1 - share) * x + share * y, atol=0.5 + 1e-3)
    assert (images[:, 0] == images[0, 0]).all() and (images[:, -1] == images[0, -1]).all()


def test_the_nearer_image_s_class_is_told(shown, monkeypatch):
    s, labels = make_studio(**{"model.num_classes": 10}), []

    def watched(s, starts, *args, **kwargs):
        labels.extend(start.label.tolist() for start in starts)
        return [(np.zeros((2, 11, 8, 8, 1), np.uint8),) * 2 for _ in starts]

    monkeypatch.setattr(figures, "follow", watched)
    figures.coarse_to_fine(s, n=2)
    _, (first, second) = figures.real(s, 2)
    assert labels == [[first] * 5 + [second] * 6] * 2 and first != second


def test_quality_scores_the_predicted_images_of_each_time(tmp_path):
    seen = []

    def score(images):
        seen.append(images)
        return {"mean": float(images.mean()), "spread": float(images.std())}

    s = make_studio(score=score)
    pages = figures.quality(s, points=4)
    for name, write in pages.items():
        write(tmp_path / name)
    numbers = json.loads((tmp_path / "quality.json").read_text())
    assert numbers["images"] == 5 and numbers["reverse steps"] == [0, 6, 13, 19]
    assert [images.shape for images in seen] == [(5, 8, 8, 1)] * 4
    assert numbers["mean"] == [images.mean() for images in seen]
    final = seen[-1].astype(float)  # the last prediction is the sample
    wanted = [np.sqrt(((images - final) ** 2).mean()) for images in seen]
    np.testing.assert_allclose(numbers["RMSE to the sample (0-255)"], wanted, rtol=1e-6)


def test_nearest_looks_at_the_whole_training_set_once(shown):
    """By pixels and by any features; the set streamed in batches that do not divide it."""
    row_means = lambda images: images.astype(np.float32).mean(2).reshape(len(images), -1)  # noqa: E731
    s = make_studio(features={"rows": row_means}, **{"sample.batch_size": 100})
    pages = figures.nearest(s, k=3)
    assert list(pages) == ["nearest_pixels.png", "nearest_rows.png"]
    real = loader.load_dataset(data.open_dataset("digits", "train")).image
    for (images, columns, _), features in zip(
        shown, (lambda a: a.astype(float), row_means), strict=True
    ):
        assert columns == ["sample", "1", "2", "3"]
        for row in images:
            away = (features(real) - features(row[:1])).reshape(len(real), -1)
            best = np.argsort((away**2).sum(1), kind="stable")[:3]
            np.testing.assert_array_equal(row[1:], real[best])


def test_what_fills_up_the_last_batch_is_no_neighbour(shown):
    """By the number in the training set, and for samples the number after it: the last are best."""
    real = loader.load_dataset(data.open_dataset("digits", "train")).image
    known = {image.tobytes(): i for i, image in enumerate(real)}

    def number(images):
        return np.array([[known.get(image.tobytes(), len(real))] for image in images], np.float32)

    figures.nearest(make_studio(features={"number": number}, **{"sample.batch_size": 100}), k=3)
    images = shown[1][0]
    np.testing.assert_array_equal(images[:, 1:], np.stack([real[[-1, -2, -3]]] * 2))


@pytest.mark.parametrize("mask", ["right", "centre"])
def test_inpainting_keeps_what_is_known(shown, mask):
    s = make_studio({"mask": mask})
    figures.inpainting(s, draws=3)
    [(images, columns, _)] = shown
    assert images.shape == (2, 5, 8, 8, 3) and columns[:2] == ["original", "known"]
    known = figures.known_part(s.config, 8, 8)
    for original, hidden, *drawn in images:
        assert (hidden[~known] == labelled_grid.HIDDEN).all()
        for image in (hidden, *drawn):
            np.testing.assert_array_equal(image[known], original[known])
        assert all((image[~known] != original[~known]).mean() > 0.5 for image in drawn)
        assert (drawn[0] != drawn[1]).any()


def test_a_mask_is_a_name_or_a_picture(tmp_path):
    picture = Image.new("L", (8, 8), 255)
    picture.putpixel((1, 2), 0)
    picture.save(tmp_path / "mask.png")
    config, _ = make({"mask": str(tmp_path / "mask.png")})
    assert np.argwhere(~figures.known_part(config, 8, 8)).tolist() == [[2, 1]]
    with pytest.raises(DDPMError, match=r"figures\.mask: .*mask\.png: expected a picture of 9x8"):
        figures.known_part(config, 9, 8)
    config.figures.mask = "rigth"
    with pytest.raises(DDPMError, match=r"figures\.mask: 'rigth' is not known; nearest: right"):
        figures.known_part(config, 8, 8)




def test_every_figure_is_drawn_and_again_the_same(tmp_path):
    config, x = make()
    params = jax.device_put({}, replicated(x.mesh))
    said = []
    for name in ("first", "again"):
        figures.run(config, x, tmp_path / name, 12, params, said.append)
    first, again = (tmp_path / name / "figures" / "00000012" for name in ("first", "again"))
    names = sorted(path.name for path in first.iterdir())
    pages = {f"{name}.png" for name in figures.FIGURES} - {"nearest.png", "animation.png"}
    assert set(names) == pages | {"nearest_pixels.png", "animation.gif", "quality.json", "how.json"}
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert sum(line.startswith("drawing") for line in said) == 2 * len(figures.FIGURES)
    with Image.open(first / "animation.gif") as picture:
        assert picture.n_frames == 20  # a chain of 20 steps has no 32 frames
    how = json.loads((first / "how.json").read_text())
    assert how["step"] == 12 and how["config"]["figures"]["seed"] == 3


def test_only_what_is_asked_for_is_drawn(tmp_path):
    config, x = make({"names": ("samples",), "seed": 3})
    params = jax.device_put({}, replicated(x.mesh))
    figures.run(config, x, tmp_path, 1, params, SAID.append)
    folder = tmp_path / "figures" / "00000001"
    assert sorted(path.name for path in folder.iterdir()) == ["how.json", "samples.png"]


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    for figures, message in (
        ({"names": ("samples", "neares")}, r"figures\.names: 'neares' is not known; nearest: near"),
        ({"names": ("interpolation",), "rows": 200}, r"expected 400 images in test .*, found 296"),
        ({"names": ("samples",), "mask": "all"}, r"figures\.mask: 'all' is not known"),
    ):
        config, x = make(figures)
        params = jax.device_put({}, replicated(x.mesh))
        with pytest.raises(DDPMError, match=message):
            figures.run(config, x, tmp_path, 1, params, SAID.append)
