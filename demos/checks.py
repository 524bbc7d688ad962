"""Every way in which demonstrations were seen broken, one sentence each."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5_errors import number_attribute, open_dataset
from errors import BadInput
from observation import CAMERAS, ROBOT_STATES

ARM_MOVES = {"joint_states": 0.1, "ee_pos": 0.05}  # rad, m: an arm that moves by more has moved what both cameras see


def check_demo(
    path: Path,
    key: str,
    demo: h5py.Group,
    has_data_attributes: bool,
    max_len: int,
    looks_at_pictures: bool,
    robot_state_name: str,
) -> None:
    """Every way in which files were seen broken, one sentence each. Of the pictures it looks at the first, or, where
    they are not going to be converted, which looks at all of them, at three. robot_state_name: data.robot_state."""
    where = f"{path}: {key}"
    actions = open_dataset(path, key, demo, "actions")
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise BadInput(f"{where}: key actions has shape {actions.shape}, expected (T, 7)")
    steps = len(actions)
    if steps < 2:
        raise BadInput(f"{where}: has {steps} steps, expected at least 2")
    if steps > max_len:
        raise BadInput(f"{where}: has {steps} steps, data.max_len_data allows {max_len}; raise it if the demo is right")
    # OpenVLA's regenerated files carry no attributes at all; a file that has LIBERO's must have this one too.
    if "num_samples" in demo.attrs:
        num_samples = number_attribute(demo.attrs, "num_samples", where)
        if num_samples != steps:
            raise BadInput(f"{where}: num_samples is {num_samples:g}, but actions has {steps} steps")
    elif has_data_attributes:
        raise BadInput(f"{where}: attribute num_samples is missing, expected {steps}")
    refuse_missing_parts(where, demo, robot_state_name)
    widths = ROBOT_STATES[robot_state_name]
    robot_state = {name: open_dataset(path, key, demo, f"obs/{name}") for name in widths}
    for name, width in widths.items():
        if robot_state[name].shape != (steps, width):
            raise BadInput(f"{where}: key obs/{name} has shape {robot_state[name].shape}, expected {(steps, width)}")
    for name, values in {"actions": actions, **{f"obs/{name}": values for name, values in robot_state.items()}}.items():
        if not (np.abs(values[()]) <= np.finfo(np.float32).max).all():
            raise BadInput(f"{where}: key {name} holds NaN or values that are infinite as float32, expected numbers")
    gripper = np.unique(actions[:, 6])
    if not np.isin(gripper, (-1, 1)).all():
        raise BadInput(
            f"{where}: key actions has gripper values {gripper[:4].tolist()}, expected -1 (open) or 1 (close)"
        )
    largest = float(np.abs(actions[:, :6]).max())
    if largest > 1 + 1e-6:
        raise BadInput(f"{where}: key actions has a pose delta of size {largest:.3g}, expected values in [-1, 1]")
    cameras = {camera: open_dataset(path, key, demo, f"obs/{camera}") for camera in CAMERAS}
    shape = cameras[CAMERAS[0]].shape
    for camera, images in cameras.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != steps or images.shape[3] != 3:
            raise BadInput(
                f"{where}: key obs/{camera} is {images.dtype} {images.shape}, expected uint8 ({steps}, h, w, 3)"
            )
        if images.shape != shape or images.shape[1] != images.shape[2] or not images.shape[1]:
            raise BadInput(
                f"{where}: key obs/{camera} has shape {images.shape}, expected square images of one size "
                f"({CAMERAS[0]}: {shape})"
            )
        looked_at = sorted({0, steps // 2, steps - 1}) if looks_at_pictures else [0]
        pictures = np.stack([images[step] for step in looked_at])
        check_pictures(
            where, camera, pictures, looked_at, {name: values[looked_at] for name, values in robot_state.items()}
        )


def refuse_missing_parts(where: str, demo: h5py.Group, robot_state_name: str) -> None:
    """Raises BadInput for a part of the robot state that a demo lacks; says which setting reads what it has."""
    obs = demo.get("obs")
    there = obs.keys() if isinstance(obs, h5py.Group) else ()  # open_dataset says what is the matter with it
    missing = [name for name in ROBOT_STATES[robot_state_name] if name not in there]
    if missing and there:
        others = [name for name, parts in ROBOT_STATES.items() if parts.keys() <= there]
        advice = f"; it has what data.robot_state {others[0]} reads" if others else ""
        raise BadInput(f"{where}: key obs/{missing[0]} is missing, data.robot_state is {robot_state_name}{advice}")


def check_pictures(
    where: str, camera: str, pictures: np.ndarray, steps: Sequence[int], robot_state: Mapping[str, np.ndarray]
) -> None:
    """pictures (n, h, w, 3) uint8 of a demo's `steps`, the parts (n, width) of the robot state there. Raises BadInput
    for one that is black or of one colour, and for a camera that goes on showing the same although the arm moves."""
    few = pictures[:, ::16, ::16]  # most pictures differ here already: 200 times faster than looking at every pixel
    suspects = (few == few[:, :1, :1]).all(axis=(1, 2, 3)).nonzero()[0]
    flat = [i for i in suspects if (pictures[i] == pictures[i, 0, 0]).all()]
    for step, picture in ((steps[i], pictures[i]) for i in flat[:1]):
        found = f"all of one colour, {picture[0, 0].tolist()}" if picture.any() else "all black"
        raise BadInput(f"{where}: key obs/{camera}: the picture of step {step} is {found}; was the camera rendered?")
    alike = (few[1:] == few[:-1]).all(axis=(1, 2, 3)).nonzero()[0]
    frozen = {int(i) for i in alike if (pictures[i + 1] == pictures[i]).all()}
    changes = [i + 1 for i in range(len(pictures) - 1) if i not in frozen]
    arm, moves = next((robot_state[name], moves) for name, moves in ARM_MOVES.items() if name in robot_state)
    for first, end in itertools.pairwise([0, *changes, len(pictures)]):  # pictures that are the same
        if np.ptp(arm[first:end], axis=0).max() > moves:
            raise BadInput(
                f"{where}: key obs/{camera}: the pictures of steps {steps[first]} and {steps[end - 1]} are the same "
                "although the arm moved; was the camera frozen?"
            )
