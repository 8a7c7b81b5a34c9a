"""Adversaries who know how protections are made, or have some clean images, or the deltas themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import SettingsError
from pipeline.hashing import derive, torch_rng
from pipeline.measures.removal import estimate_deltas
from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.regimes.recovery.subtract import SubtractEstimate
from pipeline.relearning.regimes.requirements import as_tested, named_randomness, need_clean_images, need_clean_set
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training

_BLOCK = 1024
_FINE_TUNING_EPOCHS = 5


class AdaptedNormalisation(Regime):
    """AdaBN: after training, recompute batch-norm statistics on unlabelled clean images (Li et al. 2017).

    This undoes a mere distribution shift between protected training images and clean test images. known: clean_images.
    """

    name = "adabn"

    def __init__(self, known: Knowledge) -> None:
        self._images = need_clean_images(known, self.name)

    def check_network(self, network: nn.Module) -> None:
        if not _batch_norms(network):
            raise SettingsError("regime 'adabn' needs a target with batch normalisation; this one has none")

    @torch.no_grad()
    def finish(self, training: Training) -> None:
        layers = _batch_norms(training.network)
        momenta = [layer.momentum for layer in layers]
        training.network.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
            layer.train()
        images = as_tested(training, self._images)
        for batch in images.chunk(max(1, len(images) // training.batch_size)):
            training.scores(training.central(batch).float().div(255))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        training.network.eval()


class DeltaJitter(SubtractEstimate):
    """In every epoch each training image gets another group's estimated delta, with a random sign.

    Deltas are then no longer evidence of a class. Groups and estimates are those of SubtractEstimate("either"). With a
    single group, its own delta is added or subtracted. When joined with a regime that changes images, it goes second.
    """

    def __init__(self, known: Knowledge) -> None:
        super().__init__("either", known)
        self.name = "delta-jitter"
        self._deltas = torch.zeros(0)
        self._groups = torch.zeros(0, dtype=torch.int64)
        self._images = torch.zeros(0, dtype=torch.uint8)

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        pixels = images.cpu().numpy()
        groups = self._group(pixels, labels.cpu().numpy(), seed)
        self._deltas = torch.from_numpy(estimate_deltas(pixels, groups, epsilon=self.known.epsilon)["iterated"])
        self._groups = torch.from_numpy(np.asarray(groups, dtype=np.int64))
        return images

    def start(self, training: Training) -> None:
        self._images = training.images
        self._deltas = self._deltas.to(training.device)

    def begin_epoch(self, training: Training, epoch: int) -> None:
        rng = torch_rng(training.seed, "delta-jitter", epoch)
        count, num_groups = len(self._groups), len(self._deltas)
        step = torch.randint(1, num_groups, (count,), generator=rng) if num_groups > 1 else 0
        others = ((self._groups + step) % num_groups).to(training.device)
        signs = (2 * torch.randint(2, (count, 1, 1, 1), generator=rng) - 1).to(training.device)
        training.images = torch.empty_like(self._images)
        for start in range(0, count, _BLOCK):
            rows = slice(start, start + _BLOCK)
            jittered = self._images[rows] + signs[rows] * self._deltas[others[rows]]
            training.images[rows] = jittered.round().clamp(0, 255).to(torch.uint8)


class DeltaKnown(Regime):
    """Subtract the true delta of every training image and clip to 8 bits: the upper limit for any removal.

    known: deltas, one per training image.
    """

    name = "delta-known"

    def __init__(self, known: Knowledge) -> None:
        if known.deltas is None:
            raise SettingsError("regime 'delta-known' needs the true delta of every training image; none are known")
        self._deltas = known.deltas

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        if self._deltas.shape != images.shape:
            raise SettingsError(
                f"regime 'delta-known' needs one delta per training image; deltas are {tuple(self._deltas.shape)}, "
                f"images are {tuple(images.shape)}"
            )
        return (images.to(torch.int16) - self._deltas.to(images.device)).clamp(0, 255).to(torch.uint8)


class FewClean(Regime):
    """After training, fine-tune the target on a few clean images: five epochs at a tenth of the learning rate.

    known: clean_images with clean_labels.
    """

    name = "few-clean"

    def __init__(self, known: Knowledge) -> None:
        self._images, self._labels = need_clean_set(known, self.name)

    def finish(self, training: Training) -> None:
        from pipeline.relearning.training import Training  # that module imports regimes

        recipe = replace(training.recipe, epochs=_FINE_TUNING_EPOCHS, lr=training.recipe.lr / 10)
        images = as_tested(training, self._images)
        seed = derive(training.seed, "few-clean-tuning")
        tuning = Training(*(training.network, images, self._labels, Regime(), recipe, seed, training.device))
        tuning.mean, tuning.std = training.mean, training.std
        with named_randomness(training, "few-clean"):
            for epoch in range(_FINE_TUNING_EPOCHS):
                tuning.run_epoch(epoch)


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
