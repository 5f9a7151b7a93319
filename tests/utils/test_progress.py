"""diffusion.utils.progress: a set clock and a simulated terminal give every character."""

import io
import os
import pty
import re
import threading

import pytest

from diffusion.utils import logging
from diffusion.utils.progress import GoodputTimer, Progress, human_bytes, human_time


class Clock:
    """A clock that tests set."""

    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """Returns the visible rows; tqdm moves the cursor by \\r, \\n and one row up."""
        rows, y, x = [[]], 0, 0
        for piece in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", self.getvalue()):
            if piece == "\x1b[A":
                y -= 1
            elif piece == "\n":
                y, x = y + 1, 0
                rows += [[]] * (y == len(rows))
            elif piece == "\r":
                x = 0
            else:
                rows[y] = rows[y] + [" "] * (x - len(rows[y]))
                rows[y][x : x + len(piece)] = piece
                x += len(piece)
        return "\n".join("".join(row).rstrip() for row in rows).rstrip().split("\n")


def run(clock, progress, first, last, seconds, values=None):
    """Steps first..last, each taking `seconds`."""
    for step in range(first, last + 1):
        clock.now += seconds
        progress(step, values)


def test_progress_line_in_closed_form():
    clock, out = Clock(), io.StringIO()
    progress = Progress(5000, 0, 128, stream=out, clock=clock)
    run(clock, progress, 1, 1, 90.0, {"loss": 0.5, "lr": 2e-4})  # compiles
    run(clock, progress, 2, 1200, 1 / 32, {"loss": 0.03125, "lr": None})
    first, *_, last = out.getvalue().splitlines()
    assert first == "step 1/5,000  0%  first step took 1m30s  loss 0.5  lr 0.0002"
    # Lines at steps 1, 65 (2 s later), 385, 705, 1025 (10 s each). (5000 - 1025) / 32 = 124.2 s.
    assert last == (
        "step 1,025/5,000  20%  ETA 2m04s  loss 0.03125  lr 0.0002  32 steps/s  4,096 images/s"
    )
    assert re.findall(r"^step ([\d,]+)/", out.getvalue(), re.M) == [
        "1",
        "65",
        "385",
        "705",
        "1,025",
    ]


def test_progress_rate_is_that_of_the_last_lines():
    clock, out = Clock(), io.StringIO()
    progress = Progress(10000, 0, stream=out, clock=clock, every_s=8.0)
    run(clock, progress, 1, 1, 500.0)
    run(clock, progress, 2, 9, 0.25)  # 2 s: the early line
    run(clock, progress, 10, 41, 0.25)  # 8 s at 4 a second
    run(clock, progress, 42, 49, 1.0)  # 8 s at 1 a second
    rates = re.findall(r"([\d.]+) steps/s", out.getvalue())
    assert rates == ["4", "4", "1"]


def test_progress_slow_steps_resumed_runs_and_names():
    clock, out = Clock(), io.StringIO()
    progress = Progress(12, 4, 5, stream=out, clock=clock, unit="batch", items="faces")
    run(clock, progress, 5, 7, 20.0)
    assert out.getvalue().splitlines() == [
        "batch 5/12  41%  first batch took 20s",
        "batch 6/12  50%  ETA 2m00s  20s/batch  0.25 faces/s",
        "batch 7/12  58%  ETA 1m40s  20s/batch  0.25 faces/s",
    ]


def test_progress_of_quiet_work_begins_after_its_quiet_time():
    clock, out = Clock(), io.StringIO()
    with Progress(9, stream=out, clock=clock, unit="image", quiet_s=10.0) as progress:
        run(clock, progress, 1, 9, 1.1)  # 9.9 s in all
    assert out.getvalue() == ""
    with Progress(20, stream=out, clock=clock, unit="image", quiet_s=10.0) as progress:
        run(clock, progress, 1, 19, 2.0)
    # The first line at 10 s, then as ever: 2 s later and every 10 s. 15 images at 2 s are 30 s.
    first, second, _, _, last = out.getvalue().splitlines()
    assert first == "image 5/20  25%  ETA 30s  2.0s/image"
    assert second.startswith("image 6/20") and last.startswith("image 19/20  95%  stopped after")


