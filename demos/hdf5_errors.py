"""HDF5 files opened so that what is wrong with one is one sentence, whose advice the error's own words choose."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from errors import BadInput, is_out_of_memory
from files import CANNOT_LOCK

HDF5_ERRORS = (OSError, KeyError, RuntimeError)  # h5py's for a file or its data, an object by name, a link's loop
LFS_POINTER = b"version https://git-lfs"
PREFIXES = ("HDF5_EXT_PREFIX", "HDF5_VDS_PREFIX", "HDF5_EXTFILE_PREFIX")  # folders in which HDF5 is to look first
MOST_LINKS = 16  # that lead to each other: HDF5 follows no more either
MOST_PARTS = 4  # of a dataset's part's part
LARGEST_DATASET, LARGEST_CHUNK = 2**32, 2**30  # bytes; the longest demo in the largest pictures has fewer


@contextmanager
def open_hdf5(path: str | Path, mode: str = "r", **options) -> Iterator[h5py.File]:
    """An open `h5py.File`. What HDF5 cannot open or read, here or in the block, is BadInput by `hdf5_problem`; other
    errors in the block pass."""
    with hdf5_problems_named(path), h5py.File(path, mode, **options) as file:
        yield file


@contextmanager
def hdf5_problems_named(path: str | Path, within: str = "") -> Iterator[None]:
    """What HDF5 cannot open or read in the block is BadInput by `hdf5_problem`; other errors pass."""
    try:
        yield
    except HDF5_ERRORS as problem:
        if not comes_from_hdf5(problem) or is_out_of_memory(problem):
            raise
        raise hdf5_problem(path, problem, within) from None


def comes_from_hdf5(problem: BaseException) -> bool:
    """h5py words all of HDF5's errors as "what failed (why)"; nothing else that raises these classes does."""
    return isinstance(problem, HDF5_ERRORS) and bool(
        re.fullmatch(r"(\[Errno \d+\] )?[A-Z].* \(.*\)", _words(problem), re.S)
    )


def hdf5_problem(path: str | Path, problem: BaseException, within: str = "") -> BadInput:
    """What h5py's error about the file `path`, or about what it holds as `within`, means, in one sentence."""
    where = f"{path}: {within}" if within else str(path)
    return BadInput(f"{where}: {_meaning(Path(path), problem)}")


def linked_files(path: Path, dataset: h5py.Dataset, above: tuple[tuple[Path, str], ...] = ()) -> set[Path]:
    """The files that hold the values of a dataset in the file `path`: the one that a link led to, those of a virtual
    dataset's parts, raw ones. `above` are the datasets that this one is a part of.

    Raises BadInput for one outside of the file's folder, for a file that a virtual dataset lacks, where HDF5 itself
    reads zeros without a word, and for a dataset that is a part of itself, at which HDF5 ends the process.
    """
    own = Path(dataset.file.filename)
    files, place = {own}, (own.resolve(), dataset.name)
    if place in above or len(above) == MOST_PARTS:
        raise BadInput(f"{path}: {dataset.name} is made of parts of parts without end, or of itself")
    above = (*above, place)
    for name, _, _ in dataset.external or ():
        files.add(raw := _located(own, name, "HDF5_EXTFILE_PREFIX", ()))
        _check_inside(path, dataset.name, raw)
    if dataset.is_virtual:
        for name, key in {(source.file_name, source.dset_name) for source in dataset.virtual_sources()}:
            if name == ".":
                check_link(path, dataset.name, dataset.file, key)
                files |= linked_files(path, dataset.file[key], above)
                continue
            source = _located(own, name, "HDF5_VDS_PREFIX", (own.parent, own.resolve().parent))
            _check_inside(path, dataset.name, source)
            with open_hdf5(source) as file:
                check_link(path, dataset.name, file, key)
                files |= linked_files(path, file[key], above)
    return files


def _located(own: Path, name: str, prefix: str, folders: tuple[Path, ...]) -> Path:
    """The file that HDF5 takes for a `name` written in the file `own`: it looks at the environment's prefix, beside the
    file and in the working directory, in this order."""
    beside = (Path(os.environ[prefix]), *folders) if prefix in os.environ else folders
    candidates = [folder / name for folder in (*beside, Path())]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BadInput(f"{own}: takes data from {name}, which is not there")


