"""Weights in, weights out: what comes in is what was there, and others read what goes out."""

import json
import pathlib
import struct
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import checkpoint, convert, experiment, train_step
from diffusion.convert import readers, safetensors_file
from diffusion.convert.crc32c import crc32c, masked
from diffusion.modes import export_weights, import_weights
from diffusion.runtime import config
from diffusion.runtime.config import WORKDIR, flatten, tuples, validate, with_overrides
from diffusion.samplers import ancestral, base
from diffusion.utils.errors import DDPMError
from tests.convert import test_tf_checkpoint
from tests.convert.test_convert import official
from tests.convert.test_diffusers import SCHEDULER, listed, recipe, unet_json
from tests.modes.test_train import run
from tests.test_configs import config_of
from tests.test_unet import OFFICIAL, ROUNDING, recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def folder_of_diffusers(folder, config="tiny", flat=False):
    """Files as at Hugging Face: of a pipeline, or flat as the oldest of them are."""
    unet, scheduler = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    for path in (unet, scheduler):
        path.mkdir(parents=True, exist_ok=True)
    (unet / "config.json").write_text(json.dumps(unet_json(config)))
    (scheduler / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    safetensors_file.write(unet / WEIGHTS, listed(config, recipe))
    return folder


def small_config():
    """Digits' network of seconds."""
    return config_of("digits", "tiny")


def small_state(config, step=6):
    """A state with other numbers in every array."""
    x = experiment.build(config)
    random = np.random.RandomState(0)

    def some(tree):
        return jax.tree.map(lambda a: jnp.asarray(random.randn(*a.shape), a.dtype), tree)

    abstract = experiment.abstract_state(x).params
    params, ema = some(abstract), some(abstract)
    return train_step.TrainState(jnp.int32(step), params, ema, x.tx.init(params))


def config_in(workdir):
    content = json.loads((workdir / "config.json").read_text())
    config = config.ConfigDict(tuples(content))
    validate(config, devices=1)
    return config


def taken_in(source, workdir, config=None, **options):
    """(lines, config, state) of an import, the state as the other modes read it."""
    lines = []
    import_weights.import_weights(str(source), config, workdir, lines.append, **options)
    assert not list(workdir.parent.glob(".*.unfinished"))
    made = config_in(workdir)
    opened = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    state = opened.restore(experiment.abstract_state(experiment.build(made)))
    opened.close()
    return lines, made, state


@pytest.fixture
def handed_over(monkeypatch):
    """[(step, state)] given to the checkpoints, which are not written: that takes seconds."""
    states = []

    class Checkpoints:
        def __init__(self, directory):
            directory.mkdir()

        def save(self, step, state):
            states.append((step, state))

        def close(self):
            pass

    monkeypatch.setattr(checkpoint, "Checkpoints", Checkpoints)
    return states


def refused(source, tmp_path, code, match, config=None, **options):
    """An import ends in one line and leaves nothing."""
    workdir = tmp_path / "runs" / "refused"
    with pytest.raises(DDPMError, match=match) as error:
        import_weights.import_weights(str(source), config, workdir, lambda line: None, **options)
    assert error.value.code == code and "\n" not in str(error.value)
    assert len(str(error.value)) < 2000
    assert not workdir.exists() and not list((tmp_path / "runs").glob("*"))


def output(params, config, x, t):
    net = experiment.build(config).net
    return jax.jit(net.apply, static_argnames="train")({"params": params}, x, t, train=False)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)




def test_an_official_checkpoint_gives_the_official_output(tmp_path):
    arrays = {name: recipe(name, a.shape) for name, a in official("tiny").items()}
    raw = {name: a + 1 for name, a in arrays.items()}
    ema = {f"{name}/ExponentialMovingAverage": a for name, a in arrays.items()}
    rest = {f"{name}/Adam": a for name, a in raw.items() if name.endswith("/b")}
    rest |= {"global_step": np.asarray(790_000), "beta1_power": np.float32(0.5)}
    test_tf_checkpoint.write(
        tmp_path / "model.ckpt-790000",
        raw | ema | rest,
        checksum=lambda data: struct.pack("<I", masked(crc32c(data))),
    )
    lines, config, state = taken_in(
        tmp_path, tmp_path / "runs" / "x", overrides={"data.image_size": 16}
    )
    assert config.model.attn_resolutions == (8,)  # attention is in the second level
    assert int(state.step) == 790_000
    assert any("left out: beta1_power" in line for line in lines)
    same(state.params, convert.from_official(raw))
    found = output(state.ema, config, OFFICIAL["tiny.x"], OFFICIAL["tiny.t"])
    np.testing.assert_allclose(found, OFFICIAL["tiny.out"], **ROUNDING)