def test_progress_says_how_many_steps_the_first_report_is_of():
    clock, out = Clock(), io.StringIO()
    progress = Progress(2000, 100, 0.25, stream=out, clock=clock, unit="sampling step")
    for step in (140, 180):  # reported after 40 steps each; 4 steps make an image
        clock.now += 4.0
        progress(step)
    assert out.getvalue().splitlines() == [
        "sampling step 140/2,000  7%  first 40 sampling steps took 4.0s",
        "sampling step 180/2,000  9%  ETA 3m02s  10 sampling steps/s  2.5 images/s",
    ]


def test_progress_ends_with_the_total_time_and_the_mean_rate():
    clock, out = Clock(), io.StringIO()
    with Progress(9, 0, 3, stream=out, clock=clock, unit="chunk") as progress:
        run(clock, progress, 1, 1, 100.0)
        run(clock, progress, 2, 9, 0.5, {"loss": 2.0})
        progress(9)
    assert out.getvalue().splitlines()[-1] == (
        "chunk 9/9  100%  done in 1m44s  loss 2  2 chunks/s  6 images/s"
    )
    assert out.getvalue().count("done") == 1


def test_progress_that_is_interrupted_ends_with_its_last_step():
    clock, out = Clock(), io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        with Progress(9, stream=out, clock=clock) as progress:
            run(clock, progress, 1, 3, 1.0)
            raise KeyboardInterrupt
    assert out.getvalue().splitlines()[-1] == "step 3/9  33%  stopped after 3.0s  1 steps/s"


def test_progress_pauses_count_in_the_total_and_not_in_the_rate():
    clock, out = Clock(), io.StringIO()
    progress = Progress(100, stream=out, clock=clock)
    with progress.paused():  # before the first step, too
        clock.now += 7
    run(clock, progress, 1, 5, 1.0)
    with progress.paused():
        clock.now += 50
    run(clock, progress, 6, 100, 1.0)
    assert re.findall(r"step (\d+)/", out.getvalue())[:4] == ["1", "3", "13", "23"]
    assert set(re.findall(r"\S+ steps/s|\S+/step", out.getvalue())) == {"1 steps/s"}
    assert "100%  done in 2m37s  1 steps/s" in out.getvalue()


def test_progress_rate_since_its_last_call():
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    run(clock, progress, 1, 4, 9.0)
    assert progress.rate() is None
    run(clock, progress, 5, 24, 0.5)
    with progress.paused():
        clock.now += 50
    assert progress.rate() == 2.0
    run(clock, progress, 25, 28, 0.25)
    assert progress.rate() == 4.0


def test_progress_of_no_step_prints_nothing():
    out = io.StringIO()
    with Progress(5, 5, stream=out):
        pass
    assert out.getvalue() == ""
    with pytest.raises(ValueError, match="expected 0 <= start <= total, found 6 and 5"):
        Progress(5, 6)


def test_progress_is_silent_in_processes_other_than_0():
    out = Terminal()
    logging.silence(True)
    try:
        with Progress(5, stream=out) as progress:
            progress(1, {"loss": 1.0})
            progress(5)
    finally:
        logging.silence(False)
    assert out.getvalue() == ""


def test_progress_formats_no_value_before_a_line_is_due():
    class Lazy:
        def __format__(self, spec):
            raise AssertionError("formatted")

    clock, out = Clock(), io.StringIO()
    progress = Progress(100, stream=out, clock=clock)
    progress(1)
    progress(2, {"loss": Lazy()})
    assert out.getvalue().count("\n") == 1


def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    clock, out = Clock(), Terminal()
    progress = Progress(40, 0, 8, stream=out, clock=clock)
    assert out.screen()[-1].endswith("step 0/40  0%")
    run(clock, progress, 1, 1, 60.0)
    assert out.screen()[-1].endswith("step 1/40  2%  first step took 1m00s")
    run(clock, progress, 2, 20, 0.5, {"loss": 0.25})
    bar = out.screen()[-1]
    assert bar.endswith("step 20/40  50%  ETA 10s  loss 0.25  2 steps/s  16 images/s")
    assert bar.startswith("#####")  # half of ten: a StringIO's encoding is not known to have blocks
    assert out.getvalue().count("\n") == 0
    run(clock, progress, 21, 40, 0.5)
    assert out.screen() == ["step 40/40  100%  done in 1m20s  loss 0.25  2 steps/s  16 images/s"]


