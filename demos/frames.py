"""Frames laid out for training: the pictures of an HDF5 file once more, as one flat file of bytes.

HDF5 looks up and, in compressed files, unpacks a frame every time it is asked for; a GPU trains faster. So each file is
converted once, at the smaller of its own picture size and the model's, and mapped into memory from then on: reading a
frame is a copy. Pictures of several sizes all come to the model's.

    data.cache: disk   the operating system keeps in memory what fits, and all processes of a machine share it
                ram    disk, then read into the memory of this process at the start
                gpu    disk, then put on the GPU at the start, where batches are gathered
                none   nothing is converted: frames are decompressed from HDF5 as they are asked for

A frame is both cameras at one step: (2, S, S, 3) uint8 in the order of CAMERAS, raw orientation. Row r of `Frames` is
obs[t] of a demo, r = demo.first_row + t, one of demo.drawn.

Letters: B batch, N frames, S pixels.
"""

import glob
import hashlib
import itertools
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import DataConfig
from demos.checks import check_pictures
from demos.hdf5 import Demo, drawn_rows
from demos.hdf5_errors import hdf5_problems_named, open_hdf5
from errors import BadInput, out_of_memory_named
from files import Lock, written_whole
from jepa.tokenizer import resize_images
from machine import available_gigabytes
from observation import CAMERAS

LAYOUT = 1  # goes up when the same HDF5 file would be converted to other bytes


class Frames(ABC):
    """Frames of several files by row. `read(rows, out)` may be called from any one thread at a time."""

    def __init__(self, demos: Sequence[Demo], frame_shape: tuple[int, ...]):
        self.demos, self.frame_shape = demos, frame_shape
        self.first_rows = np.array([demo.first_row for demo in demos])

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies the frames `rows` (B,) into `out` (B, 2, S, S, 3)."""
        for slot, row, index in zip(out, rows, np.searchsorted(self.first_rows, rows, side="right") - 1, strict=True):
            demo = self.demos[index]
            self._read_one(demo, demo.drawn.index(int(row - self.first_rows[index])), slot)

    @abstractmethod
    def _read_one(self, demo: Demo, index: int, out: np.ndarray) -> None:
        """Copies a demo's frame of this number into `out` (2, S, S, 3)."""


def common_size(demos: Sequence[Demo], image_size: int) -> int:
    """The size of all frames for a model of `image_size`: the smaller of the pictures' and the model's. Raises BadInput
    where pictures are of several sizes and some are smaller than the model's: all are read into one array, and enlarged
    by different factors they would look different."""
    smallest, largest = min(demos, key=lambda demo: demo.image_size), max(demos, key=lambda demo: demo.image_size)
    if smallest.image_size < largest.image_size and smallest.image_size < image_size:
        raise BadInput(
            f"{smallest.path.parent}: images are {smallest.image_size} px, those of {largest.path.parent} "
            f"{largest.image_size} px; sizes may differ where none is smaller than model.image_size, {image_size}"
        )
    return min(smallest.image_size, image_size)


class HDF5Frames(Frames):
    """data.cache none: frames as the files hold them, at the files' own picture size or, where there are several, that
    of the model, `image_size`."""

    def __init__(self, demos: Sequence[Demo], image_size: int):
        sizes = {demo.image_size for demo in demos}
        size = sizes.pop() if len(sizes) == 1 else common_size(demos, image_size)
        super().__init__(demos, (len(CAMERAS), size, size, 3))

    @cached_property
    def _files(self) -> dict[Path, h5py.File]:
        # Frames are read once each, in random order: a chunk cache would only cost memory.
        files = {}
        for path in {demo.path for demo in self.demos}:
            with hdf5_problems_named(path):
                files[path] = h5py.File(path, "r", rdcc_nbytes=0)
        return files

    def _read_one(self, demo: Demo, index: int, out: np.ndarray) -> None:
        with hdf5_problems_named(demo.path, demo.key):
            obs = self._files[demo.path]["data"][demo.key]["obs"]
            for picture, camera in zip(out, CAMERAS, strict=True):
                stored = obs[camera][index]
                same_size = stored.shape == picture.shape
                picture[:] = stored if same_size else _resized(torch.from_numpy(stored[None]), len(picture))[0]


