"""What decides in a rollout: a trained checkpoint, or one of two baselines that every figure should be held against.

    policy.act(observations, episodes, generators) -> one chunk of actions (n, 7) float64 for each environment

Observations are observation.from_simulator's, or None for a policy with `looks` False. An episode says by its task id
what is asked for: in libero_90 twelve instructions stand for 28 tasks. Each brings its own generator, so that what one
environment is told depends on no other. `rows` is the size of a forward pass.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import torch

from config import Config
from dataloader import to_device
from demos.hdf5 import demos_of, find_task_files, folder_prefixes, listed_names
from demos.hdf5_errors import object_in, open_dataset, open_hdf5
from demos.instructions import task_instruction
from demos.language import LanguageTable, with_embeddings_of
from errors import BadInput, extras_named, out_of_memory_named
from jepa.mamba import choose_mamba_backend
from jepa.precision import choose_precision
from observation import ARM_JOINTS, CAMERAS, ORIENTATION, ROBOT_STATES, nothing_seen
from published.folder import weights_sha256
from rollouts.delay import steps_of_chunk
from rollouts.episodes import STAND_STILL, Episode, Task
from rollouts.evaluation import Evaluation
from statevla_model import RecordedDecision, StateVLA, model_from_checkpoint
from training.checkpoint import config_of, instructions_of
from training.processes import choose_device

if TYPE_CHECKING:
    from rollouts.remote_policy import RemotePolicy

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
        language: Mapping[int, torch.Tensor],
        device: torch.device,
        steps: int,
        sample_steps: int,
        flow_start: str,
        precision: str = "fp32",
    ):
        """language: task id -> the embedding (lang_emb_dim,) of what the robot is told. steps: of each chunk, how many
        actions are handed over."""
        self.model, self.language, self.device = model.to(device), language, device
        self.steps, self.sample_steps, self.flow_start = steps, sample_steps, flow_start
        self.precision = precision
        self.rows = CUDA_BATCH if device.type == "cuda" else 1
        self.decide: RecordedDecision | None = None
        if device.type == "cpu":
            torch.set_num_threads(1)

    def act(
        self, observations: Sequence[dict], episodes: Sequence[Episode], generators: Sequence[torch.Generator]
    ) -> list[np.ndarray]:
        """n observations of n environments -> n chunks (steps, 7)."""
        return self.decide_for(observations, [self.language[episode.task_id] for episode in episodes], generators)

    def start_of_flow(self, generator: torch.Generator) -> torch.Tensor:
        """(1, H, 6), all that one decision draws."""
        return self.model.start_of_flow(1, self.flow_start, generator)

    def decide_for(
        self, observations: Sequence[dict], told: Sequence[torch.Tensor], generators: Sequence[torch.Generator]
    ) -> list[np.ndarray]:
        """As `act`. told: the embedding (lang_emb_dim,) of what is asked for, of each observation."""
        starts = [self.start_of_flow(generator) for generator in generators]
        chunks, names = [], (*CAMERAS, *self.model.robot_state)
        for first in range(0, len(observations), self.rows):
            real = range(first, min(first + self.rows, len(observations)))
            padded = [*real, *[first] * (self.rows - len(real))]
            batch = {
                name: torch.stack([torch.from_numpy(np.ascontiguousarray(observations[i][name])) for i in padded])
                for name in names
            }
            batch["language"] = torch.stack([told[i] for i in padded])
            batch = to_device(batch, self.device)
            if self.decide is None:
                self.decide = RecordedDecision(self.model, batch, self.sample_steps, self.precision)
            actions = self.decide(batch, torch.cat([starts[i] for i in padded]))
            chunks += list(actions[: len(real), : self.steps].cpu().double().numpy())
        return chunks


class ReplayPolicy:
    """Plays one demonstration's actions from its first to its last, blindly, then stands still.

    actions[0] is executed first whichever way the demonstration's observations are aligned: alignment says which frame
    belongs to an action, and no frame is looked at here.
    """

    looks = False
    rows = 1

    def __init__(self, demo_actions: Mapping[int, np.ndarray], max_steps: int):
        """demo_actions: task id -> (T, 7) in robot units."""
        self.chunks = {}
        for task_id, actions in demo_actions.items():
            rest = np.tile([0, 0, 0, 0, 0, 0, actions[-1, 6]], (max(max_steps - len(actions), 0), 1))
            self.chunks[task_id] = np.concatenate([actions, rest])

    def act(self, observations, episodes: Sequence[Episode], generators) -> list[np.ndarray]:
        return [self.chunks[episode.task_id] for episode in episodes]


class ZeroPolicy:
    """Stands still, gripper open: what the scene does by itself."""

    looks = False
    rows = 1

    def __init__(self, max_steps: int):
        self.chunk = np.tile(STAND_STILL, (max_steps, 1))

    def act(self, observations, episodes: Sequence[Episode], generators) -> list[np.ndarray]:
        return [self.chunk for _ in episodes]


# --------------------------------------------------------------------------------------------------------- who acts


def make_policy(
    evaluation: Evaluation, checkpoint: dict | None, tasks: dict[int, Task]
) -> tuple["CheckpointPolicy | RemotePolicy | ReplayPolicy | ZeroPolicy", dict]:
    """Who acts in these tasks, and the part of settings.json that says so. checkpoint: the content of
    evaluation.checkpoint.

    Raises BadInput where the checkpoint is of other observations, a demonstration or an embedding cannot be had, or a
    server does not answer.
    """
    settings = {"policy": evaluation.policy, "image_size": 128, "visual_mesh_ratio": 1.0}
    source, config = evaluation.checkpoint or "", None
    if checkpoint:
        observation = checkpoint["observation"]
        check_observation(observation, source)
        settings |= {name: observation[name] for name in ("image_size", "visual_mesh_ratio")}
        config = config_of(checkpoint, source, evaluation.overrides)
    if evaluation.visual_mesh_ratio is not None:
        settings["visual_mesh_ratio"] = evaluation.visual_mesh_ratio
    settings["decision_delay_steps"] = 0
    if evaluation.policy == "zero":
        return ZeroPolicy(evaluation.max_steps), settings
    policy: ReplayPolicy | CheckpointPolicy | RemotePolicy
    if evaluation.policy == "replay":
        policy, of_policy = _replay_policy(evaluation, checkpoint, config, tasks)
    elif evaluation.policy == "server":
        with extras_named():
            from rollouts.remote_policy import remote_policy
        policy, of_policy = remote_policy(evaluation, tasks)
    else:
        assert checkpoint is not None and config is not None, "an Evaluation of a checkpoint names one"
        policy, of_policy = _checkpoint_policy(evaluation, checkpoint, config, tasks)
    return policy, settings | of_policy


def _replay_policy(
    evaluation: Evaluation, checkpoint: dict | None, config: Config | None, tasks: dict[int, Task]
) -> tuple[ReplayPolicy, dict]:
    if evaluation.demo:
        if len(tasks) > 1:
            raise BadInput(f"--demo {evaluation.demo}: is of one task; choose that task with --tasks")
        chosen = dict.fromkeys(tasks, demo_of(evaluation.demo))
    else:
        assert checkpoint is not None and config is not None, "a replay without --demo has a checkpoint"
        data, held_out = config.data, checkpoint["held_out_demos"]
        chosen = {
            task_id: training_demo(task, data.folders, data.demos_per_task, held_out) for task_id, task in tasks.items()
        }
    demos = {task_id: (path, *read_demo(path, key)) for task_id, (path, key) in chosen.items()}
    actions = {task_id: actions for task_id, (*_, actions) in demos.items()}
    return ReplayPolicy(actions, evaluation.max_steps), {
        **({"demo_was_named": True} if evaluation.demo else {}),
        "demos": {str(task_id): f"{path.name}:{key}" for task_id, (path, key, _) in demos.items()},
        "actions_sha256": {  # files of one name can hold other demonstrations
            str(task_id): hashlib.sha256(one.tobytes()).hexdigest() for task_id, one in actions.items()
        },
    }


def _checkpoint_policy(
    evaluation: Evaluation, checkpoint: dict, config: Config, tasks: dict[int, Task]
) -> tuple[CheckpointPolicy, dict]:
    trained_language = LanguageTable(**checkpoint["language"])
    instructions = [task.instruction for task in tasks.values()]
    language = with_embeddings_of(instructions, trained_language)
    told = {task_id: language[task.instruction] for task_id, task in tasks.items()}
    policy, of_policy = policy_of_checkpoint(
        checkpoint, evaluation.checkpoint or "", config, told, evaluation.sample_steps, evaluation.flow_start,
        evaluation.precision,
    )  # fmt: skip
    episode = Episode(evaluation.task_suite, next(iter(tasks)), 0, 0)
    size = checkpoint["observation"]["image_size"]

    def decide() -> None:
        policy.act([nothing_seen(size)], [episode], [torch.Generator()])

    of_chunk, policy.steps = steps_of_chunk(evaluation, config.model.action_seq_len, decide)
    new = sorted(set(instructions) - {*instructions_of(checkpoint)})
    return policy, {"new_instructions": new} | of_chunk | of_policy


def policy_of_checkpoint(
    checkpoint: dict,
    source: str,
    config: Config,
    language: Mapping[int, torch.Tensor],
    sample_steps: int,
    flow_start: str | None,
    precision: str,
) -> tuple[CheckpointPolicy, dict]:
    """The policy with whole chunks, and what decides its bits. source: the checkpoint's file. flow_start: None for the
    checkpoint's own.

    Raises BadInput where memory does not suffice.
    """
    flow_start = flow_start or config.training.phase2.flow_start
    device = choose_device(config.training.device)
    of_policy = {
        "weights_sha256": weights_sha256(checkpoint["model_state_dict"]),
        "sample_steps": sample_steps,
        "flow_start": flow_start,
        "device": device.type,
        "mamba_backend": choose_mamba_backend(config.training.mamba_backend, device),
        "precision": choose_precision(precision, device),
    }
    with out_of_memory_named(
        f"{source}: out of memory while loading it on {device.type}; other programs may hold it"
        + (", and --set training.device=cpu needs none of the GPU's" if device.type != "cpu" else "")
    ):
        model = model_from_checkpoint(checkpoint, source)
        steps = config.model.action_seq_len
        policy = CheckpointPolicy(model, language, device, steps, sample_steps, flow_start, precision)
    return policy, of_policy


def check_observation(observation: dict, source: str) -> None:
    """The simulator gives these cameras, this orientation, these states; a policy trained on others is refused."""
    provided: dict[str, list] = {
        "cameras": [list(CAMERAS)],
        "robot_state": [list(parts) for parts in ROBOT_STATES.values()],
        "image_orientation": [ORIENTATION],
    }
    for key, values in provided.items():
        if observation.get(key) not in values:
            known = " or ".join(map(str, values))
            raise BadInput(f"{source}: was trained with {key} {observation.get(key)}, the simulator provides {known}")


# ------------------------------------------------------------------------------------------------- demonstrations


def demo_of(text: str) -> tuple[Path, str | None]:
    """What --demo names, FILE or FILE:demo_<number>; a path may have colons of its own."""
    match = re.fullmatch(r"(.+):(demo_\d+)", text)
    return (Path(match[1]), match[2]) if match else (Path(text), None)


def read_demo(path: Path, key: str | None) -> tuple[str, np.ndarray]:
    """Key and actions (T, 7) of one demonstration in LIBERO's HDF5 layout; without a key the first by number."""
    with open_hdf5(path) as file:
        data, keys = demos_of(path, file)
        key = key or keys[0]
        if key not in keys:
            raise BadInput(f"{path}: has no demonstration {key}; it holds {len(keys)}, {keys[0]} to {keys[-1]}")
        actions = open_dataset(path, key, object_in(path, key, data, key, h5py.Group), "actions")[()].astype(np.float64)
    if actions.ndim != 2 or actions.shape[1] != 7 or not len(actions) or not np.isfinite(actions).all():
        raise BadInput(f"{path}: {key}: key actions is {actions.shape}, expected finite (T, 7)")
    return key, actions


