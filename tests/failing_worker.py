"""A stand-in for the collector's Demonstrator in real worker processes: the settings' seed says how it fails."""

import os
import signal
from pathlib import Path

from errors import BadInput

SEEDS = {"killed": 0, "ended": 1, "bad input": 2}


class FailingWorker:
    @staticmethod
    def attempt(task_id: int, attempt: int, settings, demo_file: Path, asked=None):
        if settings.seed == SEEDS["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.seed == SEEDS["ended"]:
            os._exit(3)
        raise BadInput("the renderer has no GPU")
