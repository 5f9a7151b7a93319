"""The networks of features: a classifier, trained once and kept, and DINOv2 of the user's file."""

import hashlib
import json

import jax
import numpy as np
import pytest

from diffusion import convert, data, experiment
from diffusion.convert import dinov2_names, safetensors_file
from diffusion.metrics import classifier, dinov2
from diffusion.modes import _feature_networks, _scores
from diffusion.runtime import preemption
from diffusion.runtime.config import with_overrides
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_npz
from tests.metrics.test_dinov2 import recipe
from tests.runs import TINY, run
from tests.test_configs import config_of


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """(config, experiment), with an empty cache and a training of a few steps."""
    for module in (_feature_networks, _scores):
        monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(classifier, "STEPS", 3)
    config = config_of("digits", "tiny")
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step counter with floats
        yield config, experiment.build(config)


def test_classifier_is_trained_once_for_a_data_set(digits, tmp_path, monkeypatch, capsys):
    config, exp = digits
    first = _feature_networks.load_classifier(config, exp)
    out = capsys.readouterr().out
    assert "a classifier of 10 classes on 1,501 images" in out
    assert "of 150 held-out images right" in out
    again = _feature_networks.load_classifier(config, exp)
    assert "training" not in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, first, again)
    [kept] = (tmp_path / "classifiers").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    _feature_networks.load_classifier(config, exp)
    assert "training" in capsys.readouterr().out
    monkeypatch.setattr(data, "fingerprint", lambda images: "0" * 16)  # of other data
    _feature_networks.load_classifier(config, exp)
    assert "training" in capsys.readouterr().out


def test_what_has_no_classes_or_another_shape_has_no_classifier(digits, monkeypatch, capsys):
    """Without classes an error where it is asked for by name; else a line, and it is left out."""
    config, exp = digits
    assert _feature_networks.has_classes(experiment.load_split(config, exp))
    both = with_features(config, "classifier", "random")
    assert list(_scores.make_scorer(both, exp, (9, 9, 1)).extractor.kinds) == ["random"]
    line = "warning    no classifier: the images are 9x9x1, the data's 8x8x1"
    assert line in capsys.readouterr().out
    with pytest.raises(DataError, match="expected other features than 'classifier'"):
        _scores.make_scorer(with_features(config, "classifier"), exp, (9, 9, 1))
    split = data.SOURCES["digits"]
    unlabelled = {"digits": lambda *args: split(*args)._replace(num_classes=0)}
    monkeypatch.setattr(data, "SOURCES", unlabelled)
    assert not _feature_networks.has_classes(experiment.load_split(config, exp))
    with pytest.raises(DataError, match="for 'classifier', found 1501 of 8x8 in 0; leave it out"):
        _scores.make_scorer(both, exp, exp.image_shape)
    monkeypatch.setattr(_scores, "load_inception", lambda path: (None, "no weights"))
    scorer = _scores.make_scorer(with_features(config, "available"), exp, exp.image_shape)
    assert list(scorer.extractor.kinds) == ["random", "pixels"]
    assert "warning    no classifier: eval.features" in capsys.readouterr().out


def test_one_process_of_several_does_not_ask_for_stops_alone(digits, tmp_path, monkeypatch):
    """The others do not train, and requests are followed at the same call in all of them."""
    config, exp = digits
    images, asked = experiment.load_split(config, exp), []
    monkeypatch.setattr(preemption, "raise_if_requested", lambda: asked.append(1))
    _feature_networks._train_classifier(images, tmp_path / "alone.npz")
    assert len(asked) == classifier.STEPS
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    _feature_networks._train_classifier(images, tmp_path / "of_two.npz")
    assert len(asked) == classifier.STEPS


def with_features(config, *names):
    return with_overrides(config, {"eval.features": names})


WIDTH = 8  # of a network that takes no time


@pytest.fixture
def small_dinov2(tmp_path, monkeypatch):
    """(a file of the weights of a small network in place of ViT-L/14, these weights)."""
    monkeypatch.setattr(dinov2, "DINOV2_SIZES", {"dinov2_l14": dinov2.Size(WIDTH, 2, 2)})
    monkeypatch.setattr(dinov2_names, "DINOV2_LAYERS", {WIDTH: 2})
    monkeypatch.setattr(dinov2_names, "DINOV2_NETWORKS", {WIDTH: "ViT-L/14"})
    arrays = {p.original: recipe(p.original, p.shape) for p in dinov2_names._parameters(WIDTH)}
    safetensors_file.write(tmp_path / "dino.safetensors", arrays)
    return tmp_path / "dino.safetensors", arrays


