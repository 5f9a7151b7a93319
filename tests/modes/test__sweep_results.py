"""Differences beyond the seeds' noise: exact cases, and how often noise alone is taken for one."""

import csv
import itertools

import numpy as np
import pytest
from scipy import stats

from diffusion.modes import _sweep_results as results
from diffusion.modes._sweep_cells import Cell


def sweep_of(readings):
    """Returns (cells, {name: readings}) of {value of `a`: [readings of its seeds]}."""
    cells, read = [], {}
    for value, each in readings.items():
        for seed, reading in enumerate(each):
            cells.append(Cell({"a": value}, {}, seed))
            read[cells[-1].name] = reading if isinstance(reading, dict) else {"loss": reading}
    return cells, read


def effects_of(readings, configured=None):
    cells, read = sweep_of(readings)
    first = next(iter(readings))
    return results.effects(
        results.by_setting(cells, read), {"a": first if configured is None else configured}
    )


def test_a_difference_of_two_settings_is_the_t_test():
    """Student's of pairs of one seed, by scipy; what the seeds have in common is no noise."""
    one, two = [1.0, 20.0, 300.0], [5.0, 24.5, 303.5]
    (effect,) = effects_of({0: one, 1: two})
    assert effect.difference == pytest.approx(4.0) and effect.reference == 0 and effect.counts
    interval = stats.ttest_rel(two, one).confidence_interval(0.95)
    np.testing.assert_allclose(effect.margin, (interval.high - interval.low) / 2)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 3.0)])
def test_noise_alone_rarely_counts(scale):
    """Of 2,000 pairs of settings without a difference at most 5 % count, 3 standard errors more."""
    rng, count, n = np.random.default_rng(0), 0, 2000
    for _ in range(n):
        pair = {i: list(s * rng.standard_normal(3)) for i, s in enumerate(scale)}
        count += effects_of(pair)[0].counts
    assert count / n < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)


def test_a_large_difference_counts_and_one_seed_never_does():
    assert effects_of({0: [1.0, 1.1, 0.9], 1: [9.0, 9.1, 8.9]})[0].counts
    (effect,) = effects_of({0: [1.0], 1: [9.0]})
    assert effect.difference == 8.0 and effect.margin == np.inf and not effect.counts
    (in_json,) = results.effects_to_json([effect])
    assert in_json["difference"] == 8.0 and in_json["margin"] is None and in_json["key"] == "a"


def test_the_reference_is_what_is_configured():
    found = effects_of({0: [1.0, 2.0], 1: [2.0, 3.0], 2: [4.0, 5.0]}, configured=1)
    assert [(e.value, e.reference, e.difference) for e in found] == [(0, 1, -1.0), (2, 1, 2.0)]


def test_in_a_grid_only_cells_that_differ_in_one_key_are_compared():
    """loss = a + 10 b + 3 a b: the effect of a is 1 + 3 (0 + 1) / 2, that of b 10 + 3 / 2."""
    cells, read = [], {}
    for a in (0, 1):
        for b in (0, 1):
            for seed in (0, 1):
                cells.append(Cell({"a": a, "b": b}, {}, seed))
                read[cells[-1].name] = {"loss": a + 10 * b + 3 * a * b + 0.01 * seed}
    found = results.effects(results.by_setting(cells, read), {"a": 0, "b": 0})
    assert {(e.key, e.value): round(e.difference, 9) for e in found} == {
        ("a", 1): 2.5,
        ("b", 1): 11.5,
    }
    read |= {cell.name: {"failed": "diverged"} for cell in cells if cell.values == {"a": 1, "b": 1}}
    found = results.effects(results.by_setting(cells, read), {"a": 0, "b": 0})
    assert {e.key: round(e.difference, 9) for e in found} == {"a": 1.0, "b": 10.0}


