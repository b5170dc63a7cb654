"""Flower's entry to the coordinator: read the settings, run the rounds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.errors import RunError
from server.federation import Federation
from server.metrics import RunLog
from server.rounds import Evaluate, Start, run_rounds
from strategies.flower_compat import stay_offline

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation named in the app's settings.

    Relative paths are relative to the folder that Flower was started in, which may not be this shell's.

    Raises:
        SettingsError: the federation file cannot be used.
        RunError: the run cannot start or go on.
    """
    stay_offline()
    federation = Federation.load(Path(str(context.run_config["federation"])).absolute())
    if federation.secure_aggregation is not None and not federation.secure_aggregation.sites:
        raise RunError(
            "secure-aggregation.sites has to name every site's public key (site.pub): only 'clipward "
            "simulate' reads them from the folders of its sites"
        )
    run_dir = Path(str(context.run_config["run-dir"]) or f"runs/{federation.name}")
    from server.start import (  # imports torch, which Flower's checks do without
        STARTS,
        evaluator_of,
        prepared_start,
        start_of,
    )

    prepared = prepared_start(federation, cache=run_dir.parent / STARTS)
    coordinate(
        grid,
        federation,
        start=start_of(federation, prepared),
        evaluate=evaluator_of(federation, prepared),
        run_dir=run_dir,
        resume=bool(context.run_config["resume"]),
    )


def coordinate(
    grid: Grid,
    federation: Federation,
    *,
    start: Start,
    run_dir: Path,
    resume: bool,
    evaluate: Evaluate | None = None,
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> None:
    """Run all rounds; the result is the run's last checkpoint.

    Args:
        grid: Flower's way to the sites.
        federation: The consortium's settings.
        start: Weights of round 0 and the public bundle.
        run_dir: Folder of the run.
        resume: Go on from the last checkpoint, if there is one.
        evaluate: Measures weights on data the coordinator may look at.
        listeners: Told every event once it is on the disk.

    Raises:
        RunError: the run cannot start or go on.
    """
    run_rounds(
        grid,
        federation,
        run_dir=run_dir,
        start=start,
        evaluate=evaluate or _nothing,
        log=RunLog(run_dir / "metrics.jsonl", listeners=listeners),
        resume=resume,
    )


def _nothing(arrays: Mapping[str, Any]) -> None:
    """Evaluate nothing."""
