"""HDF5 files written whole or not at all, whatever the disk does."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import h5py

from files import replaced_whole, unwritable_named

SCENES_FOLDER = "scenes"  # in a data directory, where nothing that reads demonstrations looks


class HDF5Target(io.FileIO):
    """The file that HDF5 writes to. HDF5 cannot close a file that the disk has no room for, prints tracebacks and ends
    the process with a segmentation fault: so it never hears of a failed write, which is kept as `problem` instead."""

    problem: OSError | None = None

    def write(self, content) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while self.problem is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as problem:
            self.problem = problem
        return size

    def truncate(self, size: int | None = None) -> int:
        end = self.tell() if size is None else size
        try:
            if self.problem is None:
                super().truncate(end)
        except OSError as problem:
            self.problem = problem
        return end


@contextlib.contextmanager
def new_hdf5(path: Path, scratch: Path, advice: str = "") -> Iterator[h5py.File]:
    """An HDF5 file in folder `scratch`, open for writing, that takes the place of `path` in one step when complete.
    Raises BadInput, which ends with the advice, where the machine has no room for it."""
    with (
        unwritable_named(path, advice),
        replaced_whole(path, scratch) as part,
        HDF5Target(part, "w+") as target,
    ):
        try:
            with h5py.File(target, "w") as file:
                yield file
        finally:
            if target.problem:  # whatever else came of it
                raise target.problem
