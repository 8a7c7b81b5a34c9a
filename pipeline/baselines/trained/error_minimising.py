"""EM: noise with which a surrogate has nothing left to learn, and its adaptive forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.fitted import PUBLISHED_SURROGATE, SurrogateBaseline
from pipeline.baselines.trained.steps import Steps, resumable, scaled, sign_descent
from pipeline.baselines.trained.surrogate import (
    BATCH,
    FORWARD,
    batches,
    cross_entropies,
    error_share,
    new_surrogate,
    num_labels,
    plain_recipe,
    sgd_step,
)
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import colour_jitter
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.regimes.staged.progressive import ProgressiveTraining, StagedOptions
from pipeline.relearning.training import Labelled, Regime

RATE = 0.1
LARGEST_GRADIENT = 5.0
MODEL_STEPS = 10  # between two updates of the deltas
MOST_ROUNDS = 60  # the published loop has no end but its stop rule, which a surrogate that is held back may never meet
SEARCHED_SHARE = 0.2  # of the pictures, for class-wise deltas
LEAST_SEARCHED = 1_024  # a fifth of a small set would leave labels without pictures


@dataclass(frozen=True)
class Search:
    """How deltas are updated in a round, and the training error at which the search ends."""

    steps: Steps
    stop: float


SAMPLE_WISE = Search(Steps(20, 0.1), stop=0.01)
CLASS_WISE = Search(Steps(1, 0.1), stop=0.1)


class ErrorMinimising(SurrogateBaseline):
    """EM (Huang et al., ICLR 2021): deltas and surrogate both lower the training error, in turns.

    A round is 10 SGD steps of the surrogate on pictures + deltas, unaugmented and in fixed order, then one pass that
    moves the deltas: 20 sign steps each, or, class-wise, one step on a fifth of the pictures, of which a label's delta
    is the clamped mean. The search ends with a training error of 1 % (class-wise 10 %), or after 60 rounds; figures
    say which.

    colour  EM-T (Dang et al., section IV-C5): surrogate and deltas see pictures under random colour jitter and grey,
            drawn anew for each step as in the regime nt-cg, and so does the error that ends the search
    staged  EM-A: the surrogate is trained by ST, with a round for an epoch. Its ACM is measured on principal
            components; t-SNE after every ten steps would take most of the time
    """

    source = "Huang et al., ICLR 2021: published loop, stop rule and steps; T, A and AT: Dang et al., section IV-C5"

    def __init__(
        self,
        surrogate: str = PUBLISHED_SURROGATE,
        *,
        class_wise: bool = False,
        colour: bool = False,
        staged: bool = False,
    ) -> None:
        super().__init__(surrogate)
        self.per_sample = not class_wise
        self.colour, self.staged = colour, staged

    def passes(self, images: int, effort: float) -> float:
        root = effort**0.5  # of both, whose product is what is spent
        rounds, steps = scaled(MOST_ROUNDS, root), self.published.steps.at(root).count
        moved = self.searched(images) * (steps + FORWARD)
        return rounds * (MODEL_STEPS * min(BATCH, images) + moved)

    @property
    def published(self) -> Search:
        """The search at effort 1."""
        return SAMPLE_WISE if self.per_sample else CLASS_WISE

    def searched(self, images: int) -> int:
        """How many of the pictures deltas are moved on in a round."""
        return images if self.per_sample else min(images, max(int(SEARCHED_SHARE * images), LEAST_SEARCHED))

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        loop = MinimisingLoop(self, pictures, settings)
        for _ in resumable(settings, "rounds", loop.most_rounds, loop):
            if loop.error <= loop.search.stop:
                break
            loop.train()
            loop.move_deltas(told)
            loop.measure()
            told(loop.round / loop.most_rounds)
        self.figures = {"rounds": float(loop.round), "training_error": loop.error, "stop_at_error": loop.search.stop}
        return loop.deltas


class MinimisingLoop:
    """The surrogate and the deltas of one search.

    deltas  float32 [n, 3, S, S] in [0, 1] pixel units, class-wise [num_labels, 3, S, S]; 0 at first
    round   how many are done
    error   training error on the searched pictures with their deltas, as the surrogate saw them last
    """

    def __init__(self, method: ErrorMinimising, pictures: Labelled, settings: BaselineSettings) -> None:
        root = settings.effort**0.5
        self.search = Search(method.published.steps.at(root), method.published.stop)
        self.most_rounds = scaled(MOST_ROUNDS, root)
        self.round, self.error = 0, 1.0
        self._per_sample, self._colour, self._staged = method.per_sample, method.colour, method.staged
        self._settings = settings
        regime = ProgressiveTraining(StagedOptions(reduce="pca2")) if method.staged else Regime()
        recipe = plain_recipe(self.most_rounds)
        self.surrogate = new_surrogate(method.surrogate, pictures, settings, recipe, regime)
        count = len(pictures.images) if method.per_sample else num_labels(pictures)
        self.deltas = torch.zeros(count, *pictures.images.shape[1:], device=self.surrogate.device)
        self._searched = method.searched(len(pictures.images))
        if not method.per_sample:  # at least one picture of every label, or its delta would stay 0
            _, first = np.unique(pictures.labels.cpu().numpy(), return_index=True)
            self._searched = max(self._searched, 1 + int(first.max()))
        self._next = 0  # picture to go on with
        self._draws = 0

    def train(self) -> None:
        """Ten SGD steps on pictures + deltas; the regime may undo them."""
        surrogate = self.surrogate
        count = len(surrogate.images)
        with named_randomness(surrogate, "em-round", self.round):
            surrogate.regime.begin_epoch(surrogate, self.round)
            surrogate.network.train().requires_grad_(True)
            for _ in range(MODEL_STEPS):
                rows = (self._next + torch.arange(min(BATCH, count))) % count
                self._next = int(rows[-1]) + 1
                images, labels = self._protected(rows.to(surrogate.device))
                loss = F.cross_entropy(surrogate.scores(self._seen(images)), labels)
                sgd_step(surrogate, loss, RATE, LARGEST_GRADIENT)
            if self._staged:
                clean, surrogate.images = surrogate.images, self._published()
                surrogate.regime.end_epoch(surrogate, self.round)
                surrogate.images = clean
        surrogate.network.eval().requires_grad_(False)
        self.round += 1

    def move_deltas(self, told: Told = lambda share: None) -> None:
        """One pass over the searched pictures that moves their deltas.

        told  learns after each batch what share of all rounds is done; a round may take an hour
        """
        epsilon = self._settings.epsilon
        for rows, images, labels in batches(self.surrogate, self._searched):
            moved = sign_descent(
                partial(self._loss, labels),
                images,
                self.deltas[rows] if self._per_sample else self.deltas[labels],
                epsilon,
                self.search.steps,
            )
            if self._per_sample:
                self.deltas[rows] = moved
            else:
                self.deltas = class_means(moved, labels, self.deltas).clamp(-epsilon, epsilon)
            told((self.round - 1 + rows.stop / self._searched) / self.most_rounds)

    def measure(self) -> None:
        """Look for the training error again."""
        wrong = 0.0
        for rows, images, labels in batches(self.surrogate, self._searched):
            deltas = self.deltas[rows] if self._per_sample else self.deltas[labels]
            wrong += len(labels) * error_share(self.surrogate, labels, self._seen((images + deltas).clamp(0, 1)))
        self.error = wrong / self._searched

    def state(self) -> dict[str, Any]:
        counts = {"round": self.round, "error": self.error, "next": self._next, "draws": self._draws}
        return {"deltas": self.deltas.cpu(), "surrogate": self.surrogate.state(), **counts}

    def load(self, state: Mapping[str, Any]) -> None:
        self.deltas = state["deltas"].to(self.deltas.device)
        self.surrogate.load(state["surrogate"])
        self.round, self.error = state["round"], state["error"]
        self._next, self._draws = state["next"], state["draws"]

    def _protected(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures + deltas, float [B, 3, S, S] in [0, 1], and labels of `rows`."""
        images, labels = self.surrogate.images[rows].float() / 255, self.surrogate.labels[rows]
        return (images + self.deltas[rows if self._per_sample else labels]).clamp(0, 1), labels

    def _published(self) -> Tensor:
        """Pictures as ST has them: with their deltas, in whole levels, uint8 [n, 3, S, S]."""
        blocks = []
        for start in range(0, len(self.surrogate.images), BATCH):
            rows = torch.arange(start, min(start + BATCH, len(self.surrogate.images)), device=self.surrogate.device)
            blocks.append((255 * self._protected(rows)[0]).round().to(torch.uint8))
        return torch.cat(blocks)

    def _loss(self, labels: Tensor, images: Tensor) -> Tensor:
        return cross_entropies(self.surrogate, labels, self._seen(images))

    def _seen(self, images: Tensor) -> Tensor:
        if not self._colour:
            return images
        self._draws += 1
        return colour_jitter(images, torch_rng(self._settings.seed, "em-views", self._draws))


def class_means(deltas: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Mean delta of each label's pictures; labels without pictures keep the one `before`.

    deltas  float [B, 3, S, S]; labels int64 [B]; before float [num_labels, 3, S, S]
    A product of matrices rather than a scattered sum, whose order varies on a GPU.
    """
    members = F.one_hot(labels, len(before)).to(deltas.dtype)
    counts = members.sum(0)
    means = (members.T @ deltas.flatten(1)) / counts.clamp(min=1)[:, None]
    return torch.where((counts > 0)[:, None], means, before.flatten(1)).view_as(before)