def check_link(path: Path, within: str, group: h5py.Group, name: str, depth: int = MOST_LINKS) -> None:
    """Raises BadInput where what a group holds as `name` is a link to a file outside of the folder of the file `path`,
    before HDF5 opens that."""
    for part in filter(None, name.split("/")):
        try:
            link = group.get(part, getlink=True)
        except (KeyError, TypeError):  # it is not there, or a link of somebody's own making: the caller finds out
            return
        if isinstance(link, h5py.ExternalLink):
            _check_inside(path, within, Path(group.file.filename).parent / link.filename)
        elif isinstance(link, h5py.SoftLink) and depth:
            check_link(path, within, group.file if link.path.startswith("/") else group, link.path, depth - 1)
        try:
            group = group[part]
        except HDF5_ERRORS:
            return
        if not isinstance(group, h5py.Group):
            return


def _check_inside(path: Path, within: str, place: str | Path) -> None:
    """A path written in a file stays in that file's folder, or in one that the user gives HDF5. Symbolic links are not
    followed: they are no part of the file."""
    given = [folder for name in PREFIXES for folder in os.environ.get(name, "").split(os.pathsep) if folder]
    resolved = path.parent.resolve(), path.resolve().parent
    folders = [Path(os.path.abspath(path.parent)), *resolved, *(Path(os.path.abspath(folder)) for folder in given)]
    if not any(Path(os.path.abspath(place)).is_relative_to(folder) for folder in folders):
        raise BadInput(
            f"{path}: {within} leads to {place}, outside of the file's folder; such links are not followed, copy what "
            "they lead to beside the file"
        )


def _words(problem: BaseException) -> str:
    return str(problem.args[0]) if isinstance(problem, KeyError) and problem.args else str(problem)


def _meaning(path: Path, problem: BaseException) -> str:
    words = _words(problem)
    failed, _, rest = words.partition(" (")
    reason = " ".join(rest.rsplit(")", 1)[0].split())  # HDF5's own words
    reason = re.sub(r": time = .*error message = '([^']*)'.*", r": \1", reason)  # without the hour and the like
    is_link = isinstance(problem, KeyError)  # the file is open; what it refers to is not
    subject = "a file that it links to" if is_link else "it"
    code = getattr(problem, "errno", None)
    if "unable to lock file" in reason:
        if code in CANNOT_LOCK:
            return (
                f"the file system cannot lock it ({os.strerror(code)}); set HDF5_USE_FILE_LOCKING=FALSE and try again"
            )
        return f"{subject} is open in another process, which writes it; try again when that one has ended"
    if "already open for write" in reason or "consistency flags" in reason:
        return (
            f"{subject} is marked as open for write: a program writes it or was killed while it did; if none has "
            "it open, `h5clear -s` (package hdf5-tools) takes the mark away, and what was not yet written is missing"
        )
    if "truncated file" in reason:
        sizes = [f"{int(size):,}" for size in re.findall(r"eof = (\d+)", reason)]
        found = f" ({' of '.join(sizes)} bytes)" if len(sizes) == 2 else ""
        return f"{subject} is truncated{found}; copy or download it again"
    if "signature not found" in reason:
        return f"{subject} is no HDF5 file" if is_link else _of_another_kind(path)
    if is_link and ("can't open file" in reason or "unable to open external file" in reason):
        return f"it links to a file that is not there or cannot be opened ({reason})"
    if is_link and "component not found" in reason:
        return "it is a link to something that is not there"
    if "too many links" in reason:
        return "its links lead in a circle"
    if "external raw data file" in reason:
        return f"its data lies in another file that is not there or cannot be read ({reason})"
    if "required filter" in reason or "plugin" in reason:
        return (
            f"it is compressed in a way that this h5py cannot read ({reason}); where it can be read, "
            "`h5repack -f GZIP=4` rewrites it"
        )
    if not rest:
        return words
    if code is not None:  # the operating system's reasons: not there, not permitted, a directory, a full disk
        return f"{failed.split('] ')[-1].lower()}: {os.strerror(code)}"
    return f"{failed.lower()}: {reason}"


