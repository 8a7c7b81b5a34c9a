"""The losses of One for All by hand, and the directions that Eq. 4 of Chen et al. must have."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from pipeline.one_for_all.losses import LOSSES, Concepts, select_by_label, select_concepts, similarities
from pipeline.one_for_all.settings import Loss

# two images; near concepts at cosines (.6, .8) and (0, .6), opposite ones at -.8 and -1
FEATURES = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
NEAR = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.8, 0.6]]])
OPPOSITE = torch.tensor([[0.0, -1.0], [0.0, -1.0]])
TOWARDS = [1.8, 2.0]  # 1 - cosine to the opposite
AWAY = [0.3, 0.7]  # mean of 1 - cosine to the near ones
CONCEPTS = Concepts(NEAR, OPPOSITE)


def test_cosines_are_what_the_hand_finds():
    near, opposite = similarities(FEATURES, CONCEPTS)
    assert torch.allclose(near, torch.tensor([[0.6, 0.8], [0.0, 0.6]]))
    assert torch.allclose(opposite, torch.tensor([-0.8, -1.0]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logratio", (math.log(1.8 / 0.3) + math.log(2.0 / 0.7)) / 2),
        ("paper_detached", 0.0),
        ("fixed_lambda", 1.9 - 0.5),
        # all pairs: mean feature (.3, .9); mean opposite (0, -1); mean near concepts over images (1, 0), (.4, .8)
        ("code_pairs", 0.1 / -0.9 + (0.3 + (0.3 * 0.4 + 0.9 * 0.8)) / 2),
        ("code_diag", 0.1 / -0.9 + (0.6 + 0.8 + 0.0 + 0.6) / 4),
    ],
)
def test_each_loss_is_what_the_hand_finds(name, expected):
    assert float(LOSSES[name](FEATURES, CONCEPTS)) == pytest.approx(expected, abs=1e-6)


def test_every_name_of_the_methods_is_there():
    assert tuple(LOSSES) == get_args(Loss) == ("logratio", "paper_detached", "fixed_lambda", "code_pairs", "code_diag")


def random_problem(count: int = 6, size: int = 16) -> tuple[torch.Tensor, Concepts]:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(count, size, generator=rng, requires_grad=True)
    bank = torch.randn(40, size, generator=rng)
    return features, select_concepts(features, bank, 5)


@pytest.mark.parametrize("name", ["logratio", "paper_detached", "fixed_lambda"])
def test_a_step_down_moves_towards_the_opposite_and_away_from_the_similar(name):
    features, concepts = random_problem()
    near, opposite = (one.detach() for one in similarities(features, concepts))
    (gradient,) = torch.autograd.grad(LOSSES[name](features, concepts), features)
    after_near, after_opposite = similarities(features.detach() - 0.1 * gradient, concepts)
    assert float(after_opposite.mean()) > float(opposite.mean())
    assert float(after_near.mean()) < float(near.mean())


def test_the_printed_lambda_and_the_log_ratio_have_one_direction():
    """For one image: l1 grad(ln l1 - ln l2) = grad l1 - (l1 / l2) grad l2."""
    features, concepts = random_problem(count=1)
    log, printed = (
        torch.autograd.grad(LOSSES[name](features, concepts), features)[0].flatten()
        for name in ("logratio", "paper_detached")
    )
    assert float(F.cosine_similarity(log, printed, dim=0)) == pytest.approx(1, abs=1e-5)


def test_pairs_of_a_single_image_are_its_diagonal():
    features, concepts = random_problem(count=1)
    pairs, diagonal = (LOSSES[name](features, concepts).detach().item() for name in ("code_pairs", "code_diag"))
    assert pairs == pytest.approx(diagonal)


def test_concepts_are_the_most_and_the_least_similar_by_cosine():
    bank = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-1.0, 0.1], [1.0, 1.0], [0.1, -5.0]])
    found = select_concepts(torch.tensor([[2.0, 1.0]]), bank, 2)
    assert torch.allclose(found.near[0], F.normalize(bank[[3, 0]], dim=1))  # cosines .949 and .894
    assert torch.allclose(found.opposite[0], F.normalize(bank[2], dim=0))  # -.85; the last is at -.43


def test_targets_by_label_are_those_of_the_labels_own_concept():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    found = select_by_label(torch.tensor([0]), bank, 2)
    assert torch.allclose(found.near[0], F.normalize(bank[[0, 1]], dim=1))
    assert torch.allclose(found.opposite[0], bank[3])


def test_targets_are_held_fixed_in_the_gradient():
    features = torch.randn(3, 4, requires_grad=True)
    assert not select_concepts(features, torch.randn(9, 4), 2).near.requires_grad
