"""Pictures before and after protection, for display: one safetensors file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.errors import InputError, one_line

PER_CLUSTER = 2


@dataclass(frozen=True)
class GallerySample:
    """One picture before and after, both uint8 [H, W, 3] or [H, W], of equal shape."""

    key: str
    cluster: int
    original: NDArray[np.uint8]
    protected: NDArray[np.uint8]


def gallery_to_bytes(samples: Iterable[GallerySample]) -> bytes:
    """The first PER_CLUSTER samples of each cluster, as arrays named <cluster>/<turn>/<which>/<key>."""
    arrays = {"none": np.zeros(0, np.uint8)}  # safetensors files must not be empty
    turns: dict[int, int] = {}
    for sample in samples:
        turn = turns.get(sample.cluster, 0)
        if turn < PER_CLUSTER:
            turns[sample.cluster] = turn + 1
            for which, pixels in (("original", sample.original), ("protected", sample.protected)):
                arrays[f"{sample.cluster}/{turn}/{which}/{sample.key}"] = np.ascontiguousarray(pixels)
    return save(arrays)


def gallery_from_bytes(data: bytes, where: str) -> tuple[GallerySample, ...]:
    """The inverse of gallery_to_bytes, sorted by cluster. Raises InputError for anything it did not write."""
    try:
        arrays = load(data)
        names = sorted((int(c), int(t), key) for c, t, which, key in _names(arrays) if which == "original")
        return tuple(
            GallerySample(key, cluster, *(arrays[f"{cluster}/{turn}/{w}/{key}"] for w in ("original", "protected")))
            for cluster, turn, key in names
        )
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{where} is not a gallery written by this version of Scumble ({one_line(error)})") from None


def _names(arrays: Iterable[str]) -> Iterable[list[str]]:
    """Cluster, turn, which and key; a key may hold slashes."""
    return (name.split("/", 3) for name in arrays if name != "none")
