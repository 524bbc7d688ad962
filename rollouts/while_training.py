"""How often a policy succeeds while it is being trained: a few episodes of each task, always from the same random
resets. Offline figures do not rank policies (docs/learning.md), and the suite's init states are for evaluation."""

import contextlib
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
    observation: dict,
    suite_name: str,
    episodes_per_task: int,
    flow_start: str,
    seed: int,
    pictures: Path,
) -> float:
    """The share of episodes that the model solves as it is now.

    observation: what the demonstrations were recorded with, which is how the scenes are drawn. The last frames of
    failures come into the folder `pictures`. Below 0 where every episode crashed, which is said and stops nothing.
    Raises BadInput where the simulator cannot be used.
    """
    suite_name = suite_name.lower()
    tasks = tasks_of(suite_name, list(language.embeddings))
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
    finished = [record for record in records if not record["crashed"]]
    if not finished:
        why = records[0]["error"].partition("\n")[0]
        print(f"warning: all {len(records)} rollouts crashed, the first {why}", flush=True)
        return NO_SCORE.success
    return sum(record["success"] for record in finished) / len(finished)


@contextlib.contextmanager
def threads_as_before():
    """A policy decides on one thread of the CPU; training goes on with those that it had."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
