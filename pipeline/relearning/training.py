"""A target in training, and what a regime may do to it: the two know each other, so they stand together.

Ordinary training (NT) is the base of all regimes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.fingerprint import torch_rng
from pipeline.pictures.augment import random_views, take
from pipeline.relearning.precision import autocast
from pipeline.schedules import cosine, one_cycle

SMALL = 4_096  # fewer images are trained in smaller batches, so that a small set gets steps enough to be learnt
TEST_BATCH = 512


@dataclass(frozen=True)
class Recipe:
    """How a target is trained; equal for clean and protected images.

    batch_size     None: 128, or 64 for fewer than 4,096 images; what does not fill a batch is left out of the epoch
    schedule       one_cycle: up over `warm_up` of the steps, then down to zero; cosine: from lr to zero, per step
    padding        pixels of reflection for the random crop; None: a sixteenth of the side, at least 4
    """

    epochs: int = 12
    batch_size: int | None = None
    lr: float = 0.15
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    warm_up: float = 0.25
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    dropout: float = 0.0
    padding: int | None = None

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        is_cycle = self.schedule == "one_cycle"
        return self.lr * (one_cycle(step, steps, self.warm_up) if is_cycle else cosine(step, steps))


@dataclass(frozen=True)
class EpochScore:
    """One epoch: mean loss and accuracy on the training batches, accuracy on the test images, the regime's figures.

    accuracy_holdout  on clean images that are neither trained on nor test images; None where there are none
    """

    loss: float
    accuracy_train: float
    accuracy_test: float
    accuracy_holdout: float | None = None
    figures: dict[str, float] = field(default_factory=dict)


class Regime:
    """Ordinary training (NT); every other regime overrides what it does differently.

    The hooks stand in the order in which training calls them. Images and batches are on the training's device;
    generators (`rng`) are on the CPU, so that every device draws the same.
    """

    name = "nt"

    def recipe(self, recipe: Recipe) -> Recipe:
        """The settings of training, before anything is built."""
        return recipe

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Once: training images uint8 [n, 3, H, W] and labels int64 [n] -> images of the same shape and dtype."""
        return images

    def prepare_test(self, images: Tensor) -> Tensor:
        """Once: test images uint8 [n, 3, H, W] -> the same; for what is done to every image asked about."""
        return images

    def start(self, training: Training) -> None:
        """Once, before the first epoch (again after a restart: what must survive belongs into `state`)."""

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Per step, after crop and flip: float [B, 3, H, W] in [0, 1] -> the same."""
        return images

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Per step: the loss (scalar, to be minimised), and scores [B, classes] to count training accuracy with.

        images  float [B, 3, H, W] in [0, 1] as `batch` left them, labels int64 [B]
        """
        scores = training.scores(images)
        return training.criterion(scores, labels), scores

    def begin_epoch(self, training: Training, epoch: int) -> None:
        """Before each epoch, 0, 1, …: for example learning rates by layer."""

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        """After each epoch, before it is tested: may roll the epoch back; returns figures for the epoch's history."""
        return {}

    def finish(self, training: Training) -> None:
        """After the last epoch, before the final test: for example to refit a layer."""

    def state(self) -> dict[str, Tensor]:
        """What the regime itself must remember across a restart, by name."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up `state` again."""


