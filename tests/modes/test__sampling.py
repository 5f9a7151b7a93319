"""Drawing: one program for every seed, class and part; images independent of batches; stores."""

import jax
import numpy as np
import pytest

from configs import digits
from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.runtime import preemption
from diffusion.runtime.config import YOUNGER, flatten, with_overrides
from diffusion.runtime.validation import validate
from diffusion.utils.errors import ConfigError, WorkdirError
from diffusion.utils.io import save_npz
from tests.utils.test_progress import Clock

SMALL = {"model.ch": 4, "process.T": 6, "sampler.steps": 6, "sample.batch_size": 4}


def config_with(**keys):
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    return with_overrides(digits.get_config("tiny,conditional"), SMALL | changes)


@pytest.fixture(scope="module")
def exp():
    return experiment.build(config_with())


@pytest.fixture(scope="module")
def params(exp):
    """Initial weights plus noise: the last layer is not 0, so that the output depends on labels."""
    params = experiment.make_initial_state(config_with(), exp).params
    rng = np.random.RandomState(0)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(a.dtype), params)


@pytest.fixture(scope="module")
def sampler(exp):
    return _sampling.compile_sampler(config_with(), exp, 4)


def draw(sampler, params, n, seed=0, **options):
    return np.concatenate(list(_sampling.draw(sampler, params, seed, n, **options)))


