"""Sign steps on the deltas of a batch, and how effort shortens a published number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.baselines.base import BaselineSettings
from pipeline.baselines.trained.checkpoints import Checkpoints, Stateful
from pipeline.deltas.sign_step import check_finite

# images + deltas, float [B, 3, S, S] in [0, 1] -> what the delta of each is to lower, [B]
Objective = Callable[[Tensor], Tensor]


def scaled(count: int, effort: float) -> int:
    """A share of a published number, at least 1."""
    return max(1, round(count * effort))


def resumable(settings: BaselineSettings, name: str, count: int, *parts: Stateful) -> Iterator[int]:
    """The steps of a loop by the checkpoints of the settings (see Checkpoints.steps); all of them if there are none."""
    return (settings.checkpoints or Checkpoints()).steps(name, count, *parts)


@dataclass(frozen=True)
class Steps:
    """`count` sign steps, each of `size` times the bound."""

    count: int
    size: float

    def at(self, effort: float) -> Steps:
        """As published at effort 1. Fewer steps are made longer, so that they still cross the ball."""
        count = scaled(self.count, effort)
        return self if count == self.count else Steps(count, max(self.size, min(1.0, 2 / count)))


def sign_descent(objective: Objective, images: Tensor, deltas: Tensor, epsilon: float, steps: Steps) -> Tensor:
    """Deltas after sign steps that lower the objective, within +-epsilon.

    images   float [B, 3, S, S] in [0, 1]
    deltas   of the same shape; every step starts from images + deltas clipped to [0, 1]
    Raises PromiseError for a non-finite objective.
    """
    for step in range(steps.count):
        moved = (images + deltas).clamp(0, 1).detach().requires_grad_()
        loss = objective(moved).sum()
        check_finite(loss, "moving the deltas", step)
        (gradient,) = torch.autograd.grad(loss, moved)
        deltas = (moved.detach() - steps.size * epsilon * gradient.sign() - images).clamp(-epsilon, epsilon)
    return deltas
