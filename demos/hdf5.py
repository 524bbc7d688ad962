"""Demonstrations read from HDF5 files in LIBERO's layout, checked, aligned and split into training and held-out demos.

A folder holds one `<task>_demo.hdf5` a task (LIBERO's official files or OpenVLA's regenerated ones). Low-dimensional
data is read here, once; frames stay on disk (frames.py). A row is one frame: the frames of all demos of a folder are
numbered from 0 to N - 1.

LIBERO stores obs[t] as recorded AFTER actions[t]; OpenVLA's files store it BEFORE. With `lag` 1 or 0, the action that
leads from obs[t] to obs[t+1] is actions[t + lag], and so the chunk to predict at obs[t] starts at actions[t + lag].

Letters: T steps of a demo, N rows.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from config import DataConfig
from demos.checks import demo_problems
from demos.hdf5_errors import (
    linked_files,
    number_attribute,
    object_in,
    open_dataset,
    open_hdf5,
    text_attribute,
)
from demos.instructions import task_instruction
from demos.problems import Reader, attempted, first_raised
from errors import BadInput
from observation import ARM_JOINTS, CAMERAS, OBS_KEYS, ORIENTATION, STATE_WIDTHS
from seeds import mixed_seed

# Goes up when the same files would be split otherwise. 1: one seed for all files, so that the demos held out had the
# same numbers in every task; 2: a seed for each.
SPLIT_RULE = 2


@dataclass(frozen=True, eq=False)
class Demo:
    """One demonstration: what fits in memory, and where its frames are."""

    path: Path
    key: str  # demo_0, demo_1, ...
    parts: tuple[Path, ...]  # other files that its data is read from, through links
    task: str  # instruction as `canonical_instruction` writes it
    actions: Tensor  # (T, 7) float32 in robot units, as stored
    joint_states: Tensor  # (T, 7) float32
    gripper_states: Tensor  # (T, 2) float32
    lag: int  # actions[t + lag] leads from obs[t] to obs[t + 1]
    image_size: int
    first_row: int  # obs[t] is row first_row + t

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def name(self) -> str:
        return f"{self.path.name}/{self.key}"


def load_demos(config: DataConfig, min_actions: int) -> tuple[list[Demo], dict]:
    """Reads and checks every demo of a folder.

    Returns the demos and the description of their observations, which a checkpoint keeps so that an evaluation can
    reproduce it. Raises BadInput naming file, demo, key, what was found and what was expected. `min_actions` is how
    many actions must follow a demo's first observation for one sample: the chunk, or the prediction gap.
    """
    num_pictures = 3 if config.cache == "none" else 1  # where they are converted, that looks at all of them
    demos, descriptions, rows = [], {}, 0
    for path in find_task_files(config.data_directory):
        found, descriptions[path] = first_raised(read_task_file(path, config, min_actions, num_pictures, rows))
        demos += found
        rows += sum(len(demo) for demo in found)
    first_raised(disagreements(descriptions))
    first_raised(copies(demos))
    return demos, next(iter(descriptions.values()))


def disagreements(descriptions: Mapping[Path, dict]) -> Reader[None]:
    """What the files of a data directory were not recorded with alike. descriptions: as `read_task_file` gives them."""
    first = next(iter(descriptions))
    for path, description in descriptions.items():
        for key, value in description.items():
            if value != descriptions[first][key]:
                yield BadInput(
                    f"{path}: {key} is {value}, but {first.name} has {descriptions[first][key]}; "
                    "all files of a data directory must agree"
                )


def copies(demos: Sequence[Demo]) -> Reader[None]:
    """A demo that is there twice would be trained on and held out."""
    seen: dict[bytes, Demo] = {}
    for demo in demos:
        motion = torch.cat([demo.actions, demo.joint_states, demo.gripper_states], dim=1)
        digest = hashlib.sha256(motion.numpy().tobytes()).digest()
        if digest in seen:
            yield BadInput(
                f"{demo.path}: {demo.key} is a copy of {seen[digest].key} in {seen[digest].path.name}, it has the same "
                "actions and joints; a demo must not be there twice, since one of the two may be held out: delete one"
            )
        seen.setdefault(digest, demo)


def find_task_files(data_directory: str | Path) -> list[Path]:
    """The folder's *.hdf5 files but for hidden ones: macOS leaves a ._NAME beside each file that it copies."""
    directory = Path(data_directory)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        raise BadInput(
            f"data.data_directory: no such directory {directory}; set it in the config or with "
            "--set data.data_directory=DIR (collect_demos.py can fill one)"
        ) from None
    except OSError as problem:
        raise BadInput(f"data.data_directory: {directory} cannot be read ({problem.strerror})") from None
    paths = [directory / name for name in names if name.endswith(".hdf5") and not name.startswith(".")]
    if not paths:
        raise BadInput(f"{directory}: holds no *.hdf5 file, expected LIBERO's <task>_demo.hdf5")
    return paths


