"""Imports of weights: what comes in is what was there, and damaged inputs leave nothing."""

import functools
import json
import pathlib
import struct
import sys
import types

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import checkpoint, convert, experiment
from diffusion.convert import readers, safetensors_file
from diffusion.modes import import_weights
from diffusion.runtime.config import fill_defaults, flatten, with_overrides
from diffusion.runtime.validation import validate
from diffusion.runtime.workdir import check_owner
from diffusion.samplers import ancestral, base
from diffusion.utils import digests
from diffusion.utils.errors import DDPMError, WorkdirError
from tests import test_unet
from tests.convert import test_diffusers, test_tf_checkpoint
from tests.convert.test_diffusers import DIFFUSERS, DIFFUSERS_DEFAULTS, listed, marked, unet_json
from tests.convert.test_diffusers_config import SCHEDULER
from tests.convert.test_unet_names import official
from tests.test_configs import config_of
from tests.test_unet import NETWORKS, OFFICIAL, ROUNDING

WEIGHTS = "diffusion_pytorch_model.safetensors"


def folder_of_diffusers(folder, config="tiny", flat=False, file=DIFFUSERS, scheduler=SCHEDULER):
    """Files as at Hugging Face: of a pipeline, or flat as the oldest of them are."""
    unet, chain = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    for path in (unet, chain):
        path.mkdir(parents=True, exist_ok=True)
    (unet / "config.json").write_text(json.dumps(unet_json(config, file)))
    (chain / "scheduler_config.json").write_text(json.dumps(scheduler))
    safetensors_file.write(unet / WEIGHTS, listed(config, test_diffusers.recipe, file))
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
    state = checkpoints.restore(experiment.build(made).abstract_state)
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
    """Asserts that an import ends in one line of at most 300 characters and leaves nothing."""
    workdir = tmp_path / "runs" / "refused"
    with pytest.raises(DDPMError, match=match) as error:
        import_weights.import_weights(str(source), workdir, config, **options)
    assert error.value.code == code and "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
    assert not workdir.exists() and not list((tmp_path / "runs").glob("*"))


def output(params, config, x, t):
    net = experiment.build(config).net
    return jax.jit(net.apply, static_argnames="train")({"params": params}, x, t, train=False)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_learned_range_of_diffusers_has_a_loss_that_trains_it(tmp_path, saved_states):
    scheduler = SCHEDULER | {"variance_type": "learned_range"}
    folder = folder_of_diffusers(tmp_path / "theirs", flat=True, scheduler=scheduler)
    settings = unet_json("tiny") | {"out_channels": 6}
    (folder / "config.json").write_text(json.dumps(settings))
    arrays = listed("tiny", test_diffusers.recipe)
    for name in ("conv_out.weight", "conv_out.bias"):
        arrays[name] = np.concatenate([arrays[name], -arrays[name]])
    safetensors_file.write(folder / WEIGHTS, arrays)
    import_weights.import_weights(str(folder), tmp_path / "x")
    config, ((_, state),) = stored_config(tmp_path / "x"), saved_states
    assert (config.variance, config.loss.name) == ("learned_range", "hybrid")
    mean, position = np.split(state.ema["conv_out"]["bias"], 2)
    np.testing.assert_array_equal(position, -mean)


def test_an_import_has_the_memory_of_its_timestep_sampler():
    """Without it the training could not be resumed."""
    config = with_overrides(config_of("digits", "tiny"), {"train.timesteps": "importance"})
    exp = experiment.build(config)
    abstract = exp.abstract_state
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract.params)
    found = readers.Weights("any", params, params, 3)
    state = import_weights.make_state(found, exp, "any")
    assert digests.types(state) == digests.types(abstract)
    assert not np.any(state.times.counts)


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
    out = capsys.readouterr().out
    assert f"config     imported from {source}; its data and training are not known" in out
    assert "data.image_size: 16" in out and "configs/" not in out
    assert_equal(state.ema, convert.from_diffusers(listed("tiny", test_diffusers.recipe)))
    assert_equal(state.params, state.ema)
    assert int(state.step) == 0
    assert all(not np.any(m) for m in jax.tree.leaves(state.opt_state))
    about = json.loads((workdir / "import.json").read_text())
    assert about["input"] == str(source) and about["revision"] is None


