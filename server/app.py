"""Flower's entry to the coordinator: read the settings, run the rounds."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.federation import Federation
from server.metrics import RunLog
from server.rounds import Evaluate, run_rounds
from strategies.flower_compat import stay_offline

logger = logging.getLogger(f"clipward.{__name__}")

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]  # flwr is not annotated for us
def main(grid: Grid, context: Context) -> None:
    """Run the federation named in the app's settings."""
    stay_offline()
    federation = Federation.load(Path(str(context.run_config["federation"])))
    run_dir = str(context.run_config["run-dir"]) or f"runs/{federation.name}"
    coordinate(grid, federation, run_dir=Path(run_dir), resume=bool(context.run_config["resume"]))


def coordinate(
    grid: Grid,
    federation: Federation,
    *,
    run_dir: Path,
    resume: bool,
    evaluate: Evaluate | None = None,
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> None:
    """Build the start and run all rounds; the result is the run's last checkpoint.

    Args:
        grid: Flower's way to the sites.
        federation: The consortium's settings.
        run_dir: Folder of the run; the start is kept there, so that a resume does not train it again.
        resume: Go on from the last checkpoint, if there is one.
        evaluate: Measures weights on the coordinator's data.
        listeners: Told every event once it is on the disk.

    Raises:
        RunError: the run cannot start or go on.
    """
    from server.start import build_start  # imports torch, which reading this module should not

    start = build_start(federation, cache=run_dir / "start", on_progress=_say)
    log = RunLog(run_dir / "metrics.jsonl", listeners=listeners)
    run_rounds(
        grid,
        federation,
        run_dir=run_dir,
        start=start,
        evaluate=evaluate or _nothing,
        log=log,
        resume=resume,
    )


def _say(text: str) -> None:
    logger.info("%s", text)


def _nothing(arrays: Mapping[str, Any]) -> None:
    """Evaluate nothing."""
