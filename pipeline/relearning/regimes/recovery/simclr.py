"""SimCLR: features learnt without labels, then a linear probe (Chen et al. 2020; Zhang et al. 2023, section 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.hashing import derive
from pipeline.relearning.regimes.recovery.dfr import fit_head
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Recipe, Training

TEMPERATURE = 0.07
PROJECTION = 128


class ContrastivePretraining(Regime):
    """The target's trunk is trained contrastively on two views of each image; its head is then fitted on the features.

    Views: resized crop (.2 to 1), flip, colour jitter (.4, .4, .4, .1; p .8), grey (p .2), blur (sigma .1 to 2, p .5).
    Projection linear-ReLU-linear to 128, temperature .07. The probe uses the protected images and their labels. Until
    it is fitted, per-epoch accuracies are meaningless. The learning rate is a tenth of the recipe's.
    """

    name = "simclr"

    def __init__(self) -> None:
        self._projection: nn.Module | None = None
        self._views: nn.Module | None = None

    def recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe, lr=recipe.lr / 10)  # at the full rate the features collapse (measured)

    def start(self, training: Training) -> None:
        head, side = training.network.head, training.side
        assert isinstance(head, nn.Linear), "a target's head is one linear layer"
        width = head.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(training.seed, "simclr-projection"))
            projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))
        self._projection = projection.to(training.device)
        for name, parameter in projection.named_parameters():
            training.optimiser.add_param_group({"params": [parameter], "name": f"projection.{name}"})
            training.lr_factors.append(1.0)
        self._views = _random_views(side)

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        assert self._projection is not None, "start was not called"
        assert self._views is not None, "start was not called"
        views = self._views(torch.cat([images, images])).clamp(0, 1)
        with training.autocast():
            features = training.network.embed(training.normalise(views))  # type: ignore[operator]
            projected = self._projection(features)
            scores = training.network.head(features[: len(images)].detach())  # type: ignore[operator]
        return contrastive_loss(projected.float()), scores.detach().float()

    def finish(self, training: Training) -> None:
        fit_head(training, training.images, training.labels)

    def state(self) -> dict[str, Tensor]:
        return {} if self._projection is None else dict(self._projection.state_dict())

    def load(self, state: dict[str, Tensor]) -> None:
        assert self._projection is not None, "start was not called"
        self._projection.load_state_dict(state)


def contrastive_loss(projected: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean cross entropy of picking out the other view of the same image (NT-Xent).

    projected  float [2 B, d], not normalised: all first views, then all second views in the same order
    """
    count = len(projected) // 2
    directions = F.normalize(projected, dim=1)
    similarity = directions @ directions.T / temperature
    similarity = similarity.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=projected.device), -torch.inf)
    partners = torch.arange(2 * count, device=projected.device).roll(count)
    return F.cross_entropy(similarity, partners)


def _random_views(side: int) -> nn.Module:
    import kornia.augmentation as augmentation

    width = max(3, side // 10 | 1)  # a tenth of the side, odd
    return nn.Sequential(
        augmentation.RandomResizedCrop((side, side), scale=(0.2, 1.0)),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((width, width), (0.1, 2.0), p=0.5),
    )
