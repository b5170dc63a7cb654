"""What a person sees: errors in one line, progress bars, the closing table."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from clipward.summary import epsilon_text

# Lines between two reports of the same piece of work where there is no terminal to draw a bar in.
PLAIN_SECONDS = 10.0

console = Console(stderr=True)


def set_up_logging(*, verbose: bool) -> None:
    """Our own messages on standard error; libraries only when something is wrong."""
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    logging.getLogger("clipward").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def errors_in_one_line(expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn the project's own errors, which name thing and remedy, into a message and exit status 2."""
    try:
        yield
    except expected as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws a bar per piece of work, or prints a line now and then."""
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


class _Rate(ProgressColumn):
    """Pieces a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s", style="dim")


def _plain_progress() -> Callable[[str, int, int], None]:
    told: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        since, first = began.setdefault(what, (now, done))
        if done == total or now - told.setdefault(what, now) >= PLAIN_SECONDS:
            told[what] = now
            pace = _pace(done - first, total - done, now - since)
            console.print(f"{what}: {done} of {total}{pace}", markup=False, highlight=False)

    return show


def _pace(done: int, left: int, seconds: float) -> str:
    """Rate, and the time left at it; nothing while neither is known."""
    if done <= 0 or seconds <= 0:
        return ""
    time_left = timedelta(seconds=round(left * seconds / done))
    return f", {done / seconds:.1f}/s" + (f", {time_left} left" if left else "")


def result_table(summary: Mapping[str, Any]) -> Table:
    """The figures of a run beside chance, its public start and whatever it was compared with."""
    mode = summary["privacy"]["mode"]
    compared = summary.get("compare", {}).items()
    columns = {
        "public start": summary["public_start"],
        "after private federation" if mode == "dp" else "after federation": summary["evaluation"],
        **{name.replace("_", " ").replace("dp", "DP"): one for name, one in compared},
        **{f"{site}'s own": one for site, one in summary.get("models", {}).items()},
    }
    columns = {name: evaluation for name, evaluation in columns.items() if evaluation is not None}
    table = Table(title=f"{summary['run']}: held-out patients of all sites", title_justify="left")
    table.add_column("")
    table.add_column("chance", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for label, keys, chance_keys, style in _FIGURES:
        if any(_dig(evaluation, keys) is not None for evaluation in columns.values()):
            chance = next((_dig(one, chance_keys) for one in columns.values()), None) if chance_keys else 0.5
            values = [_dig(evaluation, keys) for evaluation in columns.values()]
            table.add_row(
                label, *("-" if value is None else format(value, style) for value in (chance, *values))
            )
    return table


_RETRIEVAL = (("image_to_text", "image to text"), ("text_to_image", "text to image"))
_FIGURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    *(
        (f"{title} R@{k}", ("retrieval", way, f"r{k}"), ("retrieval", way, f"chance_r{k}"), ".1%")
        for way, title in _RETRIEVAL
        for k in (1, 5, 10)
    ),
    ("zero-shot macro AUROC", ("zero_shot", "macro_auroc"), (), ".3f"),
)


def _dig(tree: Any, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return None if tree is None else float(tree)


def guarantee(summary: Mapping[str, Any]) -> str:
    """One sentence on what the run promises its patients."""
    privacy = summary["privacy"]
    if not privacy["formal_guarantee"]:
        reasons = {
            "none": "this run had no differential privacy.",
            "dp": "the noise came from a fixed seed, which is for tests alone.",
        }
        return f"No formal guarantee: {reasons.get(privacy['mode'], 'nobody knows how this run began.')}"
    epsilon = "unknown" if privacy["epsilon"] is None else epsilon_text(privacy["epsilon"])
    return (
        f"Every patient: epsilon = {epsilon} at delta = {privacy['delta']:g} "
        "(add or remove one patient with all their studies; maximum over the sites)."
    )
