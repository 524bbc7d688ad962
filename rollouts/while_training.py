"""How often a policy succeeds while it is being trained: a few episodes of each task, always from the same random
resets. Offline figures do not rank policies (docs/learning.md), and the suite's init states are for evaluation."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from demos.language import LanguageTable
from machine import affordable_processes
from rollouts.episodes import Episode, Rollouts, reset_seed, step_limit
from rollouts.evaluation import EPISODE_TIMEOUT, SAMPLE_STEPS, tasks_of
from rollouts.policies import CheckpointPolicy
from rollouts.pool import GB_PER_ENVIRONMENT, play_all
from statevla_model import StateVLA
from training.checkpoint import NO_SCORE


def success_rate(
    model: StateVLA,
    language: LanguageTable,
    instructions: Sequence[str],
    observation: dict,
    suite_name: str,
    episodes_per_task: int,
    flow_start: str,
    seed: int,
    pictures: Path,
) -> float:
    """The share of episodes that the model solves as it is now, of the tasks with one of these instructions.

    observation: what the demonstrations were recorded with, which is how the scenes are drawn. The last frames of
    failures come into the folder `pictures`. Crashes are said and stop nothing. A crashed episode counts as not solved,
    so that no checkpoint becomes the best by its crashes; below 0 where every episode crashed.
    Raises BadInput where the simulator cannot be used.
    """
    suite_name = suite_name.lower()
    tasks = tasks_of(suite_name, instructions)
    episodes = [
        Episode(suite_name, task, trial, reset_seed("while training", suite_name, task, trial, seed))
        for task in tasks
        for trial in range(episodes_per_task)
    ]
    pictures.mkdir(parents=True, exist_ok=True)
    rollouts = Rollouts(
        suite_name, observation["image_size"], observation["visual_mesh_ratio"], step_limit(suite_name), 0.0, True,
        "none", pictures.absolute(),
    )  # fmt: skip
    device = next(model.parameters()).device
    with threads_as_before():
        told = {task: language[instruction] for task, instruction in tasks.items()}
        policy = CheckpointPolicy(model, told, device, model.config.action_seq_len, SAMPLE_STEPS, flow_start)
        num_workers = affordable_processes(GB_PER_ENVIRONMENT)
        records = list(play_all(episodes, lambda _: None, policy, rollouts, num_workers, EPISODE_TIMEOUT))
    if crashed := [record for record in records if record["crashed"]]:
        why = crashed[0]["error"].partition("\n")[0]
        print(f"warning: {len(crashed)} of {len(records)} rollouts crashed, the first {why}", flush=True)
    if len(crashed) == len(records):
        return NO_SCORE.success
    return sum(record["success"] for record in records) / len(records)


@contextlib.contextmanager
def threads_as_before():
    """A policy decides on one thread of the CPU; training goes on with those that it had."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