def test_one_set_of_weights_is_taken_as_both():
    arrays = official("tiny")
    averages = {f"{name}/ExponentialMovingAverage": a for name, a in arrays.items()}
    for part, note in ((arrays, "no averages"), (averages, "only the averages")):
        found = readers.of_official(part)
        same(found.params, convert.from_official(arrays))
        same(found.ema, found.params)
        assert note in found.notes[0] and found.step == 0
    with pytest.raises(ValueError, match=r"1 missing \(model/conv_in/b\)"):  # of the averages alone
        readers.of_official(arrays | {k: a for k, a in averages.items() if "conv_in/b/" not in k})


def test_a_folder_of_diffusers(tmp_path):
    source, workdir = folder_of_diffusers(tmp_path / "theirs", flat=True), tmp_path / "runs" / "x"
    lines, config, state = taken_in(source, workdir)
    assert config.variance == "fixed_large" and config.data.image_size == 16
    assert any("data.image_size: was 8, now 16" in line for line in lines)
    same(state.ema, convert.from_diffusers(listed("tiny", recipe)))
    same(state.params, state.ema)
    assert int(state.step) == 0
    assert all(not np.any(m) for m in jax.tree.leaves(state.opt_state))
    about = json.loads((workdir / "import.json").read_text())
    assert about["input"] == str(source) and about["revision"] is None


def test_one_file_alone(tmp_path, handed_over):
    """The scheduler is not there: what the shapes do not tell is the nearest config's."""
    source = folder_of_diffusers(tmp_path / "theirs") / "unet" / WEIGHTS
    import_weights.import_weights(str(source), None, tmp_path / "x", lambda line: None)
    config, ((step, state),) = config_in(tmp_path / "x"), handed_over
    assert config.data.image_size == 32 and config.model.attn_resolutions == (16,)
    same(state.ema, convert.from_diffusers(listed("tiny", recipe)))
    assert step == int(state.step) == 0


def test_a_config_that_is_given_counts(tmp_path, handed_over):
    source, lines = folder_of_diffusers(tmp_path / "theirs"), []
    keys = {"model.ch": 32, "data.image_size": 16, "data.channels": 3, "sampler.clip": False}
    keys |= {"model.attn_resolutions": (8,), "train.steps": 77}
    config = with_overrides(config_of("digits"), keys)
    import_weights.import_weights(str(source), config, tmp_path / "x", lines.append)
    assert config_in(tmp_path / "x").to_dict() == config.to_dict()
    assert any("sampler.clip: the files say True" in line for line in lines)
    wrong = with_overrides(config, {"model.ch": 16})
    text = r"conv_in/bias: expected float32\[16\], found float32\[32\]; .*more"
    refused(source, tmp_path, 6, text, wrong)


@pytest.mark.parametrize(
    "network, source, name",
    [  # the official networks: which experiment of the paper each is
        ("cifar10", "model.ckpt", "configs/cifar10.py"),
        ("cifar10_outch6", "model.ckpt", "configs/cifar10.py:eps_vlb_learned"),
        ("c256", "diffusion_lsun_church_model/model.ckpt", "configs/lsun_church.py"),
        ("c256", "google/ddpm-bedroom-256", "configs/lsun_bedroom.py"),
        ("c256", "google/ddpm-ema-cat-256", "configs/lsun_cat.py"),
        ("c256", "google/ddpm-celebahq-256", "configs/celebahq256.py"),
    ],
)
def test_shapes_tell_the_experiment(network, source, name):
    size = convert.sizes(convert.from_official(official(network)))
    flat = import_weights.deduce(size, {}, source)
    found, config = import_weights.nearest(flat, source)
    assert found == name
    assert {key: flatten(config)[key] for key in flat} == flat


