"""Pictures: grids and strips of samples, curves; and saving them whole or not at all."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

VISIBLE = 64  # pixels: small images are enlarged until their shorter side has these


def grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None, pad: int = 2
) -> np.ndarray:
    """Images row by row on white, with `pad` white pixels between and around them.

    images: uint8[n, h, w, 1 or 3], n >= 1. columns: None: near-square, and full where that can be.
    scale: how many times enlarged; None: the least that makes the shorter side 64 pixels. Returns
    uint8[H, W, 3] with H = rows (scale h + pad) + pad, and W alike. Raises ValueError for other
    images, and for columns, scale < 1 or pad < 0.
    """
    images = _checked("grid", images, 4, "uint8[n, h, w, 1 or 3]")
    n, h, w, _ = images.shape
    columns = _near_square(n) if columns is None else columns
    scale = math.ceil(VISIBLE / min(h, w)) if scale is None else scale
    for name, value, least in [("columns", columns, 1), ("scale", scale, 1), ("pad", pad, 0)]:
        if value != int(value) or value < least:
            raise ValueError(f"grid: expected {name} of at least {least}, found {value}")
    h, w, rows = h * scale, w * scale, -(-n // columns)
    page = np.full([rows * (h + pad) + pad, columns * (w + pad) + pad, 3], 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (pad + j * (size + pad) for j, size in zip(divmod(i, columns), (h, w), strict=True))
        page[y : y + h, x : x + w] = enlarged(image, scale)
    return page


def enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8[h, w, 1 or 3] -> uint8[scale h, scale w, same], by bicubic interpolation.

    Not as squares: an eye that sees their edges does not see the digit in 8x8 of them.
    """
    if scale == 1:
        return image
    h, w, c = image.shape
    picture = Image.fromarray(image[..., 0] if c == 1 else image)
    size = w * scale, h * scale
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(*size[::-1], c)


def strip(images: np.ndarray, scale: int | None = None, pad: int = 2) -> np.ndarray:
    """Sequences, such as x_T ... x_0 or an interpolation, one per row: a grid of known columns.

    images: uint8[rows, columns, h, w, 1 or 3]. Returns uint8[H, W, 3]. Raises ValueError as `grid`.
    """
    images = _checked("strip", images, 5, "uint8[rows, columns, h, w, 1 or 3]")
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], scale, pad)


def _checked(who: str, images: np.ndarray, ndim: int, expected: str) -> np.ndarray:
    images = np.asarray(images)
    right = images.dtype == np.uint8 and images.ndim == ndim and images.shape[-1] in (1, 3)
    if not right or not images.size:
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"{who}: expected {expected}, not empty, found {found}")
    return images


def _near_square(n: int) -> int:
    """Columns for n images: without a gap if the grid is then not much wider than high."""
    root = math.ceil(math.sqrt(n))
    return next((c for c in range(root, int(1.6 * math.sqrt(n)) + 1) if n % c == 0), root)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when it is complete; an error leaves `path` as it was."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: the same file system
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a power cut that its bytes did not
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8[h, w, 3], [h, w, 1] or [h, w] as PNG, atomically; folders are made.

    Raises ValueError for another image, OSError for a path that cannot be written.
    """
    image = np.asarray(image)
    three = image[..., None] if image.ndim == 2 else image
    three = _checked("save_png", three, 3, "uint8[h, w, 1 or 3]")
    with _replacing(path) as file:
        Image.fromarray(three[..., 0] if three.shape[-1] == 1 else three).save(file, "png")


def save_npz(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes a sample set as evaluators read it: `arr_0` the images, `arr_1` the labels if given.

    images: uint8[n, h, w, 1 or 3]; labels: int[n]. Atomic; folders are made. Raises ValueError for
    other arrays, OSError for a path that cannot be written.
    """
    arrays = [_checked("save_npz", images, 4, "uint8[n, h, w, 1 or 3]")]
    if labels is not None:
        arrays.append(np.asarray(labels))
        if arrays[1].shape != arrays[0].shape[:1] or arrays[1].dtype.kind not in "iu":
            found = f"{arrays[1].dtype}{list(arrays[1].shape)}"
            raise ValueError(f"save_npz: expected labels int[{len(arrays[0])}], found {found}")
    with _replacing(path) as file:
        np.savez(file, *arrays)


def save_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, atomically; folders are made. Raises OSError."""
    with _replacing(path) as file:
        file.write(content)


def save_text(path: str | os.PathLike, text: str) -> None:
    """The same for a text, in UTF-8."""
    save_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_curve(path: str | os.PathLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps int[n], values float64[n]) of one metric in a metrics.jsonl, by rising step.

    The last value of a step counts; a line that cannot be read (torn by a kill) is passed over; NaN
    and infinities are kept. Raises ValueError if no line has the metric, naming those that are.
    """
    values, names = {}, set()
    for line in pathlib.Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
        names |= record.keys() - {"step", "time"}
        if name in record:
            values[step] = float(record[name])
    if not values:
        known = ", ".join(sorted(names)) or "no metric"
        raise ValueError(f"{path}: expected lines with {name!r}, found {known}")
    steps = np.array(sorted(values))
    return steps, np.array([values[step] for step in steps])


