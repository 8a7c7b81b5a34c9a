"""Pictures pushed by one trained surrogate: EMaxN, AEP / TAP, HYPO and DUNE's spatial branch."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.checkpoints import Figures, Stateful, Tensors
from pipeline.baselines.trained.fitted import PUBLISHED_SURROGATE, SurrogateBaseline
from pipeline.baselines.trained.steps import Objective, Steps, resumable, scaled, sign_descent
from pipeline.baselines.trained.surrogate import (
    BATCH,
    FORWARD,
    batches,
    cross_entropies,
    error_share,
    new_surrogate,
    num_labels,
    plain_recipe,
    train_surrogate,
)
from pipeline.fitting.proxy_training import augmented
from pipeline.hashing import torch_rng
from pipeline.relearning.training import Labelled, Training

EPOCHS = 40
TRAINING_SHARE = 0.5  # of the progress that is told


def trained_surrogate(
    name: str, pictures: Labelled, settings: BaselineSettings, told: Told, copies: int = 0
) -> tuple[Training, Copies]:
    """The surrogate that all methods of this file push with: 40 epochs at effort 1, crops and flips.

    copies  how many to keep from its training, evenly spread, the last one at its end
    """
    epochs = _epochs(settings.effort, copies)
    training = new_surrogate(name, pictures, settings, plain_recipe(epochs))
    kept = Copies(training.network)

    def on_epoch(done: int) -> None:
        if done * copies // epochs > (done - 1) * copies // epochs:
            kept.add()
        told(TRAINING_SHARE * done / epochs)

    train_surrogate(training, settings, on_epoch, kept)
    return training, kept


class PushedBySurrogate(SurrogateBaseline):
    """A baseline that trains its surrogate first.

    copies  of the surrogate at different times that it needs
    """

    copies = 0

    def passes(self, images: int, effort: float) -> float:
        return images * (_epochs(effort, self.copies) + self.passes_each(effort))

    @abstractmethod
    def passes_each(self, effort: float) -> float:
        """The most passes that pushing takes for each picture, as in `passes`."""


def _epochs(effort: float, copies: int) -> int:
    return max(scaled(EPOCHS, effort), copies)


class Copies:
    """Frozen copies of a network at different times of its training."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.networks: list[nn.Module] = []

    def add(self) -> None:
        """One more, of the network as it is now."""
        self.networks.append(copy.deepcopy(self._network).eval().requires_grad_(False))

    def state(self) -> dict[str, Any]:
        return {str(number): network.state_dict() for number, network in enumerate(self.networks)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.networks = []
        for weights in state.values():
            self.add()
            self.networks[-1].load_state_dict(weights)


class ErrorMaximising(PushedBySurrogate):
    """EMaxN (Koh and Liang's aim, min-max noise of Huang et al., ICLR 2021): deltas raise a trained surrogate's error.

    Passes of 20 sign steps, each from the deltas of the pass before, until the surrogate is wrong on 90 % of the
    pictures or 10 passes are done; figures say which.
    """

    source = "Huang et al., ICLR 2021, min-max: published steps and stop rule; at most 10 passes"
    steps = Steps(20, 0.1)
    stop = 0.9
    most_passes = 10

    def passes_each(self, effort: float) -> float:
        most, steps = self._budget(effort)
        return most * (steps.count + FORWARD)

    def _budget(self, effort: float) -> tuple[int, Steps]:
        """Passes, at most, and steps: the root of the effort of each, for their product is what is spent."""
        return scaled(self.most_passes, effort**0.5), self.steps.at(effort**0.5)

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        surrogate, _ = trained_surrogate(self.surrogate, pictures, settings, told)
        most, steps = self._budget(settings.effort)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        reached = Figures(passes=0.0, training_error=0.0)
        for done in resumable(settings, "passes", most, surrogate, Tensors(deltas), reached):
            if reached.values["training_error"] >= self.stop:
                break
            wrong = 0.0
            for rows, images, labels in batches(surrogate):
                away = partial(_away, surrogate, labels)
                deltas[rows] = sign_descent(away, images, deltas[rows], settings.epsilon, steps)
                wrong += len(labels) * error_share(surrogate, labels, (images + deltas[rows]).clamp(0, 1))
            reached.values.update(passes=done + 1.0, training_error=wrong / len(deltas))
            told(TRAINING_SHARE + (1 - TRAINING_SHARE) * (done + 1) / most)
        self.figures = reached.values | {"stop_at_error": self.stop, "steps": float(steps.count)}
        return deltas


class AdversarialPoisons(PushedBySurrogate):
    """AEP / TAP (Fowl et al., NeurIPS 2021): adversarial examples of a trained surrogate.

    250 sign steps of a twentieth of epsilon under random crops and flips, drawn anew for each step, from 8 random
    starts. Of these, each picture keeps the one with the lowest loss; the paper keeps the best start of all pictures.

    targeted  towards label + 1 (TAP, also AdvPoison); if not, away from the label, which the authors call brittle
    """

    source = "Fowl et al., NeurIPS 2021: published steps and restarts, best start chosen for each picture"
    steps = Steps(250, 0.05)
    restarts = 8

    def __init__(self, surrogate: str = PUBLISHED_SURROGATE, *, targeted: bool = True) -> None:
        super().__init__(surrogate)
        self.targeted = targeted

    def passes_each(self, effort: float) -> float:
        restarts, steps = self._budget(effort)
        return restarts * (steps.count + FORWARD)

    def _budget(self, effort: float) -> tuple[int, Steps]:
        """Restarts and steps: the root of the effort of each, for their product is what is spent."""
        return scaled(self.restarts, effort**0.5), self.steps.at(effort**0.5)

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        surrogate, _ = trained_surrogate(self.surrogate, pictures, settings, told)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        for rows, images, labels in pushed_batches(surrogate, settings, deltas):
            push = partial(_away, surrogate, labels)
            if self.targeted:
                push = partial(cross_entropies, surrogate, (labels + 1) % num_labels(pictures))
            rng = torch_rng(settings.seed, "tap", rows.start)
            deltas[rows] = self._best_of_restarts(push, images, settings, rng)
            told(TRAINING_SHARE + (1 - TRAINING_SHARE) * rows.stop / len(deltas))
        restarts, steps = self._budget(settings.effort)
        self.figures = {"restarts": float(restarts), "steps": float(steps.count)}
        return deltas

    def _best_of_restarts(
        self, push: Objective, images: Tensor, settings: BaselineSettings, rng: torch.Generator
    ) -> Tensor:
        epsilon, (restarts, steps) = settings.epsilon, self._budget(settings.effort)
        best, lowest = torch.zeros_like(images), torch.full((len(images),), torch.inf, device=images.device)
        for _ in range(restarts):
            start = epsilon * (2 * torch.rand(images.shape, generator=rng) - 1).to(images.device)
            found = sign_descent(lambda moved: push(augmented(moved, rng)), images, start, epsilon, steps)
            with torch.no_grad():
                losses = push((images + found).clamp(0, 1))
            best = torch.where((losses < lowest)[:, None, None, None], found, best)
            lowest = torch.minimum(lowest, losses)
        return best


class Hypocritical(PushedBySurrogate):
    """HYPO (Tao et al., NeurIPS 2021, P2): a trained surrogate finds the pictures easier than they are.

    100 sign steps of a tenth of epsilon towards the own label, from zero, without augmentation: the L-infinity form of
    APBench (the authors' own is bounded in L2).
    """

    source = "Tao et al., NeurIPS 2021, P2, in the L-infinity form of APBench (Qin et al. 2023)"
    steps = Steps(100, 0.1)

    def passes_each(self, effort: float) -> float:
        return self.steps.at(effort).count

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        surrogate, _ = trained_surrogate(self.surrogate, pictures, settings, told)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        for rows, images, labels in pushed_batches(surrogate, settings, deltas):
            towards, steps = partial(cross_entropies, surrogate, labels), self.steps.at(settings.effort)
            deltas[rows] = sign_descent(towards, images, deltas[rows], settings.epsilon, steps)
            told(TRAINING_SHARE + (1 - TRAINING_SHARE) * rows.stop / len(deltas))
        self.figures = {"steps": float(self.steps.at(settings.effort).count)}
        return deltas


class DuneSpatial(PushedBySurrogate):
    """The spatial branch of DUNE (arXiv 2605.01718): steps through several checkpoints of one training.

    30 sign steps of a sixteenth of epsilon towards label + 3 (+ 1 with three labels or fewer), from zero, along the
    mean gradient of 5 checkpoints. DUNE's other branch shifts the colours of a class by more than epsilon.
    """

    source = "arXiv 2605.01718, spatial branch alone: published steps, target and number of checkpoints"
    steps = Steps(30, 0.0625)
    copies = 5
    offset = 3

    def passes_each(self, effort: float) -> float:
        return self.steps.at(effort).count * self.copies

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        surrogate, kept = trained_surrogate(self.surrogate, pictures, settings, told, self.copies)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        count = num_labels(pictures)
        for rows, images, labels in pushed_batches(surrogate, settings, deltas, kept):
            targets = (labels + (self.offset if count > self.offset else 1)) % count
            push, steps = partial(_mean_loss, surrogate, kept.networks, targets), self.steps.at(settings.effort)
            deltas[rows] = sign_descent(push, images, deltas[rows], settings.epsilon, steps)
            told(TRAINING_SHARE + (1 - TRAINING_SHARE) * rows.stop / len(deltas))
        self.figures = {"steps": float(self.steps.at(settings.effort).count)}
        return deltas


def pushed_batches(
    surrogate: Training, settings: BaselineSettings, deltas: Tensor, *parts: Stateful
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As batches, but from where the checkpoint is; their deltas are what is kept."""
    count = math.ceil(len(deltas) / BATCH)
    for number in resumable(settings, "push", count, surrogate, Tensors(deltas), *parts):
        yield next(batches(surrogate, first=number * BATCH))


def _away(surrogate: Training, labels: Tensor, images: Tensor) -> Tensor:
    return -cross_entropies(surrogate, labels, images)


def _mean_loss(surrogate: Training, networks: Sequence[nn.Module], targets: Tensor, images: Tensor) -> Tensor:
    """Cross entropy for each image, mean over networks, float32 [B]."""
    with surrogate.autocast():
        scores = [network(surrogate.normalise(images)).float() for network in networks]
    return torch.stack([F.cross_entropy(of_one, targets, reduction="none") for of_one in scores]).mean(0)
