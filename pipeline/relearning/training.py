"""A target in training, and the hooks through which a regime acts on it.

The two classes refer to each other, so they share a module. Ordinary training (NT) is the base of all regimes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.hashing import torch_rng
from pipeline.pictures.augment import random_views, take
from pipeline.precision import autocast
from pipeline.relearning.presets import recipe_settings
from pipeline.schedules import cosine, one_cycle

SMALL = 4_096  # with fewer images batches are smaller, so that a small set gets enough steps
TEST_BATCH = 512


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with their labels.

    images  uint8 [n, 3, S, S]
    labels  int64 [n], 0 … classes - 1
    Raises ValueError for anything else.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [n, 3, S, S]; they are {images.dtype} {tuple(images.shape)}")
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(f"{len(labels)} labels for {len(images)} images")


@dataclass(frozen=True, eq=False)
class ScoredOn:
    """What a target is scored on.

    test     clean test images
    holdout  clean images that are neither trained on nor test images, scored after each epoch
    extra    further versions of test images, by name, scored at the end
    follow   score them after each epoch as well
    """

    test: Labelled
    holdout: Labelled | None = None
    extra: Mapping[str, Labelled] = field(default_factory=dict)
    follow: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a target is trained; the same for clean and protected images.

    batch_size     None: 128, or 64 for fewer than 4,096 images
    keep_last      use the incomplete last batch of an epoch, if it has more than one image (which batch norm needs)
    normalise      train: by mean and deviation of the training images; half: to [-1, 1]; none
    schedule       one_cycle: up over the first `warm_up` of the steps, then down to zero; cosine: from lr to zero
    padding        pixels of reflection padding for the random crop; None: a sixteenth of the side, at least 4
    oversize       factor on the side at which images are kept: a target trains on random windows of the side itself,
                   without padding, and is tested on the central one. 1: images are kept at the side
    """

    epochs: int = 12
    batch_size: int | None = None
    keep_last: bool = False
    normalise: Literal["train", "half", "none"] = "train"
    lr: float = 0.15
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    warm_up: float = 0.25
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    dropout: float = 0.0
    padding: int | None = None
    oversize: float = 1.0

    def kept_side(self, side: int) -> int:
        """Side at which images are kept, for targets that see `side`."""
        return round(side * self.oversize)

    def seen_side(self, kept: int) -> int:
        """The inverse of kept_side."""
        return round(kept / self.oversize)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at `step`, 0 … steps - 1."""
        is_cycle = self.schedule == "one_cycle"
        return self.lr * (one_cycle(step, steps, self.warm_up) if is_cycle else cosine(step, steps))


def recipe_of(name: str) -> Recipe:
    """The recipe of this name, which changed_recipe may have made."""
    return Recipe(**recipe_settings(name))


@dataclass(frozen=True)
class EpochScore:
    """One epoch: mean loss and accuracy on the training batches, accuracy on the test images, the regime's figures.

    accuracy_holdout  on clean images used for neither training nor testing; None if there are none
    """

    loss: float
    accuracy_train: float
    accuracy_test: float
    accuracy_holdout: float | None = None
    figures: dict[str, float] = field(default_factory=dict)


class Regime:
    """Ordinary training (NT); every other regime overrides what it does differently.

    Hooks are listed in the order in which training calls them. Images and batches are on the training's device;
    generators (`rng`) are on the CPU, so that every device draws the same numbers.
    """

    name = "nt"
    chooses_weights = False  # in `finish`, which then comes before that of the regime it is joined with

    def recipe(self, recipe: Recipe) -> Recipe:
        """Adjust the training settings, before anything is built."""
        return recipe

    def check_network(self, network: nn.Module) -> None:
        """Raise SettingsError if a target lacks what the regime needs; also asked before anything is trained."""

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Once: training images, uint8 [n, 3, H, W], and labels, int64 [n] -> images of the same shape and dtype."""
        return images

    def prepare_test(self, images: Tensor) -> Tensor:
        """Once per test set: images, uint8 [n, 3, H, W] -> same; for what the adversary does to every image."""
        return images

    def start(self, training: Training) -> None:
        """Once, before the first epoch, and again after a restart: what must survive belongs in `state`."""

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Per step, after crop and flip: float [B, 3, H, W] in [0, 1] -> same."""
        return images

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Per step: the scalar loss to minimise, and scores [B, classes] for training accuracy.

        images  float [B, 3, H, W] in [0, 1], as returned by `batch`
        labels  int64 [B]
        """
        scores = training.scores(images)
        return training.criterion(scores, labels), scores

    def begin_epoch(self, training: Training, epoch: int) -> None:
        """Before each epoch 0, 1, …: for example, to set learning rates by layer."""

    def place(self, training: Training) -> int | None:
        """Where in the schedule the next epoch stands, 0 … recipe.epochs - 1; None if training is over."""
        done = len(training.history)
        return done if done < training.recipe.epochs else None

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        """After each epoch, before it is tested; may roll the epoch back. Returns figures for the history."""
        return {}

    def finish(self, training: Training) -> None:
        """After the last epoch, before the final test: for example, to refit a layer."""

    def state(self) -> dict[str, Tensor]:
        """What the regime must remember across a restart, by name."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`."""