def test_what_is_not_known_is_asked_for_and_may_be_given(tmp_path, saved_states):
    """Data and training of a network that is no experiment of the paper."""
    source, made = folder_of_diffusers(tmp_path / "theirs"), tmp_path / "x"
    import_weights.import_weights(str(source), made, overrides={"sampler.steps": 20})
    config = stored_config(made)
    assert (config.data.source, config.data.name, config.train.steps) == ("", "", 0)
    exp = experiment.build(config)
    with pytest.raises(DDPMError, match=r"^data.source: .*; give it.* also train.steps$"):
        experiment.load_split(config, exp)
    with pytest.raises(DDPMError, match=r"^train.steps: expected 1 or more, found 0.*; give it$"):
        experiment.make_input_pipeline(config, exp, None)
    known = {"data.source": "digits", "train.steps": 9, "train.batch_size": 32, "optim.lr": 1e-3}
    given = with_overrides(config, known | {"model.dropout": 0.2, "loss.name": "vlb"})
    check_owner(made, given)
    with pytest.raises(WorkdirError, match="target: was eps, now x0"):  # that is known
        check_owner(made, with_overrides(given, {"target": "x0"}))
    (made / "config.json").write_text(json.dumps(given.to_dict()))
    with pytest.raises(WorkdirError, match=r"optim.lr: was 0.001, now 0.1"):  # and now this is
        check_owner(made, with_overrides(given, {"optim.lr": 0.1}))


def test_ten_classes_stay_ten(tmp_path, saved_states, capsys):
    """diffusers says of no class that it means "no class": guidance needs to be told."""
    source, rows = folder_of_diffusers(tmp_path / "theirs"), np.zeros((10, 128), np.float32)
    spoil(source / "unet" / WEIGHTS, **{"class_embedding.weight": rows})
    text = json.dumps(unet_json("tiny") | {"num_class_embeds": 10})
    (source / "unet" / "config.json").write_text(text)
    import_weights.import_weights(str(source), tmp_path / "x")
    ((_, state),) = saved_states
    assert state.ema["class_emb"]["embedding"].shape == (10, 128)
    assert "if class N is one, give --config.model.null_class=N" in capsys.readouterr().out
    config = stored_config(tmp_path / "x")
    assert config.model.num_classes == 10 and experiment.build(config).net.null_label is None
    for key in ("sampler.guidance", "train.label_dropout"):
        with pytest.raises(DDPMError, match=rf"^{key}: .*model.null_class=N"):
            validate(with_overrides(config, {key: 0.5}))
    named = with_overrides(config, {"model.null_class": 3, "sampler.guidance": 0.5})
    validate(named)
    check_owner(tmp_path / "x", named)
    for wrong in (10, -3):
        with pytest.raises(DDPMError, match=f"^model.null_class: .* below 10, found {wrong}"):
            validate(with_overrides(config, {"model.null_class": wrong}))


def test_a_class_can_mean_no_class(monkeypatch):
    """Guidance moves away from it, labels are hidden by it, and it has no row of its own."""
    keys = {"model.num_classes": 10, "model.null_class": 3, "train.label_dropout": 0.5}
    config = with_overrides(config_of("digits", "tiny"), keys | {"sampler.guidance": 1.0})
    exp, used = experiment.build(config), []
    guided = experiment.guidance.classifier_free_guidance
    monkeypatch.setattr(
        experiment.guidance,
        "classifier_free_guidance",
        lambda apply, label, null, w: used.append(null) or guided(apply, label, null, w),
    )
    experiment.make_predictor(config, exp)(None, np.zeros(1, np.int32))
    assert used == [3]
    hidden = experiment.training_labels(config, exp, jax.random.key(0), np.full(99, 7, np.int32))
    assert {*hidden.tolist()} == {3, 7}
    without = experiment.build(config_of("digits", "tiny"))
    assert experiment.training_labels(config, without, jax.random.key(0), np.zeros(9)) is None
    eleven = {"model.num_classes": 11, "model.null_class": 10}
    assert experiment.load_split(with_overrides(config, eleven), exp).num_classes == 10
    with pytest.raises(DDPMError, match=r"the data's 10, .* found 11"):
        experiment.load_split(with_overrides(config, eleven | {"model.null_class": 3}), exp)
    x, t = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, 8, 8, 1), (1,)))

    def rows(null):
        init = functools.partial(exp.net.clone(null_class=null).init, train=False)
        params = jax.eval_shape(init, jax.random.key(0), x, t)["params"]
        return params["class_emb"]["embedding"].shape[0]

    assert (rows(3), rows(-1)) == (10, 11)  # the last: a row of its own
    with pytest.raises(ValueError, match="y: expected labels"):
        rows(-2)