def test_a_failed_training_leaves_the_other_seeds_and_is_named():
    readings = {0: [1.0, 2.0, 3.0], 1: [{"failed": "loss is nan"}, 5.0, 6.0], 2: [{"failed": "x"}]}
    cells, read = sweep_of(readings)
    settings = results.by_setting(cells, read)
    found = results.effects(settings, {"a": 0})
    assert [(e.value, e.difference) for e in found] == [(1, 3.0)]  # 5 - 2 and 6 - 3
    lines = results.sentences(found, settings)
    assert "a=1: 1 of 3 trainings failed: loss is nan" in lines
    assert "a=2: 1 of 1 trainings failed: x" in lines
    assert results.summary(settings)[1]["readings"]["loss"]["each"] == [None, 5.0, 6.0]
    assert "failed" in results.readings_table(settings, ["loss"])[-1]


def test_sentences_say_what_is_better():
    low, high = (
        {"fd_random": 1.0, "precision_random": 0.1},
        {"fd_random": 9.0, "precision_random": 0.9},
    )
    cells, read = sweep_of({0: [low] * 2, 1: [high] * 2})
    settings = results.by_setting(cells, read)
    (line,) = results.sentences(results.effects(settings, {"a": 0}), settings)[1:]
    assert "fd_random +8 (worse)" in line and "precision_random +0.8000 (better)" in line


def test_the_csv_has_every_reading():
    cells, read = sweep_of({0: [{"loss": 1.5, "kid": 2.0}], 1: [{"loss": 0.1234567891}]})
    rows = list(csv.DictReader(results.to_csv(results.by_setting(cells, read)).splitlines()))
    assert rows == [
        {"setting": "a=0", "seed": "0", "loss": "1.5", "kid": "2"},
        {"setting": "a=1", "seed": "0", "loss": "0.12345679", "kid": ""},
    ]


def test_scores_agree_over_settings_by_their_order_and_with_people():
    """fd rises, precision falls, people err less where fd is large; one setting was not shown."""
    read, cells = {}, []
    for i, fd in enumerate((1.0, 2.0, 4.0, 8.0, 3.0)):
        cells.append(Cell({"a": i}, {}, 0))
        read[cells[-1].name] = {"fd_x": fd, "precision_x": -fd, "loss": 1.0}
        if i < 4:
            read[cells[-1].name][results.PEOPLE] = 1 / fd
    found = results.score_agreement(results.by_setting(cells, read))
    assert found.names == ("fd_x", "precision_x", results.PEOPLE)  # the loss has no order
    np.testing.assert_allclose(found.spearman.value, np.ones((3, 3)))  # all of them by quality
    in_json = results.agreement_to_json(found)
    assert in_json["spearman"]["value"] == found.spearman.value.tolist() and in_json["cells"] == 4
    assert in_json["spearman"]["low"] is None  # four settings are too few
    few = results.by_setting(cells[2:], read)
    assert results.score_agreement(few) is None


def test_people_who_were_asked_about_few_settings_hide_no_other_agreement():
    cells = [Cell({"a": i}, {}, 0) for i in range(5)]
    read = {cell.name: {"fd_x": float(i), "loss": -float(i)} for i, cell in enumerate(cells)}
    read[cells[0].name][results.PEOPLE] = 0.4
    found = results.score_agreement(results.by_setting(cells, read))
    assert found.names == ("loss", "fd_x") and found.spearman.value[0, 1] == pytest.approx(-1)


def test_a_wide_table_goes_on_below():
    """Every reading is a column somewhere, no line is too wide, columns are aligned."""
    read = {f"score_of_a_long_name_{i} by ancestral": float(i) for i in range(9)}
    more = {name: value + 1 for name, value in read.items()}
    cells, found = sweep_of({0: [read, more], 1000: [more, read]})
    lines = results.readings_table(results.by_setting(cells, found), list(read))
    assert max(map(len, lines)) <= results.MAX_WIDTH
    assert "\n".join(lines).count(" +- 0.50") == 2 * len(read)
    for head, row in itertools.pairwise(lines):
        if head.startswith(" "):
            assert len(head) == len(row) and row.startswith("a=0 ")
    assert [name for name in read if f"  {name}" not in "\n".join(lines)] == []
