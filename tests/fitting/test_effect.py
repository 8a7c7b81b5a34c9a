"""The acceptance of `--generator direct`: what a target learns from it, without any label in its making.

CIFAR-10, 4,000 training and 2,000 test images, 12 epochs of a network that the protection never saw. The control
(one pattern per true class) proves that this target can be kept from learning at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.clusters.clustering import fit_clusters
from pipeline.fitting.direct_fit import ProxyFit
from pipeline.fitting.fit import FitImages, FittedDeltas
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from pipeline.settings import EMBEDDED_SURROGATE, Settings, clusters_for
from pipeline.surrogates.surrogate import load_surrogate
from tests.support.real import cifar10

pytestmark = pytest.mark.slow
TRAIN, EPOCHS, PATTERN_SIDE, LEVELS = 4000, 12, 8, 16


@dataclass(frozen=True)
class Cifar:
    images: Tensor  # uint8 [n, 3, 32, 32]
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    clusters: Tensor


@pytest.fixture(scope="module")
def cifar() -> Cifar:
    images, labels = cifar10("train", TRAIN)
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=160, device="cpu")
    pictures = list(images.permute(0, 2, 3, 1).numpy())
    features = [surrogate.embed_pictures(pictures[start : start + 64]) for start in range(0, TRAIN, 64)]
    found = fit_clusters(features, "smoothed", surrogate.head, clusters_for(TRAIN, "direct"), restarts=24, seed=0)
    clusters = torch.from_numpy(found.clusters).long()
    return Cifar(images, labels, *cifar10("test"), clusters)


def fitted(cifar: Cifar, *, plain: bool) -> FittedDeltas:
    images, settings = FitImages(cifar.images, cifar.clusters), Settings(generator="direct", plain=plain)
    fit = ProxyFit(images, clusters_for(TRAIN, "direct"), settings)
    while not fit.is_done:
        fit.advance(100)
    return fit.result()


@pytest.fixture(scope="module")
def direct(cifar: Cifar) -> FittedDeltas:
    return fitted(cifar, plain=False)


def protected(images: Tensor, levels: Tensor, groups: Tensor) -> Tensor:
    return (images.short() + levels.short()[groups]).clamp(0, 255).to(torch.uint8)


def learned(cifar: Cifar, images: Tensor, regime: str = "nt") -> float:
    """Accuracy in percent on clean test images after the last epoch."""
    score = train_target(
        Labelled(images, cifar.labels),
        ScoredOn(Labelled(cifar.test_images, cifar.test_labels)),
        regime=find_regime(regime),
        seed=0,
        recipe=Recipe(epochs=EPOCHS),
    )
    print(f"{regime}: test {score.accuracy_last:.1%}, train {score.accuracy_train:.1%}, {score.seconds:.0f} s")
    return 100 * score.accuracy_last


@pytest.fixture(scope="module")
def clean(cifar: Cifar) -> float:
    return learned(cifar, cifar.images)


def mirrored_blocks(classes: int) -> Tensor:
    """Sign patterns of 8 px blocks, equal left and right, chosen far apart: int8 [classes, 3, 32, 32]."""
    drawn = np.random.default_rng(0).integers(0, 2, (2000, 3, 4, 2)) * 2 - 1
    chosen = [drawn[0]]
    while len(chosen) < classes:
        apart = np.min([(drawn != other).sum((1, 2, 3)) for other in chosen], axis=0)
        chosen.append(drawn[apart.argmax()])
    halves = np.stack(chosen)
    whole = np.concatenate([halves, halves[..., ::-1]], axis=3)
    large = whole.repeat(PATTERN_SIDE, axis=2).repeat(PATTERN_SIDE, axis=3)
    return torch.from_numpy((LEVELS * large).astype(np.int8))


def test_the_control_keeps_the_target_from_learning(cifar: Cifar) -> None:
    assert learned(cifar, protected(cifar.images, mirrored_blocks(10), cifar.labels)) < 30


def test_direct_deltas_cost_a_target_fifteen_points(cifar: Cifar, clean: float, direct: FittedDeltas) -> None:
    assert learned(cifar, protected(cifar.images, direct.levels, cifar.clusters)) <= clean - 15


def test_direct_deltas_hold_under_colour_jitter_and_grey(cifar: Cifar, direct: FittedDeltas) -> None:
    reached = learned(cifar, protected(cifar.images, direct.levels, cifar.clusters), "cg")
    assert reached <= learned(cifar, cifar.images, "cg") - 15


def test_plain_deltas_cost_a_target_twenty_points(cifar: Cifar, clean: float) -> None:
    levels = fitted(cifar, plain=True).levels
    assert learned(cifar, protected(cifar.images, levels, cifar.clusters)) <= clean - 20
