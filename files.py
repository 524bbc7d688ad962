"""How files are written here: whole or not at all, so that an interruption leaves what was there before, and by one
process at a time."""

import errno
import fcntl
import functools
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from errors import BadInput


@contextmanager
def replaced_whole(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A name for a new file, in the folder of `path` or in `scratch` on the same disk, that no other writer has. When
    the block ends without an error, the file written there takes the place of `path`, safe on the disk by then."""
    part = (scratch or path.parent) / f"{path.name}.{os.getpid()}_{secrets.token_hex(3)}.part"
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """`replaced_whole` as a stream of bytes."""
    with replaced_whole(path) as part, part.open("wb") as stream:
        yield stream


@contextmanager
def unwritable_named(what: str | Path, advice: str = "") -> Iterator[None]:
    """What the operating system refuses in the block is BadInput: `what` cannot be written, why, and the advice."""
    try:
        yield
    except OSError as problem:
        raise BadInput(f"{what}: cannot be written ({problem.strerror or problem}){advice}") from None


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk when its folder is. Some file systems know no such thing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # Lustre, network, FUSE


@functools.cache
def _say_that_it_cannot_lock(folder: Path, why: str) -> None:
    """Once for a folder."""
    print(f"note: {folder} cannot lock files ({why}); start no second process on it", flush=True)


class Lock:
    """A lock file that this process alone holds until `release()` or its own end, however that comes: the operating
    system frees it then. Usable as a context manager; who keeps no reference to it does not keep the lock.

    Raises BadInput, `busy` and who it is, where another process holds it, or, with `wait`, prints that and waits.
    Raises OSError where the file cannot be made. Where the file system cannot lock, it says so and goes on unlocked:
    everything here is written whole under a name of the writer's own, so that two writers waste work and never mix.
    """

    def __init__(self, path: Path, busy: str, wait: bool = False):
        self.path, self.is_exclusive = path, True
        while True:
            self._file = path.open("a+")
            try:
                self._take(busy, wait)
                if self._is_in_place():
                    self._sign()
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()  # whoever held it has released and with it deleted it: the next one makes a new file

    def _take(self, busy: str, wait: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            sentence = f"{busy} ({holder})" if holder else busy
            if not wait:
                raise BadInput(sentence) from None
            print(f"{sentence}: waiting for it", flush=True)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as problem:
            if problem.errno not in CANNOT_LOCK:
                raise
            self.is_exclusive = False
            _say_that_it_cannot_lock(self.path.parent, problem.strerror)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _sign(self) -> None:
        """Says who holds it, for the sentence that others get."""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def forget_parts(self, folder: Path, names: str) -> None:
        """Deletes what killed writers of the files `names` (a pattern) have left in the folder that the lock is for."""
        for part in folder.glob(f"{names}.*.part") if self.is_exclusive else ():
            part.unlink(missing_ok=True)

    def release(self) -> None:
        if self._file.closed:
            return
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *problem) -> None:
        self.release()


def keeps_files(folder: Path) -> bool:
    """Whether files can be made in this folder, itself made if need be. Permissions alone do not tell: the file system
    may be read-only or full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/statevla or ~/.cache/statevla, which may not be there yet; None without a home. A relative
    $XDG_CACHE_HOME has to be ignored, says the convention that it comes from."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    cache = asked if os.path.isabs(asked) else os.path.expanduser("~/.cache")
    return Path(cache) / "statevla" if os.path.isabs(cache) else None


def private_temporary_folder(name: str) -> Path | None:
    """A folder of this name in the system's temporary folder that this user's processes share and nobody else can write
    to, since what lies there is trusted. None where there is no such folder to be had."""
    try:
        folder = Path(tempfile.gettempdir()) / f"{name}_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_ours and keeps_files(folder) else None


def expanded(path: str) -> str:
    """~ and ~name as their home folders, wherever a path comes from: a config, --set or a flag. Shells do it only at
    the beginning of a word. Raises BadInput where there is no such home: a folder called ~ is never what was meant."""
    if "\0" in path:
        raise BadInput(f"{path}: no path has a null character in it")
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.split("/")[0]
        raise BadInput(f"{path}: no home folder of {user} is known; ./{path} is a folder of that name")
    return found
