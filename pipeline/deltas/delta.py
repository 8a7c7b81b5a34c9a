"""Round a delta to whole levels, resize it to the image, add it, clip and check: the only code that does so.

Deltas are whole 8-bit levels before they are added to 8-bit pixels, so rounding cannot break the bound.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import PromiseError, SettingsError
from pipeline.pictures.jpeg import JpegCoding
from pipeline.settings import NO_BOUND

_ROWS_ELEMENTS = 1 << 15  # values per block of rows: small enough for the CPU cache


def levels_of(epsilon: float) -> int:
    """Whole 8-bit levels inside the bound: 16 for 16/255.

    Raises SettingsError above 127/255, but for NO_BOUND.
    """
    levels = math.floor(epsilon * 255 + 1e-6)
    if not (0 <= levels <= 127 or epsilon == NO_BOUND):
        raise SettingsError(f"--epsilon {epsilon:g} is too large: use 127/255 or less")
    return levels


def quantise(delta: Tensor | NDArray[np.float32], epsilon: float) -> NDArray[np.int8]:
    """Whole levels of a delta: rounded half to even, clipped to the bound.

    delta    float32 [..., 3, S, S] in [0, 1] pixel units
    returns  int8 of the same shape, in 8-bit levels, |levels| <= levels_of(epsilon)
    Raises PromiseError if a value is not finite.
    """
    bound = min(levels_of(epsilon), 127)
    values = delta.detach().cpu().float().numpy() if isinstance(delta, Tensor) else np.asarray(delta)
    if not np.isfinite(values).all():
        raise PromiseError("a delta has non-finite values; its fitting diverged")
    whole: NDArray[np.int8] = np.clip(np.rint(values * np.float32(255)), -bound, bound).astype(np.int8)
    return whole


def lay(levels: NDArray[np.int8] | NDArray[np.int16], height: int, width: int, epsilon: float) -> NDArray[np.int16]:
    """Resize a delta to an image: bilinear with pixel centres aligned, rounded half to even.

    levels   int8 or int16 [3, S, S], whole 8-bit levels
    returns  int16 [height, width, 3], whole 8-bit levels; `levels` itself, transposed, if the sizes agree
    Sides that shrink are antialiased; otherwise single pixels of the delta would stand for many.
    Raises PromiseError if a value exceeds the bound.
    """
    side_y, side_x = levels.shape[1:]
    if (height, width) == (side_y, side_x):
        laid = np.ascontiguousarray(levels.transpose(1, 2, 0), dtype=np.int16)
    elif height >= side_y > 1 and width >= side_x > 1:
        laid = _enlarged(levels, height, width)
    else:
        planes = torch.from_numpy(levels.astype(np.float32))[None]
        resized = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        laid = np.ascontiguousarray(np.rint(resized[0].numpy()).transpose(1, 2, 0), dtype=np.int16)
    if max(int(laid.max()), -int(laid.min())) > levels_of(epsilon):
        raise PromiseError(f"a delta resized to {height}x{width} exceeds the bound of {levels_of(epsilon)} levels")
    return laid


def _enlarged(levels: NDArray[np.int8] | NDArray[np.int16], height: int, width: int) -> NDArray[np.int16]:
    """Bilinear enlargement, columns first, then rows in blocks.

    Same values as torch's F.interpolate, except for the rounding of exact ties, but faster and with memory only for
    the result; numpy's arithmetic here does not depend on the CPU.
    """
    channels, side_y, side_x = levels.shape
    flat = np.ascontiguousarray(levels.transpose(1, 2, 0), dtype=np.float32).reshape(side_y, -1)
    left, share = _neighbours(width, side_x)
    columns = (channels * left[:, None] + np.arange(channels)).ravel()
    wide = flat[:, columns]
    wide += (flat[:, columns + channels] - wide) * np.repeat(share, channels)
    steps = np.diff(wide, axis=0)
    above, share = _neighbours(height, side_y)
    laid = np.empty((height, width * channels), np.int16)
    rows = max(1, _ROWS_ELEMENTS // (width * channels))
    for start in range(0, height, rows):
        here = above[start : start + rows]
        block = steps[here]
        block *= share[start : start + rows, None]
        block += wide[here]
        laid[start : start + rows] = np.rint(block, out=block)
    return laid.reshape(height, width, channels)


def _neighbours(size: int, source: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For each of `size` positions: the source index before it, and the weight of the index after it."""
    place = np.clip((np.arange(size) + 0.5) * (source / size) - 0.5, 0, source - 1)
    before = np.minimum(place.astype(np.intp), source - 2)
    return before, (place - before).astype(np.float32)


