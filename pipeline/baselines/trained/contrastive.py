"""CP and TUE: noise that makes contrastive learning easy, so that it learns nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.checkpoints import Tensors, Weights
from pipeline.baselines.trained.fitted import PUBLISHED_SURROGATE, FittedBaseline, SurrogateBaseline
from pipeline.baselines.trained.steps import resumable, scaled
from pipeline.baselines.trained.surrogate import (
    BATCH,
    embedded,
    new_surrogate,
    num_labels,
    plain_recipe,
    seconds_each,
    sgd_step,
)
from pipeline.deltas.sign_step import check_finite
from pipeline.hashing import derive, torch_rng
from pipeline.relearning.regimes.recovery.simclr import PROJECTION, contrastive_loss
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.training import Labelled
from pipeline.schedules import cosine

RATE = 0.5
WEIGHT_DECAY = 1e-4
TEMPERATURE = 0.5
STEP = 0.1  # times epsilon
SEPARATION_EPOCHS, SEPARATION_STEPS = 40, 20
TINY = 1e-5


@dataclass(frozen=True)
class Phase:
    """One of the two parts of CP.

    batches  the surrogate is trained on, and deltas are moved on, in an epoch; None: all pictures
    steps    of the deltas of each batch
    """

    epochs: int
    batches: int | None
    steps: int


CLASS_WISE = Phase(1_000, 20, 1)
SAMPLE_WISE = Phase(200, None, 5)


class ContrastivePoisons(SurrogateBaseline):
    """CP (He, Zha and Katabi, ICLR 2023) against SimCLR: deltas and surrogate lower the contrastive loss, in turns.

    First CP-C, from random noise for each label: 1,000 epochs of 20 SGD steps and 20 sign steps of a tenth of epsilon.
    Its deltas are where CP-S starts, with new weights: 200 epochs of a pass of the surrogate and one of 5 sign steps
    of every picture's own delta. Both views of a picture carry its delta. The learning rate is scaled down with the
    batch where there are fewer than 512 pictures.

    class_wise  end after CP-C
    """

    source = "He, Zha and Katabi, ICLR 2023: published views, loss, steps and epochs for SimCLR"

    def __init__(self, surrogate: str = PUBLISHED_SURROGATE, *, class_wise: bool = False) -> None:
        super().__init__(surrogate)
        self.per_sample = not class_wise

    def passes(self, images: int, effort: float) -> float:
        """Of a picture, in two views."""
        phases = (CLASS_WISE, SAMPLE_WISE) if self.per_sample else (CLASS_WISE,)
        batch = min(BATCH, images)
        batches = [min(images // batch, phase.batches or images) for phase in phases]
        return sum(
            scaled(phase.epochs, effort) * count * batch * (1 + phase.steps)
            for phase, count in zip(phases, batches, strict=True)
        )

    def seconds_of_pass(self, some: Labelled, settings: BaselineSettings) -> float:
        rows = torch.arange(len(some.images))
        loop = ContrastiveLoop(self.surrogate, some, rows, torch.zeros(some.images.shape), settings, SAMPLE_WISE)
        loop.training.network.train()
        return seconds_each(len(rows), lambda: sgd_step(loop.training, loop.loss(rows, loop.deltas), rate=0.0))

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        share = 0.5 if self.per_sample else 1.0
        rng = torch_rng(settings.seed, "cp-start")
        shape = (num_labels(pictures), *pictures.images.shape[1:])
        start = settings.epsilon * (2 * torch.rand(shape, generator=rng) - 1)
        rows = pictures.labels
        loop = ContrastiveLoop(self.surrogate, pictures, rows, start, settings, CLASS_WISE)
        loop.run(lambda done: told(share * done))
        self.figures = {"class_wise_epochs": float(loop.epochs)}
        if not self.per_sample:
            return loop.deltas
        start = loop.deltas[pictures.labels.to(loop.deltas.device)]
        loop = ContrastiveLoop(
            self.surrogate, pictures, torch.arange(len(pictures.images)), start, settings, SAMPLE_WISE
        )
        loop.run(lambda done: told(share + (1 - share) * done))
        self.figures |= {"sample_wise_epochs": float(loop.epochs)}
        return loop.deltas


class ContrastiveLoop:
    """A surrogate with a projection, and deltas; `delta_of` says which of them each picture carries, int64 [n]."""

    def __init__(
        self,
        surrogate: str,
        pictures: Labelled,
        delta_of: Tensor,
        deltas: Tensor,
        settings: BaselineSettings,
        phase: Phase,
    ) -> None:
        self.epochs = scaled(phase.epochs, settings.effort)
        self._settings, self._phase = settings, phase
        recipe = replace(plain_recipe(self.epochs), weight_decay=WEIGHT_DECAY)
        self.training = new_surrogate(surrogate, pictures, settings, recipe)
        head = self.training.network.head
        assert isinstance(head, nn.Linear), "a target's head is one linear layer"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, "cp-projection"))
            layers = nn.Linear(head.in_features, head.in_features), nn.ReLU(), nn.Linear(head.in_features, PROJECTION)
        self._projection = nn.Sequential(*layers).to(self.training.device)
        self.training.optimiser.add_param_group({"params": list(self._projection.parameters())})
        self.training.lr_factors.append(1.0)
        self.deltas, self._delta_of = deltas.clone().to(self.training.device), delta_of.to(self.training.device)
        self._views = _contrastive_views(pictures.images.shape[-1])
        self._batch = min(BATCH, len(delta_of))

    def run(self, told: Told) -> None:
        """All epochs."""
        rate = RATE * self._batch / BATCH
        parts = self.training, Weights(self._projection), Tensors(self.deltas)
        for epoch in resumable(self._settings, f"cp-{self._phase.epochs}", self.epochs, *parts):
            with named_randomness(self.training, "cp-epoch", self._phase.epochs, epoch):
                self._freeze(False)
                for rows in self._order("cp-model", epoch):
                    loss = self.loss(rows, self.deltas[self._delta_of[rows]])
                    sgd_step(self.training, loss, rate * cosine(epoch, self.epochs))
                self._freeze(True)
                for rows in self._order("cp-deltas", epoch):
                    self._move(rows)
            told((epoch + 1) / self.epochs)

    def loss(self, rows: Tensor, deltas: Tensor) -> Tensor:
        """Contrastive loss of two views of pictures + deltas."""
        images = (self.training.images[rows].float() / 255 + deltas).clamp(0, 1)
        views = torch.cat([self._views(images), self._views(images)]).clamp(0, 1)
        return contrastive_loss(self._projection(embedded(self.training, views)), TEMPERATURE)

    def _move(self, rows: Tensor) -> None:
        """Sign steps of the deltas that these pictures carry."""
        carried = torch.unique(self._delta_of[rows])
        place = torch.searchsorted(carried, self._delta_of[rows])
        members = nn.functional.one_hot(place, len(carried)).float()  # a product sums in the same order everywhere
        for step in range(self._phase.steps):
            deltas = self.deltas[carried].requires_grad_()
            spread = (members @ deltas.flatten(1)).view(len(rows), *deltas.shape[1:])
            loss = self.loss(rows, spread)
            check_finite(loss, "moving the deltas", step)
            (gradient,) = torch.autograd.grad(loss, deltas)
            epsilon = self._settings.epsilon
            self.deltas[carried] = (deltas.detach() - STEP * epsilon * gradient.sign()).clamp(-epsilon, epsilon)

    def _order(self, purpose: str, epoch: int) -> list[Tensor]:
        """Full batches of an epoch in random order."""
        rng = torch_rng(self._settings.seed, purpose, self._phase.epochs, epoch)
        order = torch.randperm(len(self._delta_of), generator=rng).to(self.training.device)
        return [rows for rows in torch.split(order, self._batch) if len(rows) == self._batch][: self._phase.batches]

    def _freeze(self, frozen: bool) -> None:
        self.training.network.train(not frozen).requires_grad_(not frozen)
        self._projection.requires_grad_(not frozen)


class SeparableNoise(FittedBaseline):
    """TUE (Ren et al., ICLR 2023) as its published command for SimCLR runs it.

    There the contrastive loss has weight 0, so no network has a part in it: the noise of each picture alone is moved
    to lower the class-wise separability discriminant of shuffled batches of 512, from a random start, by 20 sign steps
    of a tenth of epsilon in each of 40 epochs.
    """

    source = "Ren et al., ICLR 2023: the published command for SimCLR, which weighs the contrastive loss with 0"

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        epochs, epsilon = scaled(SEPARATION_EPOCHS, settings.effort), settings.epsilon
        start = torch.rand(pictures.images.shape, generator=torch_rng(settings.seed, "tue-start"))
        deltas = epsilon * (2 * start - 1)
        for epoch in resumable(settings, "epochs", epochs, Tensors(deltas)):
            order = torch.randperm(len(deltas), generator=torch_rng(settings.seed, "tue-order", epoch))
            for rows in torch.split(order, BATCH):
                noise, labels = deltas[rows].to(settings.device), pictures.labels[rows].to(settings.device)
                for step in range(SEPARATION_STEPS if len(torch.unique(labels)) > 1 else 0):
                    loss = separability_discriminant(noise.requires_grad_().flatten(1), labels)
                    check_finite(loss, "moving the deltas", step)
                    (gradient,) = torch.autograd.grad(loss, noise)
                    noise = (noise.detach() - STEP * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
                deltas[rows] = noise.cpu()
            told((epoch + 1) / epochs)
        self.figures = {"epochs": float(epochs)}
        return deltas


def separability_discriminant(points: Tensor, labels: Tensor) -> Tensor:
    """CSD: mean over pairs of labels of (spread of one + spread of the other) / distance of their centres; a scalar.

    points  float [B, d] of at least two labels; the spread is the mean distance to the centre
    As in the published code, no gradient passes through the spreads.
    """
    present = torch.unique(labels)
    members = nn.functional.one_hot(torch.searchsorted(present, labels), len(present)).to(points.dtype)
    counts = members.sum(0)
    centres = (members.T @ points) / counts[:, None]
    spread = (members.T @ (points - members @ centres).norm(dim=1) / counts).detach()
    others = ~torch.eye(len(present), dtype=torch.bool, device=points.device)
    ratios = (spread[:, None] + spread + TINY)[others] / (torch.cdist(centres, centres)[others] + TINY)
    mean: Tensor = ratios.mean()
    return mean


def _contrastive_views(side: int) -> nn.Module:
    import kornia.augmentation as augmentation  # imported here: it takes a second that most commands do not need

    return nn.Sequential(
        augmentation.RandomResizedCrop((side, side), scale=(0.2, 1.0)),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
    )
