"""Protections that are known to work on someone who trains the ordinary way, and that need the labels: the controls.

If a target learns in spite of these, the evaluation is broken, not the protection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import BaselineSettings, LabelledPictures
from pipeline.baselines.methods import baseline


def control(
    name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], *, levels: int = 16, seed: int = 0
) -> NDArray[np.uint8]:
    """uint8 [n, 3, S, S] images protected by a published method: `random`, `block`, `sp`, …

    levels  of 255, where the method has no budget of its own
    """
    method = baseline(name)
    pictures = LabelledPictures(images, labels, tuple(f"{row:08d}" for row in range(len(labels))))
    deltas = method.deltas(pictures, BaselineSettings(levels / 255, seed), lambda _: None)
    return (images + (deltas if method.per_sample else deltas[labels])).clip(0, 255).astype(np.uint8)
