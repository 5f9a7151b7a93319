"""loader."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from diffusion.data import ArrayDataset, ImageDataset, augment
from diffusion.utils.errors import DataError

MAX_BYTES = 16 * 2**30  # of pixels: what a whole data set may take of the memory of host and device


THREADS = min(16, os.cpu_count() or 1)  # decoders of pictures, which let go of Python's lock


def load_dataset(images: ImageDataset) -> ArrayDataset:
    """The whole set. Raises DataError, at once if it is of more than MAX_BYTES."""
    if images.nbytes > MAX_BYTES:
        wanted = f"expected at most {MAX_BYTES / 2**30:.3g} GiB of pixels"
        found = f"{images.nbytes / 2**30:.3g} GiB ({images.n}x{'x'.join(map(str, images.shape))})"
        raise DataError(f"{wanted}, found {found}; stream it by data.on_device_gib=0")
    image = np.empty((images.n, *images.shape), np.uint8)
    label = np.empty(images.n, np.int32)

    def read(first: int) -> None:
        part = slice(first, min(first + 256, images.n))
        image[part], label[part] = images.read(range(part.start, part.stop))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(0, images.n, 256)))
    return ArrayDataset(image, label, images.num_classes)


def iterate_shuffled(
    images: ImageDataset,
    key: Any,
    steps: range,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(uint8[r, h, w, c], int32[r]) for each of the steps: what batches.taken gives, unflipped.

    key: as for batches.chosen. rows: which of the batch's images are wanted, for a process that
    feeds only some of the devices. workers: processes that read ahead; 0: threads of this one. What
    comes depends on neither. Raises DataError.
    """
    if not len(steps):
        return
    first, last = (step * batch_size // images.n for step in (steps[0], steps[-1] + 1))
    if last - first > MAX_EPOCHS:
        wanted = f"expected at most {MAX_EPOCHS:,} epochs of a set that is streamed"
        raise DataError(
            f"{wanted}, found {last - first:,}; let it live on the device: data.on_device_gib=1"
        )
    words = augment.epoch_words(key, first, last)

    def read(step):
        return images.read(augment.indices(words, first, step, batch_size, images.n)[rows])

    yield from _read_ahead(read, steps, workers)


MAX_EPOCHS = 2**20  # 32 bytes each: what names the orders of all of them is made beforehand


def iterate_split(
    images: ImageDataset,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(uint8[r, h, w, c], int32[r], bool[r]) of each batch: every image once, in order.

    The last batch is filled up with the last image, and False says so: nothing is dropped, and all
    batches have one shape. rows, workers: as in `stream`. first: the batch to start from. Raises
    DataError.
    """

    def read(batch):
        at = (batch * batch_size + np.arange(batch_size))[rows]
        return *images.read(np.minimum(at, images.n - 1)), at < images.n

    yield from _read_ahead(read, range(first, -(-images.n // batch_size)), workers)


def _read_ahead(read: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Any]:
    """map(read, numbers), in order, read ahead by threads or worker processes."""

    def told(number):  # an error would come out of grain with pages of its own
        try:
            return read(number)
        except DataError as error:
            return error

    threads = max(1, THREADS // max(workers, 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    ahead = grain.MapDataset.range(numbers.start, numbers.stop).map(told).to_iter_dataset(options)
    if workers:
        ahead = ahead.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    for result in ahead:
        if isinstance(result, DataError):
            raise result
        yield result
