"""Demonstrations read from HDF5 files in LIBERO's layout, checked, aligned and split into training and held-out demos.

A folder holds one `<task>_demo.hdf5` a task (LIBERO's official files or OpenVLA's regenerated ones). Low-dimensional
data is read here, once; frames stay on disk (frames.py). A row is one step: the steps of all demos of all folders are
numbered from 0 to N - 1. LIBERO draws all of them. Files of collect_demos.py may hold pictures of every few steps alone
(`draw_every`); these rows are then what there are frames and samples of.

LIBERO stores obs[t] as recorded AFTER actions[t]; OpenVLA's files store it BEFORE. With `lag` 1 or 0, the action that
leads from obs[t] to obs[t+1] is actions[t + lag], and so the chunk to predict at obs[t] starts at actions[t + lag].

Letters: T steps of a demo, N rows.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from config import DataConfig
from demos.checks import demo_problems, draw_every
from demos.hdf5_errors import (
    check_link,
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
from observation import ARM_JOINTS, CAMERAS, MIXED, ORIENTATION, ROBOT_STATES
from seeds import mixed_seed

# Goes up when the same files would be split otherwise. 1: one seed for all files, so that the demos held out had the
# same numbers in every task; 2: a seed for each.
SPLIT_RULE = 2
# What need not be the same in all folders of a run. A checkpoint describes the first folder's pictures, which is how
# the simulator then draws; where alignments differ it keeps MIXED, since each demo's own is its lag.
MAY_DIFFER = ("image_size", "visual_mesh_ratio", "obs_alignment")
FILES_AGREE = "all files of a data directory must agree"
FOLDERS_AGREE = "all folders of data.data_directory must agree in that"


@dataclass(frozen=True, eq=False)
class Demo:
    """One demonstration: what fits in memory, and where its frames are."""

    path: Path
    key: str  # demo_0, demo_1, ...
    name: str  # file and key, after the folder where there are several: what a checkpoint lists
    parts: tuple[Path, ...]  # other files that its data is read from, through links
    task: str  # instruction as `canonical_instruction` writes it
    actions: Tensor  # (T, 7) float32 in robot units, as stored
    robot_state: dict[str, Tensor]  # (T, width) float32 of each part of data.robot_state
    lag: int  # actions[t + lag] leads from obs[t] to obs[t + 1]
    image_size: int
    first_row: int  # obs[t] is row first_row + t
    draw_every: int = 1  # steps from one picture of a camera to its next

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def drawn(self) -> range:
        """The steps t of which there are pictures."""
        return range(0, len(self), self.draw_every)


def load_demos(config: DataConfig, min_actions: int) -> tuple[list[Demo], dict]:
    """Reads and checks every demo of a folder, or of several, one folder after the other.

    Returns the demos and the description of their observations, which a checkpoint keeps so that an evaluation can
    reproduce it. Raises BadInput naming file, demo, key, what was found and what was expected. `min_actions` is how
    many actions must follow a demo's first observation for one sample: the chunk, or the prediction gap.
    """
    num_pictures = 3 if config.cache == "none" else 1  # where they are converted, that looks at all of them
    demos: list[Demo] = []
    of_folders: dict[Path, dict] = {}
    for folder, prefix in folder_prefixes(config.folders).items():
        of_files = {}
        for path in find_task_files(folder):
            found, of_files[path] = first_raised(read_task_file(path, config, min_actions, num_pictures))
            demos += [replace(demo, name=prefix + demo.name) for demo in found]
        first_raised(disagreements(of_files, (), FILES_AGREE))
        of_folders[folder] = next(iter(of_files.values()))
    first_raised(copies(demos))
    first_raised(disagreements(of_folders, MAY_DIFFER, FOLDERS_AGREE))
    description = dict(next(iter(of_folders.values())))
    if len({demo.lag for demo in demos}) > 1:
        description["obs_alignment"] = MIXED
    return numbered_alone(demos), description


def disagreements(descriptions: Mapping[Path, dict], may_differ: Collection[str], rule: str) -> Reader[None]:
    """What files, or folders, were not recorded with alike and may not differ in. descriptions: as `read_task_file`
    gives them."""
    first, *others = descriptions
    for path in others:
        for key, value in descriptions[path].items():
            if value != descriptions[first][key] and key not in may_differ:
                there = first.name if first.parent == path.parent else first
                advice = ", and data.data_directory may list several" if key in MAY_DIFFER else ""
                yield BadInput(f"{path}: {key} is {value}, but {there} has {descriptions[first][key]}; {rule}{advice}")


def folder_prefixes(folders: Sequence[Path]) -> dict[Path, str]:
    """Folder -> what stands before the names of its demos: nothing where it is alone, else as many of its path's last
    names as tell all folders apart. Raises BadInput for a folder that is there twice."""
    real = [os.path.realpath(folder) for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise BadInput(f"data.data_directory: {folder} is there twice")
    if len(folders) == 1:
        return {folders[0]: ""}
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    count = next(count for count in itertools.count(1) if len({part[-count:] for part in parts}) == len(parts))
    return {folder: "/".join(part[-count:]) + "/" for folder, part in zip(folders, parts, strict=True)}


def copies(demos: Sequence[Demo]) -> Reader[None]:
    """A demo that is there twice would be trained on and held out. States are compared with the actions that they stand
    beside in a file that was recorded after them, so that a copy which is aligned the other way is one, too: with all
    of its steps, or without the first, which the other one does not have."""
    seen: dict[bytes, Demo] = {}
    for demo in demos:
        states = [part[: len(demo) - demo.lag] for part in demo.robot_state.values()]
        motion = torch.cat([demo.actions[demo.lag :], *states], dim=1)
        forms = (motion, motion[1:]) if demo.lag == 0 else (motion,)
        digests = [hashlib.sha256(form.numpy().tobytes()).digest() for form in forms]
        first = next((seen[digest] for digest in digests if digest in seen), demo)
        for digest in digests:
            seen.setdefault(digest, demo)
        if first is not demo:
            there = first.path.name if first.path.parent == demo.path.parent else first.path
            yield BadInput(
                f"{demo.path}: {demo.key} is a copy of {first.key} in {there}, it has the same actions and robot "
                "states; a demo must not be there twice, since one of the two may be held out: delete one"
            )


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
    check_link(path, "data", file, "data")
    data = object_in(path, "data", file, "data", h5py.Group) if "data" in file else {}
    keys = [key for key in data if isinstance(key, str) and re.fullmatch(r"demo_\d+", key)]  # bytes: no valid text
    if not keys:
        raise BadInput(f"{path}: holds no group data/demo_0, expected LIBERO's HDF5 layout")
    return data, sorted(keys, key=lambda key: int(key[5:]))


def numbered_alone(demos: Sequence[Demo]) -> list[Demo]:
    """The demos as if they were all that there are: rows count from 0."""
    first_rows = np.cumsum([0] + [len(demo) for demo in demos]).tolist()
    return [replace(demo, first_row=first_row) for demo, first_row in zip(demos, first_rows, strict=False)]


def between_pictures(demos: Sequence[Demo], gap: int) -> Reader[None]:
    """Of each file the first demo whose pictures lie so that `gap`, model.prediction_gap, leads from one to none."""
    odd = {demo.path: demo for demo in reversed(demos) if gap % demo.draw_every}
    for demo in reversed(odd.values()):
        yield BadInput(
            f"{demo.path}: {demo.key}: has a picture every {demo.draw_every} steps, and model.prediction_gap is {gap}; "
            f"expected a multiple of {demo.draw_every}, for phase 1 needs the pictures at both ends of it"
        )


def drawn_rows(demos: Sequence[Demo], ends: Sequence[int] | None = None) -> Tensor:
    """The rows of all demos that were drawn, or of each demo those before step `ends`."""
    ends = [len(demo) for demo in demos] if ends is None else ends
    return torch.cat(
        [torch.arange(0, max(end, 0), demo.draw_every) + demo.first_row for demo, end in zip(demos, ends, strict=True)]
    )


def split_demos(
    demos: Sequence[Demo], train_split: float, seed: int, held_out: Collection[str] = ()
) -> tuple[list[Demo], list[Demo]]:
    """Training demos and held-out demos, whole demos of each file by a draw that its name seeds too; at least one of
    each. Where `held_out`, a checkpoint's list of names, names demos of a file, exactly those are held out.

    Raises BadInput for a file that would have none to train on or none to hold out.
    """
    train: list[Demo] = []
    unseen: list[Demo] = []
    listed = listed_names((demo.name for demo in demos), held_out)
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


def listed_names(names: Iterable[str], held_out: Collection[str]) -> set[str]:
    """Those of the names that a checkpoint's list has. Of two names of which one has no folder, as in a run on a single
    folder, file and key alone are compared: rather is a demo too many held out than one too few."""
    listed = set(held_out)
    short_names = {_without_folder(name) for name in listed}

    def is_listed(name: str) -> bool:
        short = _without_folder(name)
        return name in listed or short in listed or (name == short and name in short_names)

    return {name for name in names if is_listed(name)}


def _without_folder(name: str) -> str:
    return "/".join(name.split("/")[-2:])


# ---------------------------------------------------------------------------------------------------- one file's demos


def read_task_file(
    path: Path, config: DataConfig, min_actions: int, num_pictures: int
) -> Reader[tuple[list[Demo], dict]]:
    """The demos of a file that nothing is wrong with, not yet numbered, and the description of their observations, {}
    without any. Of each demo's cameras it looks at `num_pictures`, as `demo_problems` has it."""
    with open_hdf5(path) as file:
        data, keys = demos_of(path, file)
        task, has_attributes = (yield from attempted(path, "", task_instruction, path, data)), bool(len(data.attrs))
        groups = {}
        for key in keys[: config.demos_per_task]:
            group = yield from attempted(path, key, object_in, path, key, data, key, h5py.Group)
            if group is not None:
                problems = demo_problems(
                    path, key, group, has_attributes, config.max_len_data, num_pictures, config.robot_state
                )
                if (yield from _is_sound(problems)):
                    groups[key] = group
        alignment = yield from _alignment(path, data, groups, config.obs_alignment)
        lag = 1 if alignment == "after" else 0
        demos: list[Demo] = []
        for key, group in groups.items():
            demo = yield from attempted(
                path, key, _read_demo, path, key, task or "", group, lag, min_actions, config.robot_state
            )
            if demo is not None:
                demos.append(demo)
        description = yield from _description(path, data, demos, alignment, config.robot_state)
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


