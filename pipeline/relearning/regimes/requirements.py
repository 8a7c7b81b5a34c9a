"""Checks that a regime has what it needs, and helpers that regimes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import SettingsError
from pipeline.hashing import derive
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.training import Training


def need_clean_images(known: Knowledge, regime: str) -> Tensor:
    """Knowledge.clean_images, uint8 [m, 3, S, S]. Raises SettingsError if there are none."""
    if known.clean_images is None or len(known.clean_images) == 0:
        raise SettingsError(f"regime {regime!r} needs clean images that are not test images; there are none")
    return known.clean_images


def need_clean_set(known: Knowledge, regime: str) -> tuple[Tensor, Tensor]:
    """Knowledge.clean_images and their labels, int64 [m]. Raises SettingsError if missing or of unequal length."""
    images = need_clean_images(known, regime)
    if known.clean_labels is None or len(known.clean_labels) != len(images):
        count = "none" if known.clean_labels is None else f"{len(known.clean_labels):,}"
        raise SettingsError(f"regime {regime!r} needs labels for {len(images):,} clean images; there are {count}")
    return images, known.clean_labels


def need_denoiser(known: Knowledge, regime: str, name: str | None = None) -> Denoiser:
    """The denoiser trained for the regime, under its name or another. Raises SettingsError if there is none."""
    found = known.denoisers.get(name or regime)
    if found is None:
        raise SettingsError(f"regime {regime!r} needs a denoiser trained for it; there is none")
    return found


def as_tested(training: Training, images: Tensor) -> Tensor:
    """Images, uint8, as the regime treats test images, e.g. greyscale for iss-gray+early-stop; on its device."""
    return training.regime.prepare_test(images).to(training.device)


@contextmanager
def named_randomness(training: Training, purpose: str, *index: object) -> Iterator[None]:
    """Seed torch's global generators by name for the duration of the block, then restore them."""
    devices = [training.device] if training.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(training.seed, purpose, *index))
        yield
