"""Schedules for a learning rate or step size, as a share of its peak."""

from __future__ import annotations

import math


def cosine(step: float, steps: float) -> float:
    """From 1 at step 0 down to 0 at `steps`, along a half cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def one_cycle(step: int, steps: int, warm_up: float) -> float:
    """From 1/25 up to 1 over the first `warm_up` share of the steps, then down to 0, both along a half cosine."""
    up = warm_up * steps
    if step < up:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / up)) / 2
    return cosine(step - up, steps - up)