def demos_of(path: Path, file: h5py.File) -> tuple[h5py.Group, list[str]]:
    """The group `data` of a file and the names of the demos in it, in the order of their numbers."""
    data = object_in(path, "data", file, "data", h5py.Group) if "data" in file else {}
    keys = [key for key in data if re.fullmatch(r"demo_\d+", key)]
    if not keys:
        raise BadInput(f"{path}: holds no group data/demo_0, expected LIBERO's HDF5 layout")
    return data, sorted(keys, key=lambda key: int(key[5:]))


def numbered_alone(demos: Sequence[Demo]) -> list[Demo]:
    """Some of a directory's demos as if they were all of it: rows count from 0."""
    first_rows = np.cumsum([0] + [len(demo) for demo in demos]).tolist()
    return [replace(demo, first_row=first_row) for demo, first_row in zip(demos, first_rows, strict=False)]


def split_demos(
    demos: Sequence[Demo], train_split: float, seed: int, held_out: Collection[str] = ()
) -> tuple[list[Demo], list[Demo]]:
    """Training demos and held-out demos, whole demos of each task by a draw that its file's name seeds too; at least
    one of each. Where `held_out`, a checkpoint's list of names, names demos of a file, exactly those are held out.

    Raises BadInput for a file that would have none to train on or none to hold out.
    """
    train: list[Demo] = []
    unseen: list[Demo] = []
    listed = set(held_out)
    for path in dict.fromkeys(demo.path for demo in demos):
        of_task = [demo for demo in demos if demo.path == path]
        if len(of_task) < 2:
            raise BadInput(f"{path}: has {len(of_task)} demo, expected at least 2 (one to train on, one to hold out)")
        chosen = {demo.name for demo in of_task} - listed
        if len(chosen) == len(of_task):
            count = min(max(round(train_split * len(of_task)), 1), len(of_task) - 1)
            order = np.random.default_rng(mixed_seed(seed, path.name)).permutation(len(of_task))
            chosen = {of_task[index].name for index in order[:count]}
        if not chosen:
            raise BadInput(
                f"{path}: the checkpoint holds out all {len(of_task)} demos, expected at least 1 to train on"
            )
        for demo in of_task:
            (train if demo.name in chosen else unseen).append(demo)
    return train, unseen


# ---------------------------------------------------------------------------------------------------- one file's demos


def read_task_file(
    path: Path, config: DataConfig, min_actions: int, num_pictures: int, first_row: int
) -> Reader[tuple[list[Demo], dict]]:
    """The demos of a file that nothing is wrong with, and the description of their observations, {} without any. Of
    each demo's cameras it looks at `num_pictures`, as `demo_problems` has it; `first_row` is that of the first demo."""
    with open_hdf5(path) as file:
        data, keys = demos_of(path, file)
        task, has_attributes = (yield from attempted(path, "", task_instruction, path, data)), bool(len(data.attrs))
        groups = {}
        for key in keys[: config.demos_per_task]:
            group = yield from attempted(path, key, object_in, path, key, data, key, h5py.Group)
            if group is not None:
                problems = demo_problems(path, key, group, has_attributes, config.max_len_data, num_pictures)
                if (yield from _is_sound(problems)):
                    groups[key] = group
        forced = config.obs_alignment
        alignment = (yield from _detect_alignment(path, groups)) if forced == "auto" else forced
        lag = 1 if alignment == "after" else 0
        demos: list[Demo] = []
        for key, group in groups.items():
            demo = yield from attempted(
                path, key, _read_demo, path, key, task or "", group, lag, min_actions, first_row
            )
            if demo is not None:
                demos.append(demo)
                first_row += len(demo)
        description = yield from _description(path, data, demos, alignment)
    for demo in demos:
        if demo.image_size != demos[0].image_size:
            yield BadInput(
                f"{path}: {demo.key}: images are {demo.image_size} px, those of {demos[0].key} {demos[0].image_size} px"
            )
    return demos, description


