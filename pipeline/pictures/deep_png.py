"""PNGs of 16 bits a sample, of which Pillow reads, and writes, eight where there is colour or transparency."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH_AT, _KIND_AT = 24, 25  # bit depth and colour type in the file
_CHANNELS = {0: (0,), 2: (2, 1, 0), 4: (0, 3), 6: (2, 1, 0, 3)}  # by colour type: where OpenCV has a file's channels
_KINDS = {len(channels): kind for kind, channels in _CHANNELS.items()}
_UP = 2  # filter type: each row as its difference to the row above; within 2 % of the size that the best for each gives


def deep_samples(data: bytes, seen: NDArray[np.uint8]) -> NDArray[np.uint16] | None:
    """The samples of a PNG as they are stored, uint16 [H, W, C], whatever a tRNS chunk says of their transparency.

    seen  what Pillow makes of the file, of 8 bits: grey, RGB or RGBA
    None if `data` is no PNG or has fewer bits. Raises ValueError if it cannot be decoded, or not to `seen`.
    """
    if not data.startswith(_SIGNATURE) or data[_DEPTH_AT : _DEPTH_AT + 1] != b"\x10":
        return None
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    channels = _CHANNELS.get(data[_KIND_AT])
    if read is None or read.dtype != np.uint16 or channels is None:
        raise ValueError("its samples of 16 bits cannot be read")
    read = read.reshape(*read.shape[:2], -1)
    samples: NDArray[np.uint16] = np.ascontiguousarray(read[:, :, list(channels)], np.uint16)
    if not np.array_equal(seen, samples[:, :, [0, 0, 0, 1] if len(channels) == 2 else slice(None)] >> 8):
        raise ValueError("two decoders disagree about its samples of 16 bits")
    return samples


def deep_png(samples: NDArray[np.uint16], **options: Any) -> bytes:
    """A PNG file of samples, uint16 [H, W, C], C from 1 to 4: grey, grey and alpha, RGB or RGBA.

    options  of Pillow's `save`: metadata
    """
    height, width, channels = samples.shape
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, 1 + rows.shape[1]), _UP, np.uint8)
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.uint8(0))
    header = struct.pack(">IIBBBBB", width, height, 16, _KINDS[channels], 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(filtered.tobytes()))
    return _SIGNATURE + png_chunk(b"IHDR", header) + _chunks_for(options) + body + png_chunk(b"IEND", b"")


def _chunks_for(options: dict[str, Any]) -> bytes:
    """The chunks before the pixels in which Pillow writes these options."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", **options)
    data = buffer.getvalue()
    return data[len(_SIGNATURE) + 25 : data.rindex(b"IDAT") - 4]


def png_chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
