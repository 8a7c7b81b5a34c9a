"""How long a fit may take is predicted from the passes through its surrogate: counted here while methods are fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.baselines.base import BaselineSettings, LabelledPictures
from pipeline.baselines.methods import BASELINES
from pipeline.baselines.trained import error_minimising
from pipeline.baselines.trained.contrastive import ContrastivePoisons
from pipeline.baselines.trained.error_minimising import ErrorMinimising
from pipeline.baselines.trained.fitted import SurrogateBaseline
from pipeline.baselines.trained.generated import DeepConfuse
from pipeline.baselines.trained.mutual import MutualInformation
from pipeline.baselines.trained.pushed import AdversarialPoisons, DuneSpatial, ErrorMaximising, Hypocritical
from pipeline.baselines.trained.robust import RobustErrorMinimising
from pipeline.relearning.targets import TARGETS
from pipeline.relearning.targets.base import Target
from tests.support.samples import stripes


class Counter(nn.Module):
    """Counts the images that come by, a third of each where no gradient is asked for."""

    seen = 0.0

    def forward(self, images: Tensor) -> Tensor:
        Counter.seen += len(images) * (1 if torch.is_grad_enabled() else 1 / 3)
        return images


def counting(num_classes: int, side: int, dropout: float) -> Target:
    layers = Counter(), nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()
    return Target(nn.Sequential(*layers), nn.Linear(4, num_classes), dropout)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the tests fit is counted, and no stop rule ends a fit."""
    monkeypatch.setitem(TARGETS, "counting", counting)
    monkeypatch.setattr(error_minimising, "SAMPLE_WISE", replace(error_minimising.SAMPLE_WISE, stop=-1.0))
    monkeypatch.setattr(error_minimising, "CLASS_WISE", replace(error_minimising.CLASS_WISE, stop=-1.0))
    monkeypatch.setattr(ErrorMaximising, "stop", 2.0)
    monkeypatch.setattr(DeepConfuse, "width", 8)


def pictures(count: int) -> LabelledPictures:
    images, labels = stripes(count, seed=0)
    return LabelledPictures(images[:, :, :16, :16].numpy(), labels.numpy(), tuple(map(str, range(count))))


def test_class_wise_em_moves_the_delta_of_a_label_that_one_late_picture_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_minimising, "LEAST_SEARCHED", 8)
    given = pictures(40)
    labels = given.labels.copy()
    labels[labels == 3] = 0
    labels[-1] = 3
    method = ErrorMinimising("counting", class_wise=True)
    deltas = method.deltas(replace(given, labels=labels), BaselineSettings(8 / 255, effort=0.1), lambda share: None)
    assert deltas.any((1, 2, 3)).tolist() == [True] * 4


# method, effort, images that go through the network in a pass
FITS: dict[str, tuple[Callable[[], SurrogateBaseline], float, int]] = {
    "em": (lambda: ErrorMinimising("counting"), 0.1, 1),
    "em-class": (lambda: ErrorMinimising("counting", class_wise=True), 0.1, 1),
    "em-t": (lambda: ErrorMinimising("counting", colour=True), 0.05, 1),
    "emaxn": (lambda: ErrorMaximising("counting"), 0.2, 1),
    "tap": (lambda: AdversarialPoisons("counting"), 0.1, 1),
    "tap-untargeted": (lambda: AdversarialPoisons("counting", targeted=False), 0.1, 1),
    "hypo": (lambda: Hypocritical("counting"), 0.1, 1),
    "dune": (lambda: DuneSpatial("counting"), 0.2, 1),
    "rem": (lambda: RobustErrorMinimising("counting"), 0.002, 1),
    "mi-ue": (lambda: MutualInformation("counting"), 0.03, 1),
    "cp": (lambda: ContrastivePoisons("counting"), 0.005, 2),
    "cp-class": (lambda: ContrastivePoisons("counting", class_wise=True), 0.005, 2),
    "deepconfuse": (lambda: DeepConfuse("counting"), 0.001, 3),
}


@pytest.mark.parametrize("count", [64, 192])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_takes_the_passes_that_are_predicted(name: str, count: int) -> None:
    make, effort, images_each = FITS[name]
    method = make()
    Counter.seen = 0.0
    method.deltas(pictures(count), BaselineSettings(16 / 255, effort=effort), lambda share: None)
    assert Counter.seen == pytest.approx(images_each * method.passes(count, effort), rel=0.01)


def test_staged_training_adds_little_to_the_passes() -> None:
    method = ErrorMinimising("counting", staged=True)
    Counter.seen = 0.0
    method.deltas(pictures(64), BaselineSettings(16 / 255, effort=0.1), lambda share: None)
    assert Counter.seen == pytest.approx(method.passes(64, 0.1), rel=0.1)


def test_every_method_that_trains_a_network_predicts_its_passes() -> None:
    of_file = {method.place for method in BASELINES.values() if method.trains}
    assert {
        f"trained.{type(make()).__module__.rpartition('.')[2]}:{type(make()).__name__}" for make, *_ in FITS.values()
    } == of_file


def test_a_pass_takes_longer_through_a_larger_network() -> None:
    settings = BaselineSettings(16 / 255)
    small, large = (ErrorMinimising(name).most_seconds(16, 32, settings) for name in ("counting", "resnet18"))
    assert 0 < 3 * small < large
