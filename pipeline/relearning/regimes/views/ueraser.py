"""UEraser: strong augmentation, using the draw that the target finds hardest (Qin et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.relearning.regimes.views.policies import each_image
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training

DRAWS = 5
HARDEST = 0.3  # of the epochs


class UEraserLite(Regime):
    """One draw per image: plasma brightness, plasma contrast, shuffled channels (each p .5), then TrivialAugment.

    As released: plasma roughness .3 to .7, brightness intensity .5 to 1.
    """

    name = "ueraser-lite"

    def __init__(self) -> None:
        import kornia.augmentation as augmentation

        self._plasma = nn.Sequential(
            augmentation.RandomPlasmaBrightness(roughness=(0.3, 0.7), intensity=(0.5, 1.0), p=0.5),
            augmentation.RandomPlasmaContrast(roughness=(0.3, 0.7), p=0.5),
            augmentation.RandomChannelShuffle(p=0.5),
        )
        self._policy = v2.TrivialAugmentWide()

    def draw(self, images: Tensor) -> Tensor:
        """Augment images, float [B, 3, H, W] in [0, 1] -> same."""
        return each_image(self._policy, self._plasma(images).clamp(0, 1))

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return self.draw(images)


class UEraser(UEraserLite):
    """The draw with the largest loss out of five per image: always (-max), or in the first 0.3 of the epochs.

    The authors' README says 60 of 200 epochs, their script 50.
    """

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.name = "ueraser-max" if always else "ueraser"
        self.always = always
        self.draws = DRAWS

    def begin_epoch(self, training: Training, epoch: int) -> None:
        self.draws = DRAWS if self.always or epoch < HARDEST * training.recipe.epochs else 1

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return images  # only `loss` can tell which draw is the hardest

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.stack([self.draw(images) for _ in range(self.draws)])
        hardest = drawn[0] if self.draws == 1 else self._hardest(training, drawn, labels)
        return super().loss(training, hardest, labels, rng)

    @torch.no_grad()
    def _hardest(self, training: Training, drawn: Tensor, labels: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(training.scores(images), labels, reduction="none") for images in drawn])
        return drawn[losses.argmax(0), torch.arange(len(labels), device=labels.device)]
