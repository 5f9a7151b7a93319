"""preemption."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from diffusion.utils import logging


class PreemptionHandler:
    """Ctrl-C and SIGTERM, remembered until the loop asks; the second one ends the program at once.

    A thread listens: the main one may wait for the device for minutes, deaf to both meanwhile.
    Several processes must stop after the same step: there SIGTERM is left to JAX, which makes them
    agree, and Ctrl-C becomes SIGTERM.
    """

    def __init__(self):
        self.asked = False
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)  # every signal's number goes there the moment it comes
        alone = jax.process_count() == 1
        for signum in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            signal.signal(signum, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard, alone), daemon=True).start()

    def _listen(self, heard: int, alone: bool) -> None:
        signals = iter(lambda: os.read(heard, 1)[0], None)
        stops = filter((signal.SIGINT, signal.SIGTERM).__contains__, signals)
        next(stops)
        if jax.process_index() == 0:
            logging.info("stopping   after the step in work; once more: at once, and nothing is saved")
        if alone:
            self.asked = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(128 + next(stops))

    def at(self, step: int) -> bool:
        """Whether to stop after this step; of several processes, all ask after every step."""
        if jax.process_count() > 1:
            self.asked = multihost_utils.reached_preemption_sync_point(step)
        return self.asked
