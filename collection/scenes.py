"""Scenes without a demonstration: the arm poses that they take from demonstrations, and the file that they end up in.

Letters: N scenes of a task, S numbers of a flattened simulator state, P arm poses, T steps of a demonstration.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from collection.files import (
    UNFINISHED,
    SceneSettings,
    check_settings,
    picture_datasets,
    told_once,
    with_simulators_of,
    written_hdf5,
)
from collection.pool import Order
from collection.scene_drawer import ArmPoses, SceneDrawer
from collection.task_demos import demo_names, libero_attributes
from demos.hdf5_errors import object_in, open_dataset, open_hdf5
from demos.hdf5_writing import SCENES_FOLDER
from errors import BadInput
from observation import CAMERAS, STATE_WIDTHS
from simulator.layouts import shuffled_tasks

POSE = "joint_states", "gripper_states"  # what of a demonstration's step makes an arm pose
BLOCK = 50  # scenes that a worker draws in one go, and an interruption can cost
LIBERO_ATTRIBUTES = "bddl_file_name", "bddl_file_content", "macros_image_convention"


def name_of(task_id: int) -> str:
    """Of the file of a task's scenes, with the scene's number as LIBERO counts, from 1."""
    return f"OBJECT_SCENE{task_id + 1}_scenes"


class SceneBlocks:
    """The scenes of one task on disk, and which come next. Scene i depends on its task, its number i and the settings
    alone: not on the blocks, nor on how many scenes are wanted."""

    unit = "scene"

    def __init__(
        self,
        suite,
        task_id: int,
        data_directory: Path,
        wanted: int,
        settings: SceneSettings,
        arm_poses: ArmPoses,
        block: int = BLOCK,
    ):
        """Each scene gets one of the arm poses."""
        self.suite, self.task_id, self.settings, self.arm_poses = suite, task_id, settings, arm_poses
        self.name = name_of(task_id)
        self.path = data_directory / SCENES_FOLDER / f"{self.name}.hdf5"
        self.unfinished = data_directory / SCENES_FOLDER / UNFINISHED / self.name
        self.seconds = 0.0
        self.in_file = self._scenes_in_file() if self.path.exists() else 0
        self.wanted = max(wanted, self.in_file)
        edges = [self.in_file, *range(self.in_file - self.in_file % block + block, self.wanted, block), self.wanted]
        self.new = [range(first, end) for first, end in itertools.pairwise(edges) if first < end]
        self.not_begun = [scenes for scenes in self.new if not self._is_drawn(scenes)]
        self.running = 0

    def missing(self) -> int:
        return sum(map(len, self.not_begun))

    def next_order(self) -> Order | None:
        if not self.not_begun:
            return None
        scenes = self.not_begun.pop(0)
        self.running += 1
        arguments = self.task_id, scenes, self.arm_poses, self.settings, self.block_file(scenes)
        return Order(SceneDrawer.draw, arguments, partial(self._finished, scenes))

    def _finished(self, scenes: range, _result: None, seconds: float) -> int:
        self.running -= 1
        self.seconds += seconds
        return len(scenes)

    def is_complete(self) -> bool:
        return not self.not_begun and not self.running

    def block_file(self, scenes: range) -> Path:
        return self.unfinished / f"scenes_{scenes.start:06d}_to_{scenes.stop - 1:06d}.hdf5"

    def attributes(self) -> dict:
        """The scene as LIBERO's own task of it has it, and what the robot is told where another object is asked for."""
        of_task = libero_attributes(self.suite, self.task_id, self.settings.image_size)
        tasks = shuffled_tasks(self.suite, range(self.suite.n_tasks))
        instructions = {task.target: task.instruction for task in tasks if task.scene == self.task_id}
        return {name: of_task[name] for name in LIBERO_ATTRIBUTES} | {"instructions": json.dumps(instructions)}

    def assemble(self, attributes: dict) -> None:
        """Puts the finished blocks into the task's file, after the scenes that it has already."""
        if self.new:
            self.unfinished.mkdir(parents=True, exist_ok=True)
            with written_hdf5(self.path, self.unfinished) as file:
                picture_datasets(file, self.wanted, self.settings.image_size)
                if self.in_file:
                    with open_hdf5(self.path) as before:
                        for name in sorted(before.keys() - {*CAMERAS, "states"}):  # the user's own
                            before.copy(name, file)
                        self._add(file, before, range(self.in_file))
                for scenes in self.new:
                    with open_hdf5(self.block_file(scenes)) as block:
                        self._add(file, block, scenes)
                file.attrs.update(with_simulators_of(file.attrs, attributes))
                file.attrs["num_scenes"] = self.wanted
                file.attrs["visual_mesh_ratio"] = self.settings.visual_mesh_ratio
        shutil.rmtree(self.unfinished, ignore_errors=True)  # what stays, as on NFS while it is open, is ignored later

    def _add(self, file: h5py.File, part: h5py.File, scenes: range) -> None:
        """Copies what a part holds, the scenes of these numbers, to their places in the file."""
        states = file.require_dataset("states", (self.wanted, part["states"].shape[1]), np.float64)
        states[scenes.start : scenes.stop] = part["states"][()]
        for camera in CAMERAS:
            for i in range(len(scenes)):
                file[camera][scenes.start + i] = part[camera][i]
        code = told_once(*(one.attrs.get("code", []) for one in (file, part)))
        file.attrs.update(part.attrs)
        file.attrs["code"] = code  # commits that drew the scenes

    def _scenes_in_file(self) -> int:
        with open_hdf5(self.path) as file:
            check_settings(self.path, file, self.settings)
            names = ["states", *CAMERAS]
            lengths = {name: len(object_in(self.path, name, file, name, h5py.Dataset)) for name in names}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise BadInput(f"{self.path}: holds {found}, expected as many of each; {self.settings.otherwise}")
        return lengths["states"]

    def _is_drawn(self, scenes: range) -> bool:
        path = self.block_file(scenes)
        if not path.exists():
            return False
        with open_hdf5(path) as file:
            check_settings(path, file, self.settings)
        return True


