"""Protections with a trained surrogate: each does to its surrogate what its paper says, within the bound."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, LabelledPictures
from pipeline.baselines.trained.checkpoints import Checkpoints
from pipeline.baselines.trained.contrastive import (
    CLASS_WISE,
    ContrastiveLoop,
    ContrastivePoisons,
    SeparableNoise,
    separability_discriminant,
)
from pipeline.baselines.trained.error_minimising import ErrorMinimising, MinimisingLoop, class_means
from pipeline.baselines.trained.fitted import FittedBaseline
from pipeline.baselines.trained.generated import RATE, DeepConfuse, clean_loss_ahead
from pipeline.baselines.trained.linear import LinearInduction, linear_surrogate
from pipeline.baselines.trained.mutual import MutualInformation, alignment_losses
from pipeline.baselines.trained.pushed import (
    AdversarialPoisons,
    DuneSpatial,
    ErrorMaximising,
    Hypocritical,
    trained_surrogate,
)
from pipeline.baselines.trained.robust import Budget, RobustErrorMinimising, robust_deltas
from pipeline.baselines.trained.steps import Steps, sign_descent
from pipeline.baselines.trained.surrogate import embedded, new_surrogate, plain_recipe
from pipeline.errors import InputError, SettingsError
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.regimes.adversarial import pgd
from pipeline.relearning.targets import TARGETS
from pipeline.relearning.targets.base import Target
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training
from tests.support.real import cifar10
from tests.support.samples import stripes

SETTINGS = BaselineSettings(16 / 255, seed=3, effort=0.5)


def tiny(num_classes: int, side: int, dropout: float) -> Target:
    """A network that is trained in a second."""
    layers = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)
    trunk = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return Target(trunk, nn.Linear(32, num_classes), dropout)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "tiny", tiny)


def brief_tap(targeted: bool) -> AdversarialPoisons:
    """With one start and 30 steps."""
    method = AdversarialPoisons("tiny", targeted=targeted)
    method.steps, method.restarts = Steps(60, 0.08), 1
    return method


def brief_deepconfuse() -> DeepConfuse:
    """With a narrow generator and a quarter of the surrogate's epochs."""
    method = DeepConfuse("tiny")
    method.width, method.surrogate_epochs = 8, 5
    return method


METHODS: dict[str, Callable[[], FittedBaseline]] = {
    "em": lambda: ErrorMinimising("tiny"),
    "em-class": lambda: ErrorMinimising("tiny", class_wise=True),
    "em-at": lambda: ErrorMinimising("tiny", colour=True, staged=True),
    "emaxn": lambda: ErrorMaximising("tiny"),
    "tap": lambda: brief_tap(True),
    "tap-untargeted": lambda: brief_tap(False),
    "hypo": lambda: Hypocritical("tiny"),
    "dune": lambda: DuneSpatial("tiny"),
    "rem-t": lambda: RobustErrorMinimising("tiny", colour=True),
    "pil": LinearInduction,
    "mi-ue": lambda: MutualInformation("tiny"),
    "tue": SeparableNoise,
    "cp": lambda: ContrastivePoisons("tiny"),
    "cp-class": lambda: ContrastivePoisons("tiny", class_wise=True),
    "deepconfuse": brief_deepconfuse,
}
EFFORT = {
    "em-at": 0.034,
    "rem-t": 0.002,
    "pil": 0.1,
    "mi-ue": 0.03,
    "tue": 0.1,
    "cp": 0.001,
    "cp-class": 0.001,
    "deepconfuse": 0.001,
}  # of the others: that of SETTINGS


@cache
def pictures() -> LabelledPictures:
    """128 of four classes of faint stripes, 16 px, some pixels of which are 0 and some 255."""
    images, labels = stripes(128, seed=0, periods=(4, 8), contrast=(5, 15), deviation=10)
    images = images[:, :, :16, :16].contiguous()
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 255
    return LabelledPictures(images.numpy(), labels.numpy(), tuple(f"key-{i}" for i in range(len(images))))


