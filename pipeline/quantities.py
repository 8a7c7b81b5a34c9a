"""Quantities as people type them: a change of a pixel, a time, a number of bytes."""

from __future__ import annotations

import re

from pipeline.errors import SettingsError

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_epsilon(text: str | float) -> float:
    """'16/255' or '0.0627' -> float, in pixel units. Raises SettingsError."""
    number, slash, divisor = str(text).partition("/")
    try:
        return float(number) / (float(divisor) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"--epsilon {text!r} is not a number or a fraction like 16/255") from None


def parse_seconds(text: str) -> float:
    """'30s', '2m', '1h' or a bare number of seconds. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smhd]?)\s*", text)
    if match is None:
        raise ValueError(text)
    return float(match[1]) * _SECONDS[match[2]]


def parse_bytes(text: str) -> int:
    """'64M', '1G', '500k' or a bare number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+)\s*([kMG]?)i?B?\s*", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]) << {"": 0, "k": 10, "M": 20, "G": 30}[match[2]]
