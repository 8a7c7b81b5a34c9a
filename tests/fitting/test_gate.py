"""The gate: the default still costs a target what it did when this was recorded, and the judge can tell.

1,000 images of CIFAR-10 in 10 clusters, 16/255, two fits, 12 epochs of a target that the fits never saw. So few images
are hardly protected (see tests/bench/results/relearning.md for what the default is worth); what counts here is that
figures stay where they were.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.clusters.clustering import fit_clusters
from pipeline.deltas.samplewise.sample_steps import SampleGenerator, SampleSteps
from pipeline.fitting.fit import FitImages
from pipeline.fitting.sample_fit import SampleFit
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.surrogates.surrogate import load_surrogate
from tests.bench.controls import control
from tests.support.real import cifar10

TRAIN, CLUSTERS, PROXY_STEPS = 1_000, 10, 96


class Judge:
    """What a target learns from images, in per cent of clean test images."""

    def __init__(self) -> None:
        self.images, self.labels = cifar10("train", TRAIN)
        self._tests = Labelled(*cifar10("test"))

    def learned(self, images: Tensor) -> float:
        score = train_target(
            Labelled(images, self.labels),
            ScoredOn(self._tests),
            regime=find_regime("nt"),
            seed=0,
            recipe=Recipe(epochs=12),
        )
        return 100 * score.accuracy_last

    def changed_by(self, levels: np.ndarray) -> Tensor:
        return (self.images + torch.from_numpy(levels).to(torch.int16)).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def clean(judge: Judge) -> float:
    return judge.learned(judge.images)


@pytest.fixture(scope="module")
def clusters(judge: Judge) -> np.ndarray:
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=160, device="cpu")
    pictures = list(judge.images.permute(0, 2, 3, 1).numpy())
    features = [surrogate.embed_pictures(pictures[start : start + 64]) for start in range(0, TRAIN, 64)]
    return fit_clusters(features, "smoothed", surrogate.head, CLUSTERS, restarts=24, seed=0).clusters


def protected(judge: Judge, clusters: np.ndarray, seed: int) -> Tensor:
    """The images as a fit of the default protects them, with proxies trained for fewer steps."""
    settings = Settings(seed=seed, proxy_steps=PROXY_STEPS)
    fit = SampleFit(FitImages(judge.images, torch.from_numpy(clusters).long()), CLUSTERS, settings)
    while not fit.is_done:
        fit.advance(100)
    fitted = fit.result()
    weights = {name: value.numpy() for name, value in fitted.extra.items()}
    header = {"side": 32, "steps": settings.steps, "plain": settings.plain, "seed": seed}
    steps = SampleSteps(SampleGenerator.from_parts(header, weights), fitted.targets, settings.epsilon)
    squares = judge.images.permute(0, 2, 3, 1).contiguous().numpy()
    levels, _ = steps.levels(squares, clusters.tolist(), [str(row) for row in range(TRAIN)])
    return judge.changed_by(levels)


def test_the_default_costs_what_it_did(judge: Judge, clean: float, clusters: np.ndarray) -> None:
    figures = [judge.learned(protected(judge, clusters, seed)) for seed in (0, 1)]
    print(f"clean {clean:.1f}, two fits {figures}")
    assert sum(figures) / 2 <= clean - 100


def test_noise_of_the_same_size_does_not_protect(judge: Judge, clean: float) -> None:
    noise = np.random.default_rng(0).choice([-16, 16], (TRAIN, 1, 32, 32)).astype(np.int8).repeat(3, 1)
    noisy = judge.learned(judge.changed_by(noise))
    print("noise", noisy)
    assert noisy >= clean - 100


def test_a_control_with_labels_does(judge: Judge, clean: float) -> None:
    made = control("sp", judge.images.numpy(), judge.labels.numpy())
    figure = judge.learned(torch.from_numpy(made))
    print("control", figure)
    assert figure <= clean - 100
