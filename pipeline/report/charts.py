"""The report's charts as inline SVG. Colours are CSS variables of the page, so one chart serves light and dark themes.

Each panel is a separate image a few hundred pixels wide; the page lays them out, stacked on a phone.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.hashing import sha256

# Placeholder colours for matplotlib; each is replaced by a CSS variable of the page.
INK, FAINT, CLEAN, PROTECTED, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
FOURTH, FIFTH, SIXTH, SEVENTH = "#060606", "#070707", "#080808", "#090909"
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    CLEAN: "var(--clean)",
    PROTECTED: "var(--protected)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
    FIFTH: "var(--fifth)",
    SIXTH: "var(--sixth)",
    SEVENTH: "var(--seventh)",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scumble",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
_PIXELS_PER_INCH = 72  # of matplotlib's SVGs


def histogram(
    values: Sequence[float], label: str, *, span: tuple[float, float], mark: float | None = None, mark_label: str = ""
) -> str:
    """A histogram with 24 equal bins over `span`; `mark` is drawn as a labelled vertical line.

    Non-finite values are omitted; values outside the span go into the first or last bin.
    """
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    with mpl.rc_context(STYLE):
        figure, axes = panel(310, 200)
        axes.hist(finite.clip(*span), bins=24, range=span, color=PROTECTED)
        axes.set_xlim(*span)
        axes.set_xlabel(label)
        axes.set_ylabel("pictures")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.text(mark, 1.02, mark_label, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
        return as_svg(figure, f"Histogram: {label}, {len(finite)} pictures")


def training_curve(losses: Sequence[float], title: str, *, span: tuple[float, float], is_low: bool = False) -> str:
    """One cluster's loss over its recorded steps; all clusters of a run share `span`."""
    with mpl.rc_context(STYLE):
        figure, axes = panel(190, 140)
        axes.plot(range(len(losses)), losses, color=THIRD if is_low else PROTECTED, linewidth=1.5)
        axes.set_ylim(*span)
        axes.set_xlim(0, max(1, len(losses) - 1))
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.set_title(title, loc="left")
        return as_svg(figure, f"Loss of {title}, from {losses[0]:.3g} to {losses[-1]:.3g}")


def removal(known: Mapping[str, Sequence[float]], blind: Mapping[str, Sequence[float]]) -> str:
    """Correlation of estimated and true deltas: one dot per cluster, one row per estimate and grouping."""
    names = {"mean": "mean", "high_pass": "mean − blurred mean", "iterated": "the same, six rounds"}
    rows = [
        (f"{names.get(estimate, estimate)}, {grouping}", values[estimate], colour)
        for grouping, values, colour in (("clusters known", known, CLEAN), ("blind", blind, PROTECTED))
        for estimate in values
    ]
    with mpl.rc_context(STYLE):
        figure, axes = panel(640, 56 + 26 * len(rows))
        for height, (_, values, colour) in enumerate(reversed(rows)):
            axes.plot(values, [height] * len(values), "o", color=colour, markersize=6, alpha=0.55)
            axes.plot([float(np.mean(values))] * 2, [height - 0.32, height + 0.32], color=INK, linewidth=2)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlim(min(-0.05, *(min(values) for _, values, _ in rows)), 1)
        axes.set_xlabel("correlation with the true delta (dot: cluster, bar: mean)")
        return as_svg(figure, "How well deltas can be estimated from protected images alone")


def shared_span(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits of a shared loss axis, with a margin."""
    values = [loss for curve in curves for loss in curve if math.isfinite(loss)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart, sized in pixels; create and draw it within rc_context(STYLE)."""
    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element without XML header, metadata or namespaces, labelled for screen readers.

    title  must be unique on the page, because element ids are derived from it
    """
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    prefix = f"c{sha256(title.encode())[:12]}"  # ids must not clash with those of other charts on the page
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
