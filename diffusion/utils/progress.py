"""Progress of a loop on the console, and readable durations and sizes."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from tqdm import tqdm

from diffusion.utils import logging

QUIET_S = 10.0  # what takes less needs no line of progress


class _Bar(tqdm):
    monitor_interval = 0  # no thread: every report redraws the bar


class Progress(contextlib.AbstractContextManager):
    """Shows a live bar on a terminal, and prints a line at a fixed pace elsewhere.

        with Progress(5000, start, batch_size) as progress:
            for step in range(start + 1, 5001):
                progress(step, {"loss": 0.0312, "lr": 0.0002})

        step 1,200/5,000  24%  ETA 1m32s  loss 0.0312  lr 0.0002  41.2 steps/s  5,274 images/s

    Lines are printed after the first step, 2 s later, then every `every_s` seconds, and at the end.
    The rate is that of the last `every_s` seconds; it excludes the first step, which compiles, and
    the time inside `paused()`. Processes other than 0 show nothing.

    Args:
      batch_size: items per step; None shows no items/s.
      clock: returns seconds.
      unit, items: the words for one step and for several items.
      quiet_s: seconds without a line, so that short work prints none at all.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        batch_size: float | None = None,
        every_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        unit: str = "step",
        items: str = "images",
        quiet_s: float = 0.0,
    ):
        if not 0 <= start <= total:
            raise ValueError(f"progress: expected 0 <= start <= total, found {start} and {total}")
        self._total, self._start, self._step, self._batch_size = total, start, start, batch_size
        self._unit, self._items, self._every_s, self._clock = unit, items, every_s, clock
        self._stream = sys.stdout if stream is None else stream
        self._values: dict[str, float] = {}
        self._paused_s = 0.0
        # All marks are (active seconds, step).
        self._first: tuple[float, int] | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._last_rate_call: tuple[float, int] | None = None
        self._began, self._quiet_s = clock(), quiet_s
        self._due = self._began + quiet_s
        self._open = not logging.is_silent()
        self._bar = None
        if self._open and _is_terminal(self._stream):
            style = {"bar_format": "{bar:10} {desc}", "dynamic_ncols": True, "leave": False}
            desc, stream = self._line(None), self._stream
            self._bar = _Bar(desc=desc, total=total, initial=start, file=stream, **style)

    def __call__(self, step: int, values: Mapping[str, float | None] | None = None) -> None:
        """Reports that `step` steps are done; values: the latest metrics, None if not known yet."""
        if not self._open:
            return
        self._step = step
        if values:
            self._values.update((name, x) for name, x in values.items() if x is not None)
        now = self._active_s()
        if self._first is None:
            self._first = now, step
        if step >= self._total:
            self.close()
        elif now >= self._due:
            self._report(now)

    def rate(self) -> float | None:
        """Returns the steps/s since the last call of `rate`, pauses excluded; None at the first."""
        now, before = self._active_s(), self._last_rate_call
        self._last_rate_call = now, self._step
        return self._rate_since(before, now) if before else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from the rate, but not from the total time."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - began

    def close(self) -> None:
        """Prints the total time and the mean rate after the first step, once."""
        if not self._open:
            return
        self._open = False
        if self._bar is not None:
            self._bar.close()
        if self._first is not None and self._clock() - self._began >= self._quiet_s:
            verb = "done in" if self._step >= self._total else "stopped after"
            took = f"{verb} {human_time(self._clock() - self._began)}"
            rate = self._rate_since(self._first, self._active_s())
            logging.info(self._line(rate, took), self._stream)

    def __exit__(self, *error) -> None:
        self.close()

    def _active_s(self) -> float:
        return self._clock() - self._paused_s

    def _rate_since(self, mark: tuple[float, int], now: float) -> float | None:
        then, step = mark
        return (self._step - step) / (now - then) if now > then and self._step > step else None

    def _report(self, now: float) -> None:
        self._recent.append((now, self._step))
        while len(self._recent) > 2 and self._recent[1][0] <= now - self._every_s:
            self._recent.popleft()
        mark = self._recent[0] if len(self._recent) > 1 else self._first
        line = self._line(self._rate_since(mark, now))
        if self._bar is None:
            self._due = now + (self._every_s if len(self._recent) > 1 else min(2, self._every_s))
            logging.info(line, self._stream)
        else:
            self._due = now + 0.2
            self._bar.n = self._step
            self._bar.set_description_str(line)

    def _line(self, rate: float | None, took: str | None = None) -> str:
        done = f"{self._unit} {self._step:,}/{self._total:,}"
        parts = [done, f"{100 * self._step // max(self._total, 1)}%"]
        if took:
            parts.append(took)
        elif rate:
            parts.append(f"ETA {human_time((self._total - self._step) / rate)}")
        elif self._first is not None:
            (then, step), unit = self._first, self._unit
            what = unit if step - self._start <= 1 else f"{step - self._start:,} {unit}s"
            parts.append(f"first {what} took {human_time(then - self._began)}")
        parts += [f"{name} {x:.4g}" for name, x in self._values.items()]
        if rate:
            slow = f"{human_time(1 / rate)}/{self._unit}"
            parts.append(f"{_three_digits(rate)} {self._unit}s/s" if rate >= 1 else slow)
            if self._batch_size:
                parts.append(f"{_three_digits(rate * self._batch_size)} {self._items}/s")
        return "  ".join(parts)