class FlatFrames(Frames):
    """data.cache disk and ram: one array (N, 2, S, S, 3) a demo, mapped from the flat files or copied into memory."""

    def __init__(self, demos: Sequence[Demo], arrays: list[np.ndarray]):
        super().__init__(demos, arrays[0].shape[1:])
        self.arrays = dict(zip((demo.first_row for demo in demos), arrays, strict=True))

    def _read_one(self, demo: Demo, index: int, out: np.ndarray) -> None:
        out[:] = self.arrays[demo.first_row][index]


class DeviceFrames:
    """data.cache gpu: all frames as one `tensor` (N, 2, S, S, 3) on the device, indexed there."""

    def __init__(self, frames: FlatFrames, device: torch.device):
        rows = drawn_rows(frames.demos)
        gigabytes = len(rows) * np.prod(frames.frame_shape) / 1e9
        with out_of_memory_named(
            f"data.cache is gpu, but the frames take {gigabytes:.1f} GB and do not fit on it; use ram or disk"
        ):
            self.tensor = torch.empty(len(rows), *frames.frame_shape, dtype=torch.uint8, device=device)
            counts = [len(demo.drawn) for demo in frames.demos]
            for demo, part in zip(frames.demos, self.tensor.split(counts), strict=True):
                part[:] = torch.from_numpy(frames.arrays[demo.first_row].copy())
        # Of each row's frame; what was not drawn has an index that is none.
        self.index = torch.full((sum(len(demo) for demo in frames.demos),), len(rows))
        self.index[rows] = torch.arange(len(rows))
        self.index = self.index.to(device)

    def at(self, rows: Tensor) -> Tensor:
        """The frames of drawn rows (...), on the device: (..., 2, S, S, 3)."""
        return self.tensor[self.index[rows]]


def open_frames(
    demos: Sequence[Demo], config: DataConfig, image_size: int, device: torch.device
) -> Frames | DeviceFrames:
    """The frames of all demos, converting files where `config.cache` wants it and it has not been done.

    Raises BadInput where the cache cannot be written, its disk or the memory is too small, one of its files is damaged
    or a picture of the demos shows nothing.
    """
    if config.cache == "none":
        return HDF5Frames(demos, image_size)
    if config.cache == "gpu" and device.type != "cuda":
        raise BadInput(f"data.cache is gpu, but the device is {device.type}; use disk or ram")
    size = common_size(demos, image_size)
    arrays = []
    for path, group in itertools.groupby(demos, key=lambda demo: demo.path):
        of_file = list(group)
        directory = Path(config.cache_directory or path.parent / "frame_cache")
        try:
            flat = _map(_converted(path, of_file, size, directory), of_file, size)
        except OSError as problem:
            raise BadInput(
                f"{directory}: the frames of {path.name} cannot be converted or read ({problem.strerror or problem}); "
                "set data.cache_directory to another folder, or data.cache to none"
            ) from None
        ends = np.cumsum([len(demo.drawn) for demo in of_file])
        arrays += [flat[end - len(demo.drawn) : end] for demo, end in zip(of_file, ends, strict=True)]
    if config.cache == "ram":
        needed, free = sum(array.nbytes for array in arrays) / 1e9, available_gigabytes()
        if needed > free:
            raise BadInput(
                f"data.cache is ram, but the frames take {needed:.1f} GB in each process and {free:.1f} GB are free; "
                "use disk, which keeps in memory what fits"
            )
        arrays = [np.array(array) for array in arrays]
    frames = FlatFrames(demos, arrays)
    return DeviceFrames(frames, device) if config.cache == "gpu" else frames


