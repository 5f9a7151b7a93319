"""Drawing: one program for all seeds and classes, images that depend on no batch; kept sets."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.runtime.config import validate, with_overrides
from diffusion.utils.errors import DDPMError
from tests.test_configs import config_of

SMALL = {"model.ch": 4, "process.T": 6, "sampler.steps": 6, "sample.batch_size": 4}


def config_with(**keys):
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    return with_overrides(config_of("digits", "tiny,conditional"), SMALL | changes)


@pytest.fixture(scope="module")
def x():
    return experiment.build(config_with())


@pytest.fixture(scope="module")
def params(x):
    """Initial weights, the last layer's too, so that the label has a say."""
    params = experiment.make_initial_state(config_with(), x)().params
    draw = np.random.RandomState(0)
    return jax.tree.map(lambda a: a + 0.1 * draw.standard_normal(a.shape).astype(a.dtype), params)


def drawn(chain, params, n, seed=0, **options):
    return np.concatenate(list(_sampling.draw(chain, params, seed, n, **options)))


def test_another_seed_or_class_compiles_nothing(x, params):
    """And nothing in the walk calls back to the host."""
    chain, compiled = _sampling.compile_sampler(config_with(), x, 4), []
    first = drawn(chain, params, 6)

    def listen(name, *_, **__):
        compiled.extend([name] * name.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    others = [
        drawn(chain._replace(label=label), params, 6, seed)
        for seed, label in ((1, -1), (0, 3), (0, 4))
    ]
    assert not compiled
    jax.jit(lambda a: a + 7.25)(np.float32(1)).block_until_ready()
    assert compiled  # the listener hears
    images = [first, *others]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    args = chain.start(np.uint32(0), np.int32(-1), np.arange(4, dtype=np.int32))
    text = chain.advance.lower(params, *args, chain.ts).as_text()
    assert "callback" not in text and "outfeed" not in text


def test_classes_come_in_turn_or_one_is_asked_for(x, params):
    """Of image i of a seed only the label differs: image 3 in turn is image 3 of class 3."""
    chain = _sampling.compile_sampler(config_with(), x, 4)
    in_turn, threes = (drawn(chain._replace(label=k), params, 8) for k in (-1, 3))
    same = [(a == b).all() for a, b in zip(in_turn, threes, strict=True)]
    assert same == [i == 3 for i in range(8)]


def test_a_set_may_be_taken_up_at_any_image(x, params):
    chain = _sampling.compile_sampler(config_with(), x, 4)
    whole = drawn(chain, params, 9).astype(int)
    assert (
        np.abs(drawn(chain, params, 9, first=3) - whole[3:]).max() <= 1
    )  # other batches: rounding


def test_guidance_is_the_label_s_part_again(x, params):
    """With weight 0 the labelled network, with -1 the one without a label, each drawn by itself."""
    labelled = drawn(_sampling.compile_sampler(config_with(sample__label=3), x, 4), params, 4)
    weak = config_with(sample__label=3, sampler__guidance=1e-12)
    np.testing.assert_allclose(
        drawn(_sampling.compile_sampler(weak, x, 4), params, 4).astype(int), labelled, atol=1
    )
    free = [
        drawn(
            _sampling.compile_sampler(config_with(sample__label=k, sampler__guidance=-1.0), x, 4),
            params,
            4,
        )
        for k in (3, 5)
    ]
    np.testing.assert_allclose(free[0].astype(int), free[1], atol=1)
    strong = config_with(sample__label=3, sampler__guidance=5.0)
    apart = drawn(_sampling.compile_sampler(strong, x, 4), params, 4).astype(int) - labelled
    assert np.abs(apart).mean() > 5


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_2s", "unipc", "heun"])
def test_every_sampler_is_reached_with_its_options(x, params, name):
    config = config_with(sampler__name=name, sampler__steps=4, sampler__eta=0.5, sampler__order=3)
    chain = _sampling.compile_sampler(config, x, 4)
    assert drawn(chain, params, 4).shape == (4, 8, 8, 1)
    assert chain.evaluations == (7 if name == "heun" else 4)


def test_the_times_may_be_given(x):
    chain = _sampling.compile_sampler(config_with(sampler__times=(6, 2, 5)), x, 4)
    np.testing.assert_array_equal(chain.ts, [6, 5, 2, 0])


WRONG = {
    "sampler.times: sampler times": {"sampler.times": (7,)},
    "sampler.steps: sampler steps": {"sampler.steps": 7},
    "sampler.name: 'ddmp'": {"sampler.name": "ddmp"},
    "sampler: eta": {"sampler.name": "ddim", "sampler.eta": 2.0},
    "sampler.variance: 'learned'": {"sampler.variance": "learned"},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_is_said_in_one_line(words):
    config = with_overrides(config_with(), WRONG[words])
    with pytest.raises(DDPMError, match="^" + words) as error:
        _sampling.compile_sampler(config, experiment.build(config), 4)
    assert "\n" not in str(error.value)


def test_guidance_needs_classes():
    config = with_overrides(config_of("digits", "tiny"), {"sampler.guidance": 1.0})
    with pytest.raises(DDPMError, match=r"sampler\.guidance: expected 0 for a model without classes"):
        validate(config, devices=1)




class Killed(Exception):
    pass


def kept_in(folder, x, config, step=1):
    setting = _sampling.setting_of(config, step, "ema", config.sample.seed)
    return _sampling.SampleStore(folder, setting, x.image_shape)


def keep(kept, chain, params, n, kill_at=None, monkeypatch=None):
    """sampling.keep, quietly; killed before the note of the kill_at-th batch is written."""
    if kill_at is not None:
        write, count = _sampling._write_note, iter(range(kill_at))

        def note(*args):
            if next(count, None) is None:
                raise Killed
            write(*args)

        monkeypatch.setattr(_sampling, "_write_note", note)
    with contextlib.redirect_stdout(io.StringIO()):
        _sampling.keep(kept, chain, params, n)
    with np.load(kept.npz) as file:
        return file["arr_0"]


@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_a_set_that_was_killed_is_completed(tmp_path, x, params, monkeypatch, kill_at):
    config = config_with()
    chain, kept = _sampling.compile_sampler(config, x, 4), kept_in(tmp_path / "a", x, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        keep(kept, chain, params, 12, kill_at, patch)
    assert not kept.npz.exists()
    again = keep(kept, chain, params, 12)
    np.testing.assert_array_equal(again, drawn(chain, params, 12))
    assert json.loads(kept.note.read_text())["images"] == 12 and not kept.part.exists()


def test_a_finished_set_can_grow(tmp_path, x, params):
    config = config_with()
    chain, kept = _sampling.compile_sampler(config, x, 4), kept_in(tmp_path / "a", x, config)
    few = keep(kept, chain, params, 4)
    more = keep(kept, chain, params, 8)
    np.testing.assert_array_equal(more[:4], few)
    np.testing.assert_array_equal(more, drawn(chain, params, 8))
    assert len(keep(kept, chain, params, 4)) == 8  # what is there stays


def test_a_set_of_another_setting_or_with_changed_bytes_is_refused(
    tmp_path, x, params, monkeypatch
):
    config = config_with()
    chain, kept = _sampling.compile_sampler(config, x, 4), kept_in(tmp_path / "a", x, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        keep(kept, chain, params, 12, 2, patch)
    other = kept._replace(setting=kept.setting | {"sampler.eta": 1.0, "step": 2})
    with pytest.raises(
        DDPMError, match=r"another setting: sampler\.eta: was 0\.0, now 1\.0; step: was 1"
    ):
        keep(other, chain, params, 12)
    content = bytearray(kept.part.read_bytes())
    for damage in (content[:100], content[:100] + bytes([content[100] ^ 1]) + content[101:]):
        kept.part.write_bytes(damage)
        with pytest.raises(DDPMError, match="found others; delete it"):
            keep(kept, chain, params, 12)
    kept.note.write_text("torn")
    with pytest.raises(DDPMError, match="cannot be read"):
        keep(kept, chain, params, 12)


def test_another_setting_has_another_name(x):
    names = {
        _sampling.name_of(kept_in(None, x, config_with(**keys), step).setting)
        for keys in ({}, {"sampler__eta": 0.5}, {"sample__seed": 3}, {"sample__label": 2})
        for step in (1, 2)
    }
    assert len(names) == 8 and all(name.startswith("ema_seed") for name in names)
    free = config_with(eval__num=9, train__steps=99)  # what no image depends on
    assert _sampling.name_of(kept_in(None, x, free).setting) in names


def test_some_labels_are_taken_away_in_training():
    """The share that is asked for, at places that follow from the key; none where it is 0."""
    label = np.arange(4000) % 10
    key = jax.random.key(0)
    with_dropout = np.asarray(
        experiment.drop_labels(config_with(train__label_dropout=0.25), key, label)
    )
    taken = with_dropout == 10
    assert abs(taken.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    np.testing.assert_array_equal(with_dropout[~taken], label[~taken])
    assert experiment.drop_labels(config_with(train__label_dropout=0.0), key, label) is label
