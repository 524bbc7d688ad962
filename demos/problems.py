"""Readers that go on behind a problem: generators that yield each one as BadInput, and return what could be read all
the same. Training raises the first (`first_raised`), check_demos.py tells all (`all_found`)."""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from demos.hdf5_errors import hdf5_problems_named
from errors import BadInput

T = TypeVar("T")
Reader = Generator[BadInput, None, T]


def first_raised(reader: Reader[T]) -> T:
    """What the reader returns. Raises the first problem that it yields, with what it has open closed."""
    with closing(reader):
        try:
            problem = next(reader)
        except StopIteration as end:
            return end.value
        raise problem


def all_found(reader: Reader[T]) -> tuple[T | None, list[BadInput]]:
    """What the reader returns, and all problems that it yields or ends with; None where it ends with one."""
    problems = []
    try:
        while True:
            problems.append(next(reader))
    except StopIteration as end:
        return end.value, problems
    except BadInput as last:
        return None, [*problems, last]


def attempted(path: Path, within: str, function: Callable[..., T], *arguments: object) -> Reader[T | None]:
    """What the function returns, or None where it raises BadInput or HDF5 cannot read what is `within` the file."""
    try:
        with hdf5_problems_named(path, within):
            return function(*arguments)
    except BadInput as problem:
        yield problem
    return None


def read_on(path: Path, within: str, reader: Reader[T]) -> Reader[T | None]:
    """What the reader returns, or None where it ends with BadInput or HDF5 cannot read what is `within` the file."""
    try:
        with hdf5_problems_named(path, within):
            return (yield from reader)
    except BadInput as problem:
        yield problem
    return None