def test_distance_by_dinov2_follows_from_its_features(small_dinov2, tmp_path):
    """By dgm-eval's formulas, of 20 and 24 images; the file's SHA-256 is noted."""
    path, arrays = small_dinov2
    rng, reps = np.random.default_rng(0), []
    network, params = dinov2.DinoV2(WIDTH, 2, 2), convert.from_dinov2(arrays)
    for name, n in (("a", 20), ("b", 24)):
        images = rng.integers(0, 256, (n, 8, 8, 1), np.uint8)
        save_npz(tmp_path / f"{name}.npz", images)
        features = network.apply({"params": params}, dinov2.prepare_images(images))
        reps.append(np.asarray(features, np.float64))
    inputs = (f"--input={tmp_path}/{name}.npz" for name in "ab")
    options = "--config.eval.features=('dinov2',)", f"--config.eval.dinov2={path}"
    out, _ = run(TINY, "--mode=eval", *inputs, *options, f"--workdir={tmp_path}/run")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"dinov2_l14 of {path}: its SHA-256 {digest[:16]}... is not compared" in out
    content = json.loads(next(tmp_path.glob("run/eval/*/metrics.json")).read_text())
    assert content["weights"] == {"dinov2_l14": digest}
    assert any("is not compared with a published one" in note for note in content["notes"])
    scores = content["scores"]["input"][f"{tmp_path}/b.npz"]
    covs = [np.cov(x, rowvar=False) for x in reps]
    root = np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).astype(complex)).real.sum()
    distance = np.square(reps[0].mean(0) - reps[1].mean(0)).sum()
    distance += np.trace(covs[0]) + np.trace(covs[1]) - 2 * root
    np.testing.assert_allclose(scores["fd_dinov2_l14@20"]["value"], distance, rtol=1e-4)
    assert scores["mmd_dinov2_l14"]["error"] > 0 and "kid_dinov2_l14" in scores


@pytest.mark.parametrize(
    "features, file, expected",
    [
        (("dinov2", "pixels"), "", "eval.dinov2: expected the network's weights, for 'dinov2'"),
        (("dinov2",), "", "found none; fetch model.safetensors of facebook/dinov2-large and give"),
        (("dinov2",), "missing", "missing: expected a file, found nothing"),
        (("available",), "missing", "missing: expected a file, found nothing"),
        (("available",), "damaged", "damaged: expected a file of safetensors"),
        (("available",), "cut", "cut: not a complete safetensors file"),
        (("dinov2", "pixels"), "other", "other: expected a class token of width 768 or 1024"),
    ],
)
def test_missing_dinov2_weights_are_one_line(tmp_path, monkeypatch, features, file, expected):
    """And an error where they are asked for, by their name or by their file."""
    monkeypatch.setattr(_scores, "load_inception", lambda path: (None, "no weights"))
    monkeypatch.setattr(_scores, "_find_classifier", lambda *args: (None, "none"))
    (tmp_path / "damaged").write_bytes(b"no weights")
    safetensors_file.write(tmp_path / "other", {"cls_token": np.zeros((1, 1, 384))})
    (tmp_path / "cut").write_bytes((tmp_path / "other").read_bytes()[:-10])
    config = config_of("digits", "tiny")
    exp = experiment.build(config)
    keys = {"eval.features": features, "eval.dinov2": str(tmp_path / file) if file else ""}
    config = with_overrides(config, keys)
    if features == ("dinov2",):
        with pytest.raises(DataError) as error:
            _scores.make_scorer(config, exp, exp.image_shape)
        message = str(error.value)
    else:
        scorer = _scores.make_scorer(config, exp, exp.image_shape)
        assert "dinov2_l14" not in scorer.extractor.kinds and "pixels" in scorer.extractor.kinds
        message = str(scorer.missing)
    assert expected in message and message.startswith("eval.dinov2: ") and "\n" not in message


def test_dinov2_is_left_out_where_nobody_asks_for_it(monkeypatch, capsys):
    monkeypatch.setattr(_scores, "load_inception", lambda path: (None, "no weights"))
    monkeypatch.setattr(_scores, "_find_classifier", lambda *args: (None, "none"))
    config = with_features(config_of("digits", "tiny"), "available")
    exp = experiment.build(config)
    scorer = _scores.make_scorer(config, exp, exp.image_shape)
    assert scorer.missing is None and list(scorer.extractor.kinds) == ["random", "pixels"]
    assert "DINOv2" not in capsys.readouterr().out