def test_progress_on_a_terminal_uses_the_recent_window():
    clock, out, threads = Clock(), Terminal(), set(threading.enumerate())
    with Progress(1000, 0, stream=out, clock=clock, every_s=4.0) as progress:
        run(clock, progress, 1, 21, 0.25)
        run(clock, progress, 22, 23, 1.0)  # in the last 4 s: 8 steps of 0.25 s and 2 of 1 s
        assert "2.5 steps/s" in out.screen()[-1] and "ETA 6m31s" in out.screen()[-1]  # 977 / 2.5
        assert set(threading.enumerate()) <= threads  # tqdm's monitor would be one more


def test_progress_on_a_terminal_of_no_width_is_lines():
    """The terminal of a container may report a width of 0."""
    ours, theirs = pty.openpty()
    clock = Clock()
    with open(theirs, "w") as stream, Progress(9, 0, stream=stream, clock=clock) as progress:
        run(clock, progress, 1, 9, 1.0)
        assert b"step 1/9" in os.read(ours, 10_000)
    os.close(ours)


def test_info_is_printed_above_the_bar():
    clock, out = Clock(), Terminal()
    with Progress(40, stream=out, clock=clock) as progress:
        run(clock, progress, 1, 3, 1.0)
        logging.info("saved step 3", out)
        above, bar = out.screen()
        assert above == "saved step 3" and "step 3/40" in bar
        with progress.paused(), Progress(2, stream=out, clock=clock, unit="image") as inner:
            inner(1)
            _, outer_bar, inner_bar = out.screen()
            assert "step 3/40" in outer_bar and "image 1/2" in inner_bar
            inner(2)
        _, said, bar = out.screen()
        assert said == "image 2/2  100%  done in 0.00s" and "step 3/40" in bar
    assert len(out.screen()) == 3 and "stopped after 3.0s" in out.screen()[2]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0.00s"), (0.123, "0.12s"), (0.996, "1.0s"), (8.1, "8.1s"), (9.96, "10s"), (59.4, "59s"),
     (59.6, "1m00s"), (200, "3m20s"), (3599.4, "59m59s"), (3599.6, "1h00m"), (3720, "1h02m"),
     (7199, "2h00m"), (183600, "51h00m"), (363600, "4d05h"), (float("inf"), "?"),
     (float("nan"), "?"), (-1, "?")],
)  # fmt: skip
def test_human_time(seconds, text):
    assert human_time(seconds) == text


@pytest.mark.parametrize(
    "n, text",
    [(0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "1.0 kB"), (1536, "1.5 kB"),
     (999_960, "1.0 MB"), (142.8e6, "142.8 MB"), (3.2e9, "3.2 GB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_human_bytes(n, text):
    assert human_bytes(n) == text


def test_goodput_is_the_share_of_time_without_a_name():
    clock = Clock()
    timer = GoodputTimer(clock)
    clock.now += 1
    timer.attribute_elapsed("starting")
    for _ in range(2):
        clock.now += 3
        with timer("saving"):
            clock.now += 1
    clock.now += 1
    assert timer.seconds == {"starting": 1.0, "saving": 2.0}
    assert (timer.share("saving"), timer.share("sampling")) == (0.2, 0.0)
    assert (timer.productive_seconds(), timer.goodput()) == (7.0, 0.7)
    shares = "10.0% starting, 20.0% saving"
    assert timer.describe(0) == f"70.0% training, {shares}"
    with timer.part("input"):
        clock.now += 2
    for _ in range(2):
        with timer.part("device"):
            clock.now += 4
    assert timer.split() == {"input": 2.0, "device": 8.0, "host": 7.0}
    step = "a step: 200.0 ms input, 800.0 ms device, 700.0 ms host"
    assert timer.describe(10) == f"85.0% training ({step}), 5.0% starting, 10.0% saving"
