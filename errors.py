"""What every script does with bad input: one sentence on stderr and exit code 2, no traceback."""

import errno
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def in_one_line(sentence: str) -> str:
    """Characters that break a line, or mean something to a terminal, written as Python escapes them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in sentence)


class BadInput(Exception):
    """The user's mistake in one sentence: which file or key, what was found, what was expected.

    What a file or a flag brings into the sentence stays in its one line."""

    def __init__(self, sentence: str):
        super().__init__(in_one_line(sentence))


OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS
    "allocate memory",  # PyTorch on a CPU, the operating system
    "ALLOC_FAILED",  # cuBLAS, cuSOLVER and cuDNN
    "ALLOCATION_FAILED",  # cuDNN from version 9 on
    "memory allocation failed",  # HDF5
    "bad_alloc",  # C++
    "Invalid buffer size",  # MPS, a tensor larger than all memory
    "Storage size calculation overflowed",  # PyTorch, a tensor larger than any memory
)
MACHINE_PROBLEMS = {  # what of the operating system's refusals lies with the machine, whatever the program does
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.EFBIG, errno.ENAMETOOLONG,
}  # fmt: skip


def is_out_of_memory(problem: BaseException) -> bool:
    """Python and numpy raise MemoryError, a system call OSError, HDF5 an OSError without a number, and torch
    RuntimeErrors of many wordings: its own on a GPU and on the CPU, cuBLAS's and cuDNN's where they had no room for
    their workspace."""
    if isinstance(problem, OSError) and problem.errno is not None:  # its text has the name of a file in it
        return problem.errno == errno.ENOMEM
    return isinstance(problem, MemoryError) or any(sign in str(problem) for sign in OUT_OF_MEMORY)


@contextmanager
def out_of_memory_named(sentence: str) -> Iterator[None]:
    """Running out of memory in the block is BadInput with this sentence, which says what of it was asked for and what
    to ask for instead."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise BadInput(sentence) from None


@contextmanager
def extras_named() -> Iterator[None]:
    """Around imports of what requirements-interop.txt alone brings: what is missing is BadInput that says so."""
    try:
        yield
    except ModuleNotFoundError as problem:
        raise BadInput(
            f"the package {problem.name} is not installed; `pip install -r requirements-interop.txt` brings what is"
            " needed to speak with other programs"
        ) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM: who cleans up after Ctrl-C does so after it."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 + the signal's number, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Within the block SIGTERM is raised as Terminated, unless somebody else takes it or this is no main thread."""
    is_free = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )

    def terminate(*_: object) -> None:
        raise Terminated

    if is_free:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if is_free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exits_on_bad_input(main):
    """Wraps a script's main(): BadInput, running out of memory and what the machine refuses (a full disk, a file that
    may not be read) become one sentence and exit code 2, Ctrl-C and SIGTERM one sentence and 130 and 143."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            with (
                sigterm_raised(),
                out_of_memory_named("out of memory; other programs on this machine or GPU may hold it"),
            ):
                return main(*args, **kwargs)
        except BadInput as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            sys.exit(2)
        except OSError as problem:
            if problem.errno not in MACHINE_PROBLEMS:
                raise
            place = f"{problem.filename}: " if problem.filename else ""
            print(f"error: {place}{problem.strerror}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as problem:
            if "can't start new thread" not in str(problem):
                raise
            print(f"error: {problem}: a limit on memory (ulimit -v) or processes (-u) is low", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            code = exit_code(stop)
            stopped = f"{signal.Signals(code - 128).name}: stopped"
            print(f"\n{stopped}; no file is left half written, and the same command starts again", file=sys.stderr)
            sys.exit(code)

    return wrapped
