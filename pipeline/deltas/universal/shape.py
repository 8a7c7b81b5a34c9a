"""Options of a universal generator, kept apart from the network so that they can be checked without torch."""

from __future__ import annotations

from typing import Literal

Bound = Literal["eps_tanh", "tanh_clamp", "l2"]
BOUNDS: tuple[Bound, ...] = ("eps_tanh", "tanh_clamp", "l2")
WIDTH, BLOCKS = 64, 24
STRIDE = 8  # sides must be multiples of this
