"""A comparison as one picture: every arm's figure with its interval, one panel a setting."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from clipward.charts import FIRST, MUTED, SECOND, STYLE
from clipward.compare_reading import percent, title_of
from clipward.compare_results import Comparison
from clipward.compare_rows import Row, by_setting
from clipward.plan_picture import COLOURS, DOTS_PER_INCH

INCHES_A_PANEL, INCHES_A_ROW = 4.6, 0.28
MARKS = {"federation": ("o", FIRST), "pooled": ("s", SECOND), "alone": ("D", MUTED)}


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the comparison into ``path``, whose ending says how: .png or .svg.

    Each arm is a point with its 95 % interval over seeds; upright lines are the federation (whole) and chance
    (dashed). Arms without figures are left out.
    """
    panels = list(by_setting(row for row in comparison.rows if comparison.metric in row.measures))
    height = 1.2 + INCHES_A_ROW * max((len(rows) for _, rows in panels), default=1)
    style = {
        key: COLOURS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()
    }
    with matplotlib.rc_context({**style, "figure.facecolor": "white", "svg.hashsalt": "clipward"}):
        figure = Figure(figsize=(INCHES_A_PANEL * max(1, len(panels)), height), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for one, (setting, rows) in zip(axes, panels, strict=False):
            _panel(one, rows, comparison)
            one.set_title(setting, fontsize=11, loc="left")
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, rows: list[Row], comparison: Comparison) -> None:
    metric = comparison.metric
    scale = 100 if percent(metric) else 1
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        mark, colour = MARKS[row.kind]
        estimate = row.measures[metric]
        axes.errorbar(
            scale * estimate.mean,
            place,
            xerr=None if estimate.margin is None else scale * estimate.margin,
            marker=mark,
            color=COLOURS[colour],
            markersize=5,
            linewidth=1,
        )
        if row.kind == "federation":
            axes.axvline(scale * estimate.mean, color=COLOURS[colour], linewidth=0.8, zorder=0)
    chance = rows[0].chances.get(metric)
    if chance is not None:
        axes.axvline(scale * chance, color=COLOURS[MUTED], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))  # an interval may reach below what there is
    axes.set_yticks(list(places), [row.name for row in rows])
    axes.set(xlabel=title_of(metric) + (" in %" if scale > 1 else ""), ylim=(0.3, len(rows) + 0.7))
    axes.grid(visible=False)