def test_without_attention_the_size_must_be_told():
    size = convert.Sizes(32, (1, 2), 1, (False, False), 3, 3, 0)
    with pytest.raises(DDPMError, match="do not tell the size of the images"):
        import_weights.deduce(size, {}, "x")
    stated = {"data.image_size": 16, "data.image_width": 0}
    assert import_weights.deduce(size, stated, "x")["model.attn_resolutions"] == ()


def test_a_name_at_hugging_face_is_downloaded(tmp_path, handed_over):
    source = folder_of_diffusers(tmp_path / "cache")
    asked, lines, workdir = [], [], tmp_path / "x"

    def fetch(name):
        asked.append(name)
        return source, "0123abc"

    import_weights.import_weights("google/ddpm-tiny-16", None, workdir, lines.append, fetch=fetch)
    about = json.loads((workdir / "import.json").read_text())
    assert asked == ["google/ddpm-tiny-16"] and about["revision"] == "0123abc"
    assert any("0123abc" in line for line in lines)
    assert handed_over


@pytest.mark.parametrize(
    "files, wanted", [(("a.safetensors", "a.bin"), "*.safetensors"), (("a.bin",), "*.bin")]
)
def test_what_is_asked_of_the_hub(monkeypatch, files, wanted):
    """A stand-in for the library: one revision throughout, and one form of the weights."""
    siblings = [types.SimpleNamespace(rfilename=file) for file in files]
    info = types.SimpleNamespace(sha="0123abc", siblings=siblings)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return "/folder"

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = lambda: types.SimpleNamespace(model_info=lambda name: info)
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert import_weights.fetch("a/b") == (pathlib.Path("/folder"), "0123abc")
    assert asked == {"name": "a/b", "revision": "0123abc", "allow_patterns": ["*.json", wanted]}

    def unreachable(name):
        raise ConnectionError("no\nroute")

    hub.HfApi = lambda: types.SimpleNamespace(model_info=unreachable)
    with pytest.raises(DDPMError, match="a/b: cannot be downloaded: no route"):
        import_weights.fetch("a/b")


def test_without_the_hubs_library_there_is_a_way(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("google/ddpm-cifar10-32", tmp_path, 2, "pip install huggingface_hub, or download")




def spoil(path, **changes):
    """Rewrites a safetensors file with other arrays; None: without that one."""
    arrays = safetensors_file.read(path) | changes
    safetensors_file.write(path, {name: a for name, a in arrays.items() if a is not None})


def lying_header(path):
    """The first array is said to be of 2^40 elements."""
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    header["conv_in.bias"]["shape"] = [2**40]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


def with_nan(path):
    spoil(path, **{"conv_in.bias": np.full(32, np.nan, np.float32)})


def half(path):
    spoil(path, **{"conv_in.bias": np.zeros(32, np.float16)})


@pytest.mark.parametrize(
    "change, match",
    [
        (lying_header, "conv_in.bias"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), WEIGHTS),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), WEIGHTS),
        (lambda path: path.write_bytes(b""), WEIGHTS),
        (lambda path: path.unlink(), "found neither"),
        (with_nan, "conv_in.bias.*nan"),
        (half, r"conv_in/bias: expected float32\[32\], found float16\[32\]"),
        (lambda path: spoil(path, **{"conv_out.bias": None}), r"1 missing \(conv_out.bias\)"),
        (lambda path: spoil(path, extra=np.zeros((2, 3))), r"1 left over \(extra \(2, 3\)\)"),
        (lambda path: spoil(path, **{"a\nb" * 999: np.zeros(2)}), r"1 left over \(a ba b"),
        (
            lambda path: spoil(path, **{"conv_in.bias": np.zeros(31, np.float32)}),
            r"conv_in/bias: expected float32\[32\], found float32\[31\]",
        ),
    ],
)
def test_hostile_files(tmp_path, change, match):
    source = folder_of_diffusers(tmp_path / "theirs")
    change(source / "unet" / WEIGHTS)
    refused(source, tmp_path, 6, match)


