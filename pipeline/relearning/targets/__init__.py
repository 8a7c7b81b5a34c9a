"""The target models by name: networks that an adversary trains from random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipeline.errors import SettingsError
from pipeline.relearning.targets.small import SmallResNet
from pipeline.settings import near_matches

__all__ = ["TARGETS", "build_target"]

TARGETS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "small": lambda num_classes, side, dropout: SmallResNet(num_classes, side, dropout),
}


def build_target(name: str, num_classes: int, side: int, *, seed: int, dropout: float = 0.0) -> nn.Module:
    """A target with random weights that depend on the seed alone; torch's global generator is left as it was.

    The network maps float [B, 3, side, side], normalised, to scores [B, num_classes]; `embed` gives the
    penultimate features [B, d], `head` the classifier. Raises SettingsError for an unknown name, with near matches.
    """
    if name not in TARGETS:
        names = sorted(TARGETS)
        raise SettingsError(f"unknown target {name!r}: none of {', '.join(names)}{near_matches(name, names)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TARGETS[name](num_classes, side, dropout)
