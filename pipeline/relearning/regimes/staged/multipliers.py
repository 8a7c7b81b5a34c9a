"""How much each layer's learning rate is reduced after a number of rejected epochs (Dang et al., Eq. 5).

The equation is missing from the text available to us. All variants are 1 everywhere at count 0, fall as the count grows
and never fall faster in a deeper layer than in a shallower one, as section III-B and Fig. 6 require. Only exp_depth
slows all layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import expit

WIDTH = 2.0  # layers over which linear_front falls from 1 to 0
SOFTNESS = 1.0  # layers, of sigmoid_front
DECAY = 0.5  # per layer behind the front, of geometric


def _linear_front(advance: float, depth: int, num_layers: int) -> float:
    return min(1.0, max(0.0, 1 - (advance - (depth - 1)) / WIDTH))


def _sigmoid_front(advance: float, depth: int, num_layers: int) -> float:
    return float(expit((depth - advance) / SOFTNESS) / expit(depth / SOFTNESS))


def _geometric(advance: float, depth: int, num_layers: int) -> float:
    return float(DECAY ** max(0.0, advance - (depth - 1)))


def _exp_depth(advance: float, depth: int, num_layers: int) -> float:
    return math.exp(-advance * (1 - (depth - 1) / num_layers))


def _freeze(advance: float, depth: int, num_layers: int) -> float:
    return 0.0 if depth <= math.floor(advance) else 1.0


MULTIPLIERS: dict[str, Callable[[float, int, int], float]] = {
    "linear_front": _linear_front,
    "sigmoid_front": _sigmoid_front,
    "geometric": _geometric,
    "exp_depth": _exp_depth,
    "freeze": _freeze,
}


def layer_multipliers(name: str, count: int, num_layers: int, beta: float) -> list[float]:
    """Factor for each layer's learning rate, in [0, 1], shallowest layer first.

    name        linear_front   clip(1 - (beta count - (l - 1)) / 2, 0, 1): a front moving beta layers per count
                sigmoid_front  sigmoid(l - beta count) / sigmoid(l)
                geometric      0.5 ** max(0, beta count - (l - 1))
                exp_depth      exp(-beta count (1 - (l - 1) / L))
                freeze         0 for l <= floor(beta count), else 1
    count       rejected epochs so far, >= 0
    num_layers  L; layers are l = 1 ... L
    beta        layers by which the front moves per rejected epoch, >= 0
    """
    return [MULTIPLIERS[name](beta * count, depth, num_layers) for depth in range(1, num_layers + 1)]
