"""Whether protected images lie pixel on pixel over the clean ones; a comparison of different crops measures nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

Pictures = NDArray[np.uint8]  # [n, 3, S, S]

_LOOKED_AT = 100  # pairs
_BETTER = 0.8  # a moved original that leaves less than this share of the squared difference is the better fit
_LEAST_CORRELATION = 0.5  # below it, two pictures are different ones: even 64/255 of noise leaves more


def check_aligned(
    protected: Pictures, clean: Pictures, rows: NDArray[np.int64], keys: Sequence[str], name: str
) -> None:
    """Raise InputError unless protected images show the same part of the same pictures as the clean ones.

    protected  [n, 3, S, S]
    rows       int64 [n], row of the clean images for each protected one
    keys       of the protected images, [n]
    name       of the protected collection, for the message

    Needs no bound on the deltas: whatever was added, an original fits better in its place than shifted, zoomed, turned
    or mirrored. Some pairs are looked at, and most must be aligned, because flat pictures fit everywhere.
    """
    chosen = np.linspace(0, len(rows) - 1, min(_LOOKED_AT, len(rows))).astype(int)
    moved = [row for row in chosen if not _is_aligned(protected[row], clean[rows[row]])]
    if 2 * len(moved) > len(chosen):
        raise InputError(
            f"{name}: {len(moved)} of {len(chosen)} images compared do not lie pixel on pixel over their originals, "
            f"e.g. {keys[moved[0]]}: one of the two was cropped, resized or turned; store both in the same geometry"
        )


def _is_aligned(protected: NDArray[np.uint8], original: NDArray[np.uint8]) -> bool:
    """False if the protected picture [3, S, S] is another one than the original, or fits better when that is moved."""
    ours, clean = (np.ascontiguousarray(image.transpose(1, 2, 0), np.float32) for image in (protected, original))
    difference = _distance(ours, clean)
    spread = float(ours.std()) * float(clean.std())
    if spread > 0 and float(((ours - ours.mean()) * (clean - clean.mean())).mean()) < _LEAST_CORRELATION * spread:
        return False
    return all(_distance(ours, moved) >= _BETTER * difference for moved in _moved(clean))


def _distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Mean squared difference, apart from a constant one in each channel: a tint is not a movement."""
    difference = ours - theirs
    return float((difference - difference.mean((0, 1))).var())


def _moved(image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The image [S, S, 3] shifted, zoomed along one or both sides, mirrored and turned."""
    side = image.shape[0]
    shifts = [
        _warped(image, 1, 1, step * x, step * y)
        for step in sorted({1, max(1, side // 32), max(1, side // 8)})
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    zooms = [
        _warped(image, x, y, 0, 0)
        for zoom in (16 / 15, 8 / 7, 4 / 3)
        for factor in (zoom, 1 / zoom)
        for x, y in ((factor, factor), (factor, 1), (1, factor))
    ]
    turns = [image[::y, ::x] for y, x in itertools.product((1, -1), repeat=2) if (y, x) != (1, 1)]
    return shifts + zooms + turns + [np.rot90(image, number).astype(np.float32) for number in (1, 3)]


def _warped(image: NDArray[np.float32], zoom_x: float, zoom_y: float, x: float, y: float) -> NDArray[np.float32]:
    """Zoomed about the centre, then shifted; reflected at the border."""
    side = image.shape[0]
    centre = (side - 1) / 2
    matrix = np.array([[zoom_x, 0, centre * (1 - zoom_x) + x], [0, zoom_y, centre * (1 - zoom_y) + y]])
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101), np.float32)
