"""Surrogates of baselines: built, trained, and what they make of pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings
from pipeline.baselines.trained.checkpoints import Stateful
from pipeline.baselines.trained.steps import resumable
from pipeline.deltas.sign_step import check_finite
from pipeline.hashing import derive
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.targets import build_target
from pipeline.relearning.training import Labelled, Recipe, Regime, Training

BATCH = 512  # of the passes over all pictures
FORWARD = 1 / 3  # share of a pass that its way there takes
TIMED_SECONDS = 0.5  # for which something is repeated to time it


def plain_recipe(epochs: int) -> Recipe:
    """SGD .1 with momentum .9, weight decay 5e-4, cosine: how all of these papers train, step schedules aside."""
    return Recipe(epochs=epochs, lr=0.1, schedule="cosine", nesterov=False, label_smoothing=0.0)


def new_surrogate(
    name: str, pictures: Labelled, settings: BaselineSettings, recipe: Recipe, regime: Regime | None = None
) -> Training:
    """An untrained surrogate with its optimiser, on the device; `regime` defaults to ordinary training."""
    network = build_target(
        name, num_labels(pictures), pictures.images.shape[-1], seed=derive(settings.seed, "baseline-surrogate")
    )
    training = Training(
        network,
        pictures.images,
        pictures.labels,
        regime or Regime(),
        recipe,
        derive(settings.seed, "baseline-training"),
        torch.device(settings.device),
    )
    training.regime.start(training)
    return training


def train_surrogate(
    training: Training, settings: BaselineSettings, on_epoch: Callable[[int], None], *parts: Stateful
) -> None:
    """Train for all epochs of the recipe, then leave the network in inference mode.

    on_epoch  is told how many epochs are done
    parts     that it changes
    Raises PromiseError for a loss that is not finite.
    """
    for epoch in resumable(settings, "surrogate", training.recipe.epochs, training, *parts):
        with named_randomness(training, "baseline-epoch", epoch):
            loss, _ = training.run_epoch(epoch)
        check_finite(torch.tensor(loss), "training the surrogate", epoch)
        on_epoch(epoch + 1)
    training.network.eval().requires_grad_(False)


def sgd_step(training: Training, loss: Tensor, rate: float, largest_gradient: float = float("inf")) -> None:
    """One optimiser step at `rate` times each group's factor, gradients clipped to a norm. Raises PromiseError."""
    check_finite(loss, "training the surrogate", training.step)
    training.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(training.network.parameters(), largest_gradient)
    for group, factor in zip(training.optimiser.param_groups, training.lr_factors, strict=True):
        group["lr"] = rate * factor
    training.optimiser.step()
    training.step += 1


def seconds_each(pictures: int, work: Callable[[], object]) -> float:
    """Seconds for each of the pictures that `work` takes, after a first time."""
    work()
    started, times = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < TIMED_SECONDS or not times:
        work()
        times += 1
    return spent / (times * pictures)


def num_labels(pictures: Labelled) -> int:
    """Number of labels, counting those without pictures below the largest."""
    return int(pictures.labels.max()) + 1


def batches(training: Training, count: int | None = None, *, first: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The first `count` pictures, or all, in order: rows, images float [B, 3, S, S] in [0, 1], labels.

    first  row to begin with
    """
    end = len(training.images) if count is None else count
    for start in range(first, end, BATCH):
        rows = slice(start, min(start + BATCH, end))
        yield rows, training.images[rows].float() / 255, training.labels[rows]


def cross_entropies(training: Training, labels: Tensor, images: Tensor) -> Tensor:
    """The surrogate's cross entropy for each image, float32 [B]."""
    return F.cross_entropy(training.scores(images), labels, reduction="none")


def embedded(training: Training, images: Tensor) -> Tensor:
    """Penultimate features of images in [0, 1], float32 [B, d]; unlike those of Training.features, differentiable."""
    with training.autocast():
        features: Tensor = training.network.embed(training.normalise(images))  # type: ignore[operator]
    return features.float()


@torch.no_grad()
def error_share(training: Training, labels: Tensor, images: Tensor) -> float:
    """Share of images, float [B, 3, S, S] in [0, 1], whose label the surrogate does not predict."""
    return float((training.scores(images).argmax(1) != labels).float().mean())
