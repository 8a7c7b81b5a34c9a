"""Adversaries with clean images or deltas, hardest draws, policies and SimCLR, each against an outside truth."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.errors import SettingsError
from pipeline.relearning.regime_names import parse_regime
from pipeline.relearning.regimes import Knowledge, Regime, find_regime
from pipeline.relearning.regimes.recovery.dfr import fit_head
from pipeline.relearning.regimes.recovery.simclr import contrastive_loss
from pipeline.relearning.targets import build_target
from pipeline.relearning.train import TargetScore, train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training
from tests.support.samples import stripes


def start(regime: Regime, images: Tensor, labels: Tensor, kind: type[Training] = Training) -> Training:
    network = build_target("small", int(labels.max()) + 1, 32, seed=0)
    training = kind(network, images, labels, regime, Recipe(epochs=4), 0, torch.device("cpu"))
    regime.start(training)
    return training


def run(regime: Regime, images: Tensor, labels: Tensor, *, epochs: int, **options: object) -> TargetScore:
    return train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(*stripes(200, 9))),
        regime=regime,
        seed=0,
        **options,
        recipe=Recipe(epochs=epochs),
    )


# --- clean images ---------------------------------------------------------------------------------------------------


def test_early_stop_ends_with_the_weights_of_its_best_epoch():
    clean = stripes(200, 9)  # the test images here, so that both accuracies must agree
    regime = find_regime("early-stop", Knowledge(clean_images=clean[0], clean_labels=clean[1]))
    images, labels = stripes(192, 0)
    score = run(regime, images, (labels + torch.arange(192) % 2) % 4, epochs=4)
    figures = [epoch.figures["accuracy_clean_set"] for epoch in score.history]
    assert figures == [epoch.accuracy_test for epoch in score.history]
    assert score.accuracy_last == max(figures)


def test_early_stop_chooses_before_another_regime_ends_in_either_order():
    clean = stripes(200, 9)
    images, labels = stripes(192, 0)
    wrong = (labels + torch.arange(192) % 2) % 4

    def last(name: str) -> float:
        known = Knowledge(clean_images=clean[0], clean_labels=clean[1])
        return run(find_regime(name, known), images, wrong, epochs=3).accuracy_last

    alone, one, other = (last(name) for name in ("early-stop", "dfr+early-stop", "early-stop+dfr"))
    assert one == other > alone
    with pytest.raises(SettingsError, match="do not work together"):
        parse_regime("simclr+early-stop")


@pytest.mark.parametrize("name", ["early-stop", "delta-jitter", "simclr", "shortcut-net"])
def test_what_a_regime_remembers_survives_a_restart(name):
    images, labels = stripes(64, 0)
    clean = stripes(64, 3)
    known = Knowledge(clean_images=clean[0], clean_labels=clean[1])
    states = []

    def keep(training: Training) -> None:
        file = io.BytesIO()
        torch.save(training.state(), file)
        states.append(file.getvalue())

    whole = run(find_regime(name, known), images, labels, epochs=3, on_epoch=keep)
    half = torch.load(io.BytesIO(states[1]), weights_only=True)
    resumed = run(find_regime(name, known), images, labels, epochs=3, resume=half)
    assert resumed.history == whole.history
    assert resumed.accuracy_last == whole.accuracy_last


def test_the_refitted_head_is_scikit_learns_logistic_regression():
    images, labels = stripes(160, 0)
    training = start(Regime(), images, labels)
    training.run_epoch(0)
    fit_head(training, images, labels)
    features = training.features(images).numpy()
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    expected = LogisticRegression(C=1, max_iter=2000, tol=1e-8).fit(scaled, labels.numpy()).predict_proba(scaled)
    found = training.scores(images.float() / 255).softmax(1).detach().numpy()
    assert np.abs(found - expected).max() < 0.01


def test_dfr_and_few_clean_mend_what_wrong_labels_spoilt():
    images, labels = stripes(256, 0)
    clean = stripes(256, 3)
    known = Knowledge(clean_images=clean[0], clean_labels=clean[1])
    spoilt = (labels + 1) % 4
    assert run(Regime(), images, spoilt, epochs=4).accuracy_last < 0.25
    assert run(find_regime("dfr", known), images, spoilt, epochs=4).accuracy_last > 0.8
    assert run(find_regime("few-clean", known), images, spoilt, epochs=4).accuracy_last > 0.4


def test_adabn_takes_the_statistics_of_all_clean_images_and_leaves_the_weights():
    images, labels = stripes(128, 0)
    clean = (stripes(128, 3)[0] // 2).contiguous()
    regime = find_regime("adabn", Knowledge(clean_images=clean))
    training = start(regime, images, labels)
    training.run_epoch(0)
    weights = [parameter.detach().clone() for parameter in training.network.parameters()]
    regime.finish(training)
    first = training.network.stem[0]
    with torch.no_grad(), training.autocast():
        convolved = first[0](training.normalise(clean.float() / 255)).float()
    assert torch.allclose(first[1].running_mean, convolved.mean((0, 2, 3)), atol=1e-4)
    assert first[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True))


def test_clean_images_are_treated_as_test_images_are():
    clean = stripes(64, 3)
    regime = find_regime("iss-gray+early-stop", Knowledge(clean_images=clean[0], clean_labels=clean[1]))
    test = stripes(64, 3)
    score = train_target(
        Labelled(*stripes(64, 0)), ScoredOn(Labelled(*test)), regime=regime, seed=0, recipe=Recipe(epochs=2)
    )
    assert [epoch.figures["accuracy_clean_set"] for epoch in score.history] == [
        epoch.accuracy_test for epoch in score.history
    ]


# --- deltas ---------------------------------------------------------------------------------------------------------


def test_known_deltas_are_subtracted_exactly_and_clipped():
    rng = np.random.default_rng(0)
    clean = torch.from_numpy(rng.integers(16, 240, (6, 3, 8, 8)).astype(np.uint8))
    deltas = torch.from_numpy(rng.integers(-16, 17, (6, 3, 8, 8)).astype(np.int16))
    protected = (clean.short() + deltas).to(torch.uint8)
    assert torch.equal(find_regime("delta-known", Knowledge(deltas=deltas)).prepare(protected, None, seed=0), clean)
    dark = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    bright = find_regime("delta-known", Knowledge(deltas=torch.full((1, 3, 8, 8), 16, dtype=torch.int16)))
    assert int(bright.prepare(dark, None, seed=0).max()) == 0
    with pytest.raises(SettingsError, match=r"needs one delta per training image; deltas are \(1, 3, 8, 8\)"):
        bright.prepare(protected, None, seed=0)


def test_delta_jitter_gives_every_image_the_delta_of_another_group_anew_each_epoch():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3, 300)
    deltas = 16 * rng.choice([-1, 1], (3, 3, 32, 32))
    protected = rng.integers(60, 196, (300, 3, 32, 32)) + deltas[groups]
    images = torch.from_numpy(protected.astype(np.uint8))
    labels = torch.from_numpy(groups)
    regime = find_regime("delta-jitter", Knowledge(num_groups=3))
    training = start(regime, regime.prepare(images, labels, seed=0), labels)
    seen = []
    for epoch in (0, 1, 0):
        regime.begin_epoch(training, epoch)
        added = (training.images.int() - images.int()).flatten(1).double()
        shares = added @ torch.from_numpy(deltas).flatten(1).double().T / (16**2 * 3072)
        assert int(added.abs().max()) <= 16
        assert (shares.abs() > 0.5).sum(1).tolist() == [1] * 300
        assert float(shares[torch.arange(300), labels].abs().max()) < 0.3
        seen.append(training.images)
    assert 60 < int((shares.sum(1) > 0).sum()) < 240
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


# --- augmentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("randaugment", v2.RandAugment()),
        ("autoaugment", v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        ("trivialaugment", v2.TrivialAugmentWide()),
    ],
)
def test_policies_are_torchvisions_drawn_for_each_image(name, policy):
    images = stripes(12, 0)[0]
    torch.manual_seed(4)
    expected = [policy(image) for image in images]
    torch.manual_seed(4)
    found = find_regime(name).batch(images.float() / 255, torch.Generator())
    assert torch.equal(found, torch.stack(expected).float() / 255)


@pytest.mark.parametrize("name", ["ueraser-lite", "opa", "trivialaugment"])
def test_each_of_several_equal_images_is_augmented_differently_within_range(name):
    images = (stripes(1, 0)[0].float() / 255).expand(24, 3, 32, 32)
    torch.manual_seed(0)
    found = find_regime(name).batch(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in found}) > 16


def test_ueraser_draws_five_times_for_60_of_200_epochs_or_always():
    images, labels = stripes(64, 0)
    for name, expected in (("ueraser", [5] * 60 + [1] * 140), ("ueraser-max", [5] * 200)):
        regime = find_regime(name)
        training = start(regime, images, labels)
        training.recipe = Recipe(epochs=200)
        drawn = []
        for epoch in range(200):
            regime.begin_epoch(training, epoch)
            drawn.append(regime.draws)
        assert drawn == expected


def test_ueraser_trains_on_the_hardest_draw_of_every_image():
    images, labels = stripes(16, 0)
    regime = find_regime("ueraser-max")

    class Watched(Training):
        def scores(self, images: Tensor) -> Tensor:
            self.shown = images
            return super().scores(images)

    training = start(regime, images, labels, Watched)
    unit = images.float() / 255
    draws = [unit, 1 - unit, unit.flip(2), unit.roll(1, 1), unit.sqrt()]
    losses = torch.stack([F.cross_entropy(training.scores(one), labels, reduction="none") for one in draws])
    scripted = itertools.cycle(draws)
    regime.draw = lambda _: next(scripted)
    regime.loss(training, unit, labels, torch.Generator())
    hardest = losses.argmax(0).tolist()
    assert len(set(hardest)) > 1
    assert all(torch.equal(training.shown[row], draws[best][row]) for row, best in enumerate(hardest))


def test_dropout_and_weight_decay_change_the_recipe_alone():
    assert find_regime("dropout").recipe(Recipe()) == Recipe(dropout=0.5)
    for usual in (5e-4, 3e-5):
        assert find_regime("weight-decay").recipe(Recipe(weight_decay=usual)) == Recipe(weight_decay=10 * usual)


# --- SimCLR ---------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_the_papers_formula():
    projected = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for row in range(8):
        cosines = [float(F.cosine_similarity(projected[row], projected[other], dim=0)) for other in range(8)]
        shares = [math.exp(cosine / 0.07) for other, cosine in enumerate(cosines) if other != row]
        total -= math.log(math.exp(cosines[(row + 4) % 8] / 0.07) / sum(shares))
    assert float(contrastive_loss(projected)) == pytest.approx(total / 8, rel=1e-4)


def test_simclr_learns_to_find_the_other_view_and_its_probe_the_labels():
    score = run(find_regime("simclr"), *stripes(192, 0), epochs=4)
    assert score.history[-1].loss < math.log(127) - 0.3  # what guessing among 127 others costs
    assert score.accuracy_last > 0.6
