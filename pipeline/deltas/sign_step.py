"""Sign steps that minimise a delta's loss within epsilon, and the check that the loss is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import PromiseError
from pipeline.schedules import cosine

MOMENTUM = 0.9
LARGEST_STEP = 0.15  # fraction of epsilon, at the start of the cosine
SMALLEST_STEP = 0.2 / 255  # pixel units


def sign_step(
    delta: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    size: float,
    bound: Tensor | float,
    one_channel: bool,
) -> None:
    """One descent step on p deltas [p, 3, S, S] in place: sign of the momentum of normalised gradients, projected.

    size         step size, pixel units
    bound        on |delta|, pixel units; a number, or one for every pixel [p, 1, S, S]
    one_channel  average the momentum over the channels, so that a grey delta stays grey
    """
    scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-20)  # a cluster without images: 0 / 0
    momentum.mul_(MOMENTUM).add_(gradient / scale)
    if one_channel:
        momentum.copy_(momentum.mean(1, keepdim=True).expand_as(momentum))
    limit = torch.as_tensor(bound, dtype=delta.dtype, device=delta.device)
    delta.sub_(size * momentum.sign()).clamp_(-limit, limit)


def step_size(step: int, steps: int, epsilon: float, largest: float | None = None) -> float:
    """Size of sign step number `step` of `steps`, pixel units: a cosine from 0.15 epsilon (or `largest`)."""
    top = LARGEST_STEP * epsilon if largest is None else largest
    return top * cosine(step, steps) + SMALLEST_STEP


def check_finite(loss: Tensor, where: str, step: int) -> None:
    """Raise PromiseError, naming place and step, before a non-finite loss reaches a parameter."""
    if not bool(torch.isfinite(loss.detach()).all()):
        raise PromiseError(f"{where}, step {step}: the loss is not finite; nothing was updated")
