"""The kinds of generators that make deltas of single images: from their file, and at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from pipeline.deltas.samplewise.base import DeltaMaker
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledPass
from pipeline.deltas.samplewise.sample_steps import SampleGenerator, SampleSteps

PictureGenerator = SampleGenerator | DistilledGenerator
_KINDS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, NDArray[Any]]], PictureGenerator]] = {
    "sample": SampleGenerator.from_parts,
    "distilled": DistilledGenerator.from_parts,
}
PER_PICTURE = tuple(_KINDS)  # names of generators


def generator_from(kind: str, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> PictureGenerator:
    """From what its `header` and `tensors` gave. Raises KeyError, ValueError or TypeError for anything else."""
    return _KINDS[kind](header, tensors)


def maker_of(
    generator: PictureGenerator, targets: Sequence[int], epsilon: float, device: torch.device | str = "cpu"
) -> DeltaMaker:
    """What makes its deltas on a device; arguments as for DeltaMaker."""
    if isinstance(generator, SampleGenerator):
        return SampleSteps(generator, targets, epsilon, device)
    return DistilledPass(generator, targets, epsilon, device)
