"""What decides in a rollout: a trained checkpoint, or one of two baselines that every figure should be held against.

    policy.act(observations, instructions, generators) -> one chunk of actions (n, 7) float64 for each environment

Observations are libero_sim.from_simulator's, or None for a policy with `looks` False. Each episode brings its own
generator, so that what one environment is told depends on no other. `rows` is the size of a forward pass.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from dataloader import LanguageTable, canonical_instruction, find_task_files, task_instruction, to_device
from embed_language import CLIP, OFFLINE, embed
from errors import BadInput
from rollouts.worker import STAND_STILL
from statevla_model import RecordedDecision, StateVLA

ARM_JOINTS = slice(1, 8)  # of a flattened state, whose [0] is the time
SAME_START = 0.2  # rad: a demo whose arm starts further from an episode's start begins in the middle of its task
CUDA_BATCH = 16  # rows of every forward pass on a GPU, however many environments have asked


class CheckpointPolicy:
    """The trained model.

    A matrix product's last bit depends on the number of rows and of threads (measured: 5e-7 between a batch of 1 and
    one of 8), and a rollout amplifies it. So the CPU computes each observation by itself, on one thread: an episode is
    the same whoever else is served. On CUDA every batch is filled up to CUDA_BATCH rows, so that the same recorded
    kernels run every time, on the same shapes.
    """

    looks = True

    def __init__(
        self,
        model: StateVLA,
        language: LanguageTable,
        device: torch.device,
        execute_steps: int,
        sample_steps: int,
        flow_start: str,
    ):
        self.model, self.language, self.device = model.to(device), language, device
        self.execute_steps, self.sample_steps, self.flow_start = execute_steps, sample_steps, flow_start
        self.rows = CUDA_BATCH if device.type == "cuda" else 1
        self.decide: RecordedDecision | None = None
        if device.type == "cpu":
            torch.set_num_threads(1)

    def act(
        self, observations: Sequence[dict], instructions: Sequence[str], generators: Sequence[torch.Generator]
    ) -> list[np.ndarray]:
        """n observations of n environments -> n chunks (execute_steps, 7)."""
        starts = [self.model.start_of_flow(1, self.flow_start, generator) for generator in generators]
        chunks = []
        for first in range(0, len(observations), self.rows):
            real = range(first, min(first + self.rows, len(observations)))
            padded = [*real, *[first] * (self.rows - len(real))]
            batch = {
                name: torch.stack([torch.from_numpy(np.ascontiguousarray(observations[i][name])) for i in padded])
                for name in observations[first]
            }
            batch["language"] = torch.stack([self.language[instructions[i]] for i in padded])
            batch = to_device(batch, self.device)
            if self.decide is None:
                self.decide = RecordedDecision(self.model, batch, self.sample_steps)
            actions = self.decide(batch, torch.cat([starts[i] for i in padded]))
            chunks += list(actions[: len(real), : self.execute_steps].cpu().double().numpy())
        return chunks


class ReplayPolicy:
    """Plays one demonstration's actions from its first to its last, blindly, then stands still.

    actions[0] is executed first whichever way the demonstration's observations are aligned: alignment says which frame
    belongs to an action, and no frame is looked at here.
    """

    looks = False
    rows = 1

    def __init__(self, demo_actions: dict[str, np.ndarray], max_steps: int):
        """demo_actions: instruction -> (T, 7) in robot units."""
        self.chunks = {}
        for instruction, actions in demo_actions.items():
            rest = np.tile([0, 0, 0, 0, 0, 0, actions[-1, 6]], (max(max_steps - len(actions), 0), 1))
            self.chunks[instruction] = np.concatenate([actions, rest])

    def act(self, observations, instructions: Sequence[str], generators) -> list[np.ndarray]:
        return [self.chunks[instruction] for instruction in instructions]


class ZeroPolicy:
    """Stands still, gripper open: what the scene does by itself."""

    looks = False
    rows = 1

    def __init__(self, max_steps: int):
        self.chunk = np.tile(STAND_STILL, (max_steps, 1))

    def act(self, observations, instructions: Sequence[str], generators) -> list[np.ndarray]:
        return [self.chunk for _ in instructions]


# ------------------------------------------------------------------------------------------------- demonstrations


def read_demo(path: Path, key: str) -> np.ndarray:
    """Actions (T, 7) of one demonstration in LIBERO's HDF5 layout."""
    try:
        with h5py.File(path, "r") as file:
            if key not in file.get("data", ()):
                raise BadInput(f"--demo {path}:{key}: the file has no such demonstration; expected one like demo_0")
            actions = np.asarray(file["data"][key]["actions"], np.float64)
    except (OSError, KeyError) as problem:
        raise BadInput(f"--demo {path}: not readable as a LIBERO HDF5 file ({problem})") from None
    if actions.ndim != 2 or actions.shape[1] != 7 or not np.isfinite(actions).all():
        raise BadInput(f"--demo {path}:{key}: key actions is {actions.shape}, expected finite (T, 7)")
    return actions


