"""Which layers a network has, from shallow to deep, and how much each is slowed at a count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torchvision

from pipeline.relearning.regimes.staged.layers import ordered_layers
from pipeline.relearning.regimes.staged.multipliers import MULTIPLIERS, layer_multipliers
from pipeline.relearning.targets import build_target


@pytest.fixture(scope="module")
def resnet18():
    return torchvision.models.resnet18(weights=None)


@pytest.mark.parametrize(("granularity", "count"), [("block", 10), ("module", 21), ("stage", 6)])
def test_resnet18_has_the_layers_one_would_count(resnet18, granularity, count):
    layers = ordered_layers(resnet18, granularity)
    assert len(layers) == count
    assert layers[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert layers[-1] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("granularity", ["block", "module", "stage"])
@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "shufflenet_v2_x0_5", "timm/vit_tiny_patch16_224", "small"]
)
def test_every_parameter_is_in_exactly_one_layer_in_order(name, granularity):
    if name == "small":
        network = build_target("small", 10, 32, seed=0)
    elif name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"))
    else:
        network = torchvision.models.get_model(name, weights=None)
    layers = ordered_layers(network, granularity)
    assert [one for layer in layers for one in layer] == [one for one, _ in network.named_parameters()]


def test_blocks_of_other_networks_are_what_their_papers_call_blocks():
    counts = {
        "vgg16_bn": 13 + 3,  # convs and linears
        "densenet121": 1 + 4 + 3 + 1,  # stem, dense blocks, transitions, classifier
        "mobilenet_v2": 1 + 17 + 1 + 1,
        "vit_b_16": 1 + 12 + 1,
    }
    with torch.device("meta"):
        found = {name: len(ordered_layers(torchvision.models.get_model(name, weights=None))) for name in counts}
    assert found == counts
    small = ordered_layers(build_target("small", 10, 32, seed=0), "stage")
    assert [layer[0].partition(".")[0] for layer in small] == ["stem", "residual", "last", "head"]


def test_parameters_that_are_not_trained_are_no_layer(resnet18):
    frozen = torchvision.models.resnet18(weights=None).requires_grad_(False)
    frozen.fc.requires_grad_(True)
    assert ordered_layers(frozen) == [["fc.weight", "fc.bias"]]


def test_the_linear_front_moves_beta_layers_per_count():
    assert layer_multipliers("linear_front", 0, 5, 1.0) == [1, 1, 1, 1, 1]
    assert layer_multipliers("linear_front", 1, 5, 1.0) == [0.5, 1, 1, 1, 1]
    assert layer_multipliers("linear_front", 2, 5, 1.0) == [0, 0.5, 1, 1, 1]
    assert layer_multipliers("linear_front", 3, 5, 1.0) == [0, 0, 0.5, 1, 1]
    assert layer_multipliers("linear_front", 1, 5, 2.5) == [0, 0.25, 0.75, 1, 1]
    assert layer_multipliers("linear_front", 6, 5, 1.0) == [0, 0, 0, 0, 0]


def test_the_other_multipliers_at_small_counts():
    assert layer_multipliers("freeze", 1, 4, 1.5) == [0, 1, 1, 1]
    assert layer_multipliers("freeze", 2, 4, 1.5) == [0, 0, 0, 1]
    assert layer_multipliers("geometric", 2, 4, 1.0) == [0.25, 0.5, 1, 1]
    expected = [math.exp(-2 * (1 - depth / 4)) for depth in range(4)]
    assert layer_multipliers("exp_depth", 2, 4, 1.0) == pytest.approx(expected)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [sigmoid(layer - 2) / sigmoid(layer) for layer in (1, 2, 3, 4)]
    assert layer_multipliers("sigmoid_front", 2, 4, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_multipliers_begin_at_one_fall_with_the_count_and_shallow_layers_first(name):
    table = np.array([layer_multipliers(name, count, 10, 0.7) for count in range(40)])
    assert np.array_equal(table[0], np.ones(10))
    assert (np.diff(table, axis=0) <= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert table[-1].max() < (0.1 if name == "exp_depth" else 1e-4)
    assert table.min() >= 0
