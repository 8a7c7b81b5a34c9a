"""One pattern for all pictures of a label: uniform noise, and blocks of constant sign."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, Bound, LabelledPictures, Told
from pipeline.deltas.delta import levels_of
from pipeline.hashing import numpy_rng

_T = TypeVar("_T", np.int16, np.float64)
BLOCK = 8  # pixels at 32 px; a quarter of any side


class ClassNoise:
    """Every pixel uniform in the ball of epsilon, one draw for each label."""

    per_sample = False
    bound: Bound = "linf"
    figures = NO_FIGURES
    source = "class-wise random noise: P5 of Tao et al., NeurIPS 2021; Huang et al., ICLR 2021"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [num_labels, 3, S, S]."""
        bound, side = levels_of(settings.epsilon), pictures.images.shape[-1]
        draws = [numpy_rng(settings.seed, "class noise", label) for label in range(pictures.num_labels)]
        return np.stack([rng.integers(-bound, bound + 1, (3, side, side)) for rng in draws]).astype(np.int16)


class ClassBlocks:
    """Blocks of a quarter of the side, each at plus or minus epsilon in each channel, one draw for each label."""

    per_sample = False
    bound: Bound = "linf"
    figures = NO_FIGURES
    source = "class-wise random noise in blocks, which survives resizing and compression better"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [num_labels, 3, S, S]."""
        bound, side = levels_of(settings.epsilon), pictures.images.shape[-1]
        block = max(1, side * BLOCK // 32)
        cells = -(-side // block)
        draws = [numpy_rng(settings.seed, "class blocks", label) for label in range(pictures.num_labels)]
        signs = np.stack([rng.choice(np.array([-bound, bound], np.int16), (3, cells, cells)) for rng in draws])
        return spread(signs, block, side)


def spread(cells: NDArray[_T], patch: int, side: int) -> NDArray[_T]:
    """Patterns [..., k, k], each value over patch x patch pixels, cut to [..., side, side]."""
    return cells.repeat(patch, -2).repeat(patch, -1)[..., :side, :side]
