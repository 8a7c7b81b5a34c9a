"""Names of regimes, kept apart so that options can be checked without importing torch."""

from __future__ import annotations

import re

from pipeline.errors import SettingsError
from pipeline.settings import near_matches

# keys of REGIMES, FILTERS and NUMBERED in pipeline.relearning.regimes
REGIME_NAMES = (
    *("nt", "nt-cg", "cg", "cg-paper", "jitter", "grayscale", "gamma", "brightness", "solarize", "hue"),
    *("iss-jpeg10", "iss-gray", "iss-bits2", "iss-jpeg10-train", "iss-gray-train", "iss-bits2-train"),
    *("subtract", "subtract-label", "subtract-blind", "delta-jitter", "opa", "shortcut-net"),
    *("coin", "rsk-ff", "friendly-noise", "epic"),
    *("at", "at-8", "at-16"),
    *("mixup", "cutmix", "cutout", "mixup-uc", "cutmix-uc", "cutout-uc", "mixup-14a"),
    *("ueraser-lite", "ueraser", "ueraser-max", "randaugment", "autoaugment", "trivialaugment"),
    *("adabn", "dfr", "few-clean", "delta-known", "self-pairs", "purify", "avatar", "le", "d-vae"),
    *("early-stop", "dropout", "weight-decay", "simclr"),
    *("smooth-0.5", "smooth-1", "smooth-2", "smooth-uc", "equalise", "spectral"),
    *("st", "st-cg", "st-full"),
)
FILTER_NAMES = ("highpass", "lowpass")
NUMBERED_NAMES = ("leaked-pairs",)

_STAGED = {"st", "st-cg", "st-full"}
# what does not work together: simclr adds layers that ST does not know, and has no classifier before its end; epic
# drops images that ST has numbered, that friendly-noise has made noise for, and that delta-jitter brings back without
_APART = (
    ({"simclr"}, {"early-stop", *_STAGED}),
    ({"epic"}, {"delta-jitter", "friendly-noise", *_STAGED}),
    ({"friendly-noise"}, {"delta-jitter"}),
)

AVATAR = "avatar"  # also the name of the diffusion model that every regime uses which makes images again from noise


def parse_regime(name: str) -> list[str]:
    """The regimes joined by '+' in `name`, from left to right.

    Raises SettingsError, with near matches, for one that does not exist or lacks its number; options in brackets are
    checked when the regime is created.
    """
    parts = name.split("+")
    for part in parts:
        _check_part(part, name)
    if len(parts) > 2:
        raise SettingsError(f"regime {name!r} joins {len(parts)} regimes; join at most two")
    plain = {re.split(r"[\[:]", part)[0] for part in parts}
    if any(plain & one and plain & other for one, other in _APART):
        raise SettingsError(f"regime {name!r}: {' and '.join(parts)} do not work together; evaluate them one by one")
    return parts


def _check_part(part: str, name: str) -> None:
    kind, _, number = part.partition(":")
    if kind in FILTER_NAMES:
        if not re.fullmatch(r"\d+(\.\d+)?", number) or not float(number) > 0:
            raise SettingsError(f"regime {part!r} needs a positive number of cycles per image, e.g. {kind}:8")
    elif kind in NUMBERED_NAMES:
        if not number.isdecimal() or int(number) < 1:
            raise SettingsError(f"regime {part!r} in {name!r}: a number is required, as in {kind}:16")
    elif "[" not in part and part not in REGIME_NAMES:
        names = sorted(
            [*REGIME_NAMES, *(f"{kind}:8" for kind in FILTER_NAMES), *(f"{kind}:N" for kind in NUMBERED_NAMES)]
        )
        near = near_matches(part, names)
        raise SettingsError(f"unknown regime {part!r} in {name!r}; choose from {', '.join(names)}{near}")
