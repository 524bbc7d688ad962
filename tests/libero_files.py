"""Writes small files in LIBERO's HDF5 layout for tests of the loader: real HDF5, made-up motion."""

import json
import re
from pathlib import Path

import h5py
import numpy as np

TASK = "pick_up_the_milk_and_place_it_in_the_basket"


def write_task_file(
    directory: Path,
    task: str = TASK,
    demos: int = 3,
    steps: int = 30,
    image_size: int = 32,
    alignment: str = "after",
    official: bool = True,
    seed: int = 0,
) -> Path:
    """`official` has LIBERO's attributes; without, it is OpenVLA's regenerated variant: no attributes and a gap in the
    demo numbers. `states` holds time and joints as the simulator's do, recorded before each action."""
    rng = np.random.default_rng([seed, *task.encode()])  # no two tasks have the same demos
    path = directory / f"{task}_demo.hdf5"
    instruction = re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for index in range(demos):
            number = index if official else 2 * index + 1
            demo = data.create_group(f"demo_{number}")
            joints = np.cumsum(rng.normal(0, 0.05, (steps + 1, 7)), axis=0)  # before step 0, ..., after the last
            states = np.zeros((steps, 20))
            states[:, 0] = np.arange(steps) / 20
            states[:, 1:8] = joints[:-1]
            demo["states"] = states
            actions = rng.uniform(-0.9, 0.9, (steps, 7))
            actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
            demo["actions"] = actions
            obs = demo.create_group("obs")
            obs["joint_states"] = joints[1:] if alignment == "after" else joints[:-1]
            obs["gripper_states"] = rng.uniform(0, 0.04, (steps, 2))
            obs["ee_pos"] = obs["joint_states"][:, :3]  # of no arm that there is
            obs["ee_ori"] = [np.pi, 0, 0] + 0.3 * obs["joint_states"][:, 3:6]
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                obs[camera] = rng.integers(0, 256, (steps, image_size, image_size, 3), dtype=np.uint8)
            if official:
                demo.attrs["num_samples"] = steps
        if official:
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["num_demos"] = demos
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
    return path


def leave_frames(path: Path, every: int) -> None:
    """Makes of a file one whose pictures are those of every so many-th step alone."""
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                pictures = demo["obs"][camera][::every]
                del demo["obs"][camera]
                demo["obs"][camera] = pictures
            demo.attrs["draw_every"] = every
