"""What a run keeps on the disk of its model, when, and in which order."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from config import TrainingConfig
from errors import BadInput
from training.checkpoint import save_checkpoint
from training.processes import is_first_rank

BEST, LATEST = "checkpoint_best.pt", "checkpoint_latest.pt"


class Checkpoints:
    """The checkpoint files of a run. The first process writes them.

    checkpoint_latest.pt is written every `save_minutes`, within an epoch too, with every checkpoint_epoch_N.pt, on a
    signal and at the end. A best model waits in memory for that: a long run writes megabytes a second at most, and what
    is on the disk is always of one moment, or has a best model that is newer.
    """

    def __init__(self, directory: Path, config: TrainingConfig):
        self.directory, self.minutes, self.interval = directory, config.save_minutes, config.save_interval
        self.best: dict | None = None  # what checkpoint_best.pt will be
        self.since = time.monotonic()

    def due_within_epoch(self) -> bool:
        return bool(self.minutes) and is_first_rank() and time.monotonic() - self.since > 60 * self.minutes

    def due_after(self, epoch: int, last: bool) -> bool:
        """Whether they are written after so many epochs, of which this may be the last."""
        return last or not self.minutes or epoch % self.interval == 0 or self.due_within_epoch()

    def keep_best(self, checkpoint: dict, for_later: bool) -> None:
        """Until it is written. `for_later`: that may be some epochs from now, and training goes on meanwhile."""
        self.best = copied(checkpoint) if for_later else checkpoint

    def write(self, checkpoint: dict, after_epoch: int | None = None) -> None:
        """The last one comes last: a run that is resumed from it has everything that it says there is. `after_epoch`:
        the epoch that has just ended, None within one."""
        if after_epoch and after_epoch % self.interval == 0:
            save_checkpoint(checkpoint, self.directory / f"checkpoint_epoch_{after_epoch}.pt")
        if self.best is not None:
            save_checkpoint(self.best, self.directory / BEST)
            self.best = None
        save_checkpoint(checkpoint, self.directory / LATEST)
        self.since = time.monotonic()


def copied(value):
    """Of what a checkpoint holds, with every tensor in memory of its own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def check_disk_space(
    directory: Path, model: nn.Module, trained: Sequence[Tensor], config: TrainingConfig, epochs_to_come: range
) -> None:
    """Raises BadInput where the disk has no room for what the run is going to write: a checkpoint has the model's
    weights, and AdamW's two moments of those that train."""
    of_trained = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    one = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    one += 2 * of_trained
    kept = sum((epoch + 1) % config.save_interval == 0 for epoch in epochs_to_come)
    replaced = sum((directory / name).exists() for name in (BEST, LATEST)) if epochs_to_come.start else 0
    count = kept + 3 - replaced  # the best, the latest, and a new one beside the one that it takes the place of
    folder = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if count * one / 1e9 > free:
        raise BadInput(
            f"training.checkpoint_directory: the disk of {directory} has {free:.1f} GB free, but this run writes "
            f"{count} checkpoints of {one / 1e9:.2f} GB, {kept} of them every training.save_interval epochs; raise "
            "that, or take another folder"
        )