# ------------------------------------------------------------------------------------------------------ conversion


def source_of(path: Path, demos: Sequence[Demo]) -> dict:
    """What an HDF5 file's frames come from: the file and, where it links to others, those: path, size and time of
    change of each."""
    first, *parts = (
        {"path": str(file.resolve()), "bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
        for file in (path, *sorted({part for demo in demos for part in demo.parts}))
    )
    return first | ({"parts": parts} if parts else {})


def _converted(path: Path, demos: list[Demo], size: int, directory: Path) -> Path:
    """The flat file of an HDF5 file's demos; written first if it is not there or the HDF5 file has changed since."""
    source = source_of(path, demos)
    index = source | {"layout": LAYOUT, "pixels": size, "demos": {demo.key: len(demo.drawn) for demo in demos}}
    key = hashlib.sha256(json.dumps(index).encode()).hexdigest()[:16]
    target = directory / f"{path.stem}_{size}px_{key}.frames"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with Lock(target.with_suffix(".lock"), f"another process converts {path.name}", wait=True) as lock:
            lock.forget_parts(directory, glob.escape(target.name))
            if not target.exists():  # another process may have written it while this one waited
                _forget_earlier_versions(path, source, directory)
                with written_whole(target.with_suffix(".json")) as stream:
                    stream.write(json.dumps(index, indent=2).encode())
                _convert(path, demos, size, target)
    return target


def _convert(path: Path, demos: list[Demo], size: int, target: Path) -> None:
    needed = sum(len(demo.drawn) for demo in demos) * len(CAMERAS) * size * size * 3
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise BadInput(
            f"{target.parent}: the frames of {path.name} take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "set data.cache_directory to another folder, or data.cache to none"
        )
    with open_hdf5(path) as file, written_whole(target) as stream:
        for demo in tqdm(demos, desc=f"converting {path.name} to {size} px", unit="demo"):
            robot_state = {name: part[:: demo.draw_every].numpy() for name, part in demo.robot_state.items()}
            with hdf5_problems_named(path, demo.key):
                films = {camera: file["data"][demo.key]["obs"][camera][()] for camera in CAMERAS}  # (n, h, w, 3) each
            for camera, film in films.items():
                check_pictures(f"{path}: {demo.key}", camera, film, demo.drawn, robot_state)
            cameras = [_resized(torch.from_numpy(film), size) for film in films.values()]  # (n, S, S, 3) each
            stream.write(torch.stack(cameras, dim=1).numpy().data)  # (n, 2, S, S, 3)


def _resized(pictures: Tensor, size: int) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, S, S, 3) with the project's one resize."""
    return resize_images(pictures, size).permute(0, 2, 3, 1)


def _map(target: Path, demos: list[Demo], size: int) -> np.ndarray:
    shape = (sum(len(demo.drawn) for demo in demos), len(CAMERAS), size, size, 3)
    found = target.stat().st_size
    if found != np.prod(shape):
        raise BadInput(f"{target}: has {found:,} bytes, expected {np.prod(shape):,}; delete it, it will be made again")
    return np.asarray(np.memmap(target, np.uint8, "r", shape=shape))  # a plain view: memmap's own indexing is slow


def _forget_earlier_versions(path: Path, source: dict, directory: Path) -> None:
    """Deletes what was made of this HDF5 file before it changed, which can never be used again, where this user made
    it."""
    for index_file in directory.glob(f"{glob.escape(path.stem)}_*px_*.json"):
        try:
            index = json.loads(index_file.read_text())
            is_own = index_file.stat().st_uid == os.geteuid()
        except (OSError, ValueError):  # another process was faster, it may not be read, or it is not ours
            continue
        changed = any(index.get(key) != source.get(key) for key in ("bytes", "mtime_ns", "parts"))
        if is_own and changed and index.get("path") == source["path"]:
            for suffix in (".frames", ".json"):
                index_file.with_suffix(suffix).unlink(missing_ok=True)