def test_another_seed_class_or_part_compiles_nothing(sampler, params):
    """And no step calls back to the host."""
    compiled = []
    images = [draw(sampler, params, 6)]

    def listen(name, *_, **__):
        compiled.extend([name] * name.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    for label, seed in ((-1, 1), (3, 0), (4, 0)):
        images.append(draw(sampler._replace(label=label), params, 6, seed))
    start = sampler.start(np.uint32(0), np.int32(-1), np.arange(4, dtype=np.int32))
    list(_sampling.iterate_states(sampler, params, start, (1, 4, 6)))
    assert not compiled
    jax.jit(lambda a: a + 7.25)(np.float32(1)).block_until_ready()
    assert compiled  # the listener hears
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    start = sampler.start(np.uint32(0), np.int32(-1), np.arange(4, dtype=np.int32))
    text = sampler.advance.lower(params, *start, np.int32(0), np.int32(6)).as_text()
    assert "callback" not in text and "outfeed" not in text


@pytest.mark.parametrize("seconds, parts", [(0.01, [2, 4, 8, 16]), (1.0, [2] * 15)])
def test_parts_of_a_chain_grow_while_they_are_short(monkeypatch, seconds, parts):
    """Of 30 steps: 2 at once, at most 25 parts. Where nobody watches, in one part."""
    clock = Clock()
    monkeypatch.setattr(_sampling.time, "monotonic", clock)

    def advance(params, keys, labels, state, i, j):
        taken.append(int(j - i))
        clock.now += seconds * (j - i)
        return state + j - i

    ts = np.arange(30, -1, -1)
    fake = _sampling.CompiledSampler(None, advance, None, ts, 4, 30, -1)
    for watched, expected in ((True, parts), (False, [30])):
        taken, reported = [], []
        report = reported.append if watched else None
        states = list(_sampling.iterate_states(fake, None, (0, 0, 0), (0, 30), report, 100))
        assert taken == expected and states == [0, 30]
        assert reported == (list(100 + np.cumsum(expected)) if watched else [])


def test_a_part_that_a_position_has_cut_says_nothing_of_the_next(monkeypatch):
    """Steps of 0.4 s, two at once: too long to grow, though the part up to position 1 is short."""
    clock, taken = Clock(), []
    monkeypatch.setattr(_sampling.time, "monotonic", clock)

    def advance(params, keys, labels, state, i, j):
        taken.append(int(j - i))
        clock.now += 0.4 * (j - i)
        return state

    ts = np.arange(30, -1, -1)
    fake = _sampling.CompiledSampler(None, advance, None, ts, 4, 30, -1)
    list(_sampling.iterate_states(fake, None, (0, 0, 0), (0, 1, 7), lambda done: None))
    assert taken == [1, 2, 2, 2]


def test_all_classes_in_turn_or_a_single_one(sampler, params):
    """Only the label of an image differs: image 3 of all classes is image 3 of class 3."""
    in_turn, threes = (draw(sampler._replace(label=k), params, 8) for k in (-1, 3))
    equal = [(a == b).all() for a, b in zip(in_turn, threes, strict=True)]
    assert equal == [i == 3 for i in range(8)]


def test_drawing_starts_at_any_image(sampler, params):
    """Other batches round differently: a value may fall on the neighbouring level."""
    images = draw(sampler, params, 9).astype(int)
    assert np.abs(draw(sampler, params, 9, first=3) - images[3:]).max() <= 1


def test_a_report_for_each_part_and_a_stop_after_one(sampler, params, monkeypatch):
    reports = []
    monkeypatch.setattr(_sampling, "PART_S", 0)  # no part is short
    draw(sampler, params, 6, report=reports.append)
    assert reports == list(range(1, _sampling.num_steps(sampler, 6) + 1))  # 6 steps: parts of one
    monkeypatch.setattr(preemption, "should_stop", lambda: len(reports) == 14)
    with pytest.raises(preemption.Stopped):
        draw(sampler, params, 6, report=reports.append)
    assert len(reports) == 14


def test_guidance_extrapolates_from_the_unlabelled_network(exp, sampler, params):
    """Weight 0 gives the labelled network, -1 the one without a label, as each draws by itself."""

    def guided(weight, *labels):
        guided = _sampling.compile_sampler(config_with(sampler__guidance=weight), exp, 4)
        return [draw(guided._replace(label=k), params, 4).astype(int) for k in labels]

    labelled = draw(sampler._replace(label=3), params, 4).astype(int)
    np.testing.assert_allclose(*guided(1e-12, 3), labelled, atol=1)
    np.testing.assert_allclose(*guided(-1.0, 3, 5), atol=1)
    [strong] = guided(5.0, 3)
    assert np.abs(strong - labelled).mean() > 5


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_2s", "unipc", "heun"])
def test_every_sampler_gets_its_options(exp, params, name):
    config = config_with(sampler__name=name, sampler__steps=4, sampler__eta=0.5, sampler__order=3)
    sampler = _sampling.compile_sampler(config, exp, 4)
    assert draw(sampler, params, 4).shape == (4, 8, 8, 1)
    assert sampler.evaluations == (7 if name == "heun" else 4)


def test_explicit_times(exp):
    sampler = _sampling.compile_sampler(config_with(sampler__times=(6, 5, 2)), exp, 4)
    np.testing.assert_array_equal(sampler.ts, [6, 5, 2, 0])


TIMES = [(5, 2), (1, 5), (6, 2), (1, 6), ()]


def test_times_that_begin_below_T_are_noted():
    """A chain of 6 that starts from noise at t = 5, in the line that describes the sampler."""
    words = {ts: _sampling.describe_sampler(config_with(sampler__times=ts)) for ts in TIMES}
    assert [ts for ts in TIMES if "from noise at t = 5 in place of T = 6" in words[ts]] == TIMES[:2]
    assert not any("place" in words[ts] for ts in TIMES[2:])


def test_an_estimate_is_of_all_batches(sampler, params):
    few, many = (_sampling.estimate_seconds(sampler, params, n) for n in (4, 4000))
    assert 0 < few < many


def test_a_set_keeps_its_name_where_younger_keys_have_their_defaults():
    """A set of samples of an earlier version is found again; one with other values is another."""
    config = with_overrides(digits.get_config("tiny,adam"), {"data.levels": 256})
    setting = _sampling.sample_setting(config, 1, "ema", 0)
    younger = {*YOUNGER} - {"weights"}  # by this name a setting has the weights of its images
    assert setting["model.ch"] and not set(setting) & younger
    other = with_overrides(config, {"sampler.clip_range": 2.0})
    other = _sampling.sample_setting(other, 1, "ema", 0)
    assert other == setting | {"sampler.clip_range": 2.0}
    assert _sampling.sample_name(other) != _sampling.sample_name(setting)


WRONG = {
    "sampler.times: sampler times": {"sampler.times": (7,)},
    r"sampler.times: .*falling.*found \(3, 5, 1\)": {"sampler.times": (3, 5, 1)},
    "sampler.steps: sampler steps": {"sampler.steps": 7},
    "sampler.name: 'ddmp'": {"sampler.name": "ddmp"},
    "sampler: .*eta": {"sampler.name": "ddim", "sampler.eta": 2.0},
    "sampler.variance: 'learned'": {"sampler.variance": "learned"},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_sampler_is_refused_in_one_line(words):
    config = with_overrides(config_with(), WRONG[words])
    with pytest.raises(ConfigError, match="^" + words) as error:
        _sampling.compile_sampler(config, experiment.build(config), 4)
    assert "\n" not in str(error.value)


def test_guidance_needs_classes():
    config = with_overrides(digits.get_config("tiny"), {"sampler.guidance": 1.0})
    message = r"sampler\.guidance: expected 0 for a model without classes"
    with pytest.raises(ConfigError, match=message):
        validate(config, devices=1)


# Stores


class Killed(Exception):
    pass


def store_in(folder, exp, config, step=1):
    setting = _sampling.sample_setting(config, step, "ema", config.sample.seed)
    return _sampling.SampleStore(folder, setting, exp.image_shape)


def fill(store, sampler, params, n, kill_at=None):
    """Fills a store and returns its images. kill_at: the npz whose writing is prevented."""
    save, count = _sampling.io.save_npz, iter(range(99 if kill_at is None else kill_at))

    def save_or_die(*args, **arrays):
        if next(count, None) is None:
            raise Killed
        save(*args, **arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sampling.io, "save_npz", save_or_die)
        _sampling.fill(store, sampler, params, n)
    with np.load(store.npz) as file:
        return file["arr_0"]


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_killed_set_is_completed(tmp_path, exp, sampler, params, kill_at):
    """Killed before one of the three batches is written, or before all are put together."""
    store = store_in(tmp_path / "a", exp, config_with())
    with pytest.raises(Killed):
        fill(store, sampler, params, 12, kill_at)
    assert not store.npz.exists()
    np.testing.assert_array_equal(fill(store, sampler, params, 12), draw(sampler, params, 12))
    assert sorted(p.name for p in store.folder.iterdir()) == ["samples.json", "samples.npz"]


def test_what_is_on_disk_is_not_drawn_again(tmp_path, exp, sampler, params, monkeypatch):
    store, firsts, draw_ = store_in(tmp_path / "a", exp, config_with()), [], _sampling.draw

    def watched(*args, first):
        firsts.append(first)
        return draw_(*args, first=first)

    monkeypatch.setattr(_sampling, "draw", watched)
    with pytest.raises(Killed):
        fill(store, sampler, params, 12, 2)
    for n in (12, 12, 16):
        fill(store, sampler, params, n)
    assert firsts == [0, 8, 12]


def test_a_complete_set_can_be_extended_even_after_a_kill(tmp_path, exp, sampler, params):
    store = store_in(tmp_path / "a", exp, config_with())
    few = fill(store, sampler, params, 4)
    with pytest.raises(Killed):
        fill(store, sampler, params, 12, 1)
    more = fill(store, sampler, params, 12)
    np.testing.assert_array_equal(more[:4], few)
    np.testing.assert_array_equal(more, draw(sampler, params, 12))
    assert len(fill(store, sampler, params, 4)) == 12  # a larger set stays


def test_a_set_of_another_setting_is_refused(tmp_path, exp, sampler, params):
    store = store_in(tmp_path / "a", exp, config_with())
    with pytest.raises(Killed):
        fill(store, sampler, params, 12, 2)
    other = store._replace(setting=store.setting | {"sampler.eta": 1.0, "step": 2})
    message = r"another setting: sampler\.eta: was 0\.0, now 1\.0; step: was 1"
    with pytest.raises(WorkdirError, match=message):
        fill(other, sampler, params, 12)


def test_damaged_samples_are_never_used(tmp_path, exp, sampler, params):
    """A damaged batch is drawn again; a damaged complete set, or its note, is refused."""
    store = store_in(tmp_path / "a", exp, config_with())
    images = draw(sampler, params, 12)
    with pytest.raises(Killed):
        fill(store, sampler, params, 12, 3)
    for damage in (lambda content: b"", flip_a_bit_of(images[5])):
        part = store.folder / "part_00000004.npz"
        content = part.read_bytes()
        part.write_bytes(damage(content))
        with pytest.raises(Killed):
            fill(store, sampler, params, 12, 2)
        assert part.read_bytes() != damage(content)
    np.testing.assert_array_equal(fill(store, sampler, params, 12), images)
    whole = store.npz.read_bytes()
    save_npz(store.folder / "other.npz", images[::-1])
    for other in (flip_a_bit_of(images[5])(whole), (store.folder / "other.npz").read_bytes()):
        store.npz.write_bytes(other)
        with pytest.raises(WorkdirError, match=r"SHA-256 \w+, found another; delete it"):
            fill(store, sampler, params, 12)
    store.npz.write_bytes(whole)
    (store.folder / "samples.json").write_text("torn")
    with pytest.raises(WorkdirError, match=r"cannot be read: .*; delete it"):
        fill(store, sampler, params, 12)


def flip_a_bit_of(image):
    def flip(content):
        at = content.index(image.tobytes())
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


OTHER = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 0.25}
OTHER |= {str: lambda x: f"{x}_", tuple: lambda x: (*x, 1)}


def test_another_setting_has_another_name():
    """Each key of the model and of the sampler, and what is no key, separates two sets."""
    config = config_with(sampler__variance="analytic")
    setting = _sampling.sample_setting(config, 1, "ema", 0)
    names = {key: {} for key in (True, False)}
    for key, value in flatten(config).items():
        changed = with_overrides(config, {key: OTHER[type(value)](value)})
        matters = key.startswith(("model.", "process.", "target", "variance", "sampler."))
        name = _sampling.sample_name(_sampling.sample_setting(changed, 1, "ema", 0))
        names[matters or key == "sample.label"][key] = name
    for step, weights, seed in ((2, "ema", 0), (1, "raw", 0), (1, "ema", 1)):
        other = _sampling.sample_setting(config, step, weights, seed)
        names[True][step, weights, seed] = _sampling.sample_name(other)
    for digest in ("0123456789", "0123456abc"):
        names[True][digest] = _sampling.sample_name(setting | {"x_T": digest})
    own = _sampling.sample_name(setting)
    different = set(names[True].values())
    assert len(different) == len(names[True]) > 40 and own not in different
    for section in ("bpd.", "eval.", "figures.", "frontier.", "sample.", "train.preview."):
        assert {n for key, n in names[False].items() if key.startswith(section)} == {own}, section