class LaidDelta:
    """A delta at an image's own size and in its stored orientation, ready to be added.

    Raises PromiseError for levels of another shape or above 255.
    """

    def __init__(self, levels: NDArray[np.int16]) -> None:
        """levels  int16 [H, W, 3], whole 8-bit levels"""
        if levels.ndim != 3 or levels.shape[2] != 3:
            raise PromiseError(f"a delta of shape {levels.shape} is not [H, W, 3]")
        if max(int(levels.max(initial=0)), -int(levels.min(initial=0))) > 255:
            raise PromiseError("a delta cannot have more than 255 levels")
        self.codings: dict[JpegCoding, JpegCoding] = {}  # a cache of `survival.coding_for`
        self._up, self._down = np.maximum(levels, 0).astype(np.uint8), np.maximum(-levels, 0).astype(np.uint8)

    @property
    def levels(self) -> NDArray[np.int16]:
        """int16 [H, W, 3], whole 8-bit levels."""
        return self._up.astype(np.int16) - self._down

    def patch(self, side: int) -> NDArray[np.int16]:
        """Levels of at most side x side pixels: four squares from all over the picture, int16 [h, w, 3]."""
        height, width = self._up.shape[:2]
        rows, columns = (_spread(length, side) for length in (height, width))
        up, down = (part[rows][:, columns].astype(np.int16) for part in (self._up, self._down))
        levels: NDArray[np.int16] = up - down
        return levels

    @property
    def nbytes(self) -> int:
        return self._up.nbytes + self._down.nbytes

    def added_to(self, pixels: NDArray[np.uint8], epsilon: float) -> tuple[NDArray[np.uint8], int]:
        """Pixels plus delta, clipped to 0 … 255, and the largest |result - pixels| in 8-bit levels.

        pixels   uint8 [H, W, C]: grey, grey + alpha, RGB or RGBA; H and W must equal the delta's, because
                 broadcasting would hide a wrong delta. Alpha is unchanged; grey gets the mean of the delta's three
                 channels, rounded half to even, and so stays grey.
        epsilon  bound on |result - pixels| in [0, 1] pixel units, e.g. 16/255
        Raises PromiseError, naming the pixel, if the result exceeds the bound. Source: Zhang et al. 2023, section 3.3.
        """
        if pixels.ndim != 3 or pixels.shape[:2] != self._up.shape[:2] or not 1 <= pixels.shape[2] <= 4:
            raise PromiseError(f"a delta of shape {self._up.shape} does not fit pixels of shape {pixels.shape}")
        up, down = self._for_channels(pixels.shape[2])
        pixels = np.ascontiguousarray(pixels)
        # both saturate at 0 and 255, and no pixel is both raised and lowered
        raised = cv2.add(pixels, up)
        changed = np.asarray(cv2.subtract(raised, down, dst=raised), np.uint8).reshape(pixels.shape)
        largest = int(cv2.norm(changed, pixels, cv2.NORM_INF))
        if largest > levels_of(epsilon):
            distance = np.abs(changed.astype(np.int16) - pixels)
            y, x, c = np.unravel_index(int(distance.argmax()), distance.shape)
            raise PromiseError(
                f"pixel (row {y}, column {x}, channel {c}) would change by {largest} levels; "
                f"the bound is {levels_of(epsilon)}"
            )
        return changed, largest

    def _for_channels(self, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Levels to add to and subtract from `channels`-channel pixels, each uint8 [H, W, channels]; 0 for alpha."""
        if channels == 3:
            return self._up, self._down
        if channels == 4:
            alpha = np.zeros((*self._up.shape[:2], 1), np.uint8)
            return np.concatenate([self._up, alpha], axis=2), np.concatenate([self._down, alpha], axis=2)
        grey = np.zeros((*self._up.shape[:2], channels), np.int16)
        grey[:, :, 0] = np.rint(self.levels.mean(axis=2))
        return np.maximum(grey, 0).astype(np.uint8), np.maximum(-grey, 0).astype(np.uint8)


def _spread(length: int, side: int) -> NDArray[np.intp]:
    """Indices of two runs of side / 2 each, a quarter and three quarters along; all, if there are at most `side`."""
    if length <= side:
        return np.arange(length)
    half = np.arange(side // 2)
    return np.concatenate(
        [half + max(0, length // 4 - side // 4), half + min(length, 3 * length // 4 + side // 4) - side // 2]
    )


def perturb(images: Tensor, delta: Tensor) -> Tensor:
    """Images plus delta, clamped to [0, 1], differentiable, as used while fitting (Zhang et al. 2023, section 3.3).

    images  float [B, 3, H, W] in [0, 1]
    delta   float [B, 3, H, W] or [3, H, W], pixel units
    """
    if delta.shape not in (images.shape, images.shape[1:]):
        raise PromiseError(f"a delta of shape {tuple(delta.shape)} does not fit images {tuple(images.shape)}")
    return F.hardtanh(images + delta, 0.0, 1.0)  # clamp, but with a backward pass of one kernel
