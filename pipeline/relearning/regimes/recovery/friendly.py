"""Friendly noise: as much noise as an image bears before the target's answer changes, to drown what was added to it.

Liu, Yang and Mirzasoleiman, Friendly Noise against Adversarial Noise (NeurIPS 2022), with the settings of their code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.hashing import torch_rng
from pipeline.relearning.training import Regime, Training

BEGINS = 5 / 40  # of the epochs
BOUND = 16 / 255
START = 8 / 255  # bound of the noise before the first step
RANDOM = 8 / 255  # every value of a training batch is changed by this much, up or down
STEPS, LR, MOMENTUM = 30, 100.0, 0.9
DROPS = (STEPS // 2, STEPS // 4 * 3)  # steps after which the learning rate falls to a tenth
WEIGHT = 1.0  # of the noise's size
BATCH = 128


class FriendlyNoise(Regime):
    """After an eighth of the epochs, add friendly noise to the training images; to every batch, add random signs.

    The noise takes as long to make as thirty epochs do.
    """

    name = "friendly-noise"

    def __init__(self) -> None:
        self._noise: Tensor | None = None
        self._is_added = False

    def begin_epoch(self, training: Training, epoch: int) -> None:
        if self._noise is None and epoch >= max(1, round(BEGINS * training.recipe.epochs)):
            self._noise = friendly_noise(training)
        if self._noise is not None and not self._is_added:
            noisy = training.images.short() + self._noise.to(training.device)
            training.images = noisy.clamp_(0, 255).to(torch.uint8)
            self._is_added = True

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        signs = 2 * torch.randint(2, images.shape, generator=rng).to(images.device) - 1
        return images + RANDOM * signs  # beyond black and white, too, as in the authors' code

    def state(self) -> dict[str, Tensor]:
        return {} if self._noise is None else {"noise": self._noise}

    def load(self, state: dict[str, Tensor]) -> None:
        self._noise = state.get("noise")


def friendly_noise(training: Training) -> Tensor:
    """Noise for every training image, int8 [n, 3, S, S] in 8-bit levels of at most 16, on the CPU.

    Minimises the divergence of the target's answers, KL(clean || noisy), minus the mean square of the noise.
    """
    training.network.eval()
    parts = []
    for at in range(0, len(training.images), BATCH):
        images = training.images[at : at + BATCH].float().div_(255)
        rng = torch_rng(training.seed, "friendly-noise", at)
        start = (2 * torch.rand(images.shape, generator=rng) - 1) * START
        noise = _grown(training, images, start.to(training.device)).clamp_(-BOUND, BOUND)
        parts.append(noise.mul_(255).round_().to("cpu", torch.int8))
    return torch.cat(parts)


def _grown(training: Training, images: Tensor, noise: Tensor) -> Tensor:
    """The noise of one batch after all steps."""
    with torch.no_grad():
        answers = F.log_softmax(training.scores(training.central(images)), 1)
    noise.requires_grad_()
    optimiser = torch.optim.SGD([noise], lr=LR, momentum=MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, DROPS)
    for _ in range(STEPS):
        bounded = noise.clamp(-BOUND, BOUND)
        scores = training.scores(training.central((images + bounded).clamp(0, 1)))
        harm = F.kl_div(F.log_softmax(scores, 1), answers, reduction="batchmean", log_target=True)
        (noise.grad,) = torch.autograd.grad(harm - WEIGHT * bounded.square().mean(), noise)
        optimiser.step()
        schedule.step()
    return noise.detach()
