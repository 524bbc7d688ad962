"""Dictionaries with arrays as bytes and back: msgpack, with arrays as openpi's clients and servers lay them out.

An array is a map with the keys __ndarray__, data (C order), dtype and shape, all four of them msgpack's bytes. A number
of numpy's is a map with __npgeneric__, data and dtype. There are no pickles: what is read can only be numbers, texts,
bytes, lists and dictionaries.
"""

import math
import re
from typing import Any

import msgpack
import numpy as np

from errors import in_one_line

NUMBERS = re.compile(r"[<>|=]?[biuf][1248]")  # dtypes that may come: booleans, integers and floats of 1 to 8 bytes
MOST_DIMENSIONS = 8
MOST_ITEMS = 20_000  # of all lists and dictionaries of a message together
MOST_IN_ONE = 1_000  # of a list or dictionary: msgpack takes memory for all that it claims, on each of 512 levels


class BadMessage(ValueError):
    """What is wrong with a message, in one sentence and one line, whatever the message brings into it."""

    def __init__(self, sentence: str):
        super().__init__(in_one_line(sentence))


def packed(message: dict) -> bytes:
    """Raises ValueError for what the layout has no place for, such as an array of objects."""
    return msgpack.packb(message, default=_laid_out)


def _laid_out(value: Any) -> dict:
    if isinstance(value, np.ndarray) and NUMBERS.fullmatch(value.dtype.str):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and NUMBERS.fullmatch(value.dtype.str):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ValueError(f"{type(value).__name__} {getattr(value, 'dtype', '')} cannot be sent, expected numbers or texts")


def unpacked(data: bytes) -> dict:
    """The message, its arrays read-only views. What is claimed is checked before anything of its size is made.

    Raises BadMessage for bytes that are no such message.
    """
    left = MOST_ITEMS

    def counted(items: Any) -> Any:
        nonlocal left
        left -= len(items)
        if left < 0:
            raise BadMessage(f"the message has more than {MOST_ITEMS} items")
        return items

    try:
        message = msgpack.unpackb(
            data,
            object_hook=lambda items: _restored(counted(items)),
            list_hook=counted,
            max_array_len=MOST_IN_ONE,
            max_map_len=MOST_IN_ONE,
            max_ext_len=0,
        )
    except BadMessage:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as problem:
        why = str(problem) or type(problem).__name__
        raise BadMessage(f"the message is not readable as msgpack ({why})") from None
    if not isinstance(message, dict):
        raise BadMessage(f"the message is {_kind(message)}, expected a dictionary")
    return message


def _restored(items: dict) -> Any:
    if b"__ndarray__" in items:
        return _array(items)
    if b"__npgeneric__" in items:
        value = items.get(b"data")
        if not isinstance(value, bool | int | float):
            raise BadMessage(f"a number of numpy's has {_kind(value)} for data")
        return _dtype(items).type(value)
    return items


def _array(items: dict) -> np.ndarray:
    dtype, shape, content = _dtype(items), items.get(b"shape"), items.get(b"data")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise BadMessage(f"an array has no list of up to {MOST_DIMENSIONS} sizes for shape")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise BadMessage("an array has a shape that is not of whole numbers from 0 on")
    size = dtype.itemsize * math.prod(shape)
    if not isinstance(content, bytes) or len(content) != size:
        found = f"{len(content)} bytes" if isinstance(content, bytes) else _kind(content)
        raise BadMessage(
            f"an array of shape {tuple(shape)} and dtype {dtype} has {found} for data, expected {size} bytes"
        )
    return np.ndarray(shape, dtype, content)


def _dtype(items: dict) -> np.dtype:
    name = items.get(b"dtype")
    if not isinstance(name, str) or not NUMBERS.fullmatch(name):
        raise BadMessage(
            f"an array has the dtype {str(name)[:20]!r}, expected booleans, integers or floats such as '<f4'"
        )
    try:
        return np.dtype(name)
    except TypeError:  # such as f1
        raise BadMessage(f"an array has the dtype {name!r}, which there is not") from None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