def _description(
    path: Path, data: h5py.Group, demos: Sequence[Demo], alignment: str | None, robot_state_name: str
) -> Reader[dict]:
    orientation = yield from attempted(path, "", text_attribute, data.attrs, "macros_image_convention", path)
    mesh_ratio: float | None = 1.0
    if "visual_mesh_ratio" in data.attrs:
        mesh_ratio = yield from attempted(path, "", number_attribute, data.attrs, "visual_mesh_ratio", path)
    if not demos:
        return {}
    return {
        "cameras": list(CAMERAS),
        "robot_state": list(ROBOT_STATES[robot_state_name]),
        "image_orientation": orientation or ORIENTATION,
        "image_size": demos[0].image_size,
        "visual_mesh_ratio": mesh_ratio,
        "obs_alignment": alignment,
    }


def _read_demo(
    path: Path, key: str, task: str, demo: h5py.Group, lag: int, min_actions: int, robot_state_name: str
) -> Demo:
    actions = torch.from_numpy(demo["actions"][()].astype(np.float32))
    if len(actions) < min_actions + lag:
        raise BadInput(
            f"{path}: {key}: has {len(actions)} steps, expected at least {min_actions + lag} "
            "(model.action_seq_len or model.prediction_gap, and what the alignment takes)"
        )
    state_parts = ROBOT_STATES[robot_state_name]
    robot_state = {name: torch.from_numpy(demo["obs"][name][()].astype(np.float32)) for name in state_parts}
    image_size = demo["obs"][CAMERAS[0]].shape[1]
    groups = {Path(group.file.filename) for group in (demo, demo["obs"])}
    read = ("actions", *(f"obs/{name}" for name in (*CAMERAS, *state_parts)))
    files = groups.union(*(linked_files(path, demo[name]) for name in read))
    parts = tuple(sorted({file.resolve() for file in files} - {path.resolve()}))
    return Demo(
        path, key, f"{path.name}/{key}", parts, task, actions, robot_state, lag, image_size, first_row=0,
        draw_every=draw_every(path, key, demo, len(actions)),
    )  # fmt: skip