def training_demo(
    task: Task, folders: Sequence[Path], demos_per_task: int, held_out_demos: Sequence[str]
) -> tuple[Path, str]:
    """Of a task's demonstrations that the checkpoint was trained on, the one that starts most like the task's init
    states: file and key. Which demo is replayed decides much, and a baseline should be a strong one, so one that begins
    after a missed grasp, its arm elsewhere, is out of the question."""
    usual = task.init_states.mean(axis=0)
    distance: dict[tuple[Path, str], float] = {}
    for folder, prefix in folder_prefixes(folders).items():
        path = _file_of(task, find_task_files(folder))
        if path is None:
            continue
        with open_hdf5(path) as file:
            data, keys = demos_of(path, file)
            names = {f"{prefix}{path.name}/{key}": key for key in keys[:demos_per_task]}
            held_out = listed_names(names, held_out_demos)
            seen = [key for name, key in names.items() if name not in held_out]
            if len(folders) > 1:  # imported demonstrations may have no states, and others are there
                seen = [key for key in seen if "states" in data[key]]
            starts = {key: _first_state(path, key, data) for key in seen}
        if any(start.shape != usual.shape for start in starts.values()):
            raise BadInput(f"{path}: key states is of another scene than the suite's; name a demo with --demo")
        distance |= {
            (path, key): float(np.linalg.norm((start - usual)[1:]))
            for key, start in starts.items()
            if np.abs((start - usual)[ARM_JOINTS]).max() < SAME_START
        }
    if not distance:
        where = ", ".join(map(str, folders))
        raise BadInput(f"{where}: has no training demo of '{task.instruction}' to replay; name one with --demo")
    return min(distance, key=lambda demo: distance[demo])


