"""The files of collect_demos.py: HDF5 files written whole, their pictures, the settings that each carries, and who may
write them."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np

from demos.hdf5_writing import new_hdf5
from errors import BadInput
from files import Lock
from observation import CAMERAS

UNFINISHED = ".unfinished"  # folder of the demos or scenes whose file is not complete yet
CONTINUES = "what is finished is kept, and the same command continues"


@dataclass(frozen=True)
class DemoSettings:
    """All that decides what a demo looks like. Every file carries it; files of other settings are never added to."""

    otherwise: ClassVar[str] = "choose another --data_directory or delete the file"
    image_size: int
    visual_mesh_ratio: float
    obs_alignment: str
    start_noise: float
    seed: int
    shift_target: float = 0.0
    missed_grasps: float = 0.0
    layouts: str = "libero"  # this and what follows are written only where they say something else
    draw_every: int = 1  # steps from one drawn frame to the next


@dataclass(frozen=True)
class SceneSettings:
    """The same for scenes without a demonstration."""

    otherwise: ClassVar[str] = "delete the file, and its scenes are drawn anew"
    image_size: int
    visual_mesh_ratio: float
    seed: int
    arm_poses: str  # how many there are to draw from, and a fingerprint of them


@contextlib.contextmanager
def written_hdf5(path: Path, scratch: Path) -> Iterator[h5py.File]:
    """An HDF5 file in folder `scratch`, open for writing, that takes the place of `path` in one step when complete."""
    with new_hdf5(path, scratch, f"; {CONTINUES}") as file:
        yield file


def picture_datasets(group: h5py.Group, count: int, image_size: int) -> dict[str, h5py.Dataset]:
    """For each camera an empty dataset of `count` pictures, each of which is compressed by itself."""
    picture = (image_size, image_size, 3)
    return {
        name: group.create_dataset(
            name, (count, *picture), np.uint8, chunks=(1, *picture), compression="gzip", compression_opts=1
        )
        for name in CAMERAS
    }


@contextlib.contextmanager
def claimed(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Within the block no other collector works on these tasks in this folder, which is made for it where need be.
    Raises BadInput where one does."""
    unfinished = folder / UNFINISHED
    with contextlib.ExitStack() as claims:
        if not folder.exists():
            claims.callback(remove_if_empty, folder)
        claims.callback(remove_if_empty, unfinished)
        for name in names:
            claims.enter_context(task_lock(unfinished, name))
        yield


def task_lock(unfinished: Path, name: str) -> Lock:
    busy = f"another collect_demos.py is collecting {name} in {unfinished.parent}"
    while True:
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            return Lock(unfinished / f"{name}.lock", busy)
        except FileNotFoundError:  # a collector of other tasks has just ended and removed the folder
            continue


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another run may still have unfinished demos in it
        folder.rmdir()


def told_once(*attributes: Any) -> list[str]:
    """What several runs have told of a file, a text or a list of them each, the earliest first."""
    return list(dict.fromkeys(str(one) for told in attributes for one in np.atleast_1d(told)))


def with_simulators_of(before: Mapping[str, Any], attributes: dict) -> dict:
    """Attributes to be written, in which the simulators of earlier runs are told, too, where they were others."""
    told = told_once(before.get("simulator", []), attributes.get("simulator", []))
    return attributes | ({"simulator": told if len(told) > 1 else told[0]} if told else {})


def settings_text(settings: DemoSettings | SceneSettings) -> str:
    unsaid = {("layouts", "libero"), ("draw_every", 1)}  # as in files that are older than they
    told = {name: value for name, value in asdict(settings).items() if (name, value) not in unsaid}
    return json.dumps({"program": "collect_demos.py", **told})


def check_settings(path: Path, group, settings: DemoSettings | SceneSettings) -> None:
    """Raises BadInput when the group of a file does not say that it was collected with these very settings."""
    try:
        found = json.loads(group.attrs["collector"])
        if not isinstance(found, dict):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not a file of collect_demos.py; choose another --data_directory") from None
    for name, value in asdict(settings).items():
        before = found.get(name, getattr(type(settings), name, None))  # those with a default came later
        if before != value:
            raise BadInput(f"{path}: was collected with {name} {before}, not {value}; {settings.otherwise}")
