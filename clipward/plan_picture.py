"""A plan's surroundings as curves: what more steps cost, what a cohort's size and a larger batch save."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from clipward.charts import FIRST, INK, MUTED, RULE, SECOND, STYLE
from clipward.summary import epsilon_text
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.errors import ImpossiblePlan, NoiseOutOfRange
from privacy.planning import DROWNED, Plan

Progress = Callable[[int, int], None]

# The light theme of the report's style sheet: a file on its own has no page to take its colours from.
COLOURS = {INK: "#17212b", MUTED: "#5a6672", RULE: "#d7dde2", FIRST: "#10617a", SECOND: "#b5702a"}
SHADES = ("#8fc3d2", "#10617a", "#0a3f50")
NOISE_FACTORS = (0.7, 1.0, 1.4)
STEP_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SIZE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DOTS_PER_INCH = 150


def draw(plan: Plan, path: Path, *, on_progress: Progress | None = None) -> None:
    """Draw the curves around ``plan`` into ``path``, whose ending says how: .png or .svg.

    A ring marks the plan. Left: epsilon against steps, for this noise, less and more. Middle: the noise that
    keeps this epsilon, against declared patients, at the same batch. Right, where the number of trained
    weights is known: noise over largest signal against the batch, at the same epsilon and cohort. What no
    noise keeps, and what has no bound, is left out.

    Raises:
        ImpossiblePlan: the plan's epsilon is 0 or has no bound.
        OSError: the file cannot be written.
    """
    if not 0 < plan.epsilon < math.inf:
        raise ImpossiblePlan(f"no curve leads through epsilon = {plan.epsilon}: plan other noise")
    tell = on_progress or (lambda done, total: None)
    total = len(NOISE_FACTORS) + len(SIZE_FACTORS)
    known = plan.noise_to_signal is not None
    with matplotlib.rc_context({**_style(), "svg.hashsalt": "clipward"}):
        figure = Figure(figsize=(13.0 if known else 8.8, 3.9), layout="constrained")
        axes: Sequence[Any] = figure.subplots(1, 3 if known else 2)
        _steps_chart(axes[0], plan, lambda done: tell(done, total))
        noises = _noises(plan, lambda done: tell(len(NOISE_FACTORS) + done, total))
        _patients_chart(axes[1], plan, noises)
        if known:
            _signal_chart(axes[2], plan, noises)
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def _style() -> dict[str, Any]:
    style = {
        key: COLOURS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()
    }
    return {**style, "axes.grid.axis": "both", "figure.facecolor": "white"}


def _steps_chart(axes: Any, plan: Plan, tell: Callable[[int], None]) -> None:
    steps = sorted({max(1, round(plan.steps * factor)) for factor in STEP_FACTORS})
    for done, (factor, colour) in enumerate(zip(NOISE_FACTORS, SHADES, strict=True), start=1):
        noise = plan.noise_multiplier * factor
        costs = [_cost(plan, noise_multiplier=noise, steps=count) for count in steps]
        axes.plot(steps, costs, color=colour, marker="o", markersize=3, label=f"{noise:.3g}")
        tell(done)
    axes.legend(title="noise multiplier", fontsize=9, title_fontsize=9)
    _finish(axes, steps, "steps of the whole run", "ε of every patient", "What more steps cost")
    _mark(axes, plan.steps, plan.epsilon)


def _patients_chart(axes: Any, plan: Plan, noises: dict[float, float]) -> None:
    patients = [plan.patients_declared * factor for factor in noises]
    axes.plot(patients, list(noises.values()), color=COLOURS[FIRST], marker="o", markersize=3)
    title = f"Noise for ε = {epsilon_text(plan.epsilon)} at {plan.batch:g} patients a step"
    _finish(axes, patients, "patients declared", "noise multiplier", title)
    _mark(axes, plan.patients_declared, plan.noise_multiplier)


def _signal_chart(axes: Any, plan: Plan, noises: dict[float, float]) -> None:
    """The noise follows from batch / patients: growing the cohort needs what cutting the batch alike does."""
    ratio = plan.noise_to_signal or math.nan
    batches = [plan.batch / factor for factor in noises]
    ratios = [ratio * factor * noise / plan.noise_multiplier for factor, noise in noises.items()]
    axes.plot(batches, ratios, color=COLOURS[SECOND], marker="o", markersize=3)
    axes.axhline(DROWNED, color=COLOURS[MUTED], linewidth=1, linestyle=(0, (4, 3)), label="drowned above")
    axes.legend(fontsize=9)
    title = f"Noise over signal at ε = {epsilon_text(plan.epsilon)}, {plan.patients_declared:,} patients"
    _finish(axes, batches, "expected patients per step", "noise / largest signal", title)
    _mark(axes, plan.batch, ratio)


def _noises(plan: Plan, tell: Callable[[int], None]) -> dict[float, float]:
    """By factor on the cohort's size: the noise that keeps the plan's epsilon."""
    found: dict[float, float] = {}
    for done, factor in enumerate(SIZE_FACTORS, start=1):
        rate = plan.sample_rate / factor
        if rate <= 1:
            try:
                found[factor] = noise_multiplier_for(
                    epsilon=plan.epsilon, delta=plan.delta, sample_rate=rate, steps=plan.steps
                )
            except NoiseOutOfRange:
                continue
        tell(done)
    return found


def _cost(plan: Plan, *, noise_multiplier: float, steps: int) -> float:
    """Not a number, a gap in the curve, where the steps are too many for the plan's delta."""
    event = PoissonGaussian(sample_rate=plan.sample_rate, noise_multiplier=noise_multiplier, steps=steps)
    try:
        return epsilon([event], delta=plan.delta)
    except ValueError:
        return math.nan


def _finish(axes: Any, x: Sequence[float], xlabel: str, ylabel: str, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xticks(x, [f"{value:,.4g}" for value in x], fontsize=9)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _mark(axes: Any, x: float, y: float) -> None:
    """Where the plan is."""
    axes.plot([x], [y], color=COLOURS[INK], marker="o", markersize=9, fillstyle="none", linestyle="")