def arm_poses_in(folder: Path) -> ArmPoses:
    """Those of every step of a data directory's demonstrations.

    Raises BadInput where it has none, or one whose poses cannot be read.
    """
    poses = []
    for path in sorted(folder.glob("[!.]*_demo.hdf5")):
        with open_hdf5(path) as file:
            data = object_in(path, "data", file, "data", h5py.Group)
            for key in demo_names(data):
                demo = object_in(path, key, data, key, h5py.Group)
                poses.append([_states_of(path, key, demo, name) for name in POSE])
    if not poses:
        raise BadInput(
            f"{folder}: holds no demonstration (*_demo.hdf5), and --scenes takes the arm's poses from some; collect"
            " those first"
        )
    return ArmPoses(*(np.concatenate(parts) for parts in zip(*poses, strict=True)))


def _states_of(path: Path, key: str, demo: h5py.Group, name: str) -> np.ndarray:
    """(T, width) float64 of one part of the robot's state."""
    steps = len(open_dataset(path, key, demo, "actions"))
    expected = steps, STATE_WIDTHS[name]
    values = open_dataset(path, key, demo, f"obs/{name}")[()].astype(np.float64)
    if values.shape != expected or not np.isfinite(values).all():
        raise BadInput(f"{path}: {key}: key obs/{name} is {values.shape} or holds NaN, expected finite {expected}")
    return values


def fingerprint(arm_poses: ArmPoses) -> str:
    """How many there are, and a digest of them."""
    joined = np.hstack([arm_poses.joints, arm_poses.fingers])
    return f"{len(arm_poses)} (digest {hashlib.sha256(joined.tobytes()).hexdigest()[:16]})"


def report(collections: Sequence[SceneBlocks]) -> None:
    """All scenes of these files, also those of earlier runs."""
    print("\ntask  scenes  worker seconds")
    for scenes in collections:
        print(f"{scenes.task_id:4}  {scenes.wanted:6}  {scenes.seconds:14.0f}  {scenes.name}")
