"""Checks that reject bad input before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.evaluation import LEAKED_PAIRS, SHARED_DENOISERS
from pipeline.relearning.regimes import Knowledge, Regime, find_regime
from pipeline.relearning.regimes.staged.acm import usable_classes
from pipeline.relearning.shares import protected_mask
from pipeline.relearning.targets import build_target


def check_regime(name: str, *, has_holdout: bool = True) -> Regime:
    """The regime, with stand-ins for what its adversary knows.

    has_holdout  False if no clean image is held out from training
    Raises SettingsError, with near matches, for a regime that does not exist, cannot be combined this way, or needs
    images that there are not.
    """
    pixels = torch.zeros((4, 3, 32, 32), dtype=torch.uint8)
    deltas = torch.zeros((4, 3, 32, 32), dtype=torch.int16)
    known = Knowledge(
        num_groups=2,
        clean_images=pixels if has_holdout else None,
        clean_labels=torch.zeros(4, dtype=torch.int64) if has_holdout else None,
        deltas=deltas,
        images=pixels,
        keys=tuple("abcd"),
        denoisers=dict.fromkeys(SHARED_DENOISERS, Denoiser({}, 1, 0.0, 0, "")),
    )
    return find_regime(name, known)


def check_targets(targets: Sequence[str], regimes: Sequence[str], num_classes: int, side: int) -> None:
    """Build every target once, for images of `side` pixels, and ask every regime whether it can train it.

    Raises SettingsError if not, InputError for published weights that are not available.
    """
    checked = [check_regime(regime) for regime in regimes]
    for target in targets:
        network = build_target(target, num_classes, side, seed=0)
        for regime in checked:
            regime.check_network(network)


def check_shares(shares: Sequence[str], keys: Sequence[str], labels: NDArray[np.int64]) -> None:
    """Raise SettingsError if a share of the clean training images, or of their classes, rounds to none or all."""
    for share in shares:
        protected_mask(share, keys, labels, seed=0)


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
