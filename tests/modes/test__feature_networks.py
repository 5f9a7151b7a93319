"""The classifier of the data: trained once, kept, and left out where it cannot be had."""

import jax
import numpy as np
import pytest

from diffusion import data, experiment
from diffusion.metrics import classifier
from diffusion.modes import _feature_networks, _scores
from diffusion.runtime import preemption
from diffusion.runtime.config import with_overrides
from diffusion.utils.errors import DataError
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
