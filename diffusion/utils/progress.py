"""progress."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from tqdm import tqdm

from diffusion.utils.logging import info


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own: every report redraws the bar


class Progress:
    """How far a loop is: a live bar on a terminal, lines at a fixed pace elsewhere.

        with Progress(5000, start, batch_size) as progress:
            for step in range(start + 1, 5001):
                progress(step, {"loss": 0.0312, "lr": 0.0002})

        step 1,200/5,000  24%  ETA 1m32s  loss 0.0312  lr 0.0002  41.2 steps/s  5,274 images/s

    Lines come after the first call, 2 s later, then every `every_s` seconds, and at the end. The
    rate is of the last `every_s` seconds, without the first call, which compiles, and without what
    is done under `paused()`.

    total, start: units. batch_size: items per unit (None: no item rate). stream: None is stdout.
    clock: seconds. unit, items: their names, `unit` in the singular. silent: for the processes
    that are not the first. Raises ValueError unless 0 <= start <= total.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        batch_size: int | None = None,
        every_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        unit: str = "step",
        items: str = "images",
        silent: bool = False,
    ):
        if not 0 <= start <= total:
            raise ValueError(f"progress: expected 0 <= start <= total, found {start} and {total}")
        self._total, self._step, self._batch_size = total, start, batch_size
        self._unit, self._items, self._every_s, self._clock = unit, items, every_s, clock
        self._stream = sys.stdout if stream is None else stream
        self._values: dict[str, float] = {}
        self._first_s: float | None = None
        self._marks: deque[tuple[float, int]] = deque()  # (time, step) of the recent reports
        self._asked: tuple[float, int] | None = None  # the same, when `rate` was last called
        self._open = not silent
        self._began = self._due = clock()
        self._bar = None
        if self._open and _is_screen(self._stream):
            self._bar = _Bar(
                desc=self._line(None),
                total=total,
                initial=start,
                file=self._stream,
                bar_format="{bar:10} {desc}",
                dynamic_ncols=True,
                leave=False,
            )

    def __call__(self, step: int, values: Mapping[str, float | None] | None = None) -> None:
        """`step` units are done. values: the latest numbers, None for one not known yet."""
        if not self._open:
            return
        self._step = step
        if values:
            self._values.update((name, x) for name, x in values.items() if x is not None)
        now = self._clock()
        if self._first_s is None:
            self._first_s, self._first = now - self._began, (now, step)
        if step >= self._total:
            self.close()
        elif now >= self._due:
            self._report(now)

    def rate(self) -> float | None:
        """Units/s since this was last called, pauses left out; None where that is not known."""
        now, before = self._clock(), self._asked
        self._asked = now, self._step
        return self._rate(before, now) if before else None

    def _report(self, now: float) -> None:
        self._marks.append((now, self._step))
        while len(self._marks) > 2 and self._marks[1][0] <= now - self._every_s:
            self._marks.popleft()
        line = self._line(self._rate(self._marks[0], now))
        if self._bar is None:
            self._due = now + (self._every_s if len(self._marks) > 1 else min(2, self._every_s))
            info(line, self._stream)
        else:
            self._due = now + 0.2
            self._bar.n = self._step
            self._bar.set_description_str(line)

    def _rate(self, mark: tuple[float, int], now: float) -> float | None:
        then, step = mark
        return (self._step - step) / (now - then) if now > then and self._step > step else None

    def _line(self, rate: float | None, took: str | None = None) -> str:
        done = f"{self._unit} {self._step:,}/{self._total:,}"
        parts = [done, f"{100 * self._step // max(self._total, 1)}%"]
        if took:
            parts.append(took)
        elif rate:
            parts.append(f"ETA {human_time((self._total - self._step) / rate)}")
        elif self._first_s is not None:
            parts.append(f"first {self._unit} took {human_time(self._first_s)}")
        parts += [f"{name} {x:.4g}" for name, x in self._values.items()]
        if rate:
            slow = f"{human_time(1 / rate)}/{self._unit}"
            parts.append(f"{_number(rate)} {self._unit}s/s" if rate >= 1 else slow)
            if self._batch_size:
                parts.append(f"{_number(rate * self._batch_size)} {self._items}/s")
        return "  ".join(parts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside (samples, evaluation) counts in the total time, not in the rate."""
        then = self._clock()
        try:
            yield
        finally:
            pause = self._clock() - then
            self._due += pause
            self._marks = deque((t + pause, step) for t, step in self._marks)
            if self._first_s is not None:
                self._first = self._first[0] + pause, self._first[1]
            if self._asked is not None:
                self._asked = self._asked[0] + pause, self._asked[1]

    def close(self) -> None:
        """Says the total time, and the mean rate after the first call. May be called twice."""
        if not self._open:
            return
        self._open = False
        if self._bar is not None:
            self._bar.close()
        if self._first_s is not None:
            now = self._clock()
            how = "done in" if self._step >= self._total else "stopped after"
            took = f"{how} {human_time(now - self._began)}"
            info(self._line(self._rate(self._first, now), took), self._stream)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _is_screen(stream: TextIO) -> bool:
    """A terminal that a bar fits in: some, in containers, say that they are none wide."""
    if not stream.isatty():
        return False
    with contextlib.suppress(OSError):  # not the system's: then its width is whatever it says
        return os.get_terminal_size(stream.fileno()).columns > 0
    return True


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.95 else f"{x:.3g}"


def human_time(seconds: float) -> str:
    """'0.12s', '8.1s', '42s', '3m20s', '51h00m', '4d04h'; '?' for what is not a finite time."""
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
    """'512 B', '1.5 kB', '142.8 MB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.95:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


class GoodputTimer:
    """Where the time of a run went: everything that is not put under a name was training.

    with shares("save"): ...
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._began, self.seconds = clock, clock(), {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began

    def so_far(self, name: str) -> None:
        """Puts all the time since the start under a name."""
        self.seconds = {name: self._clock() - self._began}

    def of(self, name: str) -> float:
        """The share of a name in all the time since the start, in [0, 1]."""
        return self.seconds.get(name, 0.0) / max(self._clock() - self._began, 1e-9)

    def goodput(self) -> float:
        """The share of what was put under no name."""
        return 1.0 - sum(map(self.of, self.seconds))
