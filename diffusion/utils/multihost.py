"""Agreement between the processes of a run; each function is called by all of them."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


def broadcast_from_primary(number: int) -> int:
    """Returns process 0's number, an int32, in every process."""
    if jax.process_count() == 1:
        return int(number)
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_processes(flag: bool) -> bool:
    """Returns whether the flag is set in every process, after waiting for all of them."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, by their numbers, in every process."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    longest = np.max(multihost_utils.process_allgather(np.int32(len(content))))
    rows = multihost_utils.process_allgather(np.pad(content, (0, longest - len(content))))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
