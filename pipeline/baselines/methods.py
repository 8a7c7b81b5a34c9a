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
    trains   whether it trains a network, which can be chosen
    """

    place: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = False


_EM, _TAP = "trained.error_minimising:ErrorMinimising", "trained.pushed:AdversarialPoisons"
_REM, _CP = "trained.robust:RobustErrorMinimising", "trained.contrastive:ContrastivePoisons"

BASELINES = {
    "random": Method("shortcuts.class_noise:ClassNoise", "uniform noise for each label; epsilon"),
    "block": Method("shortcuts.class_noise:ClassBlocks", "blocks of random signs for each label; epsilon"),
    "sp": Method("shortcuts.separable:Separable", "separable patches for each image (Yu et al. 2022); an L2 norm"),
    "ops": Method("shortcuts.one_pixel:OnePixel", "one pixel of each image, by label (Wu et al. 2023); no bound"),
    "ar": Method("shortcuts.autoregressive:Autoregressive", "fresh noise by a kernel of the label; an L2 norm"),
    "cuda": Method("shortcuts.class_filters:ClassFilters", "a small filter for each label; no bound"),
    "em": Method(_EM, "lowers the training error with a surrogate (Huang et al. 2021)", trains=True),
    "em-class": Method(_EM, "the same for each label", {"class_wise": True}, trains=True),
    "em-t": Method(_EM, "EM under grey and colour jitter (Dang et al.)", {"colour": True}, trains=True),
    "em-a": Method(_EM, "EM with a surrogate trained by ST (Dang et al.)", {"staged": True}, trains=True),
    "em-at": Method(_EM, "both", {"colour": True, "staged": True}, trains=True),
    "em-class-t": Method(_EM, "em-t for each label", {"class_wise": True, "colour": True}, trains=True),
    "em-class-a": Method(_EM, "em-a for each label", {"class_wise": True, "staged": True}, trains=True),
    "em-class-at": Method(_EM, "both", {"class_wise": True, "colour": True, "staged": True}, trains=True),
    "emaxn": Method("trained.pushed:ErrorMaximising", "raises a surrogate's error (Huang et al. 2021)", trains=True),
    "tap": Method(_TAP, "towards the next label (Fowl et al. 2021)", trains=True),
    "tap-untargeted": Method(_TAP, "away from the label", {"targeted": False}, trains=True),
    "hypo": Method("trained.pushed:Hypocritical", "towards the own label (Tao et al. 2021)", trains=True),
    "dune": Method("trained.pushed:DuneSpatial", "through several checkpoints (DUNE, spatial branch)", trains=True),
    "rem": Method(_REM, "EM against an adversarially trained surrogate (Fu et al. 2022)", trains=True),
    "rem-t": Method(_REM, "REM under grey and colour jitter (Dang et al.)", {"colour": True}, trains=True),
    "pil": Method("trained.linear:LinearInduction", "a linear surrogate alone (Liu et al. 2026)"),
    "mi-ue": Method("trained.mutual:MutualInformation", "draws features of a label together", trains=True),
    "cp": Method(_CP, "lowers the contrastive loss of SimCLR (He et al. 2023)", trains=True),
    "cp-class": Method(_CP, "the same for each label", {"class_wise": True}, trains=True),
    "deepconfuse": Method(
        "trained.generated:DeepConfuse", "a generator that leads training astray (Feng et al. 2019)", trains=True
    ),
    "tue": Method("trained.contrastive:SeparableNoise", "separable noise (Ren et al. 2023, as its command runs)"),
}


def baseline(name: str, network: str | None = None) -> Baseline:
    """The method of that name.

    network  that it trains, by its name in pipeline.relearning.targets; None: the published one
    Raises KeyError if there is no such method, SettingsError if there is no such network.
    """
    method = BASELINES[name]
    options = dict(method.options) | ({} if network is None else {"surrogate": network})
    module, _, kind = method.place.partition(":")
    made: Baseline = getattr(import_module(f"pipeline.baselines.{module}"), kind)(**options)
    return made
