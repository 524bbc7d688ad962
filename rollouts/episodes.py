"""What an evaluation plays: episodes of tasks, their seeds, step limits and shards. Workers import it, so no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import BadInput

STEP_LIMITS = {  # somewhat more than the longest demonstration of the suite takes; its variants have the same
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_90": 400,
    "libero_10": 520,
}
WAIT_STEPS = 10  # the objects fall into place before the policy starts
LIFTED = 0.05  # metres above where it stood, from which on an object counts as lifted
STAND_STILL = np.array([0.0, 0, 0, 0, 0, 0, -1])  # no motion, gripper open


@dataclass(frozen=True, eq=False)
class Task:
    """A task of the suite."""

    name: str  # LIBERO's, of its files: the scene's name where there are several, and the words
    instruction: str  # what the robot is told, as `canonical_instruction` writes it
    name_tells: bool  # whether the name says so, too: some suites of LIBERO-PRO keep the names of the one they vary
    init_states: np.ndarray  # (n, S)


@dataclass(frozen=True)
class Episode:
    """One rollout. With the checkpoint and the settings it decides everything that happens."""

    suite: str
    task_id: int
    trial: int  # which of the task's init states, or which of the random resets
    seed: int  # of the policy's noise and of what an init state leaves open, such as where fixtures stand

    @property
    def name(self) -> str:
        return f"task{self.task_id}_trial{self.trial}"


@dataclass(frozen=True)
class Rollouts:
    """What all episodes of an evaluation have in common."""

    task_suite: str
    image_size: int
    visual_mesh_ratio: float
    max_steps: int
    shift_target: float  # metres by which the target object is moved at most, 0 leaves it where the init state has it
    policy_looks: bool  # without, no observation is drawn
    save_video: str  # all, failures or none
    pictures: Path  # folder of videos and last frames
    layouts: str = "libero"  # or one of simulator.layouts.LAYOUTS, for random resets
    decision_delay_steps: int = 0  # that the robot goes on with the chunk before while the policy decides


def step_limit(suite: str) -> int:
    """Of a variant such as libero_object_swap that of its family, of an unknown family the largest."""
    family = [limit for name, limit in STEP_LIMITS.items() if suite.startswith(name)]
    return max(family, default=max(STEP_LIMITS.values()))


def episode_seed(suite: str, task_id: int, trial: int, seed: int) -> int:
    """Independent of the checkpoint: two checkpoints meet the same scene and the same noise, and can be paired."""
    return int.from_bytes(hashlib.sha256(f"{suite} {task_id} {trial} {seed}".encode()).digest()[:4], "big")


def reset_seed(purpose: str, suite: str, task_id: int, trial: int, seed: int) -> int:
    """As `episode_seed`, of an episode that begins from a random reset.

    Each purpose has scenes of its own: what a policy is chosen by is not what it is measured on.
    """
    return episode_seed(f"{suite} random reset, {purpose}", task_id, trial, seed)


def start_name(settings: dict) -> str:
    """What the trial of an episode counts, by the evaluation's settings."""
    return "random reset" if settings.get("random_resets") else "init state"


def shard_of(episodes: Sequence[Episode], shard: str | None) -> Sequence[Episode]:
    """The I-th of N parts, in one piece, so that a machine builds few tasks' environments."""
    if shard is None:
        return episodes
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= len(episodes)):
        raise BadInput(f"--shard {shard}: expected I/N such as 3/16, with 1 <= I <= N <= {len(episodes)} episodes")
    first, last = ((int(part) + k) * len(episodes) // int(parts) for k in (-1, 0))
    return episodes[first:last]