def _file_of(task: Task, paths: Sequence[Path]) -> Path | None:
    """The file of the task's demonstrations, None where there is none. A file with LIBERO's name is of the task of that
    name alone; others go by their instruction and by the width of their states, as do all files where a task's name
    doesn't tell.

    Raises BadInput where several could be meant.
    """
    if task.name_tells:
        for path in paths:
            if path.stem == f"{task.name}_demo":
                return path
    fitting, found = [], None
    for path in paths:
        if task.name_tells and path.stem.endswith("_demo"):
            continue
        with open_hdf5(path) as file:
            data, keys = demos_of(path, file)
            if task_instruction(path, data) == task.instruction:
                found = path
                if _first_state(path, keys[0], data).shape == task.init_states[0].shape:
                    fitting.append(path)
    if len(fitting) > 1:
        raise BadInput(
            f"{fitting[0]} and {fitting[1].name}: are both of '{task.instruction}', and neither has the name of the"
            f" task, {task.name}_demo.hdf5; name a demo with --demo"
        )
    return fitting[0] if fitting else found


def _first_state(path: Path, key: str, data: h5py.Group) -> np.ndarray:
    """(S,), the flattened simulator state at the demo's beginning."""
    states = open_dataset(path, key, object_in(path, key, data, key, h5py.Group), "states")
    if states.ndim != 2 or not len(states):
        raise BadInput(f"{path}: {key}: key states is {states.shape}, expected (T, S)")
    return states[0].astype(np.float64)