def settings_of(name: str) -> BaselineSettings:
    return BaselineSettings(16 / 255, seed=3, effort=EFFORT.get(name, SETTINGS.effort))


KEPT: defaultdict[str, list[bytes]] = defaultdict(list)  # checkpoints of each method's fit, after every step


@cache
def fitted(name: str) -> tuple[FittedBaseline, NDArray[np.int16]]:
    method, settings = METHODS[name](), settings_of(name)
    settings = replace(settings, checkpoints=Checkpoints(keep=KEPT[name].append, seconds=0))
    return method, method.deltas(pictures(), settings, lambda share: None)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pil"])  # which takes no time
def test_a_fit_goes_on_from_any_checkpoint_to_the_same_deltas(name: str) -> None:
    (method, levels), kept = fitted(name), KEPT[name]
    for number in {len(kept) // 2, len(kept) - 1}:
        after: list[bytes] = []
        settings = replace(settings_of(name), checkpoints=Checkpoints(kept[number], after.append, seconds=0))
        again = METHODS[name]()
        found = again.deltas(pictures(), settings, lambda share: None)
        assert (found == levels).all(), number
        assert again.figures == method.figures
        assert len(after) == len(kept) - number - 1, "steps were taken again, or left out"


@pytest.mark.parametrize("data", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_one_line_with_its_cure(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^s3://x/checkpoint .*delete it to begin the fit again$"):
        Checkpoints(data, where="s3://x/checkpoint")


def in_order_of_keys(given: LabelledPictures) -> Labelled:
    """As the methods are given them: the surrogate of a seed is then theirs."""
    kept: list[Labelled] = []

    class Spy(FittedBaseline):
        def fit(self, pictures: Labelled, settings: BaselineSettings, told: Callable[[float], None]) -> Tensor:
            kept.append(pictures)
            return torch.zeros(pictures.images.shape)

    Spy().deltas(given, SETTINGS, lambda share: None)
    return kept[0]


def scores(training: Training, levels: NDArray[np.int16] | int) -> Tensor:
    """The surrogate's scores of `pictures()` with whole levels added, in their own order."""
    protected = pictures().images.astype(np.int16) + levels
    with torch.no_grad():
        return training.scores(torch.from_numpy(protected).float() / 255)


LABELS = torch.from_numpy(pictures().labels)


@pytest.mark.parametrize("name", METHODS)
def test_deltas_are_whole_levels_within_epsilon_and_the_range_of_pictures(name: str) -> None:
    method, levels = fitted(name)
    assert levels.dtype == np.int16
    assert 0 < abs(levels).max() <= 16
    if method.per_sample:
        assert levels.shape == pictures().images.shape
        protected = pictures().images + levels
        assert protected.min() >= 0
        assert protected.max() <= 255
    else:
        assert levels.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("name", ["em-at", "em-class", "rem-t", "pil", "tue", "cp-class", "deepconfuse"])
def test_deltas_depend_on_seed_and_keys_and_not_on_the_order_of_pictures(name: str) -> None:
    method, levels = fitted(name)
    torch.manual_seed(7)
    order = np.random.default_rng(0).permutation(128)
    given = pictures()
    shuffled = LabelledPictures(given.images[order], given.labels[order], tuple(given.keys[i] for i in order))
    again = METHODS[name]().deltas(shuffled, settings_of(name), lambda share: None)
    assert np.array_equal(again, levels[order] if method.per_sample else levels)


def test_a_step_goes_against_the_gradient_and_stays_within_the_bound() -> None:
    images = torch.tensor([0.5, 0.5, 0.01, 0.99]).view(1, 1, 2, 2)
    slope = torch.tensor([1.0, -2.0, 1.0, 0.0]).view(1, 1, 2, 2)
    moved = sign_descent(
        lambda seen: (slope * seen).sum((1, 2, 3)), images, torch.zeros_like(images), 0.1, Steps(3, 0.4)
    )
    # three steps of .04, clamped to .1; the third pixel starts again from 0 each time it would be below it
    assert moved.flatten().tolist() == pytest.approx([-0.1, 0.1, -0.05, 0.0], abs=1e-6)


def test_fewer_steps_are_longer_and_full_effort_is_as_published() -> None:
    assert Steps(20, 0.1).at(1) == Steps(20, 0.1)
    assert Steps(1, 0.1).at(1) == Steps(1, 0.1)
    assert Steps(20, 0.1).at(0.25) == Steps(5, 0.4)
    assert Steps(250, 0.05).at(0.5) == Steps(125, 0.05)
    assert Steps(20, 0.1).at(1e-9) == Steps(1, 1.0)


@pytest.mark.parametrize(
    ("kind", "published"), [(ErrorMinimising, 60 * 20), (ErrorMaximising, 10 * 20), (AdversarialPoisons, 8 * 250)]
)
def test_a_quarter_of_the_effort_is_a_quarter_of_the_steps_on_deltas(kind: Any, published: int) -> None:
    method = kind("tiny")
    if kind is ErrorMinimising:
        loop = MinimisingLoop(method, in_order_of_keys(pictures()), replace(SETTINGS, effort=0.25))
        spent = loop.most_rounds * loop.search.steps.count
    else:
        count, steps = method._budget(0.25)
        spent = count * steps.count
    assert spent == pytest.approx(published / 4, rel=0.02)


def test_a_class_wise_delta_is_the_mean_of_its_pictures() -> None:
    deltas = torch.tensor([0.03, -0.01, 0.02]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    before = torch.full((3, 3, 2, 2), 0.005)
    means = class_means(deltas, torch.tensor([0, 0, 2]), before)
    assert means[:, 0, 0, 0].tolist() == pytest.approx([0.01, 0.005, 0.02])


@pytest.mark.parametrize("class_wise", [False, True])
def test_em_leaves_less_loss_than_the_plain_pictures_and_ends_by_its_stop_rule(class_wise: bool) -> None:
    method, ordered = ErrorMinimising("tiny", class_wise=class_wise), in_order_of_keys(pictures())
    loop = MinimisingLoop(method, ordered, SETTINGS)
    for _ in range(2):
        loop.train()
        loop.move_deltas()
    images, labels = ordered.images.float() / 255, ordered.labels
    deltas = loop.deltas[labels] if class_wise else loop.deltas
    with torch.no_grad():
        plain = F.cross_entropy(loop.surrogate.scores(images), labels)
        protected = F.cross_entropy(loop.surrogate.scores((images + deltas).clamp(0, 1)), labels)
    assert protected < plain
    figures = fitted("em-class" if class_wise else "em")[0].figures
    assert figures["training_error"] <= (0.1 if class_wise else 0.01)
    assert figures["rounds"] < loop.most_rounds == 42  # of 60, by the root of half the effort


def test_staged_training_of_em_holds_the_surrogate_back() -> None:
    """A rejected epoch leaves the weights as they were; momentum too."""
    loop = MinimisingLoop(ErrorMinimising("tiny", staged=True), in_order_of_keys(pictures()), SETTINGS)
    loop.train()
    clean = loop.surrogate.images.clone()
    loop.surrogate.regime.threshold = lambda: -1.0  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in loop.surrogate.network.state_dict().items()}
    loop.train()
    assert all(torch.equal(value, before[name]) for name, value in loop.surrogate.network.state_dict().items())
    assert torch.equal(loop.surrogate.images, clean)


@cache
def surrogate() -> Training:
    return trained_surrogate("tiny", in_order_of_keys(pictures()), SETTINGS, lambda share: None)[0]


def test_tap_is_taken_for_the_next_label() -> None:
    _, levels = fitted("tap")
    assert (scores(surrogate(), levels).argmax(1) == (LABELS + 1) % 4).float().mean() > 0.7
    assert (scores(surrogate(), 0).argmax(1) == (LABELS + 1) % 4).float().mean() < 0.2


def test_untargeted_tap_and_emaxn_raise_the_training_error() -> None:
    right = (scores(surrogate(), 0).argmax(1) == LABELS).float().mean()
    for name in ("tap-untargeted", "emaxn"):
        assert (scores(surrogate(), fitted(name)[1]).argmax(1) == LABELS).float().mean() < right / 2
    assert fitted("emaxn")[0].figures["training_error"] >= 0.9


def test_hypo_is_easier_for_its_surrogate_than_the_plain_pictures() -> None:
    losses = [F.cross_entropy(scores(surrogate(), levels), LABELS) for levels in (0, fitted("hypo")[1])]
    assert losses[1] < losses[0] / 2


def test_dune_moves_all_checkpoints_towards_the_third_next_label() -> None:
    ordered = in_order_of_keys(pictures())
    training, kept = trained_surrogate("tiny", ordered, SETTINGS, lambda share: None, DuneSpatial.copies)
    assert len(kept.networks) == 5
    for network in kept.networks:
        training.network = network
        plain, moved = (
            F.cross_entropy(scores(training, levels), (LABELS + 3) % 4) for levels in (0, fitted("dune")[1])
        )
        assert moved < plain


def test_rem_leaves_less_loss_under_the_adversary_than_no_noise_and_em() -> None:
    budget, ordered = Budget(12, Steps(2, 1.0), 1, Steps(1, 1.0)), in_order_of_keys(pictures())
    training = RobustErrorMinimising("tiny").robust_surrogate(ordered, SETTINGS, budget, lambda share: None)
    images, rng = torch.from_numpy(pictures().images).float() / 255, torch.Generator().manual_seed(0)
    budget = Budget(0, Steps(10, 0.2), 2, Steps(4, 0.4))
    robust = robust_deltas(training, images, LABELS, epsilon=SETTINGS.epsilon, budget=budget, rng=rng)
    left = []
    for deltas in (robust, torch.from_numpy(fitted("em")[1]) / 255, torch.zeros_like(images)):
        seen = (images + deltas).clamp(0, 1)
        offset = torch.zeros_like(images)
        moved = pgd(training.scores, seen, LABELS, epsilon=8 / 255, step=1.6 / 255, steps=10, offset=offset)
        with torch.no_grad():
            left.append(float(F.cross_entropy(training.scores(moved), LABELS)))
    assert left[0] < min(left[1:])


def test_rem_spends_the_published_gradients_at_full_effort() -> None:
    assert (Budget.at(1).model_steps, Budget.at(1).gradients) == (5_000, 550)
    assert Budget.at(0.001).model_steps == 5
    assert Budget.at(0.001).gradients <= 2


def test_pil_subtracts_noise_that_has_the_label_by_itself() -> None:
    _, levels = fitted("pil")
    network = linear_surrogate(in_order_of_keys(pictures()), settings_of("pil"))
    images, deltas = torch.from_numpy(pictures().images).float() / 255, torch.from_numpy(levels).float() / 255
    assert (network(-deltas).argmax(1) == LABELS).float().mean() > 0.95
    # linear without biases: the scores of a sum are the sum of the scores
    assert torch.allclose(network(images + deltas), network(images) + network(deltas), atol=1e-4)


def test_mi_ue_draws_the_features_of_a_label_together() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    together, apart = math.exp(10), 1.0  # exp(1 / .1), exp(0 / .1)
    of_two = -math.log(2 * together / (2 * together + apart))
    of_one = -math.log(together / (together + 2 * apart))
    losses = alignment_losses(features, torch.tensor([0, 0, 1]))
    assert losses.tolist() == pytest.approx([of_two, of_two, of_one], abs=1e-6)
    images, levels = (
        torch.from_numpy(pictures().images).float() / 255,
        torch.from_numpy(fitted("mi-ue")[1]).float() / 255,
    )
    plain, protected = (
        alignment_losses(embedded(surrogate(), seen), LABELS).mean() for seen in (images, images + levels)
    )
    assert protected < plain


def test_tue_gives_the_pictures_of_a_label_noise_of_their_own_kind() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0], [0.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1, 5])
    # centres (0, 1), (4, 1), (0, 4); spreads 1, 1, 0; distances 4, 3, 5
    expected = (2 / 4 + 1 / 3 + 1 / 5) / 3
    assert float(separability_discriminant(points, labels)) == pytest.approx(expected, abs=1e-4)
    random = 16 * (2 * torch.rand(128, 768, generator=torch.Generator().manual_seed(0)) - 1)
    found = torch.from_numpy(fitted("tue")[1]).float().flatten(1)
    assert separability_discriminant(found, LABELS) < separability_discriminant(random, LABELS) / 2


def test_cp_makes_the_contrastive_task_easier() -> None:
    ordered = in_order_of_keys(pictures())
    start = torch.zeros(4, 3, 16, 16)
    loop = ContrastiveLoop("tiny", ordered, ordered.labels, start, SETTINGS, replace(CLASS_WISE, epochs=10))
    loop.run(lambda share: None)
    rows = torch.arange(128)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = loop.loss(rows, start[ordered.labels])
        torch.manual_seed(0)
        assert loop.loss(rows, loop.deltas[ordered.labels]) < plain


def test_deepconfuse_looks_one_step_of_the_surrogate_ahead() -> None:
    training = new_surrogate("tiny", in_order_of_keys(pictures()), SETTINGS, plain_recipe(1))
    images = torch.from_numpy(pictures().images).float() / 255
    deltas = torch.from_numpy(fitted("em")[1]).float().div(255).requires_grad_()
    training.network.train()
    ahead = clean_loss_ahead(training, images, LABELS, deltas)
    (gradient,) = torch.autograd.grad(ahead, deltas)

    def stepped(deltas: Tensor) -> float:
        network = copy.deepcopy(training.network)
        F.cross_entropy(network(training.normalise((images + deltas).clamp(0, 1))), LABELS).backward()
        torch.optim.SGD(network.parameters(), lr=RATE).step()
        return float(F.cross_entropy(network(training.normalise(images)), LABELS).detach())

    assert float(ahead.detach()) == pytest.approx(stepped(deltas.detach()), abs=1e-5)
    assert stepped(deltas.detach() + 0.02 * gradient.sign()) > float(ahead.detach())


def test_what_cannot_be_fitted_is_refused() -> None:
    given = pictures()
    alike = LabelledPictures(given.images, np.zeros_like(given.labels), given.keys)
    with pytest.raises(InputError, match="all pictures have the same label"):
        ErrorMinimising("tiny").deltas(alike, SETTINGS, lambda share: None)
    with pytest.raises(SettingsError, match="unknown target 'smal'"):
        ErrorMinimising("smal")


@pytest.mark.slow
def test_class_wise_em_takes_real_pictures_from_a_small_target() -> None:
    images, labels = cifar10("train", 1_500)
    test = ScoredOn(Labelled(*cifar10("test", 1_000)))
    given = LabelledPictures(images.numpy(), labels.numpy(), tuple(map(str, range(len(images)))))
    levels = ErrorMinimising("small", class_wise=True).deltas(given, BaselineSettings(16 / 255), lambda share: None)
    protected = torch.from_numpy(np.clip(given.images + levels[given.labels], 0, 255).astype(np.uint8))
    clean, relearned = (
        train_target(Labelled(x, labels), test, regime=find_regime("nt"), seed=0, recipe=Recipe(epochs=8)).accuracy_last
        for x in (images, protected)
    )
    assert clean > 0.35
    assert relearned < 0.7 * clean
