"""Adversaries who train a denoiser and run all images through it, training and test, or training alone (avatar, le).

self-pairs       trained on pairs they make themselves, by protecting other pictures with Scumble and their own seeds;
                 needs no knowledge of our protection
purify           trained on clean pictures with noise of the usual kinds
avatar, le       a diffusion model of clean pictures, which makes the images again from noise
leaked-pairs:N   trained on N images of this collection that they have both protected and clean

A trial's figures give the denoiser's gain in dB (`gain_db`) on its own held-out pictures and on this collection: if a
denoiser gains little, its failure is weak evidence for a protection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import SettingsError
from pipeline.hashing import hash_sample
from pipeline.relearning.denoisers.denoiser import Denoiser, DenoiserRecipe, UNet, denoise, gain_db, train_denoiser
from pipeline.relearning.denoisers.diffusion import NoiseSchedule, regenerated
from pipeline.relearning.regime_names import AVATAR
from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.regimes.requirements import need_denoiser
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training

OWN_DB, HERE_DB = "denoiser_own_db", "denoiser_here_db"
_LOOKED_AT = 512  # protected images on which the gain is measured


class Purify(Regime):
    """Run all images through the denoiser trained beforehand for this regime. known: denoisers.

    The clean control goes through the same denoiser, which shows what denoising costs clean images.
    """

    def __init__(self, name: str, known: Knowledge) -> None:
        self.name = name
        self.known = known
        self._network: UNet | None = None
        self._figures: dict[str, float] = {}
        self._denoiser = self._ready()

    def _ready(self) -> Denoiser | None:
        return need_denoiser(self.known, self.name)

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        self._look()
        return self._cleaned(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        return self._cleaned(images)

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        return self._figures

    def _cleaned(self, images: Tensor) -> Tensor:
        if self._network is None and self._denoiser is not None:
            self._network = self._denoiser.network(torch.device(self.known.device))
        return images if self._network is None else self._through(self._network, images)

    def _through(self, network: UNet, images: Tensor) -> Tensor:
        return denoise(network, images)

    def _look(self, without: frozenset[int] = frozenset()) -> None:
        """Record the gains; `without` are the rows of training images the denoiser was trained on."""
        if self._denoiser is not None:
            self._figures[OWN_DB] = self._denoiser.gain_db
        rows = [row for row in changed_rows(self.known) if row not in without]
        if rows and self.known.images is not None and self.known.deltas is not None:
            chosen = torch.tensor(rows)[torch.tensor(hash_sample(map(str, rows), _LOOKED_AT, 0, "denoiser-here"))]
            changed, clean = self.known.images[chosen], originals(self.known, chosen)
            self._figures[HERE_DB] = gain_db(changed, self._cleaned(changed), clean)


class Regenerate(Purify):
    """Training images alone are made again from noise, as the authors of AVATAR and LE do; known: denoisers."""

    def __init__(self, name: str, known: Knowledge, schedule: NoiseSchedule) -> None:
        self._schedule = schedule
        super().__init__(name, known)

    def _ready(self) -> Denoiser | None:
        return need_denoiser(self.known, self.name, AVATAR)

    def prepare_test(self, images: Tensor) -> Tensor:
        return images

    def _through(self, network: UNet, images: Tensor) -> Tensor:
        return regenerated(network, images, self._schedule, seed=0)


class LeakedPairs(Purify):
    """The denoiser is trained on `number` leaked pairs, chosen by key hash. known: deltas, images, keys.

    The clean control has no pairs that differ; its images are unchanged.
    """

    def __init__(self, known: Knowledge, number: int) -> None:
        self._number = number
        super().__init__(f"leaked-pairs:{number}", known)

    def _ready(self) -> Denoiser | None:
        if self._number < 2:
            raise SettingsError(f"regime {self.name!r}: at least 2 pairs are needed; one is held out")
        if self.known.deltas is None or self.known.images is None or self.known.keys is None:
            raise SettingsError(f"regime {self.name!r} needs the true delta of every training image; none are known")
        return None

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        assert self.known.images is not None, "checked by _ready"
        assert self.known.keys is not None, "checked by _ready"
        rows = changed_rows(self.known)
        if not rows:
            return images
        if len(rows) < self._number:
            raise SettingsError(f"regime {self.name!r}: only {len(rows):,} of the training images are protected")
        keys = [self.known.keys[row] for row in rows]
        leaked = torch.tensor(rows)[torch.tensor(hash_sample(keys, self._number, 0, "leaked-pairs"))]
        pairs = originals(self.known, leaked), self.known.images[leaked]
        self._denoiser = train_denoiser(*pairs, seed=0, device=self.known.device, recipe=DenoiserRecipe())
        self._look(without=frozenset(leaked.tolist()))
        return self._cleaned(images)


def changed_rows(known: Knowledge) -> list[int]:
    """Rows of the training images whose delta is not zero."""
    if known.deltas is None:
        return []
    return [int(row) for row in known.deltas.flatten(1).any(1).nonzero()[:, 0]]


def originals(known: Knowledge, rows: Tensor) -> Tensor:
    """Clean images of those rows, uint8: the published ones minus their true deltas."""
    assert known.images is not None, "images come with deltas"
    assert known.deltas is not None, "only called when they are known"
    return (known.images[rows].short() - known.deltas[rows]).clamp(0, 255).to(torch.uint8)
