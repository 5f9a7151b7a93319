"""What each figure shows, looked at before it is drawn; and which figures are drawn again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import data, experiment, process
from diffusion.data import augment
from diffusion.modes import figures
from diffusion.plotting import labelled_grid
from diffusion.runtime.config import Run
from diffusion.samplers import ancestral, base
from diffusion.utils.errors import ConfigError, DDPMError
from tests.modes.test__trajectories import toy_context, toy_model
from tests.modes.test_sample import save_initial_state


@pytest.fixture(scope="module")
def context():
    return toy_context()


def images_of(split):
    images = data.open_dataset("digits", split)
    return images.read(np.arange(images.n))[0]


@pytest.fixture
def shown(monkeypatch):
    """The (images, columns, rows) of every labelled grid, in place of the page."""
    given = []

    def grid(images, columns=(), rows=(), title="", note="", breaks=()):
        given.append((np.asarray(images), list(columns), list(rows)))
        return np.zeros([1, 1, 3], np.uint8)

    monkeypatch.setattr(labelled_grid, "labelled_grid", grid)
    return given


def test_progressive_and_denoising_show_the_same_walk(context, shown):
    figures.progressive(context, columns=5)
    figures.denoising(context, columns=5)
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
    np.testing.assert_array_equal(x[:, 0], augment.unscale(T, 17))


def test_shared_draws_differ_and_share_more_the_smaller_t(context, shown):
    figures.shared(context, depths=(1, 0.5, 0.1), draws=6)
    [(images, columns, rows)] = shown
    assert images.shape == (3, 7, 8, 8, 1) and columns[0] == "xₜ"
    assert rows == ["t = 20", "t = 10", "t = 2"]
    spread = images[:, 1:].astype(float).std(1).mean((1, 2, 3))
    assert spread[0] > spread[2] > 0 and spread[1] > spread[2]


def test_shared_notes_a_sampler_that_draws_no_noise(shown, monkeypatch, capsys):
    p = (model := toy_model()).exp.process

    def step(predict, keys, state, t, s):
        found = predict(state.x, t)
        b = jnp.broadcast_to(s, state.x.shape[:1])
        return base.SamplerState(process.q_sample(p, found.x_0, b, found.eps), found.x_0)

    _, ts = experiment.make_sampler(model.config, model.exp)
    noiseless = base.Sampler(ancestral.ancestral(p).init, step)
    monkeypatch.setattr(experiment, "make_sampler", lambda config, exp: (noiseless, ts))
    figures.shared(toy_context(), draws=2)
    assert "ancestral draws no noise" in capsys.readouterr().out


def test_interpolation_joins_pairs_of_real_images(context, shown):
    figures.interpolation(context)
    [(images, columns, _)] = shown
    real = images_of("test")
    assert images.shape == (2, 13, 8, 8, 1) and columns[0] == columns[-1] == "source"
    found = {tuple(np.flatnonzero((real == source).all((1, 2, 3)))) for source in images[:, 0]}
    found |= {tuple(np.flatnonzero((real == source).all((1, 2, 3)))) for source in images[:, -1]}
    assert len(found) == 4 and () not in found


def test_coarse_to_fine_ends_in_blended_pixels(context, shown):
    """Without noise there is nothing to decode: the row of t = 0 is (1 - lambda) x + lambda y."""
    figures.coarse_to_fine(context)
    [(images, columns, rows)] = shown
    assert rows == [f"t = {t}" for t in (20, 18, 15, 13, 10, 8, 5, 3, 0)]
    assert columns[1:12] == ["λ = 0", *(f"0.{i}" for i in range(1, 10)), "λ = 1"]
    x, y = images[-1, 0].astype(float), images[-1, -1].astype(float)
    for share, image in zip(np.linspace(0, 1, 11), images[-1, 1:-1], strict=True):
        # Rounded to one of 17 levels, which are bytes.
        np.testing.assert_allclose(image, (1 - share) * x + share * y, atol=255 / 16 / 2 + 1)
    assert (images[:, 0] == images[0, 0]).all() and (images[:, -1] == images[0, -1]).all()


def test_the_network_gets_the_nearer_image_s_label(shown, monkeypatch):
    context, labels = toy_context(**{"model.num_classes": 10}), []

    def watched(context, starts, *args, **kwargs):
        labels.extend(start.label.tolist() for start in starts)
        return [(np.zeros((2, 11, 8, 8, 1), np.uint8),) * 2 for _ in starts]

    monkeypatch.setattr(figures, "rollout", watched)
    figures.coarse_to_fine(context, n=2)
    _, (first, second) = figures.read_real(context.config, context.trained.exp, 2)
    assert labels == [[first] * 5 + [second] * 6] * 2 and first != second


def test_quality_scores_the_predicted_images_of_each_time(tmp_path):
    seen = []

    def score(images):
        seen.append(images)
        return {"mean": float(images.mean()), "spread": float(images.std())}

    for name, write in figures.quality(toy_context(score=score), points=4).items():
        write(tmp_path / name)
    numbers = json.loads((tmp_path / "quality.json").read_text())
    assert numbers["images"] == 5 and numbers["reverse steps"] == [0, 6, 13, 19]
    assert [images.shape for images in seen] == [(5, 8, 8, 1)] * 4
    assert numbers["mean"] == [images.mean() for images in seen]
    final = seen[-1].astype(float)  # the last prediction is the sample
    wanted = [np.sqrt(((images - final) ** 2).mean()) for images in seen]
    np.testing.assert_allclose(numbers["RMSE to the sample (0-255)"], wanted, rtol=1e-6)


def test_nearest_searches_the_training_set(shown):
    """In pixels and in features, in batches that do not divide the set, against a full sort."""
    row_means = lambda images: images.astype(np.float32).mean(2).reshape(len(images), -1)  # noqa: E731
    context = toy_context(features={"rows": row_means}, **{"sample.batch_size": 100})
    assert list(figures.nearest(context, k=3)) == ["nearest_pixels.png", "nearest_rows.png"]
    real = images_of("train")
    for (images, columns, _), features in zip(
        shown, (lambda a: a.astype(float), row_means), strict=True
    ):
        assert columns == ["sample", "1", "2", "3"]
        for row in images:
            away = (features(real) - features(row[:1])).reshape(len(real), -1)
            best = np.argsort((away**2).sum(1), kind="stable")[:3]
            np.testing.assert_array_equal(row[1:], real[best])


def test_memorisation_measures_samples_and_held_out_images(tmp_path, capsys):
    """Against all pairs; samples that are training images are at 0 and nearer than all others."""
    context = toy_context()
    for name, write in figures.memorisation(context).items():
        write(tmp_path / name)
    [(space, found)] = json.loads((tmp_path / "memorisation.json").read_text()).items()
    real, num = images_of("train").astype(float), context.config.figures.num
    x, _ = figures.first_samples(context, num, (0, 20))
    chosen, _ = figures.read_real(context.config, context.trained.exp, num)
    for images, distances in zip((x[-1], chosen), found.values(), strict=True):
        away = ((images[:, None].astype(float) - real) ** 2).mean((2, 3, 4)) ** 0.5
        np.testing.assert_allclose(distances, away.min(1), rtol=1e-12)
    assert space.startswith("pixels") and list(found) == ["samples", "images of test"]
    assert f"{np.median(found['samples']):.3g} of samples" in capsys.readouterr().out
    assert figures.nearer_share(np.zeros(5), np.array(found["images of test"])) == 1
    held_out = np.arange(1, 1001.0)
    assert abs(figures.nearer_share(held_out, held_out) - 0.05) < 1e-3
    with Image.open(tmp_path / "memorisation.png") as picture:
        assert min(picture.size) > 300


def test_memorisation_is_not_measured_by_training_images(capsys):
    """Which are their own nearest: no sample would be as near."""
    assert figures.memorisation(toy_context(figures={"split": "train"})) == {}
    assert "figures.split=test" in capsys.readouterr().out


def test_padding_of_the_last_batch_is_no_neighbour(shown):
    """The feature is the number in the training set, that of samples the next one: the last win."""
    real = images_of("train")
    known = {image.tobytes(): i for i, image in enumerate(real)}

    def number(images):
        return np.array([[known.get(image.tobytes(), len(real))] for image in images], np.float32)

    figures.nearest(toy_context(features={"number": number}, **{"sample.batch_size": 100}), k=3)
    images = shown[1][0]
    np.testing.assert_array_equal(images[:, 1:], np.stack([real[[-1, -2, -3]]] * 2))


@pytest.mark.parametrize("mask", ["right", "centre"])
def test_inpainting_keeps_the_known_pixels(shown, mask):
    context = toy_context(figures={"mask": mask})
    figures.inpainting(context, draws=3)
    [(images, columns, _)] = shown
    assert images.shape == (2, 5, 8, 8, 3) and columns[:2] == ["original", "known"]
    known = figures.known_mask(context.config, 8, 8)
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
    config = toy_model(figures={"mask": str(tmp_path / "mask.png")}).config
    assert np.argwhere(~figures.known_mask(config, 8, 8)).tolist() == [[2, 1]]
    with pytest.raises(ConfigError, match=r"figures\.mask: .*mask\.png: expected .* of 9x8"):
        figures.known_mask(config, 9, 8)
    config.figures.mask = "rigth"
    with pytest.raises(ConfigError, match=r"figures\.mask: 'rigth' is not known; nearest: right"):
        figures.known_mask(config, 8, 8)


@pytest.fixture
def unmeasured(monkeypatch):
    """No score and no features but pixels: those of --mode=eval have tests of their own."""
    monkeypatch.setattr("diffusion.modes._scores.make_measures", lambda trained: (None, {}))


def measure_a_file(workdir):
    """Leaves what --mode=compress does."""
    folder = workdir / "eval" / "00000012"
    folder.mkdir(parents=True, exist_ok=True)
    point = {"bits": 1.0, "rmse": 20.0, "bound": 0.8, "bound_rmse": 19.0}
    report = {"points": [point, point | {"bits": 2.0}], "lossy": {"JPEG": [(2.0, 30.0)]}}
    (folder / "codec.json").write_text(json.dumps(report))


def test_compression_is_drawn_once_there_is_a_file(tmp_path, capsys):
    draw = functools.partial(figures.draw_figures, toy_model(tmp_path, {"names": ["compression"]}))
    draw()
    assert "--mode=compress" in capsys.readouterr().out
    measure_a_file(tmp_path)
    for said in ("drawing", "keeping"):
        draw()
        assert f"{said}    compression" in capsys.readouterr().out
    assert (tmp_path / "figures" / "00000012" / "compression.png").exists()


def test_every_figure_is_drawn_and_again_the_same(tmp_path, unmeasured, capsys):
    for name in ("first", "again"):
        measure_a_file(tmp_path / name)
        figures.draw_figures(toy_model(tmp_path / name))
    first, again = (tmp_path / name / "figures" / "00000012" for name in ("first", "again"))
    names = sorted(path.name for path in first.iterdir())
    pages = {f"{name}.png" for name in figures.FIGURES} - {"nearest.png", "animation.png"}
    numbers = {"quality.json", "memorisation.json", "how.json"}
    assert set(names) == pages | {"nearest_pixels.png", "animation.gif"} | numbers
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    said = capsys.readouterr().out
    assert said.count("drawing    ") == 2 * len(figures.FIGURES)
    with Image.open(first / "animation.gif") as picture:
        assert picture.n_frames == 20  # a chain of 20 steps has no 32 frames
    how = json.loads((first / "how.json").read_text())
    assert how["step"] == 12 and how["config"]["figures"]["seed"] == 3


NAMES = ("samples", "denoising", "quality")


def drawn_by(capsys, workdir, **keys):
    """Returns the names of the figures that a run draws and of those that it keeps."""
    figures.draw_figures(toy_model(workdir, {"names": NAMES}, **keys))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    drawn, kept = ([x[1].strip(",") for x in lines if x[0] == y] for y in ("drawing", "keeping"))
    return drawn, kept


def test_a_killed_run_goes_on_with_the_next_figure(tmp_path, unmeasured, monkeypatch, capsys):
    folder = tmp_path / "figures" / "00000012"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(figures.FIGURES, "denoising", interrupted)
        drawn_by(capsys, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["how.json", "samples.png"]
    capsys.readouterr()
    assert drawn_by(capsys, tmp_path) == (["denoising", "quality"], ["samples"])
    assert drawn_by(capsys, tmp_path) == ([], list(NAMES))


def interrupted(context):
    raise KeyboardInterrupt


def test_a_figure_is_drawn_again_where_a_file_or_its_setting_changed(tmp_path, unmeasured, capsys):
    drawn_by(capsys, tmp_path)
    (tmp_path / "figures" / "00000012" / "quality.json").unlink()
    assert drawn_by(capsys, tmp_path) == (["quality"], ["samples", "denoising"])
    irrelevant = {"figures.names": NAMES[:2], "sample.batch_size": 8, "train.steps": 99}
    assert drawn_by(capsys, tmp_path, **irrelevant) == ([], ["samples", "denoising"])
    measured = {"eval.features": ("pixels",)}
    assert drawn_by(capsys, tmp_path, **measured) == (["quality"], ["samples", "denoising"])
    for changed in ({"figures.rows": 1}, {"sampler.steps": 10}):
        assert drawn_by(capsys, tmp_path, **changed) == (list(NAMES), [])


def test_only_named_figures_are_drawn(tmp_path):
    figures.draw_figures(toy_model(tmp_path, {"names": ("samples",)}))
    folder = tmp_path / "figures" / "00000012"
    assert sorted(path.name for path in folder.iterdir()) == ["how.json", "samples.png"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"names": ("samples", "neares")}, r"figures\.names: 'neares' is not known; nearest: near"),
        ({"names": ("interpolation",), "rows": 200}, r"expected 400 images in test .*, found 296"),
        ({"names": ("samples",), "mask": "all"}, r"figures\.mask: 'all' is not known"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(keys, message):
    model = toy_model(figures=keys)
    with pytest.raises(DDPMError, match=message):
        figures.check(model.config, model.exp)


def test_the_mode_draws_from_a_checkpoint(tmp_path, unmeasured, capsys):
    config = save_initial_state(tmp_path)
    config.figures.names = ("samples", "nearest")
    figures.run(Run("figures", config, tmp_path, None))
    folder = tmp_path / "figures" / "00000000"
    assert {"samples.png", "nearest_pixels.png"} <= {path.name for path in folder.iterdir()}
    assert capsys.readouterr().out.splitlines()[-1] == f"done       {folder}"
