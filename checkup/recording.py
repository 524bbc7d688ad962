"""One demo as it was found: its numbers, and its films looked at once, whatever else is wrong with it.

Letters: T steps, h w pixels.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from demos.checks import draw_every, picture_problems
from demos.hdf5_errors import open_dataset
from demos.problems import Reader, all_found, attempted, read_on
from observation import CAMERAS, ROBOT_STATES

ACTION_WIDTH = 7


@dataclass(frozen=True, eq=False)
class Film:
    """The pictures of one camera, of which three are kept."""

    samples: np.ndarray  # (3, h, w, 3) uint8: the first, the middle and the last
    num_bad: int  # pictures of one colour, or that stay the same although the arm moves
    brightest: int  # value of any pixel
    checksum: int  # of all pictures


@dataclass(frozen=True, eq=False)
class Recording:
    """What of a demo could be read; None, or no film, where it could not."""

    key: str
    actions: np.ndarray | None  # (T, 7) float64
    robot_state: dict[str, np.ndarray]  # (T, width) float64 of each part of data.robot_state that could be read
    films: dict[str, Film]  # by camera
    ends_in_success: bool | None  # None where the file does not say

    @property
    def steps(self) -> int:
        return 0 if self.actions is None else len(self.actions)

    @property
    def opening(self) -> np.ndarray | None:
        """Distance between the two fingers (T,), m: they move apart, one in each direction."""
        fingers = self.robot_state.get("gripper_states")
        return None if fingers is None else np.abs(fingers).sum(axis=1)


def read_recording(path: Path, key: str, demo: h5py.Group, robot_state_name: str) -> Reader[Recording]:
    """Yields what is wrong with the pictures, all of which are looked at here, a film at a time. What else is wrong is
    `demo_problems`' to say."""
    actions = _numbers(path, key, demo, "actions", ACTION_WIDTH)
    widths = ROBOT_STATES[robot_state_name]
    parts = {name: _numbers(path, key, demo, f"obs/{name}", width) for name, width in widths.items()}
    robot_state = {name: values for name, values in parts.items() if values is not None}
    dones = _numbers(path, key, demo, "dones", None)
    steps = 0 if actions is None else len(actions)
    every = all_found(attempted(path, key, draw_every, path, key, demo, steps))[0] or 1
    of_frames = {name: values[::every] for name, values in robot_state.items()}
    films = {}
    for camera in CAMERAS:
        dataset = _dataset(path, key, demo, f"obs/{camera}")
        if dataset is None or dataset.dtype != np.uint8 or dataset.ndim != 4 or dataset.shape[3] != 3:
            continue
        if not dataset.size or any(len(values) != len(dataset) for values in of_frames.values()):
            continue
        film = yield from read_on(path, key, _film(f"{path}: {key}", camera, dataset, every, of_frames))
        if film is not None:
            films[camera] = film
    ends_in_success = None if dones is None or not len(dones) else bool(dones[-1])
    return Recording(key, actions, robot_state, films, ends_in_success)


def _film(
    where: str, camera: str, dataset: h5py.Dataset, every: int, robot_state: Mapping[str, np.ndarray]
) -> Reader[Film]:
    """A film has a picture every so many steps; the robot state is that of these."""
    pictures = dataset[()]  # (frames, h, w, 3)
    count = len(pictures)
    num_bad = yield from picture_problems(where, camera, pictures, range(0, count * every, every), robot_state)
    samples = pictures[[0, count // 2, count - 1]]
    return Film(samples, num_bad, int(pictures.max()), zlib.crc32(np.ascontiguousarray(pictures).data))


def _dataset(path: Path, key: str, demo: h5py.Group, name: str) -> h5py.Dataset | None:
    return all_found(attempted(path, key, open_dataset, path, key, demo, name))[0]


def _numbers(path: Path, key: str, demo: h5py.Group, name: str, width: int | None) -> np.ndarray | None:
    """(T, width) float64, or (T,) where the width is None; None unless all of it is there and finite, and T > 0."""
    dataset = _dataset(path, key, demo, name)
    if dataset is None or dataset.shape[1:] != (() if width is None else (width,)) or not dataset.ndim:
        return None
    values, _ = all_found(attempted(path, key, lambda: dataset[()].astype(np.float64)))
    return values if values is not None and len(values) and np.isfinite(values).all() else None
