"""Is joining worth it? The federation beside one model on all data and every site alone, measured alike."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from clipward.compare_arms import Arm, Asked, arms_of
from clipward.compare_picture import draw
from clipward.compare_results import BRIEF_HEADERS, PICTURE, Comparison, brief_cells
from clipward.compare_rows import Row
from clipward.compare_runs import Outcome, Runner
from clipward.public_start import Progress
from server.federation import Federation


def compare(
    federation: Federation, asked: Asked, *, runs: Path, on_progress: Progress | None = None
) -> tuple[Comparison, Path]:
    """Run what is not yet run, and write what came of it.

    Guarantees:
        Interrupted at any moment and called again, it goes on where it was; called once more, it trains
        nothing.

    Args:
        federation: The file; it has a ``simulation`` table.
        asked: What is compared.
        runs: Folder of all runs.
        on_progress: Told what is being done.

    Returns:
        The comparison, and the folder in which it lies as ``compare.json``, ``.csv``, ``.md`` and ``.png``.

    Raises:
        SettingsError: the file lacks what is asked for, or forbids it.
        CohortError: a site's data cannot be used.
        RunError: an arm cannot go on. One whose sites refuse is shown without figures instead.
    """
    tell = on_progress or (lambda what, done, total: None)
    runner = Runner(federation, runs=runs, on_progress=on_progress)
    arms = arms_of(federation, asked, runner.sites)
    outcomes: list[Outcome] = []
    for arm in arms:
        outcomes.append(_run(runner, arm, tell))
        tell("arms", len(outcomes), len(arms))
    comparison = Comparison.of(
        outcomes,
        name=federation.name,
        metric=federation.evaluation.metric,
        pairs=len(runner.held_out.texts),
        sites=len(runner.sites),
    )
    comparison.write(runner.folder)
    draw(comparison, runner.folder / PICTURE)
    return comparison, runner.folder


def table_of(title: str, rows: list[Row]) -> Table:
    """The arms of one setting as a table for a terminal of 80 columns; the files have all figures."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(BRIEF_HEADERS[0], overflow="fold")
    for header in BRIEF_HEADERS[1:]:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*brief_cells(row))
    return table


def _run(runner: Runner, arm: Arm, tell: Progress) -> Outcome:
    title, rounds = f"{arm.setting}, seed {arm.seed}, {arm.name}", arm.federation.training.rounds
    return runner.run(arm, on_round=lambda done: tell(title, done, rounds))
