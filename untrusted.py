"""Files from strangers: arrays and checkpoints read without running anything that a file names and without believing
the sizes that it claims.

Python's own unpickler calls whatever a file asks for. The one here knows tensors, arrays and plain values, and calls
nothing else. A size is compared with the bytes that are there before memory is taken for it.
"""

import io
import math
import pickle
import struct
import tokenize
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

LARGEST_ARRAYS = 256_000_000  # bytes of a file of embeddings or init states, and of the arrays in it
DAMAGED = (  # what a pickle that is cut short, or was never one, ends in
    AttributeError, EOFError, LookupError, MemoryError, OverflowError, RecursionError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
STORAGES = {  # torch's names of its kinds of memory -> numpy's of the same numbers, bytes of each
    "DoubleStorage": ("f8", 8), "FloatStorage": ("f4", 4), "HalfStorage": ("f2", 2), "BFloat16Storage": (None, 2),
    "LongStorage": ("i8", 8), "IntStorage": ("i4", 4), "ShortStorage": ("i2", 2), "CharStorage": ("i1", 1),
    "ByteStorage": ("u1", 1), "BoolStorage": ("?", 1), "UntypedStorage": ("u1", 1),
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file that torch.save writes without a zip archive


# -------------------------------------------------------------------------------------------------- NumPy's files


def npz_arrays(path: str | Path, names: tuple[str, ...], largest: int = LARGEST_ARRAYS) -> dict[str, np.ndarray]:
    """These arrays of an npz file. Raises KeyError for one that it lacks, and ValueError, zipfile.BadZipFile,
    zlib.error or RuntimeError for what is damaged, holds Python objects or claims more bytes than there are or than
    `largest`."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in a way that numpy never writes")
            if member.file_size > largest:
                raise ValueError(f"{name} claims {member.file_size:,} bytes, at most {largest:,} are read")
            with archive.open(member) as stream:
                found[name] = _array_in(stream, member.file_size)
    return found


def npy_array(path: str | Path) -> np.ndarray:
    """The array of an npy file. Raises OSError, and ValueError as `npz_arrays`."""
    with open(path, "rb") as stream:
        return _array_in(stream, Path(path).stat().st_size)


def _array_in(stream, length: int) -> np.ndarray:
    """The array of the npy file of `length` bytes that a stream begins with."""
    read_header: dict[tuple, Callable] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in read_header:
        raise ValueError(f"an npy file of version {version}, expected 1.0 or 2.0")
    try:
        shape, is_fortran, dtype = read_header[version](stream)
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError) as problem:  # it is read as Python's literals
        raise ValueError(f"the header of an array is damaged ({problem})") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects (a pickle), which are never loaded")
    return _array_of(shape, dtype, stream, length - stream.tell(), is_fortran)


def _array_of(shape: tuple, dtype: np.dtype, stream, length: int, is_fortran: bool = False) -> np.ndarray:
    """The array whose numbers are the next `length` bytes of a stream, all of them."""
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != length or count > max(length, 1):
        raise ValueError(f"an array of {shape} {dtype} was announced, but {length:,} bytes are there")
    content = bytearray(length)
    if stream.readinto(content) != length:
        raise ValueError(f"an array of {shape} {dtype} was announced, but it is cut short")
    return np.ndarray(shape, dtype, content, order="F" if is_fortran else "C")


# ---------------------------------------------------------------------------------------------------- checkpoints


def check_archive(path: str | Path) -> None:
    """Looks through a file of torch.save before torch loads it: even with weights_only, torch makes a bytearray of
    whatever size a few bytes of its pickle ask for, and unfolds compressed parts.

    Raises zipfile.BadZipFile or pickle.UnpicklingError for an archive that takes more memory than the file has bytes,
    that claims other sizes than its parts have, or whose pickle names anything but tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = _stored_sizes(archive, Path(path).stat().st_size)
        pickled = archive.read(_pickle_of(archive))
    _Claims(io.BytesIO(pickled), sizes).load_whole()


def _stored_sizes(archive: zipfile.ZipFile, length: int) -> dict[str, int]:
    """Member -> bytes, of an archive that is all there, stored once and uncompressed, as torch writes it."""
    members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise zipfile.BadZipFile(f"its part {member.filename} is compressed, which torch.save never does")
    if (claimed := sum(member.file_size for member in members)) > length:
        raise zipfile.BadZipFile(f"its parts claim {claimed:,} bytes, the file has {length:,}")
    name, times = Counter(member.filename.lower() for member in members).most_common(1)[0] if members else ("", 0)
    if times > 1:
        raise zipfile.BadZipFile(f"its part {name} is there {times} times")
    return {member.filename: member.file_size for member in members}


def _pickle_of(archive: zipfile.ZipFile) -> str:
    """The name of the member that holds the structure of what was saved."""
    folders = {name.split("/")[0] for name in archive.namelist()}
    name = f"{next(iter(folders), '')}/data.pkl"
    if len(folders) != 1 or name not in archive.namelist():
        raise zipfile.BadZipFile("it is no archive of torch.save")
    return name


class _Restricted(pickle._Unpickler):
    """Rebuilds plain values and what `self.known` has, (module, name) -> what stands for it here. Whatever else a file
    names is refused, and what could change an object that is no file's own is not done."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: action
        for code, action in pickle._Unpickler.dispatch.items()
        if code not in {op[0] for op in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)}
    }
    known: dict[tuple[str, str], Any]

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if name in STORAGES and module in ("torch", "torch.storage"):
            return _Kind(name)
        raise pickle.UnpicklingError(f"its pickle names {module}.{name}, and nothing is run that a file names")

    def load_whole(self) -> Any:
        """`load`, with one kind of error for every kind of damage."""
        try:
            return self.load()
        except DAMAGED as problem:
            raise pickle.UnpicklingError(f"its pickle is damaged ({problem})") from None

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(built, (_Array, _Dtype)):
            built.set(state)
        elif type(built) is not dict:  # where torch keeps versions of a state dict's modules: nothing reads them here
            raise pickle.UnpicklingError(f"its pickle changes a {type(built).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def _empty() -> dict:
    """Pickles fill a dictionary once it is there. One that was made of what it is given could be asked for, large,
    again and again."""
    return {}


class _Kind:
    """A kind of torch's memory, by name."""

    def __init__(self, name: str):
        self.name = name
        self.code, self.itemsize = STORAGES[name]


class _Claims(_Restricted):
    """Goes through the pickle of a checkpoint and compares every size in it with the archive's."""

    def __init__(self, stream: BinaryIO, sizes: dict[str, int]):
        super().__init__(stream)
        self.sizes = {name.partition("/")[2]: size for name, size in sizes.items()}
        self.known = {
            ("collections", "OrderedDict"): _empty,
            ("torch._utils", "_rebuild_tensor_v2"): self._check_tensor,
        }

    def persistent_load(self, claim) -> int:
        """("storage", kind, key, device, elements) -> elements."""
        _, kind, key, _, count = claim
        found = self.sizes.get(f"data/{key}")
        if count * kind.itemsize != found:
            there = "is not there" if found is None else f"has {found:,} bytes"
            raise pickle.UnpicklingError(f"its part data/{key} {there}, its pickle claims {count:,} x {kind.itemsize}")
        return count

    def _check_tensor(self, count: int, offset: int, size: tuple, stride: tuple, *_) -> None:
        _check_view(count, offset, size, stride)


def _check_view(count: int, offset: int, size: tuple, stride: tuple) -> None:
    """A tensor lies within its storage of `count` elements and has no more of them."""
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or math.prod(size) > count or (math.prod(size) and last >= count):
        raise pickle.UnpicklingError(f"its pickle claims a tensor of {tuple(size)} in a part of {count:,} elements")


# ------------------------------------------------------------------------------------------------ arrays in pickles


def pickled_arrays(path: str | Path, largest: int = LARGEST_ARRAYS) -> np.ndarray | dict[str, np.ndarray]:
    """The array, or the texts with an array or tensor each, that pickle.dump or torch.save wrote into a file, as public
    LIBERO init states and language embeddings come.

    Raises OSError, and zipfile.BadZipFile, pickle.UnpicklingError or ValueError for anything else in it and for more
    than `largest` bytes.
    """
    if (length := Path(path).stat().st_size) > largest:
        raise ValueError(f"it has {length:,} bytes, at most {largest:,} are read")
    content = Path(path).read_bytes()
    found = _Arrays(io.BytesIO(content), largest).whole_file()
    try:
        if type(found) is not dict:
            return found.array()
        if all(type(key) is str for key in found):
            return {key: value.array() for key, value in found.items()}
    except DAMAGED:
        pass
    raise pickle.UnpicklingError("it holds something else than an array, or texts with an array each")


class _Arrays(_Restricted):
    """Rebuilds arrays, and tensors as arrays, of at most `room` bytes in all: a few bytes of a pickle can ask for the
    same megabytes again and again."""

    def __init__(self, stream: BinaryIO, room: int):
        super().__init__(stream)
        self.stream, self.room = stream, room
        self.read_part: Callable[[str], bytes] | None = None  # of a zip archive of torch.save
        self.storages: dict[str, _Storage] = {}
        core = [f"numpy.{core}" for core in ("core", "_core")]  # of numpy 1 and 2
        self.known = {
            ("collections", "OrderedDict"): _empty,
            ("_codecs", "encode"): self._encoded,
            ("numpy", "ndarray"): "an array",
            ("numpy", "dtype"): _Dtype,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.storage", "_load_from_bytes"): self._nested,
            **{(f"{module}.multiarray", "_reconstruct"): lambda *_: _Array(self.spend) for module in core},
            **{(f"{module}.numeric", "_frombuffer"): self._from_buffer for module in core},
        }

    def spend(self, length: int) -> None:
        self.room -= length
        if self.room < 0:
            raise pickle.UnpicklingError("its pickle asks for more memory than such a file needs")

    def whole_file(self) -> Any:
        """What the file holds, whichever of the three ways it was written."""
        beginning = self.stream.read(4)
        self.stream.seek(0)
        if beginning.startswith(b"PK"):
            return self._of_archive()
        first = self.load_whole()
        if first != LEGACY_MAGIC:
            return first
        for _ in range(2):  # a version and facts on the machine that wrote it
            self.load_whole()
        saved, keys = self.load_whole(), self.load_whole()
        for key in keys:
            storage = self.storages.get(str(key))
            (count,) = struct.unpack("<q", self.stream.read(8).ljust(8, b"\xff"))
            if storage is None or count != storage.count:
                raise pickle.UnpicklingError(f"its part {key} is damaged")
            storage.content = self.stream.read(count * storage.kind.itemsize)
        return saved

    def _of_archive(self) -> Any:
        with zipfile.ZipFile(self.stream) as archive:
            _stored_sizes(archive, len(self.stream.getbuffer()))  # type: ignore[attr-defined]
            name = _pickle_of(archive)
            inside = _Arrays(io.BytesIO(archive.read(name)), self.room)
            inside.read_part = lambda key: archive.read(f"{name.removesuffix('data.pkl')}data/{key}")
            return inside.load_whole()

    def persistent_load(self, claim) -> "_Storage":
        """("storage", kind, key, device, elements), and, in a file without an archive, what is a view of what."""
        _, kind, key, _, count = claim[:5]
        if str(key) not in self.storages:
            self.spend(abs(count) * kind.itemsize)
            self.storages[str(key)] = _Storage(kind, count)
            if self.read_part:
                self.storages[str(key)].content = self.read_part(str(key))
        return self.storages[str(key)]

    def _tensor(self, storage: "_Storage", offset: int, size: tuple, stride: tuple, *_) -> "_Tensor":
        _check_view(storage.count, offset, size, stride)
        self.spend(math.prod(size) * storage.kind.itemsize)
        return _Tensor(storage, offset, size, stride)

    def _nested(self, content: bytes) -> Any:
        """A tensor in a plain pickle carries its memory as a file of torch.save's within."""
        inside = _Arrays(io.BytesIO(content), self.room)
        found = inside.whole_file()
        self.room = inside.room
        return found

    def _encoded(self, text: str, encoding: str) -> bytes:
        """The bytes of an array as Python 2 could read them."""
        self.spend(len(text))
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"its pickle has bytes as {encoding}")
        return text.encode("latin1")

    def _from_buffer(self, content: bytes, dtype: "_Dtype", shape: tuple, order: str) -> "_Array":
        array = _Array(self.spend)
        array.set((1, shape, dtype, order == "F", content))
        return array


class _Dtype:
    def __init__(self, name: str, *_):
        self.code = name.lstrip("<>=|")
        if self.code not in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}:
            raise pickle.UnpicklingError(f"its pickle has an array of {name}, expected numbers")
        self.order = "<"

    def set(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    def __init__(self, spend: Callable[[int], None]):
        self.spend = spend
        self.values: np.ndarray | None = None

    def set(self, state: tuple) -> None:
        """(version, shape, dtype, is_fortran, bytes): numpy's own."""
        _, shape, dtype, is_fortran, content = state
        self.spend(len(content))
        kind = np.dtype(dtype.order + dtype.code)
        self.values = _array_of(shape, kind, io.BytesIO(content), len(content), is_fortran)

    def array(self) -> np.ndarray:
        if self.values is None:
            raise ValueError("an array without numbers")
        return self.values


class _Storage:
    def __init__(self, kind: _Kind, count: int):
        self.kind, self.count, self.content = kind, count, b""


class _Tensor:
    """torch's view of a storage, whose bytes may come later."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def array(self) -> np.ndarray:
        kind = self.storage.kind
        if kind.code is None:
            raise ValueError(f"numpy has no {kind.name}")
        length = len(self.storage.content)
        flat = _array_of((self.storage.count,), np.dtype(kind.code), io.BytesIO(self.storage.content), length)
        steps = tuple(step * kind.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.size, steps).copy()
