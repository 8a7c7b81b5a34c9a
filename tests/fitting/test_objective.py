"""Distances have their textbook values, steps their stated size, deltas the side that is asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from pipeline.deltas.sign_step import check_finite, sign_step, step_size
from pipeline.errors import PromiseError
from pipeline.fitting.objective import delta_side, distances, feature_means, is_moved, sum_by_cluster
from pipeline.settings import Settings

EPSILON = 16 / 255


def test_kl_has_its_hand_computed_value() -> None:
    feature = torch.tensor([[math.log(3.0), 0.0]])  # softmax 3/4, 1/4
    aim = torch.tensor([[0.0, 0.0]])  # softmax 1/2, 1/2
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(distances(feature, aim, "kl")) == pytest.approx(expected)


def test_kl_is_scipys_for_any_features() -> None:
    rng = np.random.default_rng(0)
    features, aims = rng.normal(size=(2, 5, 7)).astype(np.float32)
    mine = distances(torch.from_numpy(features), torch.from_numpy(aims), "kl")
    assert np.allclose(mine, rel_entr(softmax(aims, 1), softmax(features, 1)).sum(1), atol=1e-5)


def test_kl_vanishes_only_where_the_feature_is_the_aim_up_to_a_constant() -> None:
    aim = torch.tensor([[1.0, -2.0, 0.5]])
    assert abs(float(distances(aim + 3, aim, "kl"))) < 1e-6
    assert float(distances(aim * 1.1, aim, "kl")) > 1e-3


def test_cosine_and_l2_have_their_hand_computed_values() -> None:
    feature, aim = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert float(distances(feature, aim, "cosine")) == pytest.approx(1 - 3 / 5)
    assert float(distances(feature, aim, "l2")) == pytest.approx(4 + 16)


def test_a_sign_step_goes_against_the_gradient_and_stays_in_the_bound() -> None:
    delta, momentum = torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)
    gradient = torch.tensor([1.0, -3.0, 2.0]).reshape(1, 3, 1, 1).expand(2, -1, -1, -1) * 1e-9
    sign_step(delta, momentum, gradient, 0.01, EPSILON, one_channel=False)
    assert delta[0].flatten().tolist() == pytest.approx([-0.01, 0.01, -0.01])
    assert momentum[0].flatten().tolist() == pytest.approx([0.5, -1.5, 1.0])  # over mean |g| = 2e-9
    sign_step(delta, momentum, gradient, 1.0, EPSILON, one_channel=False)
    assert momentum[0].flatten().tolist() == pytest.approx([0.95, -2.85, 1.9])
    assert delta.abs().max() <= torch.tensor(EPSILON)


def test_one_channel_steps_alike_in_all_three() -> None:
    delta, momentum = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    sign_step(delta, momentum, torch.tensor([3.0, -1.0, -1.0]).reshape(1, 3, 1, 1), 0.01, EPSILON, one_channel=True)
    assert delta.flatten().tolist() == pytest.approx([-0.01] * 3)


def test_a_cluster_that_was_not_in_the_batch_stays_where_it_is() -> None:
    delta, momentum = torch.full((1, 3, 2, 2), 0.01), torch.zeros(1, 3, 2, 2)
    sign_step(delta, momentum, torch.zeros_like(delta), 0.01, EPSILON, one_channel=False)
    assert torch.equal(delta, torch.full((1, 3, 2, 2), 0.01))


def test_step_sizes_follow_a_cosine_to_a_fifth_of_a_level() -> None:
    assert step_size(0, 100, EPSILON) == pytest.approx(0.15 * EPSILON + 0.2 / 255)
    assert step_size(50, 100, EPSILON) == pytest.approx(0.075 * EPSILON + 0.2 / 255)
    assert step_size(100, 100, EPSILON) == pytest.approx(0.2 / 255)
    assert step_size(0, 100, EPSILON, largest=0.03) == pytest.approx(0.03 + 0.2 / 255)


def test_sums_and_means_are_per_cluster() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    clusters = torch.tensor([2, 0, 2])
    assert sum_by_cluster(values, clusters, 3).tolist() == [[3, 4], [0, 0], [6, 8]]
    assert feature_means(values, clusters, 3).tolist() == [[3, 4], [0, 0], [3, 4]]


def test_an_image_has_moved_if_the_targets_centroid_is_the_nearest() -> None:
    centroids = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    features = torch.tensor([[4.0, 0.0], [6.0, 0.0]])
    assert is_moved(features, centroids, torch.tensor([1, 1])).tolist() == [False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_is_named(value: float) -> None:
    with pytest.raises(PromiseError, match="fitting cluster 3, step 17: the loss is not finite"):
        check_finite(torch.tensor([1.0, value]), "fitting cluster 3", 17)


def test_the_side_of_a_delta() -> None:
    proxy, through = Settings(), Settings(generator="direct", optimise_through="surrogate")
    assert delta_side(Settings(delta_size=40), 224, [500]) == 40
    assert delta_side(proxy, 224, [32] * 5) == 32
    assert delta_side(proxy, 224, [8, 60, 61]) == 56
    assert delta_side(proxy, 224, [20]) == 32
    assert delta_side(proxy, 224, [500, 300, 400]) == 72
    assert delta_side(through, 160, [500]) == 160
    assert delta_side(Settings(generator="direct", optimise_through="surrogate", size="224"), 336, [500]) == 224
    network = Settings(generator="network", optimise_through="surrogate", bound="eps_tanh")
    assert delta_side(network, 378, [500]) == 376