@pytest.mark.parametrize("chain", ["trained_betas", "sigmoid"])
def test_a_network_with_diffusers_defaults(tmp_path, saved_states, chain):
    """Its output, and ten steps of DDIM by the chain that the folder describes.

    One has explicit betas and dynamic thresholding, the other clips x_0 to [-0.7, 0.7].
    """
    file = DIFFUSERS_DEFAULTS
    settings = dict(file=file, scheduler=unet_json(chain, file))
    source = folder_of_diffusers(tmp_path / "theirs", "small", **settings)
    import_weights.import_weights(str(source), tmp_path / "x")
    config, ((_, state),) = stored_config(tmp_path / "x"), saved_states
    exp, x = experiment.build(config), file["small.x"].transpose(0, 2, 3, 1)
    predict = experiment.make_predictor(config, exp)(state.ema, jnp.zeros(2, jnp.int32))
    ts = np.append(file[f"{chain}.timesteps"] + 1, 0)  # theirs count from 0

    @jax.jit
    def found(x):
        out = exp.net.apply({"params": state.ema}, x, file["small.t"], train=False)
        return out, base.sample(ancestral.ddim(exp.process), predict, jax.random.key(0), x, ts)

    out, sample = (a.transpose(0, 3, 1, 2) for a in found(x))
    np.testing.assert_allclose(out, file["small.out"], **ROUNDING)
    # Their table of alpha_bar is a product in float32, 1e-6 off; the first x_0 is x_T times 150.
    np.testing.assert_allclose(sample, file[f"{chain}.out"], rtol=0, atol=1e-4)


def test_one_file_alone(tmp_path, saved_states):
    """The scheduler is not there: what the shapes do not tell is the default's."""
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
        ("cifar10", "diffusion_cifar10_model/model.ckpt", "configs/cifar10.py"),
        ("cifar10", "google/ddpm-ema-CIFAR-10", "configs/cifar10.py"),
        ("cifar10_outch6", "cifar10/model.ckpt", "configs/cifar10.py:eps_vlb_learned"),
        ("c256", "diffusion_lsun_church_model/model.ckpt", "configs/lsun_church.py"),
        ("c256", "google/ddpm-bedroom-256", "configs/lsun_bedroom.py"),
        ("c256", "google/ddpm-ema-cat-256", "configs/lsun_cat.py"),
        ("c256", "google/ddpm-celebahq-256", "configs/celebahq256.py"),
    ],
)
def test_shapes_and_the_name_tell_the_experiment(network, source, name):
    flat = import_weights.deduce_keys(convert.from_official(official(network)), {}, source)
    for stated in ({}, {"model.dropout": 0.3, "data.data_dir": "/mnt"}):  # and not these
        found, config = import_weights.find_experiment(flat | stated, source)
        assert found == name
        assert {key: flatten(config)[key] for key in flat} == flat


@pytest.mark.parametrize(
    "network, source",
    [  # another network than the name says, or no name, or of several
        ("cifar10", "model.ckpt"),
        ("cifar10", "me/cifar100"),
        ("cifar10", "me/digits-32"),
        ("tiny", "google/ddpm-celebahq-256"),
        ("c256", "model.ckpt"),
        ("c256", "me/replicated-256"),
        ("c256", "diffusion_lsun_model/model.ckpt"),
    ],
)
def test_neither_shapes_nor_a_name_alone_tell_the_experiment(network, source):
    params, size = convert.from_official(official(network)), {"data.image_size": 32}
    flat = import_weights.deduce_keys(params, size if network == "tiny" else {}, source)
    assert import_weights.find_experiment(flat, source) is None


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
    stated = {"data.image_size": size}
    found = import_weights.deduce_keys(params, stated, "x")
    assert found["model.num_classes"] == 10  # the last row is "no class"
    found = import_weights.deduce_keys(params, stated | {"model.null_class": -2}, "x")
    assert found["model.num_classes"] == 11  # none is


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
