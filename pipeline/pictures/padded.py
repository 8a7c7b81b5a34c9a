"""RGB pixels in four bytes each, as Pillow keeps them: from Pillow to numpy and back without a copy.

A padded picture is a uint8 array [H, W, 3] like any other; its fourth byte per pixel lies between the pixels, unseen.
Packing and unpacking it would cost as much as the arithmetic in between.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
_FOUR_BYTES = pa.list_(pa.uint8(), 4)


def pixels_of(image: Image.Image) -> Pixels:
    """Pixels uint8 [H, W, 3] of a loaded RGB image: its own memory, read-only; packed where that lies in pieces."""
    width, height = image.size
    try:
        buffer = pa.array(image).buffers()[-1]
    except ValueError:  # Pillow splits what is larger than a block (16 MB)
        return np.asarray(image)
    return np.frombuffer(buffer, np.uint8, count=4 * width * height).reshape(height, width, 4)[:, :, :3]


def image_of(pixels: Pixels, *, rgbx: bool = False) -> Image.Image:
    """The image of uint8 pixels [H, W], [H, W, 2], [H, W, 3] or [H, W, 4]; padded ones share its memory.

    rgbx  padded ones may come in mode RGBX, which is sooner done and which the JPEG encoder takes for RGB
    """
    whole = whole_of(pixels)
    if whole is None:
        return Image.fromarray(pixels)
    height, width = whole.shape[:2]
    if rgbx:
        return Image.frombuffer("RGBX", (width, height), whole, "raw", "RGBX", 0, 1)
    values = pa.UInt8Array.from_buffers(pa.uint8(), whole.size, [None, pa.py_buffer(whole)])
    array = pa.FixedSizeListArray.from_buffers(_FOUR_BYTES, height * width, [None], children=[values])
    return Image.fromarrow(array, "RGB", (width, height))


def whole_of(pixels: Pixels) -> Pixels | None:
    """All four bytes of padded pixels, uint8 [H, W, 4], contiguous; None if they are not padded."""
    base, (height, width) = pixels.base, pixels.shape[:2]
    if pixels.shape != (height, width, 3) or pixels.strides != (4 * width, 4, 1) or not isinstance(base, np.ndarray):
        return None
    if base.size != 4 * height * width or _address(base) != _address(pixels):
        return None  # a part of something else
    return base.reshape(height, width, 4)


def padded(pixels: Pixels) -> Pixels:
    """RGB pixels uint8 [H, W, 3] as padded ones; the bytes between are of no value."""
    again = pixels_of(Image.fromarray(np.ascontiguousarray(pixels)))
    if whole_of(again) is None:
        again = np.zeros((*pixels.shape[:2], 4), np.uint8)[:, :, :3]
        again[:] = pixels
    return again


def _address(array: Pixels) -> int:
    return int(array.__array_interface__["data"][0])
