"""Every way in which demonstrations were seen broken, one sentence each, yielded as problems.py has it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5_errors import check_link, number_attribute, open_dataset
from demos.problems import Reader, attempted, first_raised, read_on
from errors import BadInput
from observation import CAMERAS, DRAW_EVERY, ROBOT_STATES

ARM_MOVES = {"joint_states": 0.1, "ee_pos": 0.05}  # rad, m: an arm that moves by more has moved what both cameras see


def demo_problems(
    path: Path,
    key: str,
    demo: h5py.Group,
    has_data_attributes: bool,
    max_len: int,
    num_pictures: int,
    robot_state_name: str,
) -> Reader[None]:
    """All that is wrong with a demo. Of each camera it looks at so many pictures: 0, the first, or 3 over its length.
    robot_state_name: data.robot_state.

    What a demo holds is compared with the length of its actions. Of one without them nothing else is said, and of
    pictures nothing where it is not told which steps they are of.
    """
    where = f"{path}: {key}"
    actions = yield from attempted(path, key, open_dataset, path, key, demo, "actions")
    if actions is None:
        return
    if actions.ndim != 2 or actions.shape[1] != 7:
        yield BadInput(f"{where}: key actions has shape {actions.shape}, expected (T, 7)")
    steps = len(actions) if actions.ndim else 0
    if steps < 2:
        yield BadInput(f"{where}: has {steps} steps, expected at least 2")
        return
    if steps > max_len:
        yield BadInput(f"{where}: has {steps} steps, data.max_len_data allows {max_len}; raise it if the demo is right")
    # OpenVLA's regenerated files carry no attributes at all; a file that has LIBERO's must have this one too.
    if "num_samples" in demo.attrs:
        num_samples = yield from attempted(path, key, number_attribute, demo.attrs, "num_samples", where)
        if num_samples not in (None, steps):
            yield BadInput(f"{where}: num_samples is {num_samples:g}, but actions has {steps} steps")
    elif has_data_attributes:
        yield BadInput(f"{where}: attribute num_samples is missing, expected {steps}")
    robot_state = {}
    for name in ROBOT_STATES[robot_state_name]:
        values = yield from read_on(path, key, _state(path, key, demo, name, steps, robot_state_name))
        if values is not None:
            robot_state[name] = values
    if actions.shape[1:] == (7,):
        yield from read_on(path, key, _action_problems(where, actions))
    shape: tuple[int, ...] | None = None
    every = yield from attempted(path, key, draw_every, path, key, demo, steps)
    if every is None:
        return
    drawn = range(0, steps, every)
    for camera in CAMERAS:
        film = yield from attempted(path, key, open_dataset, path, key, demo, f"obs/{camera}")
        if film is None:
            continue
        shape = shape or film.shape
        refused = list(_film_problems(where, camera, film, len(drawn), shape))
        yield from refused
        looked_at = {0: [], 1: [0], 3: sorted({0, len(drawn) // 2, len(drawn) - 1})}[num_pictures]
        if looked_at and not refused:
            yield from read_on(path, key, _picture_problems(where, camera, film, looked_at, drawn, robot_state))


def draw_every(path: Path, key: str, demo: h5py.Group, steps: int) -> int:
    """Steps from one picture of a demo of so many steps to the next. Raises BadInput where it says what cannot be."""
    if DRAW_EVERY not in demo.attrs:
        return 1
    where = f"{path}: {key}"
    every = number_attribute(demo.attrs, DRAW_EVERY, where)
    if not 1 <= every <= steps or every != int(every):
        raise BadInput(f"{where}: attribute {DRAW_EVERY} is {every:g}, expected a whole number of steps, 1 to {steps}")
    return int(every)


def _state(
    path: Path, key: str, demo: h5py.Group, name: str, steps: int, robot_state_name: str
) -> Reader[np.ndarray | None]:
    """One part of the robot state, None where it is refused."""
    _refuse_missing_part(path, key, demo, name, robot_state_name)
    dataset = open_dataset(path, key, demo, f"obs/{name}")
    expected = (steps, ROBOT_STATES[robot_state_name][name])
    if dataset.shape != expected:
        yield BadInput(f"{path}: {key}: key obs/{name} has shape {dataset.shape}, expected {expected}")
        return None
    values = dataset[()]
    if not _is_finite(values):
        yield _not_finite(f"{path}: {key}", f"obs/{name}")
        return None
    return values.astype(np.float64)


def _refuse_missing_part(path: Path, key: str, demo: h5py.Group, name: str, robot_state_name: str) -> None:
    """Raises BadInput for a part of the robot state that a demo lacks; says which setting reads what it has."""
    within = f"{key}: key obs/{name}"
    check_link(path, within, demo, "obs")
    obs = demo.get("obs")
    there = obs.keys() if isinstance(obs, h5py.Group) else ()  # open_dataset says what is the matter with it
    if there and name not in there:
        others = [other for other, parts in ROBOT_STATES.items() if parts.keys() <= there]
        advice = f"; it has what data.robot_state {others[0]} reads" if others else ""
        raise BadInput(f"{path}: {within} is missing, data.robot_state is {robot_state_name}{advice}")


def _is_finite(values: np.ndarray) -> bool:
    return bool((np.abs(values) <= np.finfo(np.float32).max).all())


def _not_finite(where: str, name: str) -> BadInput:
    return BadInput(f"{where}: key {name} holds NaN or values that are infinite as float32, expected numbers")


def _action_problems(where: str, dataset: h5py.Dataset) -> Reader[None]:
    actions = dataset[()]
    if not _is_finite(actions):
        yield _not_finite(where, "actions")
        return
    gripper = np.unique(actions[:, 6])
    if not np.isin(gripper, (-1, 1)).all():
        yield BadInput(
            f"{where}: key actions has gripper values {gripper[:4].tolist()}, expected -1 (open) or 1 (close)"
        )
    largest = float(np.abs(actions[:, :6]).max())
    if largest > 1 + 1e-6:
        yield BadInput(f"{where}: key actions has a pose delta of size {largest:.3g}, expected values in [-1, 1]")


def _film_problems(
    where: str, camera: str, film: h5py.Dataset, count: int, shape: tuple[int, ...]
) -> Iterator[BadInput]:
    """count: of the drawn steps; shape: that of the other camera."""
    if film.dtype != np.uint8 or film.ndim != 4 or film.shape[0] != count or film.shape[3] != 3:
        yield BadInput(f"{where}: key obs/{camera} is {film.dtype} {film.shape}, expected uint8 ({count}, h, w, 3)")
    elif film.shape != shape or film.shape[1] != film.shape[2] or not film.shape[1]:
        yield BadInput(
            f"{where}: key obs/{camera} has shape {film.shape}, expected square images of one size "
            f"({CAMERAS[0]}: {shape})"
        )


def _picture_problems(
    where: str,
    camera: str,
    film: h5py.Dataset,
    looked_at: Sequence[int],
    drawn: range,
    robot_state: Mapping[str, np.ndarray],
) -> Reader[None]:
    """Looks at some pictures of a film of the steps `drawn`."""
    pictures = np.stack([film[index] for index in looked_at])
    steps = [drawn[index] for index in looked_at]
    there = {name: values[steps] for name, values in robot_state.items()}
    yield from picture_problems(where, camera, pictures, steps, there)


def check_pictures(
    where: str, camera: str, pictures: np.ndarray, steps: Sequence[int], robot_state: Mapping[str, np.ndarray]
) -> None:
    """Raises the first of `picture_problems`."""
    first_raised(picture_problems(where, camera, pictures, steps, robot_state))


def picture_problems(
    where: str, camera: str, pictures: np.ndarray, steps: Sequence[int], robot_state: Mapping[str, np.ndarray]
) -> Reader[int]:
    """pictures (n, h, w, 3) uint8 of a demo's `steps`, the parts (n, width) of the robot state there. Yields the first
    that is black or of one colour, and each time that the camera goes on showing the same although the arm moves: one
    of which nothing is known is not said to. Returns how many pictures those are."""
    few = pictures[:, ::16, ::16]  # most pictures differ here already: 200 times faster than looking at every pixel
    suspects = (few == few[:, :1, :1]).all(axis=(1, 2, 3)).nonzero()[0]
    flat = [int(i) for i in suspects if (pictures[i] == pictures[i, 0, 0]).all()]
    for step, picture in ((steps[i], pictures[i]) for i in flat[:1]):
        found = f"all of one colour, {picture[0, 0].tolist()}" if picture.any() else "all black"
        yield BadInput(f"{where}: key obs/{camera}: the picture of step {step} is {found}; was the camera rendered?")
    alike = (few[1:] == few[:-1]).all(axis=(1, 2, 3)).nonzero()[0]
    same = {int(i) for i in alike if (pictures[i + 1] == pictures[i]).all()}
    changes = [i + 1 for i in range(len(pictures) - 1) if i not in same]
    refused = set(flat)
    arm, moves = next(
        ((robot_state[name], moves) for name, moves in ARM_MOVES.items() if name in robot_state),
        (np.zeros((len(pictures), 1)), 0.0),
    )
    for first, end in itertools.pairwise([0, *changes, len(pictures)]):  # pictures that are the same
        if first not in refused and np.ptp(arm[first:end], axis=0).max() > moves:
            yield BadInput(
                f"{where}: key obs/{camera}: the pictures of steps {steps[first]} and {steps[end - 1]} are the same "
                "although the arm moved; was the camera frozen?"
            )
            refused.update(range(first, end))
    return len(refused)