def _alignment(path: Path, data: h5py.Group, demos: Mapping[str, h5py.Group], forced: str) -> Reader[str | None]:
    """The alignment that data.obs_alignment forces, the file tells or its demos show; None where none of them does."""
    told = yield from attempted(path, "", text_attribute, data.attrs, "obs_alignment", path)
    if told not in (None, "", "before", "after"):
        yield BadInput(f"{path}: attribute obs_alignment is {told!r}, expected before or after")
        told = None
    if forced != "auto":
        return forced
    return told or (yield from _detect_alignment(path, demos))


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
            f"{path}: obs[t] was recorded {found[others[0]]} actions[t] in {first_few(others)}, but {usual} it in the "
            f"other {len(found) - len(others)} demos; all of a data directory must agree, give each kind a folder of "
            "its own (data.data_directory may list both)"
        )
    return usual


def first_few(keys: Sequence[str]) -> str:
    """At most five of them by name."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _alignment_of(path: Path, key: str, demo: h5py.Group) -> str:
    """joint_states[t] equals the simulator's states[t + 1, 1:8] if recorded after actions[t], states[t, 1:8] if before
    (states[:, 0] is the time)."""
    states = open_dataset(path, key, demo, "states") if "states" in demo else None
    has_joints = "joint_states" in demo["obs"]  # those of the end effector alone say nothing about `states`
    if states is None or states.ndim != 2 or states.shape[1] < 8 or not has_joints:
        found = "states is missing" if states is None else f"states is {states.shape}"
        raise BadInput(
            f"{path}: {key}: key {found if has_joints else 'obs/joint_states is missing'}, so whether obs[t] was "
            "recorded before or after actions[t] cannot be found out; set data.obs_alignment to before or after"
        )
    joints = open_dataset(path, key, demo, "obs/joint_states")
    simulated, observed = (values.astype(np.float64) for values in (states[:, ARM_JOINTS], joints[()]))
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
