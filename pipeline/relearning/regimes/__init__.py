"""The regimes by name. A name is one of REGIMES or several joined by '+', applied from left to right."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import SettingsError
from pipeline.relearning.regimes.base import Composed, Knowledge, Regime
from pipeline.relearning.regimes.colour import ColourAndGray
from pipeline.relearning.regimes.iss import Grayscale, JpegCompression
from pipeline.relearning.regimes.subtract import SubtractEstimate
from pipeline.settings import near_matches

__all__ = ["REGIMES", "Knowledge", "Regime", "find_regime"]

REGIMES: dict[str, Callable[[Knowledge], Regime]] = {
    "nt": lambda _: Regime(),
    "nt-cg": lambda _: ColourAndGray(),
    "cg": lambda _: ColourAndGray(),
    "iss-jpeg10": lambda _: JpegCompression(10),
    "iss-gray": lambda _: Grayscale(),
    "subtract": lambda known: SubtractEstimate("either", known),
    "subtract-label": lambda known: SubtractEstimate("label", known),
    "subtract-blind": lambda known: SubtractEstimate("blind", known),
}


def find_regime(name: str, known: Knowledge = Knowledge()) -> Regime:  # noqa: B008  frozen
    """The regime called `name`, e.g. 'nt-cg' or 'subtract+cg'; at most two may be joined by '+'.

    known   what the informed adversary assumes; other regimes do not use it
    Raises SettingsError for an unknown name, with near matches.
    """
    parts = [_find_part(part, name, known) for part in name.split("+")]
    if len(parts) > 2:
        raise SettingsError(f"regime {name!r} joins {len(parts)} regimes; at most two can be joined")
    return parts[0] if len(parts) == 1 else Composed(name, parts)


def _find_part(part: str, name: str, known: Knowledge) -> Regime:
    if part not in REGIMES:
        names = sorted(REGIMES)
        raise SettingsError(
            f"unknown regime {part!r} in {name!r}: none of {', '.join(names)}{near_matches(part, names)}"
        )
    return REGIMES[part](known)
