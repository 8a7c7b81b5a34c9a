"""Charts of the relearning report: curves as inline SVG in the page's colours, activations as PNG.

No names are drawn inside a chart: they stand in the page, where they are escaped and can wrap.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.charts import FIFTH, FOURTH, INK, PROTECTED, SEVENTH, SIXTH, STYLE, THIRD, as_svg, panel

SERIES = (PROTECTED, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH)
SERIES_NAMES = ("protected", "third", "fourth", "fifth", "sixth", "seventh")  # the page's CSS variables, same order
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 3))
_GREY = "#8b8f97"  # readable on both light and dark backgrounds, which share the PNG


@dataclass(frozen=True)
class Line:
    """One line of a chart; non-finite values leave a gap.

    colour    a placeholder from pipeline.report.charts
    spread    half height of the band around y, or of the error bars if the line has dots
    crosses   indices of points marked with a cross: rejected epochs, or where a training diverged
    end       value of a dot at the last x, for a measurement made afterwards
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    is_dashed: bool = False
    has_dots: bool = False
    is_step: bool = False
    spread: Sequence[float] | None = None
    crosses: Sequence[int] = ()
    end: float | None = None


def curves(
    lines: Sequence[Line],
    title: str,
    *,
    label: str,
    unit: str = "epoch",
    is_accuracy: bool = True,
    floor: float | None = None,
) -> str:
    """Lines over epochs or shares as SVG.

    title         for screen readers; must be unique on the page
    label         of the vertical axis
    unit          of the horizontal axis
    is_accuracy   show [0, 1] in per cent on the vertical axis
    floor         draw a dotted horizontal line here
    """
    with mpl.rc_context(STYLE):
        figure, axes = panel(310, 210)
        for line in lines:
            _draw(axes, line)
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=1, linestyle=_DOTTED)
        if is_accuracy:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        if unit == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        else:
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(unit)
        axes.set_ylabel(label)
        return as_svg(figure, title)


def _draw(axes: Axes, line: Line) -> None:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    style = _DASHED if line.is_dashed else "-"
    marker, steps = "o" if line.has_dots else "", "steps-mid" if line.is_step else "default"
    axes.plot(x, y, color=line.colour, linewidth=1.6, linestyle=style, marker=marker, markersize=4, drawstyle=steps)
    if line.spread is not None and any(line.spread):
        spread = np.asarray(line.spread, float)
        if line.has_dots:
            axes.errorbar(x, y, spread, fmt="none", ecolor=line.colour, elinewidth=1)
        else:
            axes.fill_between(x, y - spread, y + spread, color=line.colour, alpha=0.15, linewidth=0)
    crosses = [i for i in line.crosses if i < len(y) and math.isfinite(y[i])]
    if crosses:
        axes.plot(x[crosses], y[crosses], "x", color=line.colour, markersize=6, markeredgewidth=1.6)
    if line.end is not None and len(x):
        axes.plot(x[-1], line.end, "o", color=line.colour, markersize=5, clip_on=False)


def activations(pictures: Sequence[Mapping[str, Any]]) -> str:
    """One training's activations in two dimensions as a PNG data URL: PCA above, t-SNE below, a column per epoch.

    pictures   as returned by run_trial
    One colour per class, cycling through ten; protected images are dots, clean ones rings. Axes have no units and
    are not comparable between columns.
    Source: Dang et al. 2023, Fig. 5.
    """
    kinds = [kind for kind in ("pca", "tsne") if any(picture[kind] for picture in pictures)]
    # A figure without rows or columns cannot be drawn, so keep at least one empty panel
    figure = Figure(figsize=(1.75 * max(1, len(pictures)), 1.65 * max(1, len(kinds))), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(max(1, len(kinds)), max(1, len(pictures)), squeeze=False)
    palette = mpl.colormaps["tab10"](np.arange(10))
    for row, kind in enumerate(kinds):
        for column, picture in enumerate(pictures):
            axes = places[row][column]
            if picture[kind]:
                points = np.asarray(picture[kind], float)
                colours = [palette[int(label) % 10] for label in picture["labels"]]
                faces = [c if shown else (0, 0, 0, 0) for c, shown in zip(colours, picture["protected"], strict=True)]
                axes.scatter(points[:, 0], points[:, 1], s=7, c=faces, edgecolors=colours, linewidths=0.5)
            if row == 0:
                axes.set_title(f"epoch {picture['epoch']}", fontsize=8, color=_GREY)
            if column == 0:
                axes.set_ylabel({"pca": "PCA", "tsne": "t-SNE"}[kind], fontsize=8, color=_GREY)
    for axes in places.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(_GREY)
            spine.set_linewidth(0.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, transparent=True, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
