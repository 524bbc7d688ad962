"""A run's folder, its metrics.jsonl and, where wandb.mode says so, its wandb run."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from errors import BadInput
from files import Lock, replaced_whole, unwritable_named
from training.checkpoint import NO_SCORE, Score, best_of_run, best_score, epoch_and_score
from training.processes import is_first_rank, report

PHASE_DIRECTORIES = {1: "phase1_temporal_jepa", 2: "phase2_flow_matching"}
COLLAPSED_STD = 0.1  # a mean std of z below this (VICReg pulls it towards 1), or an effective rank
COLLAPSED_RANK = 0.05  # below this share of the dimensions, is warned about unless it rises


def run_directory(config: Config, phase: int) -> Path:
    return Path(config.training.checkpoint_directory) / PHASE_DIRECTORIES[phase]


@contextlib.contextmanager
def only_training_in(directory: Path) -> Iterator[None]:
    """Keeps every other training out of a run's folder. The lock stands beside the folder, which may be renamed.

    Raises BadInput where another training is at it, or where nothing can be written."""
    if not is_first_rank():
        yield
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory.with_name(f".{directory.name}.lock"), f"{directory}: another training writes into it")
    except OSError as problem:
        raise _not_writable(directory, problem) from None
    with lock:
        lock.forget_parts(directory, "checkpoint_*.pt")
        if directory.name == PHASE_DIRECTORIES[2]:  # which alone writes states
            lock.forget_parts(directory.parent / "frozen_states", "*.npy")
        yield


class RunLog:
    """Writes on the first rank only. An earlier run's folder is set aside unless this one continues it."""

    def __init__(self, config: Config, phase: int, resumed_from: str | None):
        self.directory = run_directory(config, phase)
        self.sums: dict[str, Tensor] = {}
        self.count, self.since, self.waited = 0, time.perf_counter(), 0.0
        self.samples_per_step = config.training.batch_size * config.training.accumulate * dist.get_world_size()
        self.before: dict[str, float] | None = None
        self.file = self.wandb_run = None
        if not is_first_rank():
            return
        continues = resumed_from is not None and Path(resumed_from).resolve().parent == self.directory.resolve()
        try:
            if not continues:
                set_aside(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            self.file = (self.directory / "metrics.jsonl").open("a+")
            if half_a_line(self.file):  # the run that goes on was killed, or its disk was full
                self.file.write("\n")
        except OSError as problem:
            raise _not_writable(self.directory, problem) from None
        if config.wandb.mode != "disabled":
            self.wandb_run = start_wandb(config, phase, self.directory)

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's values; nothing is copied from the device until a line is due."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def unwritten(self) -> tuple[list[str], Tensor]:
        """This process's sums (names,) since the last line, of `count` steps."""
        return list(self.sums), torch.stack([value.float() for value in self.sums.values()] or [torch.zeros(())])

    def clocks(self, waited: float) -> tuple[float, float]:
        """Seconds since the last line, and those of them in which steps waited for data, as `write_training` has it."""
        return time.perf_counter() - self.since, waited - self.waited

    def take_over(self, names: list[str], sums: Tensor, count: int, clocks: tuple[float, float]) -> None:
        """What `unwritten` and `clocks` gave in the run that this one continues."""
        self.sums, self.count = dict(zip(names, sums.unbind(), strict=True)), count
        seconds, waited = clocks
        self.since, self.waited = time.perf_counter() - seconds, -waited

    def write_training(self, epoch: int, step: int, learning_rate: float, waited: float) -> dict[str, float]:
        """One line with the means over the steps since the last and over all ranks (one all-reduce). `waited` are the
        seconds that all steps so far waited for data; the line has their share of the time since the last. No line, and
        nothing returned, where all steps since the last were skipped."""
        if not self.count:
            return {}
        names = list(self.sums)
        totals = torch.stack([self.sums[name].float() for name in names])
        totals = totals.cpu() if totals.device.type == "mps" else totals  # gloo reduces CPU and CUDA tensors
        dist.all_reduce(totals)
        means = dict(zip(names, (totals / self.count / dist.get_world_size()).tolist(), strict=True))
        now = time.perf_counter()
        seconds = now - self.since
        line = {"split": "train", "epoch": epoch, "step": step, "learning_rate": learning_rate, **means}
        line["samples_per_s"] = self.samples_per_step * self.count / seconds
        line["waiting_for_data"] = (waited - self.waited) / seconds
        self._write(line)
        self.sums, self.count, self.since, self.waited = {}, 0, now, waited
        return means

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training steps."""
        self.since += seconds

    def write_validation(self, epoch: int, step: int, metrics: dict[str, float], state_dim: int) -> None:
        self._write({"split": "validation", "epoch": epoch, "step": step, **metrics})
        report("validation  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if is_collapsing(metrics, self.before, state_dim):
            report(
                f"warning: the representation is collapsing (mean std of z {metrics['z_std']:.3f}, effective rank "
                f"{metrics['effective_rank']:.1f} of {state_dim}); see variance_weight and covariance_weight in the "
                "config"
            )
        self.before = metrics

    def _write(self, line: dict) -> None:
        if self.file:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as problem:
                raise _not_writable(self.directory, problem) from None
        if self.wandb_run:
            split = line["split"]
            self.wandb_run.log(
                {f"{split}/{name}": value for name, value in line.items() if name != "split"}, step=line["step"]
            )

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def take_over_best(resumed: dict, path: str, directory: Path) -> Score:
    """The best score so far. Its checkpoint is put into the folder where the run goes on, unless that has
    one as good: the best one is written before the latest, so that a run that was killed between them, and goes on from
    its latest, has the best one of an epoch that it will now do again."""
    source, target = best_of_run(resumed, Path(path)), directory / "checkpoint_best.pt"
    best, (epoch, score) = best_score(resumed), epoch_and_score(target)
    is_latest = Path(path).resolve() == (directory / "checkpoint_latest.pt").resolve()
    if not best.beats(score) and (is_latest or epoch <= resumed["epoch"] + 1):
        return score
    if best == NO_SCORE:  # no epoch was validated yet
        return NO_SCORE
    if source is None:
        report(
            f"note: the best checkpoint so far is not beside {path} any more; the best of the epochs to come is kept"
        )
        return NO_SCORE
    if is_first_rank():
        with unwritable_named(target), replaced_whole(target) as part:
            shutil.copyfile(source, part)
    return best


def is_collapsing(metrics: dict[str, float], before: dict[str, float] | None, state_dim: int) -> bool:
    """Whether z has next to no spread or rank and no more of it than after the epoch before: every run starts low, and
    a healthy one rises."""
    if "z_std" not in metrics or before is None:
        return False
    low = metrics["z_std"] < COLLAPSED_STD, metrics["effective_rank"] < COLLAPSED_RANK * state_dim
    rises = metrics["z_std"] > 1.02 * before["z_std"], metrics["effective_rank"] > 1.02 * before["effective_rank"]
    return any(is_low and not rising for is_low, rising in zip(low, rises, strict=True))


def broken(values: dict[str, float]) -> list[str]:
    """The names of those that are not finite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def check_finite(values: dict[str, float], step: int, advice: str, untouched: bool) -> None:
    """Raises BadInput that names the losses that are not finite, with advice that can help. `untouched`: they are those
    of the weights as they were at the start."""
    names = broken(values)
    if not names:
        return
    found = f"training diverged: {', '.join(names)} at step {step} not finite"
    if untouched:
        raise BadInput(f"{found}, before any weight was changed; are the weights that it started from finite?")
    raise BadInput(f"{found}; {advice}")


def against_divergence(learning_rate: float, bfloat16: bool) -> str:
    """What to change."""
    advice = f"lower the learning rate ({learning_rate:g}) or raise training.warmup_steps"
    return f"{advice}{', or set training.precision to fp32' if bfloat16 else ''}"


def start_wandb(config: Config, phase: int, directory: Path):
    mode = f"wandb.mode is {config.wandb.mode}, but"
    try:
        import wandb
    except ImportError as problem:
        raise BadInput(f"{mode} wandb cannot be imported ({problem})") from None
    try:
        return wandb.init(
            project=config.wandb.project, mode=config.wandb.mode, config=config.to_dict(), dir=directory,
            name=PHASE_DIRECTORIES[phase],
        )  # fmt: skip
    except wandb.Error as problem:
        raise BadInput(f"{mode} wandb says: {problem}") from None


def half_a_line(file: TextIO) -> bool:
    """Whether a file that is open for appending and reading ends within a line."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    return file.read() not in ("", "\n")


def set_aside(directory: Path) -> None:
    """An earlier run's folder is renamed, never overwritten: starting anew loses nothing."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}_earlier_{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"{directory}: the run that was there is kept as {aside}", flush=True)


def _not_writable(directory: Path, problem: OSError) -> BadInput:
    return BadInput(f"training.checkpoint_directory: cannot write {directory} ({problem.strerror})")
