"""MI-UE: noise under which the features of a label point in one direction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.checkpoints import Tensors
from pipeline.baselines.trained.fitted import SurrogateBaseline
from pipeline.baselines.trained.steps import Steps, resumable, scaled, sign_descent
from pipeline.baselines.trained.surrogate import batches, embedded, new_surrogate, plain_recipe, sgd_step
from pipeline.hashing import torch_rng
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.training import Labelled, Training
from pipeline.schedules import cosine

RATE = 0.1
WEIGHT_DECAY = 1e-4
EPOCHS = 100
STEPS = 10  # of the deltas after each epoch
FIRST_STEP, LAST_STEP = 0.025, 0.05  # times epsilon
TEMPERATURE = 0.1


class MutualInformation(SurrogateBaseline):
    """MI-UE (Zhu et al., ICLR 2026, arXiv 2603.03725): features of a label are drawn together, others pushed away.

    100 epochs of the surrogate on unaugmented pictures + deltas, by cross entropy; after each, 10 sign steps of every
    delta, of .025 epsilon at first and .05 in the end, that lower `alignment_losses` of the penultimate features.
    """

    source = "arXiv 2603.03725 and its published code: losses, temperature, epochs and steps"

    def passes(self, images: int, effort: float) -> float:
        return scaled(EPOCHS, effort) * images * (1 + STEPS)

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        epochs = scaled(EPOCHS, settings.effort)
        recipe = replace(plain_recipe(epochs), weight_decay=WEIGHT_DECAY)
        surrogate = new_surrogate(self.surrogate, pictures, settings, recipe)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        for epoch in resumable(settings, "epochs", epochs, surrogate, Tensors(deltas)):
            surrogate.network.train().requires_grad_(True)
            order = torch.randperm(len(deltas), generator=torch_rng(settings.seed, "mi-ue-order", epoch))
            with named_randomness(surrogate, "mi-ue-epoch", epoch):
                for number in range(surrogate.num_batches):
                    rows = order[number * surrogate.batch_size :][: surrogate.batch_size].to(surrogate.device)
                    images = (surrogate.images[rows].float() / 255 + deltas[rows]).clamp(0, 1)
                    loss = F.cross_entropy(surrogate.scores(images), surrogate.labels[rows])
                    sgd_step(surrogate, loss, RATE * cosine(epoch, epochs))
            surrogate.network.eval().requires_grad_(False)
            steps = Steps(STEPS, LAST_STEP - (LAST_STEP - FIRST_STEP) * (epochs - epoch) / epochs)
            for block, images, labels in batches(surrogate):
                objective = partial(_losses, surrogate, labels)
                deltas[block] = sign_descent(objective, images, deltas[block], settings.epsilon, steps)
            told((epoch + 1) / epochs)
        self.figures = {"epochs": float(epochs)}
        return deltas


def alignment_losses(features: Tensor, labels: Tensor) -> Tensor:
    """Minus the log of the own label's share of exp(cosine / .1) over all rows: of features [B, d] for each, [B]."""
    directions = F.normalize(features, dim=1)
    weights = (directions @ directions.T / TEMPERATURE).exp()
    own = weights * (labels[:, None] == labels)
    return -(own.sum(1) / weights.sum(1)).log()


def _losses(surrogate: Training, labels: Tensor, images: Tensor) -> Tensor:
    return alignment_losses(embedded(surrogate, images), labels)
