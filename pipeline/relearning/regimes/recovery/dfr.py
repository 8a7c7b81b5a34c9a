"""Deep feature reweighting: features from protected images, the classifier from clean ones (Kirichenko et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.regimes.requirements import as_tested, need_clean_set
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training


class FeatureReweighting(Regime):
    """After ordinary training, refit only the head, on features of clean images.

    Sandoval-Segura et al. (NeurIPS 2023) use this to show which features an unlearnable set still teaches.
    known: clean_images with clean_labels.
    """

    name = "dfr"

    def __init__(self, known: Knowledge) -> None:
        self._images, self._labels = need_clean_set(known, self.name)

    def finish(self, training: Training) -> None:
        fit_head(training, as_tested(training, self._images), self._labels)


def fit_head(training: Training, images: Tensor, labels: Tensor) -> None:
    """Replace the target's head with logistic regression on penultimate features of images, uint8 [n, 3, S, S].

    Features are standardised. The objective is the mean cross entropy plus |W|^2 / 2n (C = 1), minimised by L-BFGS in
    float64.
    """
    head = training.network.head
    assert isinstance(head, nn.Linear), "a target's head is one linear layer"
    features = training.features(images).double()
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    weight, bias = logistic_regression((features - mean) / scale, labels.to(features.device), head.out_features)
    weight = weight / scale
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias - weight @ mean)


def logistic_regression(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weights [classes, d] and bias [classes] of multinomial logistic regression with C = 1, float64."""
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        penalty = weight.square().sum() / (2 * len(features))
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
