"""Checks that reject bad input before anything is trained."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.evaluation import LEAKED_PAIRS, SHARED_DENOISERS
from pipeline.relearning.regimes import Knowledge, find_regime
from pipeline.relearning.regimes.staged.acm import usable_classes


def check_regime(name: str) -> None:
    """Raise SettingsError with near matches, for a regime that does not exist or cannot be combined this way."""
    pixels = torch.zeros((4, 3, 32, 32), dtype=torch.uint8)
    deltas = torch.zeros((4, 3, 32, 32), dtype=torch.int16)
    known = Knowledge(
        num_groups=2,
        clean_images=pixels,
        clean_labels=torch.zeros(4, dtype=torch.int64),
        deltas=deltas,
        images=pixels,
        keys=tuple("abcd"),
        denoisers=dict.fromkeys(SHARED_DENOISERS, Denoiser({}, 1, 0.0, 0, "")),
    )
    find_regime(name, known)


def check_labels(regime: str, labels: NDArray[np.int64]) -> None:
    """Raise InputError if there are too few training images for the regime; labels int64 [n]."""
    for part in regime.split("+"):
        plain, _, number = part.partition(":")
        if plain == LEAKED_PAIRS and int(number) > len(labels):
            raise InputError(f"regime {regime}: only {len(labels):,} training images are available")
    if any(part.startswith("st") for part in regime.split("+")):
        try:
            usable_classes(labels)
        except InputError as error:
            raise InputError(f"regime {regime}: {error}") from None
