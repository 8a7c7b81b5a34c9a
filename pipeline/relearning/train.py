"""Train one target under one regime and measure on clean test images what it learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.hashing import derive
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.targets import build_target
from pipeline.relearning.training import EpochScore, Labelled, Recipe, Regime, ScoredOn, Training

_Tests = dict[str, tuple[Tensor, Tensor]]  # name -> images as the regime treats them, labels


@dataclass(frozen=True)
class TargetScore:
    """What a target learned; accuracies in [0, 1].

    accuracy_last        on the test images at the end: the figure that counts
    accuracy_best        of the best epoch, or at the end, by the test images themselves (an oracle): for diagnosis only
    accuracy_train       on the training batches of the last epoch
    accuracy_early_stop  on the test images after the best epoch on the held-out images; None without those
    extra_tests          accuracy on further test sets, by name; if they are followed, also in the figures of each epoch
    accuracy_holdout     on the held-out images at the end; None without those
    seconds              time of the whole training: what the regime does before the first epoch and after the last one,
                         epochs and tests
    train_seconds        time of all epochs, excluding tests
    notes                of on_epoch (see Training)
    diverged             the loss became non-finite and training stopped; excluded from averages
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
    accuracy_holdout: float | None = None
    extra_tests: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    train_seconds: float = 0.0
    notes: tuple[dict[str, Any], ...] = ()


def train_target(
    train: Labelled,
    scored_on: ScoredOn,
    *,
    regime: Regime,
    seed: int,
    target: str = "small",
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    device: str | torch.device = "cpu",
    resume: dict[str, Any] | None = None,
    on_epoch: Callable[[Training], None] | None = None,
) -> TargetScore:
    """Train a target from random weights on images as `regime` treats them, and score it.

    train     images of a side of at least 32 pixels
    target    a name known to pipeline.relearning.targets
    resume    what Training.state() returned after an earlier epoch
    on_epoch  called after each epoch; training.history[-1] is its score

    Uses channels_last, and bfloat16 autocast where supported. Deterministic for a given CPU and number of
    threads; on a GPU, sums may vary in their last bits.
    """
    started = time.perf_counter()
    device, test = torch.device(device), scored_on.test
    recipe = regime.recipe(recipe)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    side = recipe.seen_side(train.images.shape[-1])
    network = build_target(target, num_classes, side, seed=derive(seed, "target-weights"), dropout=recipe.dropout)
    regime.check_network(network)
    prepared = regime.prepare(train.images, train.labels, seed=seed)
    training = Training(network, prepared, train.labels, regime, recipe, seed, device)
    tests = {"test": (regime.prepare_test(test.images).to(device), test.labels.to(device))}
    if (holdout := scored_on.holdout) is not None:
        tests["holdout"] = (regime.prepare_test(holdout.images).to(device), holdout.labels.to(device))
    regime.start(training)
    extra = {name: (regime.prepare_test(one.images), one.labels) for name, one in scored_on.extra.items()}
    training.seconds = time.perf_counter() - started
    if resume is not None:
        training.load(resume)
    while (place := regime.place(training)) is not None:
        if training.history and not math.isfinite(training.history[-1].loss):
            break
        training.history.append(_epoch(training, place, tests, extra if scored_on.follow else {}))
        if on_epoch is not None:
            on_epoch(training)
    return _score(training, tests, extra)


def _epoch(training: Training, place: int, tests: _Tests, extra: _Tests) -> EpochScore:
    started, epoch = time.perf_counter(), len(training.history)
    # dropout and library augmentations draw from torch's global generators
    with named_randomness(training, "relearning-global", epoch):
        training.regime.begin_epoch(training, epoch)
        loss, accuracy_train = training.run_epoch(epoch, place)
        training.train_seconds += time.perf_counter() - started
        figures = training.regime.end_epoch(training, epoch)
    reached = {name: training.accuracy(*test) for name, test in tests.items()}
    figures = figures | {name: training.accuracy(*one) for name, one in extra.items()}
    score = EpochScore(loss, accuracy_train, reached["test"], reached.get("holdout"), figures)
    training.seconds += time.perf_counter() - started
    return score


def _score(training: Training, tests: _Tests, extra: _Tests) -> TargetScore:
    """Finish a training: the regime's last step, then the tests that count."""
    started, history, regime = time.perf_counter(), training.history, training.regime
    diverged = not math.isfinite(history[-1].loss)
    if not diverged:
        regime.finish(training)
    reached = {name: training.accuracy(*test) for name, test in (tests | extra).items()}
    return TargetScore(
        regime=regime.name,
        seed=training.seed,
        accuracy_last=reached["test"],
        accuracy_best=max(reached["test"], *(score.accuracy_test for score in history)),
        accuracy_train=history[-1].accuracy_train,
        accuracy_early_stop=_early_stop(history),
        history=tuple(history),
        accuracy_holdout=reached.get("holdout"),
        seconds=training.seconds + time.perf_counter() - started,
        diverged=diverged,
        extra_tests={name: reached[name] for name in extra},
        images_per_second=len(history) * training.num_batches * training.batch_size / max(training.train_seconds, 1e-9),
        train_seconds=training.train_seconds,
        notes=tuple(training.notes),
    )


def _early_stop(history: list[EpochScore]) -> float | None:
    """Test accuracy of the best epoch on the held-out images; ties go to the earlier epoch."""
    scored = [score for score in history if score.accuracy_holdout is not None]
    if not scored:
        return None
    return max(scored, key=lambda score: score.accuracy_holdout or 0.0).accuracy_test
