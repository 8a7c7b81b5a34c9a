"""The gate: the default still costs a target what it did when this was recorded, and the judge can tell.

1,000 images of CIFAR-10, 16/255, two fits on 320 of them, 12 epochs of a target that the fits never saw. The clusters
are the classes: so few images teach too little for clusters that a surrogate finds to show more than noise. What the
default is worth with those stands in tests/bench/results/relearning.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.deltas.samplewise.kinds import generator_from, maker_of
from pipeline.fitting.distilled_fit import DistilledFit
from pipeline.fitting.fit import FitImages
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from pipeline.settings import Settings
from tests.bench.controls import control
from tests.support.real import cifar10

TRAIN, TEST, FIT_IMAGES, CLUSTERS, STEPS = 1_000, 1_000, 320, 10, 64
RECORDED, MARGIN = 26.3, 5.0  # per cent, mean of two fits; clean images give 40.0, noise 41.0, the control 18.7


class Judge:
    """What a target learns from images, in per cent of clean test images."""

    def __init__(self) -> None:
        self.images, self.labels = cifar10("train", TRAIN)
        self._tests = Labelled(*cifar10("test", TEST))

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


def protected(judge: Judge, seed: int) -> Tensor:
    """The images as a fit of the default protects them, with proxies and network trained for fewer steps."""
    settings = Settings(seed=seed, proxy_steps=STEPS, steps=STEPS, given=frozenset({"proxy_steps", "steps"}))
    fit = DistilledFit(FitImages(judge.images[:FIT_IMAGES], judge.labels[:FIT_IMAGES]), CLUSTERS, settings)
    while not fit.is_done:
        fit.advance(100)
    fitted = fit.result()
    weights = {name: value.numpy() for name, value in fitted.extra.items()}
    generator = generator_from(settings.generator, {"side": 32, "plain": settings.plain, "seed": seed}, weights)
    maker = maker_of(generator, fitted.targets, settings.epsilon)
    squares = judge.images.permute(0, 2, 3, 1).contiguous().numpy()
    return judge.changed_by(maker.levels(squares, judge.labels.tolist(), [str(row) for row in range(TRAIN)]))


def test_the_default_costs_what_it_did(judge: Judge, clean: float) -> None:
    figures = [judge.learned(protected(judge, seed)) for seed in (0, 1)]
    print(f"clean {clean:.1f} %, two fits of the default {figures}")
    assert sum(figures) / 2 <= RECORDED + MARGIN


def test_noise_of_the_same_size_does_not_protect(judge: Judge, clean: float) -> None:
    noise = np.random.default_rng(0).choice([-16, 16], (TRAIN, 1, 32, 32)).astype(np.int8).repeat(3, 1)
    assert judge.learned(judge.changed_by(noise)) >= clean - 8


def test_a_control_that_knows_the_labels_does(judge: Judge, clean: float) -> None:
    made = control("block", judge.images.numpy(), judge.labels.numpy())
    assert judge.learned(torch.from_numpy(made)) <= clean - 15
