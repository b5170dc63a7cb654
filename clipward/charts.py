"""The report's charts: matplotlib figures as SVG elements that follow the page's theme."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import matplotlib
from markupsafe import escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DIRECTION_NAMES = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
Rows: TypeAlias = Sequence[Mapping[str, Any]]

# Matplotlib cannot write CSS variables, so charts are drawn in stand-in colours that are replaced afterwards:
# the page's theme, light or dark or printed, then holds in the charts too.
INK, MUTED, RULE, FIRST, SECOND = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
THEME = {INK: "--ink", MUTED: "--muted", RULE: "--rule", FIRST: "--first", SECOND: "--second"}


def draw_charts(*, rounds: Rows, sites: Rows, findings: Rows) -> dict[str, str | None]:
    """Draw every chart of the report.

    Guarantees:
        Equal rows give equal text. Ids are unique over all charts, so they can stand in one page. Text stays
        text, escaped; colours are the CSS variables of ``THEME``.

    Args:
        rounds: ``round``, ``recall`` and ``epsilons`` (by task, by site), ``auroc``, and the chance levels
            ``chance_r10`` and ``chance_auroc``.
        sites: ``name``, ``epsilon``, ``epsilon_max``.
        findings: ``name``, ``start``, ``final``.

    Returns:
        SVG elements by name; None where there is nothing to draw.
    """
    with (
        matplotlib.rc_context({**STYLE, "svg.hashsalt": "clipward"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # text stays text: the browser draws it
        return {
            "recall": _recall_chart(rounds),
            "auroc": _auroc_chart(rounds),
            "budget": _budget_chart(sites),
            "spending": _spending_chart(rounds, sites),
            "findings": _findings_chart(findings),
        }


STYLE = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a site may be called A$B
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
}
_HALF, _FULL = 6.2, 13.0  # inches of 72 points, near the page's pixels, so that letters keep their size


def _recall_chart(rounds: Rows) -> str | None:
    points = [row for row in rounds if any(value is not None for value in row["recall"].values())]
    if not points:
        return None
    figure, axes = _figure(_HALF, 3.1)
    x = [row["round"] for row in points]
    for (task, name), colour, mark in zip(DIRECTION_NAMES.items(), (FIRST, SECOND), "os", strict=True):
        y = [_percent(row["recall"][task]) for row in points]
        _curve(axes, x, y, name, colour=colour, mark=mark)
    _chance(axes, [_percent(row["chance_r10"]) for row in points])
    axes.set(ylabel="R@10 in %", ylim=(0, None))
    _finish_rounds(axes, x)
    return _svg(figure, "recall", "Retrieval R@10 after each round, both directions, with the chance level")


def _auroc_chart(rounds: Rows) -> str | None:
    points = [row for row in rounds if row["auroc"] is not None]
    if not points:
        return None
    figure, axes = _figure(_HALF, 3.1)
    x = [row["round"] for row in points]
    _curve(axes, x, [row["auroc"] for row in points], "Macro AUROC")
    _chance(axes, [row["chance_auroc"] for row in points])
    axes.set(ylabel="Macro AUROC")
    _finish_rounds(axes, x)
    return _svg(figure, "auroc", "Zero-shot macro AUROC after each round, with the chance level")


def _budget_chart(sites: Rows) -> str | None:
    known = [site for site in sites if site["epsilon"] is not None]
    if not known:
        return None
    figure, axes = _figure(_HALF, _height(len(known)))
    y = range(len(known), 0, -1)
    for place, site in zip(y, known, strict=True):
        budget = site["epsilon_max"]
        if budget is not None:
            axes.barh(place, budget, height=0.62, color=RULE)
            axes.plot([budget, budget], [place - 0.36, place + 0.36], color=INK, linewidth=1.4)
        axes.barh(place, site["epsilon"], height=0.62, color=FIRST)
    axes.set_yticks(list(y), [site["name"] for site in known])
    axes.set(xlabel="ε spent (bar) and allowed (line)", xlim=(0, None))
    axes.grid(visible=False)
    return _svg(figure, "budget", "Epsilon spent by each site's cohort against its budget")


def _spending_chart(rounds: Rows, sites: Rows) -> str | None:
    spending = [row for row in rounds if row["epsilons"]]
    if not spending:
        return None
    figure, axes = _figure(_HALF, 3.1)
    for site in sites:
        mine = [
            (row["round"], row["epsilons"][site["name"]])
            for row in spending
            if site["name"] in row["epsilons"]
        ]
        axes.plot(*zip(*mine, strict=True) if mine else ([], []), color=MUTED, linewidth=0.8)
    x = [row["round"] for row in spending]
    highest = [max(row["epsilons"].values()) for row in spending]
    _curve(axes, x, highest, "Highest of all sites")
    budgets = {site["epsilon_max"] for site in sites} - {None}
    if len(budgets) == 1:
        axes.axhline(budgets.pop(), color=INK, linewidth=1, linestyle=(0, (4, 3)), label="Budget")
    axes.set(ylabel="ε spent", ylim=(0, None))
    _finish_rounds(axes, x)
    return _svg(
        figure, "spending", "Epsilon spent after each round, one thin line a site, the highest in colour"
    )


def _findings_chart(findings: Rows) -> str | None:
    known = [row for row in findings if row["final"] is not None or row["start"] is not None]
    if not known:
        return None
    figure, axes = _figure(_FULL, _height(len(known)))
    y = list(range(len(known), 0, -1))
    for place, row in zip(y, known, strict=True):
        if row["start"] is not None and row["final"] is not None:
            axes.plot([row["start"], row["final"]], [place, place], color=RULE, linewidth=3, zorder=1)
    for field, name, colour, mark in (("start", "Public start", SECOND, "s"), ("final", "Final", FIRST, "o")):
        points = [(row[field], place) for place, row in zip(y, known, strict=True) if row[field] is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, marker=mark, s=34, zorder=2, label=name)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="Chance", zorder=0)
    axes.set_yticks(y, [row["name"] for row in known])
    axes.set(xlabel="AUROC", ylim=(0.3, len(known) + 0.7))
    axes.grid(visible=False)
    _legend(axes)
    return _svg(figure, "findings", "AUROC of each finding, public start against final model")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
    return figure, figure.subplots()


def _height(lines: int) -> float:
    """Inches for so many lines of text under one another, closer when there are many."""
    return 0.9 + lines * (0.3 if lines <= 12 else 0.2)


def _curve(
    axes: Any, x: Sequence[float], y: Sequence[float], name: str, *, colour: str = FIRST, mark: str = "o"
) -> None:
    marker = mark if len(x) <= 30 else ""  # more would hide the line
    axes.plot(x, y, color=colour, marker=marker, markersize=4, label=name)


def _chance(axes: Any, levels: Sequence[float | None]) -> None:
    known = [level for level in levels if level is not None]
    if known:
        axes.axhline(known[-1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="Chance")


def _finish_rounds(axes: Any, rounds: Sequence[int]) -> None:
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(rounds) - 0.4, max(rounds) + 0.4)
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.6)


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an SVG element that can stand beside others in one page.

    Matplotlib numbers the ids of every figure alike, and its style element would style the whole page: ids
    get the figure's name in front, the style goes (the page's own style sheet has it).
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|\sxmlns(:xlink)?=\"[^\"]*\"|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _percent(value: float | None) -> float:
    """Percent for a chart; a gap where it is unknown."""
    return math.nan if value is None else 100 * value
