"""Reads an ImageDataset: all of it into memory, streamed in training order, or in its own order."""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from diffusion.data import ImageDataset, mismatch
from diffusion.utils.errors import DataError

MAX_BYTES = 16 * 2**30  # of pixels in memory, on the host and on every device
READ_CHUNK = 256  # images that one thread of load_dataset reads at a time
MAX_THREADS = min(16, os.cpu_count() or 1)  # they decode images, which releases the GIL

HostBatch = tuple[np.ndarray, np.ndarray]  # image uint8[b, h, w, c], label int32[b]


def make_batch_indices(n: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Returns a function from a step to the dataset indices of its batch, int32[b] in 0..n-1.

    Batches follow each other without a gap through an endless sequence of epochs. Every epoch is a
    random permutation of all images that depends on (seed, epoch) alone, so that resuming needs no
    more than the step. Exact for steps and n below 2^31; raises ValueError for other sizes.
    """
    if not (0 < n < 2**31 and 0 < batch_size < 2**31):
        raise ValueError(f"expected n and batch_size in 1..2^31-1, found {n} and {batch_size}")

    def batch_indices(step: int) -> np.ndarray:
        epoch, place = np.divmod(int(step) * batch_size + np.arange(batch_size, dtype=np.int64), n)
        first, last = int(epoch[0]), int(epoch[-1])
        parts = (_epoch_order(n, seed, e)[place[epoch == e]] for e in range(first, last + 1))
        return np.concatenate(list(parts))

    return batch_indices


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of 0..n-1, int32[n], by sorting random 64-bit keys."""
    # NumPy keeps the streams of its bit generators between releases, but not its permutations.
    bits = np.random.PCG64([seed, epoch]).random_raw(n)
    return bits.argsort(kind="stable").astype(np.int32)


def load_dataset(images: ImageDataset) -> HostBatch:
    """Reads all images and labels into memory: (uint8[n, h, w, c], int32[n]).

    Raises DataError for a damaged image, and at once for more than MAX_BYTES.
    """
    if images.nbytes > MAX_BYTES:
        expected = f"at most {MAX_BYTES / 2**30:.3g} GiB of pixels"
        found = f"{images.nbytes / 2**30:.3g} GiB ({images.n}x{'x'.join(map(str, images.shape))})"
        raise mismatch("data.on_device_gib", expected, found, "stream them with 0")
    image = np.empty((images.n, *images.shape), np.uint8)
    label = np.empty(images.n, np.int32)

    def read(first: int) -> None:
        part = slice(first, min(first + READ_CHUNK, images.n))
        image[part], label[part] = images.read(range(part.start, part.stop))

    with ThreadPoolExecutor(MAX_THREADS) as pool:
        list(pool.map(read, range(0, images.n, READ_CHUNK)))
    return image, label


def iterate_shuffled(
    images: ImageDataset,
    seed: int,
    steps: range,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
) -> Iterator[HostBatch]:
    """Yields the batches of consecutive training steps, which `make_batch_indices` names.

    rows selects the images of each batch that this process feeds to its devices. workers is the
    number of processes that read ahead; 0 reads in threads of this one. Raises DataError for a
    damaged image.
    """
    indices = make_batch_indices(images.n, batch_size, seed)
    yield from _read_ahead(lambda step: images.read(indices(step)[rows]), steps, workers)


def iterate_split(
    images: ImageDataset,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields every image once, in order, as (uint8[b, h, w, c], int32[b], mask bool[b]).

    The last batch repeats the last image, with mask False, so that nothing is dropped and all
    batches have one shape. first is the batch to start from; rows and workers are those of
    `iterate_shuffled`. Raises DataError for a damaged image.
    """

    def read(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = (batch * batch_size + np.arange(batch_size))[rows]
        return *images.read(np.minimum(index, images.n - 1)), index < images.n

    yield from _read_ahead(read, range(first, -(-images.n // batch_size)), workers)


def _read_ahead(read: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Any]:
    """Yields read(number) in order, computed ahead by threads or worker processes."""

    def read_or_error(number: int) -> Any:  # raised inside grain, an error would grow to pages
        try:
            return read(number)
        except DataError as error:
            return error

    if not numbers:
        return
    threads = max(1, MAX_THREADS // max(workers, 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read_or_error)
    batches = dataset.to_iter_dataset(options)
    if workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
