"""The page of a concept bank: three criteria over the number of groups (Chen et al. 2024, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from pipeline.relearning.labels.sweep import Grouping
from pipeline.report.charts import PROTECTED, STYLE, as_svg, panel
from pipeline.report.page import find_template

_TITLES = {"sse": "SSE", "silhouette": "Silhouette", "calinski_harabasz": "Calinski–Harabasz"}


def concepts_page(bank: str, num_concepts: int, found: Sequence[Grouping]) -> str:
    """The page as self-contained HTML.

    bank   its name
    found  at least one number of groups
    """
    charts = [_chart(found, name, title) for name, title in _TITLES.items()]
    rows = [(one.groups, one.sse, one.silhouette, one.calinski_harabasz) for one in found]
    return find_template("concepts.html.j2").render(bank=bank, concepts=num_concepts, charts=charts, rows=rows)


def _chart(found: Sequence[Grouping], name: str, title: str) -> str:
    values = [getattr(one, name) for one in found]
    with mpl.rc_context(STYLE):
        figure, axes = panel(310, 200)
        axes.plot([one.groups for one in found], values, "o-", color=PROTECTED, markersize=4, linewidth=1.5)
        axes.set_xlabel("groups")
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return as_svg(figure, f"{title} over the number of groups, from {values[0]:.3g} to {values[-1]:.3g}")
