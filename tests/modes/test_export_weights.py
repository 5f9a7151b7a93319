"""Exports of weights: imported again they are the same, and diffusers reads them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import convert, experiment, train_step
from diffusion.convert import diffusers_config, int8_weights, model_card, safetensors_file
from diffusion.convert.diffusers_config import from_diffusers_config
from diffusion.modes import import_weights
from diffusion.modes.export_weights import export_weights
from diffusion.runtime.config import flatten, with_overrides
from diffusion.samplers import ancestral, base
from diffusion.utils.errors import DDPMError
from tests.convert.test_diffusers import recipe, unet_json
from tests.convert.test_diffusers_config import SCHEDULER
from tests.modes.test_import_weights import (
    WEIGHTS,
    assert_equal,
    import_and_restore,
    output,
    refused,
    saved_states,  # noqa: F401
    stored_config,
)
from tests.runs import run
from tests.test_configs import config_of
from tests.test_unet import ROUNDING


def random_state(config, step=6):
    """A state with other numbers in every array."""
    exp = experiment.build(config)
    random = np.random.RandomState(0)

    def some(tree):
        return jax.tree.map(lambda a: jnp.asarray(random.randn(*a.shape), a.dtype), tree)

    abstract = exp.abstract_state.params
    params, ema = some(abstract), some(abstract)
    return train_step.TrainState(jnp.int32(step), params, ema, exp.tx.init(params))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(config, state, folder) of an export that has scores, and no form in diffusers."""
    tmp_path, config = tmp_path_factory.mktemp("export"), config_of("digits", "tiny")
    folder = tmp_path / "w" / "eval" / "00000006"
    folder.mkdir(parents=True)
    scores = {"ema": {"train": {"fid": {"value": 3.17, "error": None}}}}
    sampler = {"name": "ddim", "steps": 50, "times": []}
    (folder / "metrics.json").write_text(
        json.dumps({"step": 6, "samples": 50_000, "scores": scores, "sampler": sampler})
    )
    bits = {"bound on test": {"mean": 3.75, "error": 0.01}}
    (folder / "bpd.json").write_text(json.dumps({"step": 6, "images": 100, "bits_per_dim": bits}))
    (folder.parent / "7").mkdir()
    (folder.parent / "7" / "bpd.json").write_text("{")  # unfinished: left out
    state = random_state(config)
    export_weights(config, tmp_path / "w", state, tmp_path / "out")
    return config, state, tmp_path / "out"


def test_an_export_is_imported_bit_for_bit(exported, tmp_path):
    """Raw and averaged weights, the step and every key of the config."""
    config, state, folder = exported
    assert {p.name for p in folder.iterdir()} == {"README.md", "ddpm.json", "flax.safetensors"}
    made, found = import_and_restore(folder, tmp_path / "runs" / "x")
    assert made.to_dict() == config.to_dict()
    assert_equal(found._replace(opt_state=()), state._replace(opt_state=()))


def test_an_export_never_replaces_a_folder(exported, tmp_path):
    config, state, folder = exported
    with pytest.raises(DDPMError, match="expected a new or empty folder"):
        export_weights(config, tmp_path, state, folder)