def _is_sound(problems: Reader[None]) -> Reader[bool]:
    """Passes the problems on, and says whether there were none."""
    sound = True
    for problem in problems:
        sound = False
        yield problem
    return sound


def _description(path: Path, data: h5py.Group, demos: Sequence[Demo], alignment: str | None) -> Reader[dict]:
    orientation = yield from attempted(path, "", text_attribute, data.attrs, "macros_image_convention", path)
    mesh_ratio: float | None = 1.0
    if "visual_mesh_ratio" in data.attrs:
        mesh_ratio = yield from attempted(path, "", number_attribute, data.attrs, "visual_mesh_ratio", path)
    if not demos:
        return {}
    return {
        "cameras": list(CAMERAS),
        "robot_state": list(STATE_WIDTHS),
        "image_orientation": orientation or ORIENTATION,
        "image_size": demos[0].image_size,
        "visual_mesh_ratio": mesh_ratio,
        "obs_alignment": alignment,
    }


def _read_demo(path: Path, key: str, task: str, demo: h5py.Group, lag: int, min_actions: int, first_row: int) -> Demo:
    actions = torch.from_numpy(demo["actions"][()].astype(np.float32))
    if len(actions) < min_actions + lag:
        raise BadInput(
            f"{path}: {key}: has {len(actions)} steps, expected at least {min_actions + lag} "
            "(model.action_seq_len or model.prediction_gap, and what the alignment takes)"
        )
    robot_state = {name: torch.from_numpy(demo["obs"][name][()].astype(np.float32)) for name in STATE_WIDTHS}
    image_size = demo["obs"][CAMERAS[0]].shape[1]
    groups = {Path(group.file.filename) for group in (demo, demo["obs"])}
    files = groups.union(*(linked_files(demo[name]) for name in ("actions", *(f"obs/{name}" for name in OBS_KEYS))))
    parts = tuple(sorted({file.resolve() for file in files} - {path.resolve()}))
    return Demo(path, key, parts, task, actions, **robot_state, lag=lag, image_size=image_size, first_row=first_row)


def _detect_alignment(path: Path, demos: Mapping[str, h5py.Group]) -> Reader[str | None]:
    """The alignment of all demos of a file, each looked at by itself; None where it can be found out of none."""
    found = {}
    for key, demo in demos.items():
        alignment = yield from attempted(path, key, _alignment_of, path, key, demo)
        if alignment is not None:
            found[key] = alignment
    if not found:
        return None
    usual = Counter(found.values()).most_common(1)[0][0]
    others = [key for key, alignment in found.items() if alignment != usual]
    if others:
        yield BadInput(
            f"{path}: obs[t] was recorded {found[others[0]]} actions[t] in {listed(others)}, but {usual} it in the "
            f"other {len(found) - len(others)} demos; all of a data directory must agree, give each kind a folder of "
            "its own"
        )
    return usual


def listed(keys: Sequence[str]) -> str:
    """At most five of them by name."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _alignment_of(path: Path, key: str, demo: h5py.Group) -> str:
    """joint_states[t] equals the simulator's states[t + 1, 1:8] if recorded after actions[t], states[t, 1:8] if before
    (states[:, 0] is the time)."""
    states = open_dataset(path, key, demo, "states") if "states" in demo else None
    if states is None or states.ndim != 2 or states.shape[1] < 8:
        raise BadInput(
            f"{path}: {key}: key states is {'missing' if states is None else states.shape}, so whether obs[t] was "
            "recorded before or after actions[t] cannot be found out; set data.obs_alignment to before or after"
        )
    simulated, observed = (
        values.astype(np.float64) for values in (states[:, ARM_JOINTS], demo["obs"]["joint_states"][()])
    )
    if simulated.shape != observed.shape or not np.isfinite(simulated).all():
        raise BadInput(
            f"{path}: {key}: key states is {states.shape} or holds NaN, expected finite values of {len(observed)} steps"
        )
    gap = {
        "before": float(np.abs(observed - simulated).mean()),
        "after": float(np.abs(observed[:-1] - simulated[1:]).mean()),
    }
    best, other = sorted(gap, key=lambda name: gap[name])
    if not gap[best] < 0.2 * gap[other]:
        raise BadInput(
            f"{path}: {key}: obs/joint_states fits states neither as recorded before (mean gap {gap['before']:.2g} "
            f"rad) nor after (mean gap {gap['after']:.2g} rad) actions[t]; set data.obs_alignment to before or after"
        )
    return best
