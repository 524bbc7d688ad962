"""One demo as it was found: its numbers, and its films looked at once, whatever else is wrong with it.

Letters: T steps, h w pixels.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from demos.checks import picture_problems
from demos.hdf5_errors import open_dataset
from demos.problems import Reader, all_found, attempted, read_on
from observation import CAMERAS, STATE_WIDTHS

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
    joint_states: np.ndarray | None  # (T, 7) float64, rad
    gripper_states: np.ndarray | None  # (T, 2) float64, m
    films: dict[str, Film]  # by camera
    ends_in_success: bool | None  # None where the file does not say

    @property
    def steps(self) -> int:
        return 0 if self.actions is None else len(self.actions)

    @property
    def opening(self) -> np.ndarray | None:
        """Distance between the two fingers (T,), m: they move apart, one in each direction."""
        return None if self.gripper_states is None else np.abs(self.gripper_states).sum(axis=1)


def read_recording(path: Path, key: str, demo: h5py.Group) -> Reader[Recording]:
    """Yields what is wrong with the pictures, all of which are looked at here, a film at a time. What else is wrong is
    `demo_problems`' to say."""
    actions = _numbers(path, key, demo, "actions", ACTION_WIDTH)
    state = {name: _numbers(path, key, demo, f"obs/{name}", width) for name, width in STATE_WIDTHS.items()}
    dones = _numbers(path, key, demo, "dones", None)
    arm = state["joint_states"]
    films = {}
    for camera in CAMERAS:
        dataset = _dataset(path, key, demo, f"obs/{camera}")
        if dataset is None or dataset.dtype != np.uint8 or dataset.ndim != 4 or dataset.shape[3] != 3:
            continue
        if not dataset.size or (arm is not None and len(arm) != len(dataset)):
            continue
        film = yield from read_on(path, key, _film(f"{path}: {key}", camera, dataset, arm))
        if film is not None:
            films[camera] = film
    ends_in_success = None if dones is None or not len(dones) else bool(dones[-1])
    return Recording(key, actions, state["joint_states"], state["gripper_states"], films, ends_in_success)


def _film(where: str, camera: str, dataset: h5py.Dataset, arm: np.ndarray | None) -> Reader[Film]:
    pictures = dataset[()]  # (T, h, w, 3)
    steps = len(pictures)
    unknown = np.zeros((steps, 1))  # an arm of which nothing is known is not said to have moved
    num_bad = yield from picture_problems(where, camera, pictures, range(steps), unknown if arm is None else arm)
    samples = pictures[[0, steps // 2, steps - 1]]
    return Film(samples, num_bad, int(pictures.max()), zlib.crc32(np.ascontiguousarray(pictures).data))


def _dataset(path: Path, key: str, demo: h5py.Group, name: str) -> h5py.Dataset | None:
    return all_found(attempted(path, key, open_dataset, path, key, demo, name))[0]


def _numbers(path: Path, key: str, demo: h5py.Group, name: str, width: int | None) -> np.ndarray | None:
    """(T, width) float64, or (T,) where the width is None; None unless all of it is there and finite."""
    dataset = _dataset(path, key, demo, name)
    if dataset is None or dataset.shape[1:] != (() if width is None else (width,)) or not dataset.ndim:
        return None
    values, _ = all_found(attempted(path, key, lambda: dataset[()].astype(np.float64)))
    return values if values is not None and np.isfinite(values).all() else None
