"""The regimes by name. A name is one of REGIMES, or two joined by '+', applied from left to right.

Names of the ST family may carry options in brackets: 'st-cg[reduce=pca2,kappa=2]'. Those in FILTERS and NUMBERED end
with a number: 'highpass:16', 'leaked-pairs:100'.
"""

from __future__ import annotations

from collections.abc import Callable

from torchvision.transforms import v2

from pipeline.relearning.denoisers.diffusion import AVATAR_SCHEDULE, LE_SCHEDULE
from pipeline.relearning.regime_names import parse_regime
from pipeline.relearning.regimes.adversarial import AdversarialTraining
from pipeline.relearning.regimes.base import Composed, Knowledge
from pipeline.relearning.regimes.recovery.dfr import FeatureReweighting
from pipeline.relearning.regimes.recovery.disentangled import Disentangled
from pipeline.relearning.regimes.recovery.epic import IsolatedDropped
from pipeline.relearning.regimes.recovery.friendly import FriendlyNoise
from pipeline.relearning.regimes.recovery.informed import AdaptedNormalisation, DeltaJitter, DeltaKnown, FewClean
from pipeline.relearning.regimes.recovery.opa import OrthogonalProjection
from pipeline.relearning.regimes.recovery.purify import LeakedPairs, Purify, Regenerate
from pipeline.relearning.regimes.recovery.shortcut import ShortcutNet
from pipeline.relearning.regimes.recovery.simclr import ContrastivePretraining
from pipeline.relearning.regimes.recovery.subtract import SubtractEstimate
from pipeline.relearning.regimes.regularise import Dropout, EarlyStop, WeightDecay
from pipeline.relearning.regimes.staged.progressive import (
    ProgressiveColour,
    ProgressiveFull,
    ProgressiveTraining,
    staged_regime,
)
from pipeline.relearning.regimes.views.colour import ColourAndGray, PaperColour
from pipeline.relearning.regimes.views.interpolate import RandomInterpolation
from pipeline.relearning.regimes.views.iss import BitDepth, Grayscale, JpegCompression
from pipeline.relearning.regimes.views.mix import (
    ChannelMixup,
    Cutout,
    FixedCutMix,
    FixedCutout,
    FixedMixup,
    MixedLabels,
)
from pipeline.relearning.regimes.views.policies import AugmentationPolicy
from pipeline.relearning.regimes.views.sharpen import SharpenedAndFiltered
from pipeline.relearning.regimes.views.single import SingleChange
from pipeline.relearning.regimes.views.smooth import Smoothing
from pipeline.relearning.regimes.views.spectrum import Equalised, PeaksCut, RadialFilter
from pipeline.relearning.regimes.views.ueraser import UEraser, UEraserLite
from pipeline.relearning.training import Regime

__all__ = ["FILTERS", "NUMBERED", "REGIMES", "Knowledge", "Regime", "find_regime"]

