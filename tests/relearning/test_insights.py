"""Dang et al.'s observations: gradients by hand, and blocks from another network that stay as they came."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.relearning.targets import build_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from tests.support.samples import stripes


@pytest.fixture
def insights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import insights

    yield insights
    for name in ("insights", "ratio", "shared_delta"):
        sys.modules.pop(name, None)


def train(insights, regime, epochs=2, **options):
    images, labels = stripes(128, seed=0)
    kept = []
    score = insights.train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(*stripes(64, seed=9))),
        regime=regime,
        seed=0,
        recipe=Recipe(epochs=epochs, batch_size=64),
        on_epoch=kept.append,
        **options,
    )
    return score, kept[-1].network


def test_the_gradient_mean_value_is_that_of_the_first_two_blocks_over_the_steps(insights):
    seen = []

    class Counted(insights.Watched):
        def loss(self, training, images, labels, rng):
            loss, scores = super().loss(training, images, labels, rng)
            inner = [p for n, p in training.network.named_parameters() if n.startswith(("stem.1.", "stem.2."))]
            seen.append([g.abs() for g in torch.autograd.grad(loss, inner, retain_graph=True)])
            return loss, scores

    score, network = train(insights, Counted(), epochs=1)
    assert [block[0] for block in insights.blocks_of(network)[:2]] == ["stem.1.0.weight", "stem.2.0.weight"]
    steps = [torch.cat([g.flatten() for g in step]).mean() for step in seen]
    assert len(steps) == 2
    # autograd.grad calls the hooks as backward does, so each gradient was counted twice
    assert score.history[0].figures["gmv"] == pytest.approx(2 * float(torch.stack(steps).mean()), rel=1e-4)


def test_blocks_from_a_donor_stay_to_the_bit_and_the_others_train(insights):
    donor = build_target("small", 2, 32, seed=7).state_dict()
    fresh = build_target("small", 2, 32, seed=8).state_dict()
    for value in donor.values():
        if value.is_floating_point():
            value += 0.25  # running statistics too
    score, network = train(insights, insights.Transplanted(donor, [0, 1]))
    trained = network.state_dict()
    kept = {name for name in trained if name.startswith(("stem.1.", "stem.2."))}
    assert any("running_mean" in name for name in kept)
    for name in kept:
        assert torch.equal(trained[name], donor[name]), name
    weights = [name for name, _ in network.named_parameters() if name not in kept]
    assert weights
    assert not any(
        torch.equal(trained[name], donor[name]) or torch.equal(trained[name], fresh[name]) for name in weights
    )
    assert {"acm", "gmv"} <= set(score.history[-1].figures)


def test_the_table_has_a_line_for_each_epoch_and_four_figures_for_each_training(insights):
    score, _ = train(insights, insights.Watched())
    lines = insights.table({"clean": score.history, "sp": score.history}).splitlines()
    assert len(lines) == 2 + 2
    assert all(line.count("|") == 4 for line in lines)
    assert lines[2].count(",") == 6