def _is_terminal(stream: TextIO) -> bool:
    """Returns whether the stream is a terminal with room for a bar; a container's may be 0 wide."""
    if not stream.isatty():
        return False
    with contextlib.suppress(OSError):  # not a terminal of the operating system
        return os.get_terminal_size(stream.fileno()).columns > 0
    return True


def _three_digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.95 else f"{x:.3g}"


def human_time(seconds: float) -> str:
    """Formats a duration: '0.12s', '8.1s', '42s', '3m20s', '51h00m', '4d04h'; '?' if not finite."""
    if not 0 <= seconds < float("inf"):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s" if seconds >= 0.995 else f"{seconds:.2f}s"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    m, h = round(seconds / 60), round(seconds / 3600)
    if h >= 72:
        return f"{h // 24:,}d{h % 24:02d}h"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{m // 60}h{m % 60:02d}m"


def human_bytes(n: float) -> str:
    """Formats a number of bytes in powers of 1000: '512 B', '1.5 kB', '142.8 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.95:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


class GoodputTimer:
    """Attributes the wall time of a run to named activities; the rest was training.

        with timer("saving"): ...

    Of the training it knows the time of two parts, input and device; the rest was the host's.

        with timer.part("input"): ...
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._began = clock, clock()
        self.seconds: dict[str, float] = {}
        self._parts = {"input": 0.0, "device": 0.0}

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._measure(self.seconds, name)

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Attributes the time inside to `input` or `device`; it stays training."""
        return self._measure(self._parts, name)

    @contextlib.contextmanager
    def _measure(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + self._clock() - began

    def attribute_elapsed(self, name: str) -> None:
        """Attributes all of the time since the start to the name."""
        self.seconds = {name: self._elapsed_s()}

    def share(self, name: str) -> float:
        """Returns the name's share of the time since the start, in [0, 1]."""
        return self.seconds.get(name, 0.0) / max(self._elapsed_s(), 1e-9)

    def productive_seconds(self) -> float:
        """Returns the seconds since the start that have no name."""
        return self._elapsed_s() - sum(self.seconds.values())

    def goodput(self) -> float:
        """Returns the share of the time since the start that has no name, in [0, 1]."""
        return self.productive_seconds() / max(self._elapsed_s(), 1e-9)

    def split(self) -> dict[str, float]:
        """Returns the seconds of training so far, {"input": s, "device": s, "host": the rest}."""
        return self._parts | {"host": self.productive_seconds() - sum(self._parts.values())}

    def describe(self, steps: int) -> str:
        """Returns all shares in words, and the milliseconds of a step where there were any."""
        ms = ", ".join(f"{1e3 * s / max(steps, 1):.1f} ms {k}" for k, s in self.split().items())
        training = f"{self.goodput():.1%} training" + (f" (a step: {ms})" if steps else "")
        return ", ".join([training, *(f"{self.share(k):.1%} {k}" for k in self.seconds)])

    def _elapsed_s(self) -> float:
        return self._clock() - self._began
