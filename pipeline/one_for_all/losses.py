"""The readings of One for All's loss, by name, and the choice of concepts it applies to.

Shape letters: B batch, d embedding, m concepts, k near concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.one_for_all.settings import NEAR, Loss

_LEAST = 1e-6  # keeps the logarithm of a zero distance finite


@dataclass(frozen=True, eq=False)
class Concepts:
    """The unit-length concepts that each image is moved away from and towards.

    near      float [B, k, d], the most similar
    opposite  float [B, d], the least similar
    """

    near: Tensor
    opposite: Tensor


def select_concepts(embeddings: Tensor, bank: Tensor, num_near: int = NEAR) -> Concepts:
    """The k most similar concepts and the least similar one for each embedding, by cosine.

    embeddings  float [B, d]
    bank        float [m, d], m > k
    Source: Chen et al. 2024, section 3.4.1.
    """
    rows = F.normalize(bank, dim=1)
    similarity = F.normalize(embeddings.detach(), dim=1) @ rows.T
    return Concepts(rows[similarity.topk(num_near, dim=1).indices], rows[similarity.argmin(1)])


def select_by_label(labels: Tensor, bank: Tensor, num_near: int = NEAR) -> Concepts:
    """As in the released code: neighbours and opposite of the label's own concept, itself one of the near ones.

    labels  int64 [B], row indices into the bank
    bank    float [m, d], m > k
    """
    return select_concepts(bank[labels], bank, num_near)


def similarities(features: Tensor, concepts: Concepts) -> tuple[Tensor, Tensor]:
    """Cosine similarity of features [B, d] to their near concepts [B, k] and to the opposite one [B]."""
    unit = F.normalize(features, dim=1)
    return torch.einsum("bd,bkd->bk", unit, concepts.near), (unit * concepts.opposite).sum(1)


def logratio(features: Tensor, concepts: Concepts) -> Tensor:
    """Mean of ln(1 - sim to the opposite) - ln(mean of 1 - sim to the near ones).

    This is what Eq. 4 with lambda = |l1 / l2| minimises: l1 - lambda l2 is always zero, but with lambda held fixed its
    gradient is l1 times that of ln l1 - ln l2.
    """
    towards, away = _distances(features, concepts)
    return (towards.clamp_min(_LEAST).log() - away.clamp_min(_LEAST).log()).mean()


def paper_detached(features: Tensor, concepts: Concepts) -> Tensor:
    """Eq. 4 as printed: l1 - lambda l2 with lambda = |l1 / l2| of the batch held fixed; its value is always 0."""
    towards, away = (part.mean() for part in _distances(features, concepts))
    return towards - (towards / away.clamp_min(_LEAST)).abs().detach() * away


def fixed_lambda(features: Tensor, concepts: Concepts) -> Tensor:
    """Eq. 4 with lambda = 1."""
    towards, away = (part.mean() for part in _distances(features, concepts))
    return towards - away


def code_pairs(features: Tensor, concepts: Concepts) -> Tensor:
    """As in the released code: 0.1 / m(F, far) + mean over j of m(F, near_j), m the mean over all B x B pairs.

    Each image is pulled towards the mean concepts of its batch, most likely a slip; for reproduction only.
    """
    unit = F.normalize(features, dim=1)
    far = (unit @ concepts.opposite.T).mean()
    near = torch.einsum("bd,ckd->bck", unit, concepts.near).mean()
    return 0.1 / far + near


def code_diag(features: Tensor, concepts: Concepts) -> Tensor:
    """Like code_pairs, with each image's own concepts: 0.1 / mean sim to the opposite + mean sim to the near ones."""
    near, opposite = similarities(features, concepts)
    return 0.1 / opposite.mean() + near.mean()


LOSSES: dict[Loss, Callable[[Tensor, Concepts], Tensor]] = {
    "logratio": logratio,
    "paper_detached": paper_detached,
    "fixed_lambda": fixed_lambda,
    "code_pairs": code_pairs,
    "code_diag": code_diag,
}


def _distances(features: Tensor, concepts: Concepts) -> tuple[Tensor, Tensor]:
    """1 - cosine to the opposite concept [B], and its mean over the near ones [B]."""
    near, opposite = similarities(features, concepts)
    return 1 - opposite, (1 - near).mean(1)