def smooth(x: np.ndarray, y: np.ndarray, width: float = 0.04) -> np.ndarray:
    """The mean of the finite y [n] whose x [n, rising] is within `width` / 2 of the range of x.

    At least two neighbours on each side count, at the ends as many as both sides have; NaN where
    none is finite. In the coordinates of its axis, a curve is so smoothed alike everywhere.
    """
    half = width / 2 * (x[-1] - x[0])
    i = np.arange(len(x))
    near = np.minimum(2, np.minimum(i, i[::-1]))
    low = np.minimum(np.searchsorted(x, x - half, "left"), i - near)
    high = np.maximum(np.searchsorted(x, x + half, "right"), i + near + 1)
    finite = np.isfinite(y)
    total = np.append(0, np.cumsum(np.where(finite, y, 0)))
    count = np.append(0, np.cumsum(finite))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def loss_curve(
    jsonl_path: str | os.PathLike, png_path: str | os.PathLike, name: str = "loss"
) -> None:
    """Draws a metric of metrics.jsonl against the step: as logged, faint, and smoothed.

    An axis is logarithmic where its numbers are positive and span a factor of 100 (steps) or 5
    (values). Values that are not finite are counted, and marked in red at the step axis. Raises
    ValueError if there is no finite value of that name, OSError if the file cannot be read.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    steps, values = read_curve(jsonl_path, name)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"{jsonl_path}: expected finite values of {name!r}, found {values[-1]}")
    log_x, log_y = _spans(steps[finite & (steps > 0)], 100), _spans(values[finite], 5)
    if log_x:
        values, finite, steps = values[steps > 0], finite[steps > 0], steps[steps > 0]
    curve = smooth(np.log(steps) if log_x else steps, values)

    ink, grey, red = "#1f5fa8", "#5a6270", "#c0392b"
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, np.where(finite, values, np.nan), color=ink, alpha=0.3, linewidth=0.8)
    axes.plot(steps, curve, color=ink, linewidth=2.2, solid_capstyle="round")
    end = np.flatnonzero(np.isfinite(curve))[-1]
    axes.plot(steps[end], curve[end], "o", color=ink, markersize=5)
    axes.annotate(
        f"{curve[end]:.4g}",
        (steps[end], curve[end]),
        (8, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=ink,
        fontweight="bold",
    )
    lost = steps[~finite]
    at_the_axis = axes.get_xaxis_transform()
    axes.plot(lost, np.zeros(len(lost)), "|", color=red, markersize=12, transform=at_the_axis)

    for axis, log in [(axes.xaxis, log_x), (axes.yaxis, log_y)]:
        if log:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            wide = axis is axes.xaxis or _spans(values[finite], 1000)
            axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(MaxNLocator("auto", integer=axis is axes.xaxis, min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.set_title(name, loc="left", color="#20242b", fontsize=13, fontweight="bold")
    note = f"{len(lost):,} not finite" if len(lost) else "as logged, and smoothed"
    axes.set_title(note, loc="right", color=red if len(lost) else grey, fontsize=9)
    axes.set_xlabel("step", color=grey)
    axes.grid(True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=grey)
    with _replacing(png_path) as file:
        figure.savefig(file, format="png")


def _spans(values: np.ndarray, factor: float) -> bool:
    return values.size > 1 and values.min() > 0 and values.max() >= factor * values.min()


def rate_distortion(png_path: str | os.PathLike, rate: np.ndarray, rmse: np.ndarray) -> None:
    """Draws the three panels of the paper's Figure 5.

    rate: float[T], bits/dim sent until x_k is known, at k - 1; rmse: float[T], distortion there, on
    0-255. Steps are counted as there, from x_T on. Raises OSError.
    """
    from matplotlib.figure import Figure

    rate, rmse = rate[::-1], rmse[::-1]
    steps = np.arange(1, len(rate) + 1)
    panels = [
        ("reverse steps (T - t)", steps, "distortion (RMSE)", rmse),
        ("reverse steps (T - t)", steps, "rate (bits/dim)", rate),
        ("rate (bits/dim)", rate, "distortion (RMSE)", rmse),
    ]
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (x_name, x, y_name, y) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, color="#1f5fa8", linewidth=2)
        axes.set(xlabel=x_name, ylabel=y_name, ylim=(0, None))
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors="#5a6270")
    with _replacing(png_path) as file:
        figure.savefig(file, format="png")
