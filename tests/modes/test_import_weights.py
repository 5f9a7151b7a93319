"""Imports of weights: what comes in is what was there, and damaged inputs leave nothing."""

import json
import pathlib
import struct
import sys
import types

import google_crc32c
import jax
import numpy as np
import pytest

from diffusion import checkpoint, convert, experiment
from diffusion.convert import readers, safetensors_file
from diffusion.modes import import_weights
from diffusion.runtime.config import fill_defaults, flatten, validate, with_overrides
from diffusion.utils.errors import DDPMError, WorkdirError
from tests import test_unet
from tests.convert import test_diffusers, test_tf_checkpoint
from tests.convert.test_diffusers import listed, marked, unet_json
from tests.convert.test_diffusers_config import SCHEDULER
from tests.convert.test_unet_names import official
from tests.test_configs import config_of
from tests.test_unet import NETWORKS, OFFICIAL, ROUNDING

WEIGHTS = "diffusion_pytorch_model.safetensors"


def folder_of_diffusers(folder, config="tiny", flat=False):
    """Files as at Hugging Face: of a pipeline, or flat as the oldest of them are."""
    unet, scheduler = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    for path in (unet, scheduler):
        path.mkdir(parents=True, exist_ok=True)
    (unet / "config.json").write_text(json.dumps(unet_json(config)))
    (scheduler / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    safetensors_file.write(unet / WEIGHTS, listed(config, test_diffusers.recipe))
    return folder


def stored_config(workdir):
    config = fill_defaults(json.loads((workdir / "config.json").read_text()))
    validate(config)
    return config


def import_and_restore(source, workdir, config=None, **options):
    """Imports; returns the config and the state as the other modes read them."""
    import_weights.import_weights(str(source), workdir, config, **options)
    assert not list(workdir.parent.glob(".*.unfinished"))
    made = stored_config(workdir)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    state = checkpoints.restore(experiment.abstract_state(experiment.build(made)))
    checkpoints.close()
    return made, state


@pytest.fixture
def saved_states(monkeypatch):
    """[(step, state)] given to the checkpoints, which are not written: that takes seconds."""
    states = []

    class Checkpoints:
        def save(self, step, state):
            states.append((step, state))

        def close(self):
            pass

    monkeypatch.setattr(import_weights, "open_checkpoints", lambda folder: Checkpoints())
    return states


def refused(source, tmp_path, code, match, config=None, **options):
    """Asserts that an import ends in one short line and leaves nothing."""
    workdir = tmp_path / "runs" / "refused"
    with pytest.raises(DDPMError, match=match) as error:
        import_weights.import_weights(str(source), workdir, config, **options)
    assert error.value.code == code and "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(source)) + len(str(tmp_path))
    assert not workdir.exists() and not list((tmp_path / "runs").glob("*"))


def output(params, config, x, t):
    net = experiment.build(config).net
    return jax.jit(net.apply, static_argnames="train")({"params": params}, x, t, train=False)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def checksum(data):
    """CRC-32C, masked as in LevelDB; test_tf_checkpoint has its definition."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def test_an_official_checkpoint_gives_the_official_output(tmp_path, capsys):
    arrays = {name: test_unet.recipe(name, a.shape) for name, a in official("tiny").items()}
    raw = {name: a + 1 for name, a in arrays.items()}
    ema = {f"{name}/ExponentialMovingAverage": a for name, a in arrays.items()}
    rest = {f"{name}/Adam": a for name, a in raw.items() if name.endswith("/b")}
    rest |= {"global_step": np.asarray(790_000), "beta1_power": np.float32(0.5)}
    test_tf_checkpoint.write(
        tmp_path / "model.ckpt-790000",
        raw | ema | rest,
        checksum=checksum,
    )
    config, state = import_and_restore(
        tmp_path, tmp_path / "runs" / "x", overrides={"data.image_size": 16}
    )
    assert config.model.attn_resolutions == (8,)  # attention is in the second level
    assert int(state.step) == 790_000
    assert "left out: beta1_power" in capsys.readouterr().out
    assert_equal(state.params, convert.from_official(raw))
    found = output(state.ema, config, OFFICIAL["tiny.x"], OFFICIAL["tiny.t"])
    np.testing.assert_allclose(found, OFFICIAL["tiny.out"], **ROUNDING)


def test_one_set_of_weights_is_taken_as_both():
    arrays = official("tiny")
    averages = {f"{name}/ExponentialMovingAverage": a for name, a in arrays.items()}
    for part, note in ((arrays, "no averaged"), (averages, "only averaged")):
        found = readers.from_official_checkpoint(part)
        assert_equal(found.params, convert.from_official(arrays))
        assert_equal(found.ema, found.params)
        assert note in found.notes[0] and found.step == 0
    with pytest.raises(ValueError, match=r"1 missing \(model/conv_in/b\)"):  # of the averages alone
        readers.from_official_checkpoint(
            arrays | {k: a for k, a in averages.items() if "conv_in/b/" not in k}
        )


def test_a_folder_of_diffusers(tmp_path, capsys):
    source, workdir = folder_of_diffusers(tmp_path / "theirs", flat=True), tmp_path / "runs" / "x"
    config, state = import_and_restore(source, workdir)
    assert config.variance == "fixed_large" and config.data.image_size == 16
    assert "data.image_size: was 8, now 16" in capsys.readouterr().out
    assert_equal(state.ema, convert.from_diffusers(listed("tiny", test_diffusers.recipe)))
    assert_equal(state.params, state.ema)
    assert int(state.step) == 0
    assert all(not np.any(m) for m in jax.tree.leaves(state.opt_state))
    about = json.loads((workdir / "import.json").read_text())
    assert about["input"] == str(source) and about["revision"] is None


def test_one_file_alone(tmp_path, saved_states):
    """The scheduler is not there: what the shapes do not tell is the nearest config's."""
    source = folder_of_diffusers(tmp_path / "theirs") / "unet" / WEIGHTS
    import_weights.import_weights(str(source), tmp_path / "x")
    config, ((step, state),) = stored_config(tmp_path / "x"), saved_states
    assert config.data.image_size == 32 and config.model.attn_resolutions == (16,)
    assert_equal(state.ema, convert.from_diffusers(listed("tiny", test_diffusers.recipe)))
    assert step == int(state.step) == 0


def test_a_given_config_has_precedence(tmp_path, saved_states, capsys):
    source = folder_of_diffusers(tmp_path / "theirs")
    keys = {"model.ch": 32, "data.image_size": 16, "data.channels": 3, "sampler.clip": False}
    keys |= {"model.attn_resolutions": (8,), "train.steps": 77}
    config = with_overrides(config_of("digits"), keys)
    import_weights.import_weights(str(source), tmp_path / "x", config)
    assert stored_config(tmp_path / "x").to_dict() == config.to_dict()
    assert "sampler.clip: the files state True" in capsys.readouterr().out
    wrong = with_overrides(config, {"model.ch": 16})
    text = r"raw weights.*conv_in/bias: expected float32\[16\], found float32\[32\]"
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
    flat = import_weights.deduce_keys(convert.from_official(official(network)), {}, source)
    found, config = import_weights.nearest_config(flat, source)
    assert found == name
    assert {key: flatten(config)[key] for key in flat} == flat


@pytest.mark.parametrize("network", ["tiny", "cifar10", "c256"])
def test_shapes_tell_the_sizes(network):
    options, size, _ = NETWORKS[network]
    params, net = convert.from_diffusers(marked(network)), test_unet.UNet(**options)
    found = import_weights.deduce_keys(params, {"data.image_size": size}, "x")
    expected = {
        "model.ch": net.ch,
        "model.ch_mult": net.ch_mult,
        "model.num_res_blocks": net.num_res_blocks,
        "model.attn_resolutions": net.attn_resolutions,
        "model.num_classes": 0,
        "data.channels": 3,
    }
    assert {key: found[key] for key in expected} == expected and "variance" not in found
    params["class_emb"] = {"embedding": np.zeros((11, 4 * net.ch), np.float32)}
    found = import_weights.deduce_keys(params, {"data.image_size": size}, "x")
    assert found["model.num_classes"] == 10  # the last row is "no class"


def without_attention():
    def kernel(c_in, c_out):
        return {"kernel": np.zeros((3, 3, c_in, c_out), np.float32)}

    levels = {f"down_{i}": {"block_0": {"conv1": kernel(32, 32 << i)}} for i in range(2)}
    return {"conv_in": kernel(3, 32), "conv_out": kernel(32, 3), **levels}


def test_without_attention_the_size_must_be_given():
    with pytest.raises(DDPMError, match="do not determine the image size"):
        import_weights.deduce_keys(without_attention(), {}, "x")
    stated = {"data.image_size": 16, "data.image_width": 0}
    flat = import_weights.deduce_keys(without_attention(), stated, "x")
    assert flat["model.attn_resolutions"] == () and flat["model.ch_mult"] == (1, 2)


@pytest.mark.parametrize(
    "part, value, match",
    [
        ("conv_in", {}, "expected the kernels of a U-Net"),
        ("conv_in", {"kernel": np.zeros((3, 32))}, "expected the kernels of a U-Net"),
        ("conv_out", {"kernel": np.zeros((3, 3, 32, 4))}, "expected 3 or 6 output channels"),
        ("conv_in", {"kernel": np.zeros((3, 3, 3, 5))}, "levels of multiples of 5"),
    ],
)
def test_shapes_of_no_network_are_refused(part, value, match):
    with pytest.raises(DDPMError, match=match):
        import_weights.deduce_keys(without_attention() | {part: value}, {}, "x")


def test_a_name_at_hugging_face_is_downloaded(tmp_path, saved_states, monkeypatch, capsys):
    source, workdir, names = folder_of_diffusers(tmp_path / "cache"), tmp_path / "x", []

    def download(name):
        names.append(name)
        return source, "0123abc"

    monkeypatch.setattr(import_weights, "download_repository", download)
    import_weights.import_weights("google/ddpm-tiny-16", workdir)
    about = json.loads((workdir / "import.json").read_text())
    assert names == ["google/ddpm-tiny-16"] and about["revision"] == "0123abc"
    assert "0123abc" in capsys.readouterr().out
    assert saved_states


@pytest.mark.parametrize(
    "files, wanted", [(("a.safetensors", "a.bin"), "*.safetensors"), (("a.bin",), "*.bin")]
)
def test_one_revision_and_one_format_are_downloaded(monkeypatch, files, wanted):
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
    assert import_weights.download_repository("a/b") == (pathlib.Path("/folder"), "0123abc")
    assert asked == {"name": "a/b", "revision": "0123abc", "allow_patterns": ["*.json", wanted]}

    def unreachable(name):
        raise ConnectionError("no\nroute")

    hub.HfApi = lambda: types.SimpleNamespace(model_info=unreachable)
    with pytest.raises(DDPMError, match="a/b: cannot be downloaded: no route"):
        import_weights.download_repository("a/b")


def test_without_the_library_of_the_hub_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("google/ddpm-cifar10-32", tmp_path, 2, "pip install huggingface_hub, or download")


def spoil(path, **changes):
    """Rewrites a safetensors file with other arrays; None: without that one."""
    arrays = safetensors_file.read(path) | changes
    safetensors_file.write(path, {name: a for name, a in arrays.items() if a is not None})


def false_header(path):
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
        (false_header, "not a complete safetensors file"),
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
        ({"act_fn": "gelu"}, 2, "act_fn: expected 'silu', found 'gelu'"),
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


def test_missing_inputs_are_refused(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path):
        refused(source, tmp_path, 2, "expected a TensorFlow checkpoint, a folder of diffusers")
    file = tmp_path / "words.txt"
    file.write_text("words")
    refused(file, tmp_path, 6, "words.txt: expected a file of safetensors")


def test_a_work_directory_in_use_is_left_alone(tmp_path, saved_states):
    source, workdir = folder_of_diffusers(tmp_path / "theirs"), tmp_path / "runs"
    workdir.mkdir()
    (workdir / "config.json").write_text("mine")
    with pytest.raises(WorkdirError, match=r"expected a new or empty folder.* another --workdir"):
        import_weights.import_weights(str(source), workdir)
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    (workdir / "config.json").unlink()
    import_weights.import_weights(str(source), workdir)
    assert stored_config(workdir)