@pytest.mark.parametrize(
    "change, code, match",
    [
        ({"act_fn": "gelu"}, 2, "act_fn: the network here has 'silu', found 'gelu'"),
        (
            {"block_out_channels": [32, 96]},
            6,
            r"down_1/attn_0/k/bias: expected float32\[96\], found float32\[64\]",
        ),
        ({"layers_per_block": 2}, 6, "down_0/block_1/conv1/bias: expected .*, found none"),
        ({"sample_size": 15}, 2, "divisible by 2"),
    ],
)
def test_settings_that_are_not_those_of_the_weights(tmp_path, change, code, match):
    source = folder_of_diffusers(tmp_path / "theirs")
    (source / "unet" / "config.json").write_text(json.dumps(unet_json("tiny") | change))
    refused(source, tmp_path, code, match)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_settings_that_cannot_be_read(tmp_path, text):
    source = folder_of_diffusers(tmp_path / "theirs")
    (source / "unet" / "config.json").write_text(text)
    refused(source, tmp_path, 6, "config.json: ")


def test_inputs_that_are_none(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path):
        refused(source, tmp_path, 2, "expected a TensorFlow checkpoint, a folder of diffusers")
    file = tmp_path / "words.txt"
    file.write_text("words")
    refused(file, tmp_path, 6, "words.txt: expected a file of safetensors")


def test_a_work_directory_in_use_is_left_alone(tmp_path, handed_over):
    source, workdir = folder_of_diffusers(tmp_path / "theirs"), tmp_path / "runs"
    workdir.mkdir()
    (workdir / "config.json").write_text("mine")
    with pytest.raises(DDPMError, match="or an empty one; choose another --workdir") as error:
        import_weights.import_weights(str(source), None, workdir, lambda line: None)
    assert error.value.code == WORKDIR
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    (workdir / "config.json").unlink()
    import_weights.import_weights(str(source), None, workdir, lambda line: None)
    assert config_in(workdir)




def test_out_and_in_again_is_the_same(tmp_path):
    """Raw and averaged weights to the bit, the step and the whole config."""
    config, lines = small_config(), []
    state = small_state(config)
    out = tmp_path / "out"
    export_weights.export_weights(config, tmp_path / "w", 6, state, out, lines.append)
    assert "nothing for diffusers: model.ch" in lines[0]  # not in 32 groups
    assert {p.name for p in out.iterdir()} == {"README.md", "ddpm.json", "flax.safetensors"}
    _, made, found = taken_in(out, tmp_path / "runs" / "x")
    assert made.to_dict() == config.to_dict()
    same(found._replace(opt_state=()), state._replace(opt_state=()))
    with pytest.raises(DDPMError, match="it is there already"):
        export_weights.export_weights(config, tmp_path / "w", 6, state, out, lines.append)


@pytest.mark.slow
def test_training_and_sampling_go_on_from_an_import(tmp_path):
    """main.py itself, from step 6 to step 8."""
    config = small_config()
    args = config, tmp_path / "w", 6, small_state(config), tmp_path / "out", lambda line: None
    export_weights.export_weights(*args)
    workdir = tmp_path / "runs" / "x"
    import_weights.import_weights(str(tmp_path / "out"), None, workdir, lambda line: None)
    out, _ = run("--workdir", workdir)
    assert "from step 6" in out
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["6", "8"]
    run("--workdir", workdir, "--mode=sample")


SAMPLER = {"name": "ddim", "steps": 50, "times": []}


def test_the_card_tells_what_was_measured(tmp_path):
    folder = tmp_path / "w" / "eval" / "00000006"
    folder.mkdir(parents=True)
    scores = {"ema": {"train": {"fid": {"value": 3.17, "error": None}}}}
    (folder / "metrics.json").write_text(
        json.dumps({"step": 6, "samples": 50_000, "scores": scores, "sampler": SAMPLER})
    )
    bits = {"bound on test": {"mean": 3.75, "error": 0.01}}
    (folder / "bpd.json").write_text(json.dumps({"step": 6, "images": 100, "bits_per_dim": bits}))
    (folder.parent / "7").mkdir()
    (folder.parent / "7" / "bpd.json").write_text("{")  # torn: passed over
    config = small_config()
    export_weights.export_weights(
        config, tmp_path / "w", 6, small_state(config), tmp_path / "out", lambda line: None
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| 6 | fid, 50,000 samples of ema weights by ddim in 50 steps against train | 3.17 |"
        in card
    )
    assert "| 6 | bits/dim, bound on test, 100 images | 3.75 ± 0.01 |" in card
    assert "`digits`" in card and "after 6 steps" in card and "| model.ch | `8` |" in card