REGIMES: dict[str, Callable[[Knowledge], Regime]] = {
    "nt": lambda _: Regime(),
    "nt-cg": lambda _: ColourAndGray(),
    "cg": lambda _: ColourAndGray(),
    "cg-paper": lambda _: PaperColour(),
    "jitter": lambda _: PaperColour("jitter", gray_share=0),
    "grayscale": lambda _: SingleChange("grayscale"),
    "gamma": lambda _: SingleChange("gamma"),
    "brightness": lambda _: SingleChange("brightness"),
    "solarize": lambda _: SingleChange("solarize"),
    "hue": lambda _: SingleChange("hue"),
    "iss-jpeg10": lambda _: JpegCompression(10),
    "iss-gray": lambda _: Grayscale(),
    "iss-bits2": lambda _: BitDepth(2),
    "iss-jpeg10-train": lambda _: JpegCompression(10, tests_too=False),
    "iss-gray-train": lambda _: Grayscale(tests_too=False),
    "iss-bits2-train": lambda _: BitDepth(2, tests_too=False),
    "subtract": lambda known: SubtractEstimate("either", known),
    "subtract-label": lambda known: SubtractEstimate("label", known),
    "subtract-blind": lambda known: SubtractEstimate("blind", known),
    "at": lambda _: AdversarialTraining("at", 4 / 255, 0.8 / 255),
    "at-8": lambda _: AdversarialTraining("at-8", 8 / 255, 2 / 255),
    "at-16": lambda _: AdversarialTraining("at-16", 16 / 255, 4 / 255),
    "mixup": lambda _: MixedLabels("mixup", v2.MixUp, 1.0),
    "cutmix": lambda _: MixedLabels("cutmix", v2.CutMix, 0.5),
    "cutout": lambda _: Cutout(),
    "mixup-uc": lambda _: FixedMixup(),
    "cutmix-uc": lambda _: FixedCutMix(),
    "cutout-uc": lambda _: FixedCutout(),
    "mixup-14a": lambda _: ChannelMixup(),
    "opa": lambda _: OrthogonalProjection(),
    "ueraser-lite": lambda _: UEraserLite(),
    "ueraser": lambda _: UEraser(always=False),
    "ueraser-max": lambda _: UEraser(always=True),
    "adabn": AdaptedNormalisation,
    "delta-jitter": DeltaJitter,
    "delta-known": DeltaKnown,
    "few-clean": FewClean,
    "self-pairs": lambda known: Purify("self-pairs", known),
    "purify": lambda known: Purify("purify", known),
    "avatar": lambda known: Regenerate("avatar", known, AVATAR_SCHEDULE),
    "le": lambda known: Regenerate("le", known, LE_SCHEDULE),
    "d-vae": Disentangled,
    "early-stop": EarlyStop,
    "dfr": FeatureReweighting,
    "dropout": lambda _: Dropout(),
    "weight-decay": lambda _: WeightDecay(),
    "randaugment": lambda _: AugmentationPolicy("randaugment"),
    "autoaugment": lambda _: AugmentationPolicy("autoaugment"),
    "trivialaugment": lambda _: AugmentationPolicy("trivialaugment"),
    "smooth-0.5": lambda _: Smoothing("smooth-0.5", 0.5),
    "smooth-1": lambda _: Smoothing("smooth-1", 1.0),
    "smooth-2": lambda _: Smoothing("smooth-2", 2.0),
    "smooth-uc": lambda _: Smoothing("smooth-uc", 3.0, kernel=7),
    "equalise": lambda _: Equalised(),
    "spectral": lambda _: PeaksCut(),
    "shortcut-net": lambda _: ShortcutNet(),
    "coin": lambda _: RandomInterpolation(),
    "rsk-ff": lambda _: SharpenedAndFiltered(),
    "friendly-noise": lambda _: FriendlyNoise(),
    "epic": lambda _: IsolatedDropped(),
    "simclr": lambda _: ContrastivePretraining(),
    "st": lambda _: ProgressiveTraining(),
    "st-cg": lambda _: ProgressiveColour(),
    "st-full": lambda _: ProgressiveFull(),
}
NUMBERED: dict[str, Callable[[Knowledge, int], Regime]] = {"leaked-pairs": LeakedPairs}

FILTERS: dict[str, Callable[[float], Regime]] = {
    "highpass": lambda cutoff: RadialFilter("highpass", cutoff),
    "lowpass": lambda cutoff: RadialFilter("lowpass", cutoff),
}


def find_regime(name: str, known: Knowledge = Knowledge()) -> Regime:  # noqa: B008  frozen
    """The regime called `name`, e.g. 'nt-cg', 'highpass:16' or 'subtract+cg'; at most two may be joined by '+'.

    known   what the adversary has besides the protected images; most regimes ignore it
    Raises SettingsError for an unknown name, with near matches, and if `known` lacks what a regime needs.
    """
    parts = [_find_part(part, known) for part in parse_regime(name)]
    return parts[0] if len(parts) == 1 else Composed(name, parts)


def _find_part(part: str, known: Knowledge) -> Regime:
    kind, _, number = part.partition(":")
    if "[" in part:
        return staged_regime(part)
    if kind in FILTERS:
        return FILTERS[kind](float(number))
    if kind in NUMBERED:
        return NUMBERED[kind](known, int(number))
    return REGIMES[part](known)
