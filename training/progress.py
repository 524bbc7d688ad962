"""Where a run is between two steps, beside its weights: what makes one that was interrupted there, and resumed, the run
that it would have been."""

import torch
from torch import Tensor

from errors import BadInput
from training.bad_steps import BadSteps
from training.processes import Processes, noise_state, report, set_noise_state
from training.run_log import RunLog


class Progress:
    """Of an epoch: how many of its samples have been trained on, where every process's noise goes on, and what of the
    log is in no line yet. Processes and samples a batch and a step decide what a batch is, so they are in it, too."""

    def __init__(self, processes: Processes, samples_per_step: int, batch_size: int, before: dict):
        """`before`: what `to_dict` gave for the checkpoint that the run goes on from, or nothing."""
        self.processes, self.before = processes, before
        self.samples = before.get("samples", 0)
        number = before.get("processes", processes.number)
        self.as_now = {
            "processes": processes.number,
            "device": processes.device.type,
            "samples_per_step": samples_per_step,
            "batch_size": batch_size,
        }
        # The first versions did not keep the batch size.
        self.is_exact = all(before.get(k, batch_size) == v for k, v in self.as_now.items())
        if number != processes.number:
            report(
                f"note: it was trained on {number} process(es) so far and goes on on {processes.number}; from here the "
                "samples come in other batches and the noise is another, so that it is not the run that it would have "
                "been"
            )

    def to_dict(self, samples: int, training_samples: int, log: RunLog, waited: float, bad_steps: BadSteps) -> dict:
        """For a checkpoint; every process has to come here. `samples`: of this epoch so far, of all processes, and
        `training_samples` of a whole one. `waited`: as `RunLog.write_training` has it."""
        names, sums = log.unwritten()
        return {
            "samples": samples,
            "training_samples": training_samples,
            **self.as_now,
            "noise": self.processes.rows(noise_state(self.processes.device)),  # (processes, n)
            "log_names": names,
            "log_sums": self.processes.rows(sums),  # (processes, names)
            "log_count": log.count,
            "log_clocks": log.clocks(waited),
            "bad_steps": bad_steps.counts(),
        }

    def take_over_log(self, log: RunLog) -> None:
        if self.is_exact and self.before["log_count"]:
            sums = self.before["log_sums"][self.processes.rank].to(self.processes.device)
            clocks = self.before.get("log_clocks", (0.0, 0.0))  # the first versions did not keep them
            log.take_over(self.before["log_names"], sums, self.before["log_count"], clocks)

    def take_over_noise(self) -> None:
        """Within an epoch that other batches were begun with, noise stays that of the epoch's begin."""
        if self.is_exact and self.samples:
            set_noise_state(self.before["noise"][self.processes.rank], self.processes.device)

    def check_alike(self, epoch: int, training_samples: int, source: str) -> None:
        """Raises BadInput where the processes have not read the same, for each reads its own machine's disk, or where
        the run that goes on had other data."""
        found = self.processes.rows(torch.tensor([epoch, self.samples, training_samples]))
        for rank, row in enumerate(found):
            if not torch.equal(row, found[0]):
                raise BadInput(f"process {rank} would begin {_said(row)}, process 0 {_said(found[0])}; every machine "
                               "needs the same data and checkpoints")  # fmt: skip
        earlier = self.before.get("training_samples", training_samples)
        if earlier != training_samples:
            raise BadInput(
                f"{source}: an epoch of it has {earlier:,} samples, of this run {training_samples:,}; a resumed run "
                "needs the same data (data.data_directory, data.demos_per_task, data.obs_alignment)"
            )


def _said(row: Tensor) -> str:
    epoch, samples, in_all = row.tolist()
    return f"after {samples:,} of {in_all:,} samples of epoch {epoch + 1}"