def test_the_names_in_a_file_for_flax(tmp_path):
    config = small_config()
    state = small_state(config)
    export_weights.export_weights(config, tmp_path, 6, state, tmp_path / "out", lambda line: None)
    arrays = safetensors_file.read(tmp_path / "out" / "flax.safetensors")
    for part, tree in (("params", state.params), ("ema", state.ema)):
        np.testing.assert_array_equal(
            arrays[f"{part}/down_0/block_0/conv1/kernel"],
            tree["down_0"]["block_0"]["conv1"]["kernel"],
        )
    assert arrays["step"].tolist() == [6]


def for_diffusers(**changes):
    """A config that diffusers can express, with the small network of its vectors."""
    flat = import_weights.diffusers_config.config_of_diffusers(unet_json("tiny"), SCHEDULER)
    return with_overrides(config_of("digits"), flat | changes)


def exported(tmp_path, config):
    """(folder, averaged weights) of an export for diffusers."""
    state = small_state(config)
    arrays = convert.to_diffusers(state.ema)
    ema = convert.from_diffusers({name: recipe(name, a.shape) for name, a in arrays.items()})
    state = state._replace(ema=jax.tree.map(jnp.asarray, ema))
    export_weights.export_weights(config, tmp_path, 6, state, tmp_path / "out", lambda line: None)
    return tmp_path / "out", state.ema


def test_the_averaged_weights_go_to_diffusers(tmp_path):
    folder, ema = exported(tmp_path, for_diffusers())
    same(convert.from_diffusers(safetensors_file.read(folder / "unet" / WEIGHTS)), ema)
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


@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_same_network(tmp_path, diffusers):
    torch, library = diffusers
    config = for_diffusers(**{"variance": "fixed_small"})
    folder, ema = exported(tmp_path, config)
    pipeline = library.DDPMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    x, t = noise((2, 16, 16, 3)), np.array([7, 993], np.int32)
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t)).sample
    ours = output(ema, config, x, t)
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, **ROUNDING)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws_the_same_images(tmp_path, diffusers):
    """Ten steps of DDIM from the same noise."""
    torch, library = diffusers
    config = for_diffusers()
    folder, ema = exported(tmp_path, config)
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
    x = experiment.build(config)
    predict = experiment.make_predictor(config, x)(ema, jnp.zeros(2, jnp.int32))
    ts = np.append(np.arange(901, 0, -100), 0)  # theirs count from 0: 900, 800, ..., 0
    ours = jax.jit(
        lambda x_T: base.sample(ancestral.ddim(x.p), predict, jax.random.key(0), x_T, ts)
    )(x_T)
    # Their table is a product in float32, 1e-6 off; at t = 901 x_0 is x_T times 60.
    np.testing.assert_allclose(image.numpy().transpose(0, 2, 3, 1), ours, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_classes(tmp_path, diffusers):
    torch, library = diffusers
    config = for_diffusers(**{"model.num_classes": 4})
    folder, ema = exported(tmp_path, config)
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
def test_what_diffusers_saves_is_read(tmp_path, diffusers, handed_over, safe):
    torch, library = diffusers
    torch.manual_seed(0)
    unet = library.UNet2DModel(**unet_json("tiny"))
    scheduler = library.DDPMScheduler(variance_type="fixed_large")
    pipeline = library.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    import_weights.import_weights(str(tmp_path / "theirs"), None, tmp_path / "x", lambda line: None)
    config, ((_, state),) = config_in(tmp_path / "x"), handed_over
    assert config.variance == "fixed_large"
    x, t = noise((2, 16, 16, 3)), np.array([7, 993], np.int32)
    with torch.no_grad():
        theirs = unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t)).sample
    ours = output(state.ema, config, x, t)
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, **ROUNDING)
