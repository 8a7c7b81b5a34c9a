"""Plain regularisation: dropout, weight decay and early stopping on clean images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.regimes.requirements import as_tested, need_clean_set
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Recipe, Training


class Dropout(Regime):
    """Dropout of 0.5 on the penultimate features."""

    name = "dropout"

    def recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe, dropout=0.5)


class WeightDecay(Regime):
    """Ten times the recipe's weight decay."""

    name = "weight-decay"

    def recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe, weight_decay=10 * recipe.weight_decay)


class EarlyStop(Regime):
    """Keep the weights of the epoch that scores best on clean images, which are never the test images.

    Protections often take over only after some epochs (Sandoval-Segura et al. 2022). Ties go to the earlier epoch. When
    joined with a regime that rolls epochs back, it goes second: st+early-stop. Each epoch's figures include
    `accuracy_clean_set`. known: clean_images with clean_labels.
    """

    name = "early-stop"
    chooses_weights = True

    def __init__(self, known: Knowledge) -> None:
        self._images, self._labels = need_clean_set(known, self.name)
        self._best = -1.0
        self._weights: dict[str, Tensor] = {}

    def start(self, training: Training) -> None:
        self._images = as_tested(training, self._images)

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        accuracy = training.accuracy(self._images, self._labels)
        if accuracy > self._best:
            self._best = accuracy
            self._weights = {name: value.detach().clone() for name, value in training.network.state_dict().items()}
        return {"accuracy_clean_set": accuracy}

    def finish(self, training: Training) -> None:
        training.network.load_state_dict(self._weights)

    def state(self) -> dict[str, Tensor]:
        weights = {f"network/{name}": value for name, value in self._weights.items()}
        return {"best": torch.tensor(self._best, dtype=torch.float64)} | weights

    def load(self, state: dict[str, Tensor]) -> None:
        self._best = float(state["best"])
        self._weights = {name.partition("/")[2]: value for name, value in state.items() if name != "best"}
