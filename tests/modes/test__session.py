"""What a training records of its steps, on a clock that the test sets."""

import jax
import numpy as np

from diffusion.modes._session import Session
from diffusion.runtime.config import Run
from diffusion.utils.progress import GoodputTimer
from tests.runs import logged
from tests.test_configs import config_of
from tests.utils.test_progress import Clock


def test_the_parts_of_a_step_s_time_add_up(tmp_path, monkeypatch):
    """A step: 1 s input, 2 s to hand it over, 4 s to wait for its metrics, 8 s on the host.

    Metrics are read one step late, but at saves. So step 2 is logged in the third step, when two
    steps have been waited for and two inputs have been read; step 4 in the fourth, and so on.
    """
    clock, config = Clock(), config_of("digits", "tiny")
    clock.now += 50
    timer = GoodputTimer(clock)
    monkeypatch.setattr(jax, "device_get", lambda x: setattr(clock, "now", clock.now + 4) or x)
    with Session(Run("train", config, tmp_path, None), None, None, 0, timer) as session:
        for step in range(1, 9):
            steps = range(step, step + 1)
            with session.dispatch(steps, None):
                clock.now += 2
            clock.now += 8
            session.record(steps, {"loss": [1.0]}, None, wait=step % 4 == 0)
            if step % 4 == 0:
                with timer("saving"):
                    clock.now += 100
                with session.paused():
                    clock.now += 1000
            if step < 8:
                with timer.part("input"):
                    clock.now += 1
    steps = {2: 3, 4: 1, 6: 3, 8: 1}  # {logged step: steps since the one before}
    found = {name: logged(tmp_path, f"train/{name}_ms") for name in ("input", "device", "host")}
    assert all(list(values) == [*steps] for values in found.values())
    total = {k: [values[s] / 1e3 * n for s, n in steps.items()] for k, values in found.items()}
    np.testing.assert_allclose(total["input"], [2, 1, 3, 1])
    np.testing.assert_allclose(total["device"], [2 * 3 + 4 * 2, 2 + 4 * 2] * 2)
    np.testing.assert_allclose(total["host"], [8 * 3, 8] * 2)
    np.testing.assert_allclose(np.sum([*total.values()]), timer.productive_seconds())
