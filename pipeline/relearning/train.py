"""Training of one target under one regime, and what it learned, measured on clean test images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.augment import random_views, take
from pipeline.fingerprint import derive, torch_rng
from pipeline.relearning.regimes.base import Regime
from pipeline.relearning.target import SmallResNet, build_target

BATCH_SIZE = 128
SMALL_BATCH_SIZE = 64  # for fewer than SMALL images, so that a small set gets steps enough to be learnt
SMALL = 4_096
PEAK_LR = 0.15
WARM_UP = 0.25  # share of the steps
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class EpochScore:
    """One epoch: mean loss and accuracy on the augmented training batches, accuracy on the test images."""

    loss: float
    accuracy_train: float
    accuracy_test: float


@dataclass(frozen=True)
class TargetScore:
    """What a target learned; accuracies in [0, 1].

    accuracy_last   on the test images after the last epoch: the figure that counts
    accuracy_best   of the best epoch, chosen on the test images themselves ("oracle"): for diagnosis only
    accuracy_train  on the training batches of the last epoch
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


def train_target(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    regime: Regime,
    epochs: int,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TargetScore:
    """Train a SmallResNet from random weights on `images` as `regime` treats them; test it on `test_images`.

    images, test_images   uint8 [n, 3, S, S], S >= 32; labels, test_labels  int64 [n], 0 ... classes-1
    progress              called after each epoch with (epochs done, epochs)

    Recipe: SGD (Nesterov 0.9, weight decay 5e-4), one cycle to 0.15 with a quarter of warm-up, batches of 128 (64 for
    fewer than 4,096 images; what does not fill a batch is left out of the epoch), label smoothing 0.1, reflect-padded
    random crop and flip; channels_last; bf16 autocast on a GPU. Equal arguments give equal results on one machine with
    one number of threads. Raises ValueError for shapes that do not fit.
    """
    _check(images, labels)
    _check(test_images, test_labels)
    start = time.perf_counter()
    device = torch.device(device)
    train = regime.prepare(images, labels, seed=seed).to(device)
    test = regime.prepare_test(test_images).to(device)
    labels, test_labels = labels.to(device), test_labels.to(device)
    target = build_target(int(labels.max()) + 1, images.shape[-1], seed=derive(seed, "target-weights"))
    trainer = _Trainer(target, train, labels, regime, epochs, seed, device)
    history: list[EpochScore] = []
    for epoch in range(epochs):
        loss, accuracy_train = trainer.run_epoch(epoch)
        history.append(EpochScore(loss, accuracy_train, trainer.accuracy(test, test_labels)))
        if progress is not None:
            progress(epoch + 1, epochs)
        if not math.isfinite(loss):
            break
    return TargetScore(
        regime=regime.name,
        seed=seed,
        accuracy_last=history[-1].accuracy_test,
        accuracy_best=max(epoch_score.accuracy_test for epoch_score in history),
        accuracy_train=history[-1].accuracy_train,
        history=tuple(history),
        seconds=time.perf_counter() - start,
        diverged=not math.isfinite(history[-1].loss),
    )


class _Trainer:
    """Holds the target, its optimiser and the training images on the device."""

    def __init__(
        self,
        target: SmallResNet,
        images: Tensor,
        labels: Tensor,
        regime: Regime,
        epochs: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.target = target.to(device).to(memory_format=torch.channels_last)
        self.images, self.labels, self.regime, self.seed, self.device = images, labels, regime, seed, device
        self.batch_size = min(BATCH_SIZE if len(images) >= SMALL else SMALL_BATCH_SIZE, len(images))
        self.num_batches = len(images) // self.batch_size
        self.mean, self.std = _channel_statistics(images)
        self.loss = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
        self.optimiser = torch.optim.SGD(
            self.target.parameters(), lr=PEAK_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser,
            PEAK_LR,
            total_steps=epochs * self.num_batches + 1,
            pct_start=WARM_UP,
            cycle_momentum=False,
        )

    def run_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over the training images in random order; mean loss and accuracy of its batches."""
        rng = torch_rng(self.seed, "relearning-epoch", epoch)
        order = torch.randperm(len(self.images), generator=rng)
        self.target.train()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for step in range(self.num_batches):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size].to(self.device)
            batch = _crop_and_flip(self.images[rows], rng).float().div_(255)
            batch = self._normalise(self.regime.batch(batch, rng))
            with self._autocast():
                scores = self.target(batch)
            loss = self.loss(scores.float(), self.labels[rows])
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            loss_sum += loss.detach()
            correct += (scores.argmax(1) == self.labels[rows]).sum()
        seen = self.num_batches * self.batch_size
        return float(loss_sum) / self.num_batches, float(correct) / seen

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose highest score is their label; no augmentation."""
        self.target.eval()
        correct = 0
        for start in range(0, len(images), 512):
            batch = self._normalise(images[start : start + 512].float().div_(255))
            with self._autocast():
                scores = self.target(batch)
            correct += int((scores.argmax(1) == labels[start : start + 512]).sum())
        return correct / len(images)

    def _normalise(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        # bf16 gains nothing on CPUs (measured), and float32 there is the same on more machines
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def _crop_and_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Shift by up to a sixteenth of the side (at least 4 pixels), mirrored at the border; flip half of the images."""
    side = images.shape[-1]
    return take(images, random_views(len(images), side, side, max(4, side // 16), rng))


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
