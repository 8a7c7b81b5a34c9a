"""CIFAR's batches as they are published, made by hand."""

from __future__ import annotations

import struct

import numpy as np


def as_python_2_wrote_it(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as CIFAR-10 is published: protocol 2, texts of Python 2, numpy's names before version 2."""
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    )
    kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    state = b"(" + number(1) + shape + kind + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + empty + state + text(b"labels") + listed + b"u."


def names_as_python_2_wrote_them(key: bytes, names: list[bytes]) -> bytes:
    """batches.meta, or meta: the names of the classes."""
    return b"\x80\x02}(" + text(key) + b"](" + b"".join(map(text, names)) + b"eu."


def text(value: bytes) -> bytes:
    """The opcode for a text of Python 2."""
    return b"T" + struct.pack("<i", len(value)) + value


def number(value: int) -> bytes:
    """The opcode for a whole number."""
    return b"J" + struct.pack("<i", value)