def test_an_interrupted_export_leaves_nothing(exported, tmp_path, monkeypatch):
    config, state, _ = exported

    def disk_full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", disk_full)
    with pytest.raises(DDPMError, match="out: cannot be written: No space left on device"):
        export_weights(config, tmp_path, state, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_training_and_sampling_continue_from_an_import(exported, tmp_path):
    """main.py itself, from step 6 to step 8."""
    workdir = tmp_path / "runs" / "x"
    run("--mode=import", "--input", exported[2], "--workdir", workdir)
    out, _ = run("--workdir", workdir)
    assert "from step 6" in out
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["6", "8"]
    run("--workdir", workdir, "--mode=sample")
    run("--workdir", workdir, "--mode=export", "--output", tmp_path / "again")
    arrays = safetensors_file.read(tmp_path / "again" / "flax.safetensors")
    assert arrays["step"].tolist() == [8]


SAMPLER = ("name=unipc", "grid=uniform", "steps=20")  # that of previews


def sample(workdir):
    """16 images of a work directory's averaged weights, as integers."""
    keys = ("sample.num=16", "sample.batch_size=16", *(f"sampler.{key}" for key in SAMPLER))
    run("--mode=sample", "--workdir", workdir, *(f"--config.{key}" for key in keys))
    (path,) = workdir.glob("samples/*/samples.npz")
    with np.load(path) as file:
        return file["arr_0"].astype(int)


@pytest.mark.slow
def test_an_export_in_8_bits_is_imported_within_half_a_step(exported, tmp_path):
    """What it states is lost is what samples of both work directories lose."""
    config, state, folder = exported
    run("--mode=import", "--input", folder, "--workdir", tmp_path / "all")
    packed, back = tmp_path / "packed", tmp_path / "back"
    said, _ = run("--mode=export", "--int8", "--workdir", tmp_path / "all", "--output", packed)
    assert [path.name for path in packed.iterdir()] == ["weights-1-of-1.safetensors"]
    run("--mode=import", "--input", packed, "--workdir", back)
    made, found = import_and_restore(packed, tmp_path / "runs" / "x")
    assert made.to_dict() == config.to_dict() and int(found.step) == int(state.step)
    assert_equal(found.params, found.ema)
    squares, lost = 0.0, 0.0
    for w, rounded in zip(jax.tree.leaves(state.ema), jax.tree.leaves(found.ema), strict=True):
        step = np.abs(w).max(axis=tuple(range(w.ndim - 1))) / 127 if w.ndim > 1 else 0 * w
        assert (np.abs(rounded - w) <= 0.5001 * step).all()
        squares, lost = squares + np.sum(w**2), lost + np.sum((rounded - w) ** 2)
    _, metadata = int8_weights.read_set(packed)
    loss = json.loads(metadata["loss"])
    assert loss["relative_error"] == pytest.approx(np.sqrt(lost / squares), rel=1e-3)
    error = sample(back) - sample(tmp_path / "all")
    assert loss["max"] == np.abs(error).max() > 0
    assert loss["rms"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert f"{loss['relative_error']:.2%}" in said and f"{loss['max']} at most" in said


def test_8_bits_without_a_config_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    int8_weights.write_set(tmp_path / "x", {"ema/w": np.ones((2, 3), np.int8)}, {"config": "[]"})
    refused(tmp_path / "x", tmp_path, 6, "x: expected a config among the metadata, found none")


def test_the_card_lists_what_was_measured(exported):
    card = (exported[2] / "README.md").read_text()
    sampled = "50,000 samples of ema weights by ddim in 50 steps"
    assert f"| 6 | fid, {sampled} against train | 3.17 |" in card
    assert "| 6 | bits/dim, bound on test, 100 images | 3.75 ± 0.01 |" in card
    assert "`digits`" in card and "after 6 steps" in card and "| model.ch | `8` |" in card
    assert "diffusers has no form for this model" in card  # channels that are not in 32 groups


@pytest.mark.parametrize(
    "source, revision, first, steps, words",
    [
        ("me/flowers", "0123abc", 0, 0, "channels, imported from me/flowers."),
        ("/home/me/model.ckpt-790", None, 790, 0, "imported from model.ckpt-790 at step 790."),
        ("me/x", "0", 2, 9, "from me/x at step 2, then trained for 4 steps of batch 16 with JAX"),
    ],
)
def test_the_card_says_where_imported_weights_are_from(
    tmp_path, source, revision, first, steps, words
):
    record = {"input": source, "revision": revision, "step": first}
    (tmp_path / "import.json").write_text(json.dumps(record))
    keys = {"data.source": "digits" if steps else "", "train.steps": steps}
    flat = flatten(with_overrides(config_of("digits", "tiny"), keys))
    card = model_card.render("x", flat, 6 if steps else first, tmp_path, False)
    assert words in card and "after" not in card and str(tmp_path) not in card
    # What is not known of the data and the training is not stated.
    assert ("of `digits`" in card) == ("optim.lr" in card) == ("seed" in card) == (steps > 0)


@pytest.mark.parametrize(
    "null, words", [(-1, "0 to 9, or 10 for no class."), (-2, "0 to 9."), (4, "0 to 9; 4 is no")]
)
def test_the_card_says_which_labels_there_are(tmp_path, null, words):
    config = for_diffusers(**{"model.num_classes": 10, "model.null_class": null})
    assert words in model_card.render("x", flatten(config), 6, tmp_path, True)
    unet = diffusers_config.to_diffusers_config(flatten(config))["unet/config.json"]
    assert unet["num_class_embeds"] == 10 + (null == -1)


def test_the_names_in_a_file_for_flax(exported):
    _, state, folder = exported
    arrays = safetensors_file.read(folder / "flax.safetensors")
    for part, tree in (("params", state.params), ("ema", state.ema)):
        np.testing.assert_array_equal(
            arrays[f"{part}/down_0/block_0/conv1/kernel"],
            tree["down_0"]["block_0"]["conv1"]["kernel"],
        )
    assert arrays["step"].tolist() == [6]


def for_diffusers(**changes):
    """A config that diffusers can express, with the small network of its vectors."""
    flat = from_diffusers_config(unet_json("tiny"), SCHEDULER)
    return with_overrides(config_of("digits"), flat | changes)


def export_for_diffusers(tmp_path, config):
    """(folder, averaged weights) of an export for diffusers."""
    state = random_state(config)
    arrays = convert.to_diffusers(state.ema)
    ema = convert.from_diffusers({name: recipe(name, a.shape) for name, a in arrays.items()})
    state = state._replace(ema=jax.tree.map(jnp.asarray, ema))
    export_weights(config, tmp_path, state, tmp_path / "out")
    return tmp_path / "out", state.ema


def test_the_averaged_weights_go_to_diffusers(tmp_path):
    folder, ema = export_for_diffusers(tmp_path, for_diffusers())
    assert_equal(convert.from_diffusers(safetensors_file.read(folder / "unet" / WEIGHTS)), ema)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert "from_pretrained" in (folder / "README.md").read_text()


@pytest.fixture
def diffusers():
    """(torch, diffusers), or a skip: neither is needed by this program."""
    why = "pip install torch diffusers, to see diffusers itself read what is exported"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other people's imports
        torch = pytest.importorskip("torch", reason=why)
        return torch, pytest.importorskip("diffusers", reason=why)


def noise(shape):
    return np.random.RandomState(1).randn(*shape).astype(np.float32)


OF_DIFFUSERS = {  # its defaults, and what its schedulers can do besides
    "model.attention_head_dim": 8,
    "model.downsample_padding": 1,
    "model.flip_sin_to_cos": True,
    "model.freq_shift": 0,
    "model.norm_eps": 1e-5,
    "process.betas": tuple((np.linspace(0.01, 0.12, 1000) ** 2).tolist()),
    "sampler.threshold": 0.9,
    "sampler.threshold_max": 1.5,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, OF_DIFFUSERS], ids=["paper", "diffusers"])
def test_diffusers_reads_the_same_network(tmp_path, diffusers, changes):
    torch, library = diffusers
    config = for_diffusers(**changes | {"variance": "fixed_small"})
    folder, ema = export_for_diffusers(tmp_path, config)
    pipeline = library.DDPMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    x, t = noise((2, 16, 16, 3)), np.array([7, 993], np.int32)
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t)).sample
    ours = output(ema, config, x, t)
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, **ROUNDING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, OF_DIFFUSERS], ids=["paper", "diffusers"])
def test_diffusers_draws_the_same_images(tmp_path, diffusers, changes):
    """Ten steps of DDIM from the same noise."""
    torch, library = diffusers
    config = for_diffusers(**changes)
    folder, ema = export_for_diffusers(tmp_path, config)
    x_T = noise((2, 16, 16, 3))
    unet = library.UNet2DModel.from_pretrained(folder, subfolder="unet")
    ddim = library.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ddim.set_timesteps(10)
    image = torch.tensor(x_T.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for t in ddim.timesteps:
            # Ours derives eps from the clipped x_0; theirs does so where it is told to.
            out = ddim.step(unet(image, t).sample, t, image, use_clipped_model_output=True)
            image = out.prev_sample
    exp = experiment.build(config)
    predict = experiment.make_predictor(config, exp)(ema, jnp.zeros(2, jnp.int32))
    ts = np.append(np.arange(901, 0, -100), 0)  # theirs count from 0: 900, 800, ..., 0
    ours = jax.jit(
        lambda x_T: base.sample(ancestral.ddim(exp.process), predict, jax.random.key(0), x_T, ts)
    )(x_T)
    # Their table is a product in float32, 1e-6 off; at t = 901 x_0 is x_T times 60.
    np.testing.assert_allclose(image.numpy().transpose(0, 2, 3, 1), ours, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_classes(tmp_path, diffusers):
    torch, library = diffusers
    config = for_diffusers(**{"model.num_classes": 4})
    folder, ema = export_for_diffusers(tmp_path, config)
    unet = library.UNet2DModel.from_pretrained(folder, subfolder="unet")
    x, t, y = noise((2, 16, 16, 3)), np.array([7, 993], np.int32), np.array([1, 4], np.int32)
    image = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        theirs = unet(image, torch.tensor(t), class_labels=torch.tensor(y)).sample
    net = experiment.build(config).net
    ours = jax.jit(net.apply, static_argnames="train")({"params": ema}, x, t, y, train=False)
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, **ROUNDING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "PyTorch's own format"])
def test_what_diffusers_saves_is_read(tmp_path, diffusers, saved_states, safe):  # noqa: F811
    torch, library = diffusers
    torch.manual_seed(0)
    unet = library.UNet2DModel(**unet_json("tiny"))
    scheduler = library.DDPMScheduler(variance_type="fixed_large")
    pipeline = library.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    import_weights.import_weights(str(tmp_path / "theirs"), tmp_path / "x")
    config, ((_, state),) = stored_config(tmp_path / "x"), saved_states
    assert config.variance == "fixed_large"
    x, t = noise((2, 16, 16, 3)), np.array([7, 993], np.int32)
    with torch.no_grad():
        theirs = unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t)).sample
    ours = output(state.ema, config, x, t)
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, **ROUNDING)
