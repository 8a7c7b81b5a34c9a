"""The published protections by name. A module is imported when its method is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.baselines.base import Baseline


@dataclass(frozen=True)
class Method:
    """A line of the table.

    place    module below this package, and class
    about    for the help: what it is, what has a delta of its own, what bounds it
    options  of the class
    """

    place: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)


BASELINES = {
    "random": Method("shortcuts.class_noise:ClassNoise", "uniform noise for each label; epsilon"),
    "block": Method("shortcuts.class_noise:ClassBlocks", "blocks of random signs for each label; epsilon"),
    "sp": Method("shortcuts.separable:Separable", "separable patches for each image (Yu et al. 2022); an L2 norm"),
    "ops": Method("shortcuts.one_pixel:OnePixel", "one pixel of each image, by label (Wu et al. 2023); no bound"),
    "ar": Method("shortcuts.autoregressive:Autoregressive", "fresh noise by a kernel of the label; an L2 norm"),
    "cuda": Method("shortcuts.class_filters:ClassFilters", "a small filter for each label; no bound"),
}


def baseline(name: str) -> Baseline:
    """The method of that name. Raises KeyError if there is none."""
    method = BASELINES[name]
    module, _, kind = method.place.partition(":")
    made: Baseline = getattr(import_module(f"pipeline.baselines.{module}"), kind)(**method.options)
    return made
