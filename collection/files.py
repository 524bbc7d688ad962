"""The files of collect_demos.py: HDF5 files written whole, the settings that each carries, and who may write them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py

from demos.hdf5_writing import new_hdf5
from errors import BadInput
from files import Lock

UNFINISHED = ".unfinished"  # folder of the demos whose task is not complete yet
CONTINUES = "finished demos are kept, and the same command continues"


@dataclass(frozen=True)
class DemoSettings:
    """All that decides what a demo looks like. Every file carries it; files of other settings are never added to."""

    image_size: int
    visual_mesh_ratio: float
    obs_alignment: str
    start_noise: float
    seed: int
    shift_target: float = 0.0
    missed_grasps: float = 0.0
    layouts: str = "libero"  # written only where it is another, so that files of LIBERO's layouts are what they were


@contextlib.contextmanager
def written_hdf5(path: Path, scratch: Path) -> Iterator[h5py.File]:
    """An HDF5 file in folder `scratch`, open for writing, that takes the place of `path` in one step when complete."""
    with new_hdf5(path, scratch, f"; {CONTINUES}") as file:
        yield file


@contextlib.contextmanager
def claimed(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Within the block no other collector works on these tasks in this folder. Raises BadInput where one does."""
    unfinished = folder / UNFINISHED
    with contextlib.ExitStack() as claims:
        claims.callback(remove_if_empty, unfinished)
        for name in names:
            claims.enter_context(task_lock(unfinished, name))
        yield


def task_lock(unfinished: Path, name: str) -> Lock:
    busy = f"another collect_demos.py is collecting {name} in {unfinished.parent}"
    while True:
        unfinished.mkdir(exist_ok=True)
        try:
            return Lock(unfinished / f"{name}.lock", busy)
        except FileNotFoundError:  # a collector of other tasks has just ended and removed the folder
            continue


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another run may still have unfinished demos in it
        folder.rmdir()


def settings_text(settings: DemoSettings) -> str:
    told = {name: value for name, value in asdict(settings).items() if (name, value) != ("layouts", "libero")}
    return json.dumps({"program": "collect_demos.py", **told})


def check_settings(path: Path, group, settings: DemoSettings) -> None:
    """Raises BadInput when the group of a file does not say that it was collected with these very settings."""
    try:
        found = json.loads(group.attrs["collector"])
        if not isinstance(found, dict):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not a file of collect_demos.py; choose another --data_directory") from None
    for name, value in asdict(settings).items():
        before = found.get(name, getattr(DemoSettings, name, None))  # those with a default came later
        if before != value:
            raise BadInput(
                f"{path}: was collected with {name} {before}, not {value};"
                f" choose another --data_directory or delete the file"
            )