class Training:
    """A target in training: the network, its optimiser, and the images on the device. Regimes act on this.

    images       uint8 [n, 3, S, S], as prepared by the regime, on `device`
    labels       int64 [n], on `device`
    rows         int64 [n], their numbers among the images that training began with, on the CPU
    side         of what the network sees of them: S, or less if they are kept oversize
    lr_factors   one factor on the scheduled learning rate per parameter group of the optimiser
    notes        what on_epoch wants to find again after a restart: dicts of numbers, texts and lists of them
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
        self.rows = torch.arange(len(images))
        self.regime, self.recipe, self.seed, self.device = regime, recipe, seed, device
        self.side = recipe.seen_side(images.shape[-1])
        self.batch_size = min(recipe.batch_size or (128 if len(images) >= SMALL else 64), len(images))
        self.num_batches = self._count_batches()
        self.mean, self.std = _normalisation(self.images, recipe)
        self.optimiser = self._optimiser()
        self.lr_factors = [1.0] * len(self.optimiser.param_groups)
        self.step = 0
        self.history: list[EpochScore] = []
        self.seconds = self.train_seconds = 0.0
        self.notes: list[dict[str, Any]] = []

    def _optimiser(self) -> torch.optim.SGD:
        """SGD with one group per parameter, so that a regime can slow any of them."""
        recipe = self.recipe
        groups = [{"params": [p], "name": name} for name, p in self.network.named_parameters() if p.requires_grad]
        nesterov = recipe.nesterov and recipe.momentum > 0
        return torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov
        )

    def run_epoch(self, epoch: int, place: int | None = None) -> tuple[float, float]:
        """One pass over the training images in random order; returns mean loss and accuracy over its batches.

        epoch  names the order and the views
        place  where in the learning-rate schedule the epoch stands; None: at `epoch`
        """
        rng = torch_rng(self.seed, "relearning-epoch", epoch)
        order = torch.randperm(len(self.images), generator=rng)
        self.step = (epoch if place is None else place) * self.num_batches
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
        seen = min(self.num_batches * self.batch_size, len(self.images))
        return float(loss_sum) / self.num_batches, float(correct) / seen

    def keep(self, rows: Tensor) -> None:
        """From now on, train on only these of the images; the learning rate still follows the epochs."""
        self.rows = self.rows[rows.cpu()]
        rows = rows.to(self.device)
        self.images, self.labels = self.images[rows], self.labels[rows]
        self.batch_size = min(self.batch_size, len(self.images))
        self.num_batches = self._count_batches()

    def _count_batches(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (self.recipe.keep_last and rest > 1)

    def descend(self, loss: Tensor) -> None:
        """One optimiser step at the scheduled rate times each group's factor."""
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
        """Class scores, float32 [B, classes], of images, float [B, 3, H, W] in [0, 1], in the network's mode."""
        with self.autocast():
            scores: Tensor = self.network(self.normalise(images))
        return scores.float()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, float32 [n, d], of the centres of images, uint8 [n, 3, S, S]; inference mode."""
        self.network.eval()
        blocks = []
        for start in range(0, len(images), TEST_BATCH):
            batch = self.central(images[start : start + TEST_BATCH]).to(self.device).float().div_(255)
            with self.autocast():
                blocks.append(self.network.embed(self.normalise(batch)).float())  # type: ignore[operator]
        return torch.cat(blocks)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Accuracy on the centres of images, uint8 [n, 3, S, S]; inference mode."""
        self.network.eval()
        correct = 0
        for start in range(0, len(images), TEST_BATCH):
            batch = self.central(images[start : start + TEST_BATCH]).to(self.device).float().div_(255)
            predicted = self.scores(batch).argmax(1)
            correct += int((predicted == labels[start : start + TEST_BATCH].to(self.device)).sum())
        return correct / len(images)

    def central(self, images: Tensor) -> Tensor:
        """What the network sees of test images [n, 3, S, S]: [n, 3, side, side]."""
        start = (images.shape[-1] - self.side) // 2
        return images[..., start : start + self.side, start : start + self.side]

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise as the recipe says, unless the network normalises by itself."""
        if getattr(self.network, "normalises_itself", False):
            return images
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return autocast(self.device)

    def weights(self) -> dict[str, Any]:
        """A copy of weights, buffers and optimiser state, for rolling an epoch back."""
        return {
            "network": copy.deepcopy(self.network.state_dict()),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
        }

    def restore(self, weights: dict[str, Any]) -> None:
        """Restore what `weights` returned; the copy stays usable."""
        self.network.load_state_dict(weights["network"])
        self.optimiser.load_state_dict(copy.deepcopy(weights["optimiser"]))

    def state(self) -> dict[str, Any]:
        """Everything the next epoch depends on, for torch.save; loadable with weights_only."""
        return {
            "weights": self.weights(),
            "lr_factors": list(self.lr_factors),
            "history": [vars(score) for score in self.history],
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "notes": self.notes,
            "regime": self.regime.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""
        self.restore(state["weights"])
        self.lr_factors = list(state["lr_factors"])
        self.history = [EpochScore(**score) for score in state["history"]]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.notes = state["notes"]
        self.regime.load(state["regime"])

    def _views(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Random crops, with reflection padding if images are no larger than they; half of the images flipped."""
        kept = images.shape[-1]
        padding = max(4, kept // 16) if self.recipe.padding is None else self.recipe.padding
        return take(images, random_views(len(images), kept, self.side, padding if kept == self.side else 0, rng))


def _normalisation(images: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What is subtracted, and what is divided by, [3, 1, 1], in [0, 1] units."""
    if recipe.normalise == "train":
        return _channel_statistics(images)
    halves = torch.full((3, 1, 1), 0.5, device=images.device)
    return (halves, halves) if recipe.normalise == "half" else (0 * halves, 2 * halves)


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [3, 1, 1], in [0, 1] units, computed in blocks."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=images.device)
    for start in range(0, len(images), 512):
        values = images[start : start + 512].double() / 255
        sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / 3)
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
