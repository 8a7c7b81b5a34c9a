"""Adversarial training (AT): every batch is first perturbed, within a bound, to maximise the target's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training


class AdversarialTraining(Regime):
    """Training on PGD examples only (Madry et al., ICLR 2018), generated with the network in inference mode.

    epsilon   L-infinity bound, in [0, 1] pixel units
    step      step size, likewise. 4/255 with step .8/255 follows Fu et al. (ICLR 2022, robust error-minimising noise),
              8/255 with step 2/255 follows APBench (Qin et al. 2023)
    steps     number of PGD steps, from a uniform random start within the bound
    """

    def __init__(self, name: str, epsilon: float, step: float, steps: int = 10) -> None:
        self.name = name
        self.epsilon, self.step, self.steps = epsilon, step, steps

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        offset = self.epsilon * (2 * torch.rand(images.shape, generator=rng) - 1).to(images.device)
        training.network.eval()
        moved = pgd(
            *(training.scores, images, labels), epsilon=self.epsilon, step=self.step, steps=self.steps, offset=offset
        )
        training.network.train()
        scores = training.scores(moved)
        return training.criterion(scores, labels), scores


def pgd(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    offset: Tensor,
) -> Tensor:
    """Projected gradient ascent on the cross entropy; the result lies within epsilon of `images` and within [0, 1].

    scores    maps images float [B, 3, H, W] in [0, 1] -> class scores [B, C]
    offset    starting point relative to `images`, within +-epsilon
    """
    moved = (images + offset).clamp(0, 1).detach()
    for _ in range(steps):
        moved.requires_grad_(True)
        gradient = torch.autograd.grad(F.cross_entropy(scores(moved), labels), moved)[0]
        delta = (moved.detach() + step * gradient.sign() - images).clamp(-epsilon, epsilon)
        moved = (images + delta).clamp(0, 1).detach()
    return moved
