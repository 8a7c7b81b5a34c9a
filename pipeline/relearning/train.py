"""Training of one target under one regime, and what it learned, measured on clean test images."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import random_views, take
from pipeline.fingerprint import derive, torch_rng
from pipeline.relearning.precision import autocast
from pipeline.relearning.regimes.base import Regime
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.targets import build_target
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


@dataclass(frozen=True)
class TargetScore:
    """What a target learned; accuracies in [0, 1].

    accuracy_last   on the test images at the end: the figure that counts
    accuracy_best   of the best epoch, chosen on the test images themselves ("oracle"): for diagnosis only
    accuracy_train  on the training batches of the last epoch
    accuracy_early_stop  on the test images after the epoch that was best on the held-out images; None without them
    extra_tests     accuracy on further test sets, by name
    seconds         of all epochs, tests included; train_seconds  without them
    diverged        the loss became non-finite and training stopped; such a run is not averaged with others
    """

    regime: str
    seed: int
    accuracy_last: float
    accuracy_best: float
    accuracy_train: float
    history: tuple[EpochScore, ...]
    seconds: float
    diverged: bool
    accuracy_early_stop: float | None = None
    extra_tests: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    train_seconds: float = 0.0


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


def train_target(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    regime: Regime,
    seed: int,
    epochs: int | None = None,
    target: str = "small",
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    device: str | torch.device = "cpu",
    holdout: tuple[Tensor, Tensor] | None = None,
    extra_tests: dict[str, Tensor] | None = None,
    resume: dict[str, Any] | None = None,
    on_epoch: Callable[[Training], None] | None = None,
) -> TargetScore:
    """Train a target from random weights on `images` as `regime` treats them; test it on `test_images`.

    images, test_images   uint8 [n, 3, S, S], S >= 32; labels, test_labels  int64 [n], 0 ... classes-1
    target                a name of pipeline.relearning.target
    epochs                those of the recipe, unless given here
    holdout               clean images and labels, neither trained on nor tested, scored after each epoch
    extra_tests           further versions of the test images, by name, tested at the end
    resume                what Training.state() returned after an earlier epoch
    on_epoch              called after each epoch; training.history[-1] is its score

    channels_last; bf16 autocast where the device has it (GPUs, and CPUs with avx512_bf16 or AMX: twice as fast there).
    Equal arguments give equal results on one machine with one number of threads. Raises ValueError for shapes that do
    not fit.
    """
    _check(images, labels)
    _check(test_images, test_labels)
    device = torch.device(device)
    recipe = regime.recipe(recipe if epochs is None else replace(recipe, epochs=epochs))
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    network = build_target(
        target, num_classes, images.shape[-1], seed=derive(seed, "target-weights"), dropout=recipe.dropout
    )
    prepared = regime.prepare(images, labels, seed=seed)
    training = Training(network, prepared, labels, regime, recipe, seed, device)
    tests = {"test": (regime.prepare_test(test_images).to(device), test_labels.to(device))}
    if holdout is not None:
        tests["holdout"] = (regime.prepare_test(holdout[0]).to(device), holdout[1].to(device))
    regime.start(training)
    if resume is not None:
        training.load(resume)
    for epoch in range(len(training.history), recipe.epochs):
        if training.history and not math.isfinite(training.history[-1].loss):
            break
        training.history.append(_epoch(training, epoch, tests))
        if on_epoch is not None:
            on_epoch(training)
    return _score(training, *tests["test"], extra_tests or {})


def _epoch(training: Training, epoch: int, tests: dict[str, tuple[Tensor, Tensor]]) -> EpochScore:
    started = time.perf_counter()
    # dropout and libraries' augmentations draw from torch's global generators
    with named_randomness(training, "relearning-global", epoch):
        training.regime.begin_epoch(training, epoch)
        loss, accuracy_train = training.run_epoch(epoch)
        training.train_seconds += time.perf_counter() - started
        figures = training.regime.end_epoch(training, epoch)
    reached = {name: training.accuracy(*test) for name, test in tests.items()}
    score = EpochScore(loss, accuracy_train, reached["test"], reached.get("holdout"), figures)
    training.seconds += time.perf_counter() - started
    return score


def _score(training: Training, test: Tensor, test_labels: Tensor, extra: dict[str, Tensor]) -> TargetScore:
    """The end of a training: what the regime still does, then the tests that count."""
    history, regime = training.history, training.regime
    diverged = not math.isfinite(history[-1].loss)
    if not diverged:
        regime.finish(training)
    return TargetScore(
        regime=regime.name,
        seed=training.seed,
        accuracy_last=training.accuracy(test, test_labels),
        accuracy_best=max(score.accuracy_test for score in history),
        accuracy_train=history[-1].accuracy_train,
        accuracy_early_stop=_early_stop(history),
        history=tuple(history),
        seconds=training.seconds,
        diverged=diverged,
        extra_tests={
            name: training.accuracy(regime.prepare_test(images), test_labels) for name, images in extra.items()
        },
        images_per_second=len(history) * training.num_batches * training.batch_size / max(training.train_seconds, 1e-9),
        train_seconds=training.train_seconds,
    )


def _early_stop(history: list[EpochScore]) -> float | None:
    """Test accuracy of the epoch that was best on the held-out images; the first of equals."""
    scored = [score for score in history if score.accuracy_holdout is not None]
    if not scored:
        return None
    return max(scored, key=lambda score: score.accuracy_holdout or 0.0).accuracy_test


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [3, 1, 1], in [0, 1] units, computed in blocks."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=images.device)
    for start in range(0, len(images), 512):
        values = images[start : start + 512].double() / 255
        sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / 3)
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]


def _check(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [n, 3, S, S]; they are {images.dtype} {tuple(images.shape)}")
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