def training_demo(
    instruction: str, data_directory: str, held_out_demos: Sequence[str], init_states: np.ndarray
) -> tuple[Path, str]:
    """Of a task's demonstrations that the checkpoint was trained on, the one that starts most like the task's init
    states (n, S): file and key. Which demo is replayed decides much, and a baseline should be a strong one, so one that
    begins after a missed grasp, its arm elsewhere, is out of the question."""
    for path in find_task_files(data_directory):
        try:
            with h5py.File(path, "r") as file:
                if task_instruction(path, file["data"]) != instruction:
                    continue
                starts = {
                    key: demo["states"][0]
                    for key, demo in file["data"].items()
                    if f"{path.name}/{key}" not in held_out_demos
                }
        except (OSError, KeyError) as problem:
            raise BadInput(f"{path}: not readable as a LIBERO HDF5 file ({problem}); name a demo with --demo") from None
        usual = init_states.mean(axis=0)
        if any(start.shape != usual.shape for start in starts.values()):
            raise BadInput(f"{path}: key states is of another scene than the suite's; name a demo with --demo")
        distance = {
            key: np.linalg.norm((start - usual)[1:])
            for key, start in starts.items()
            if np.abs((start - usual)[ARM_JOINTS]).max() < SAME_START
        }
        if distance:
            return path, min(distance, key=distance.get)
    raise BadInput(f"{data_directory}: has no training demo of '{instruction}' to replay; name one with --demo")


# ------------------------------------------------------------------------------------------------------- language


def with_embeddings_of(instructions: Sequence[str], language: LanguageTable) -> LanguageTable:
    """The checkpoint's embeddings and, for instructions that it doesn't know, new ones from the same text encoder.

    Raises BadInput where that encoder can't be had or gives the known instructions other vectors than it did then.
    """
    unknown = sorted({text for text in map(canonical_instruction, instructions) if text not in language.embeddings})
    if not unknown:
        return language
    which = {OFFLINE: "offline", CLIP: "clip"}
    encoder = next((name for package, name in which.items() if language.encoder.startswith(package)), None)
    advice = f"no embedding of '{unknown[0]}' in the checkpoint, and its text encoder '{language.encoder}'"
    if encoder is None:
        raise BadInput(f"{advice} is none of embed_language.py's")
    known = next(iter(language.embeddings))
    try:
        _, vectors = embed([known, *unknown], encoder)
    except (BadInput, ImportError) as problem:
        raise BadInput(f"{advice} cannot be used here: {problem}") from None
    vectors = torch.from_numpy(vectors)
    if not torch.allclose(vectors[0], language.embeddings[known], atol=1e-3):
        raise BadInput(f"{advice} gives '{known}' another vector here than in training; install the same version")
    return LanguageTable(language.encoder, language.embeddings | dict(zip(unknown, vectors[1:], strict=True)))
