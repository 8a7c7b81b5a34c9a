"""What all pages share: the template environment, and readable figures, durations and URLs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def find_template(name: str, **filters: Callable[..., Any]) -> Template:
    """A template in pipeline/report/templates, by file name; `filters` are additional filters for it.

    Values are escaped when rendered; an undefined name is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": lambda number: f"{number:,}",
        "size": size,
        "duration": duration,
        "figure": figure,
        "precise": lambda value: f"{value:#.3g}".rstrip("."),
    }
    environment.filters |= filters
    return environment.get_template(name)


def plain_url(url: str) -> str:
    """The URL without credentials, query and fragment."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "not measured" if share is None else f"{100 * share:.1f} %"


def fits_range(fits: Sequence[float]) -> str:
    """Shares in [0, 1] as ' (34.5 to 36.4 over 3 fits)'; empty for fewer than two."""
    return f" ({100 * min(fits):.1f} to {100 * max(fits):.1f} over {len(fits)} fits)" if len(fits) > 1 else ""


def figure(value: float) -> str:
    """Three significant digits, without an exponent for large values."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