class Training:
    """A target in training: the network, its optimiser, and the images on the device. Regimes work on this.

    images, labels   uint8 [n, 3, S, S] as the regime prepared them, int64 [n], on `device`
    lr_factors       one number per parameter group of the optimiser, multiplied with the scheduled rate
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        regime: Regime,
        recipe: Recipe,
        seed: int,
        device: torch.device,
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.images, self.labels = images.to(device), labels.to(device)
        self.regime, self.recipe, self.seed, self.device = regime, recipe, seed, device
        self.batch_size = min(recipe.batch_size or (128 if len(images) >= SMALL else 64), len(images))
        self.num_batches = len(images) // self.batch_size
        self.mean, self.std = _channel_statistics(self.images)
        self.optimiser = self._optimiser()
        self.lr_factors = [1.0] * len(self.optimiser.param_groups)
        self.step = 0
        self.history: list[EpochScore] = []
        self.seconds = self.train_seconds = 0.0

    def _optimiser(self) -> torch.optim.SGD:
        """SGD with one parameter group per parameter, so that a regime may slow any of them."""
        recipe = self.recipe
        groups = [{"params": [p], "name": name} for name, p in self.network.named_parameters() if p.requires_grad]
        nesterov = recipe.nesterov and recipe.momentum > 0
        return torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov
        )

    def run_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over the training images in random order; mean loss and accuracy of its batches."""
        rng = torch_rng(self.seed, "relearning-epoch", epoch)
        order = torch.randperm(len(self.images), generator=rng)
        self.step = epoch * self.num_batches
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for number in range(self.num_batches):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size].to(self.device)
            batch = self.regime.batch(self._views(self.images[rows], rng).float().div_(255), rng)
            self.network.train()
            loss, scores = self.regime.loss(self, batch, self.labels[rows], rng)
            self.descend(loss)
            loss_sum += loss.detach()
            correct += (scores.argmax(1) == self.labels[rows]).sum()
        seen = self.num_batches * self.batch_size
        return float(loss_sum) / self.num_batches, float(correct) / seen

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser at the scheduled rate times each group's factor."""
        rate = self.recipe.rate(self.step, self.recipe.epochs * self.num_batches)
        for group, factor in zip(self.optimiser.param_groups, self.lr_factors, strict=True):
            group["lr"] = rate * factor
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.step += 1

    def criterion(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=self.recipe.label_smoothing)

    def scores(self, images: Tensor) -> Tensor:
        """Class scores float32 [B, classes] of images float [B, 3, H, W] in [0, 1], in whatever mode the network is."""
        with self.autocast():
            found: Tensor = self.network(self.normalise(images))
        return found.float()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features float32 [n, d] of images uint8 [n, 3, S, S], in inference mode, not augmented."""
        self.network.eval()
        found = []
        for start in range(0, len(images), TEST_BATCH):
            batch = images[start : start + TEST_BATCH].to(self.device).float().div_(255)
            with self.autocast():
                found.append(self.network.embed(self.normalise(batch)).float())  # type: ignore[operator]
        return torch.cat(found)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images uint8 whose highest score is their label, in inference mode, not augmented."""
        self.network.eval()
        correct = 0
        for start in range(0, len(images), TEST_BATCH):
            batch = images[start : start + TEST_BATCH].to(self.device).float().div_(255)
            found = self.scores(batch).argmax(1)
            correct += int((found == labels[start : start + TEST_BATCH].to(self.device)).sum())
        return correct / len(images)

    def normalise(self, images: Tensor) -> Tensor:
        """By the training images' own mean and deviation, unless the network does it as its weights expect."""
        if getattr(self.network, "normalises_itself", False):
            return images
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return autocast(self.device)

    def weights(self) -> dict[str, Any]:
        """A copy of weights, buffers and optimiser state: what a rolled-back epoch must give back."""
        return {
            "network": copy.deepcopy(self.network.state_dict()),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
        }

    def restore(self, weights: dict[str, Any]) -> None:
        """Take back what `weights` returned; the copy stays usable."""
        self.network.load_state_dict(weights["network"])
        self.optimiser.load_state_dict(copy.deepcopy(weights["optimiser"]))

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, for torch.save; loadable with weights_only."""
        return {
            "weights": self.weights(),
            "lr_factors": list(self.lr_factors),
            "history": [vars(score) for score in self.history],
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "regime": self.regime.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.restore(state["weights"])
        self.lr_factors = list(state["lr_factors"])
        self.history = [EpochScore(**score) for score in state["history"]]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.regime.load(state["regime"])

    def _views(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Random crop of mirrored borders; half of the images flipped."""
        side = images.shape[-1]
        padding = max(4, side // 16) if self.recipe.padding is None else self.recipe.padding
        return take(images, random_views(len(images), side, side, padding, rng))


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [3, 1, 1], in [0, 1] units, computed in blocks."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=images.device)
    for start in range(0, len(images), 512):
        values = images[start : start + 512].double() / 255
        sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / 3)
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