def _of_another_kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    if not beginning:
        return "is empty, expected an HDF5 file"
    if beginning == LFS_POINTER:
        return "is a Git LFS pointer and not the file itself; fetch that with `git lfs pull`"
    return f"is no HDF5 file, it begins with {beginning!r}"


# ------------------------------------------------------------------------------------------- what a group holds


def object_in(path: Path, within: str, group: h5py.Group, name: str, kind: type):
    """What a group holds as `name`, an h5py.Group or h5py.Dataset. Raises BadInput where it is missing, of the other
    kind, or a link that leads nowhere or out of the file's folder."""
    check_link(path, within, group, name)
    if name not in group:
        raise BadInput(f"{path}: {within} is missing")
    try:
        found = group[name]
    except HDF5_ERRORS as problem:
        link = group.get(name, getlink=True)
        target = f", a link to {link.filename}" if isinstance(link, h5py.ExternalLink) else ""
        raise hdf5_problem(path, problem, within + target) from None
    _check_inside(path, within, found.file.filename)  # where a chain of links has ended
    if not isinstance(found, kind):
        raise BadInput(f"{path}: {within} is a {type(found).__name__.lower()}, expected a {kind.__name__.lower()}")
    return found


def open_dataset(path: Path, key: str, demo: h5py.Group, name: str) -> h5py.Dataset:
    """A demo's dataset of numbers, all of whose parts are there: as many bytes as its shape announces. `key` is "" for
    one at the file's root."""
    within = f"{key}: key {name}" if key else f"key {name}"
    *folders, last = name.split("/")
    for folder in folders:
        demo = object_in(path, within, demo, folder, h5py.Group)
    dataset = object_in(path, within, demo, last, h5py.Dataset)
    try:
        kind = dataset.dtype.kind
    except TypeError:  # HDF5 has types that numpy lacks
        kind = "?"
    if kind not in "fiub" or dataset.shape is None:
        raise BadInput(f"{path}: {within} holds no array of numbers")
    linked_files(path, dataset)
    _check_size(f"{path}: {within}", dataset)
    return dataset


def _check_size(where: str, dataset: h5py.Dataset) -> None:
    """A shape of terabytes costs a file nothing: HDF5 reads what was never written as zeros."""
    claimed = dataset.size * dataset.dtype.itemsize
    if claimed > LARGEST_DATASET:
        raise BadInput(f"{where} claims {claimed:,} bytes {dataset.shape}, more than any demonstration has")
    if dataset.chunks:
        if (chunk := math.prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
            raise BadInput(f"{where} is stored in chunks of {chunk:,} bytes, at most {LARGEST_CHUNK:,} are read")
        chunks = math.prod(-(-length // step) for length, step in zip(dataset.shape, dataset.chunks, strict=True))
        if (there := dataset.id.get_num_chunks()) < chunks:
            raise BadInput(
                f"{where} has the shape {dataset.shape}, but {chunks - there} of its {chunks} parts are missing"
            )
    elif not dataset.is_virtual and not dataset.external and dataset.id.get_storage_size() < claimed:
        raise BadInput(f"{where} has the shape {dataset.shape}, but holds no data")


def text_attribute(attributes: h5py.AttributeManager, name: str, path: str | Path) -> str:
    """An attribute as text, "" where it is missing; files of other programs have bytes."""
    if name not in attributes:
        return ""
    try:
        value = attributes[name]
    except (TypeError, ValueError, OSError) as problem:
        raise BadInput(f"{path}: attribute {name} cannot be read ({problem})") from None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def number_attribute(attributes: h5py.AttributeManager, name: str, where: str | Path) -> float:
    """An attribute that is a number; LIBERO's own files were seen to have it as text."""
    text = text_attribute(attributes, name, where).strip("[]")  # an array of one number is one, too
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{where}: attribute {name} is {text!r}, expected a number")
    return number
