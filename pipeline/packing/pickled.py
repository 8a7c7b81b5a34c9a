"""Pickles of plain values and numpy arrays, read without running anything that they name.

A pickle may call whatever it can import. Here it can import nothing: the few names that numpy's own pickles contain
stand for records of ours, which only keep what they are given; arrays are built afterwards, from checked parts.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line

MAX_PICKLE_BYTES = 1 << 30
_KINDS = {"u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f4", "f8", "b1"}


class _Kind:
    """What a pickle says of a dtype."""

    def __init__(self, code: object = b"", *_: object) -> None:
        self.code = _text(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])


class _Array:
    """What a pickle says of an array."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)

    def array(self) -> NDArray[Any]:
        """The array. Raises ValueError unless its parts fit together."""
        _, shape, kind, by_columns, data = self.state
        if not isinstance(kind, _Kind) or kind.code not in _KINDS or not isinstance(data, bytes):
            raise ValueError("an array of other values than numbers")
        dtype = np.dtype((">" if kind.order == ">" else "<") + kind.code)
        if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError("an array whose shape does not fit its bytes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _encoded(text: str, *_: object) -> bytes:
    """How Python 3 writes bytes into old pickles."""
    if not isinstance(text, str):
        raise ValueError("bytes that are none")
    return text.encode("latin-1")


class _ArraysOnly(pickle.Unpickler):
    _KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): "ndarray",  # only ever an argument
        ("numpy", "dtype"): _Kind,
        ("_codecs", "encode"): _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a data set") from None


def unpickled(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle, its keys as text; values are plain, or numpy arrays of numbers.

    Raises InputError for anything else, whatever it is made to do.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise InputError(f"{where}: {len(data):,} bytes are too many for a pickled data set")
    try:
        value = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(value, dict):
            raise ValueError("not a dictionary")
        return {_text(key): one.array() if isinstance(one, _Array) else one for key, one in value.items()}
    except (
        *(pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError),
        *(OverflowError, MemoryError, RecursionError, ImportError),
    ) as error:
        raise InputError(f"{where}: not a pickled data set of arrays ({one_line(error, 120)})") from None
