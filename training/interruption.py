"""SIGTERM and SIGINT (Ctrl-C): from a terminal, from torchrun, and from Slurm before it takes a machine away.

A training ends between two steps, with everything saved. torchrun and Slurm's srun may both pass one signal on, so that
a process gets it twice within moments; a second one that comes later is meant, and ends the process at once.
"""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TWICE_BY_CHANCE = 1.0  # seconds


class Interrupted(Exception):
    """A training has ended between two steps, since it was asked to by this signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """Within the block a first signal is noted as `number`, 0 before it comes, and a second one ends the process with
    128 + its number, the status that shells give it."""

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0

    def __enter__(self) -> "Interruption":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
        elif now - self.since > TWICE_BY_CHANCE:
            os._exit(128 + number)
