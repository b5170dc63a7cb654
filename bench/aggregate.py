"""Combining the updates of a round: the coordinator's memory and time beside Flower's own strategies.

Every figure is of a child process of its own. Replies are made one at a time when they are asked for, as a
grid gives them: ours folds each in and lets it go, Flower's strategies take the list of all. The weights the
round starts from are held by both, as in a run. Seconds are processor time, which other work on the machine
disturbs little; the wall's stand beside them.
"""

import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from reporting import Table, cell, write_rows
from strategies.flower_compat import act_as_coordinator
from strategies.strategy import StrategySettings, strategy_of

OURS, FLOWER = "ours", "flower"
FLOWERS = {"fedavg": flower.FedAvg, "median": flower.FedMedian, "krum": flower.Krum}
SITES, MEGABYTES = (2, 8, 32), 350
QUICK_MEGABYTES = 40
GOAL_MODELS = 3.0  # most memory of ours for fedavg, in multiples of the model
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one child process measures.

    Attributes:
        what: Strategy.
        who: Whose code.
        sites: Replies of the round.
        megabytes: Size of the model.
        limit: Most bytes the process may hold.
    """

    what: str
    who: str
    sites: int
    megabytes: int
    limit: int


# --- the replies --------------------------------------------------------------------------------------------


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """25 arrays, of which the first is a quarter of the whole, as CLIP's token embedding is."""
    values = megabytes * 10**6 // 4
    return {"00": (values // 4,), **{f"{number:02}": (values // 32,) for number in range(1, 25)}}


class Replies:
    """Replies that are made when the iterator comes to them, and how long that took."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.made = 0
        self.seconds = 0.0
        self.wall_seconds = 0.0

    def __iter__(self) -> Iterator[Message]:
        for number in range(self._case.sites):
            begin = time.process_time(), time.perf_counter()
            message = self._reply(number)
            self.made += 1
            self.seconds += time.process_time() - begin[0]
            self.wall_seconds += time.perf_counter() - begin[1]
            yield message
            del message

    def _reply(self, number: int) -> Message:
        arrays = ArrayRecord(
            {name: _array(shape, number) for name, shape in shapes(self._case.megabytes).items()}
        )
        metrics = MetricRecord({"num-examples": 1000.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 1, "train")


def _array(shape: tuple[int, ...], number: int) -> Array:
    """As `Array(values)`, which would hold two more copies of the bytes on the way."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    values = np.random.default_rng(number).integers(-100, 100, 4096).astype(np.float32)
    data = b"".join([header.getvalue(), np.resize(values, shape).data])
    return Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)


# --- one child ----------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Combine one round in this process: seconds without making the replies, and the peak of its memory."""
    act_as_coordinator(1)
    before = _resident("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (before + case.limit, before + case.limit))
    base = {name: np.ones(shape, dtype=np.float32) for name, shape in shapes(case.megabytes).items()}
    replies = Replies(case)
    combine = _ours if case.who == OURS else _flower
    begin = time.process_time(), time.perf_counter()
    try:
        combine(case, base, replies)
        reason = None
    except MemoryError:
        reason = f"out of memory at the limit of {case.limit / GIB:.1f} GiB after {replies.made} replies"
    return {
        "seconds": time.process_time() - begin[0] - replies.seconds,
        "wall_seconds": time.perf_counter() - begin[1] - replies.wall_seconds,
        "peak_bytes": _resident("VmHWM") - before,
        "reason": reason,
    }


def _ours(case: Case, base: dict[str, Any], replies: Replies) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        strategy = strategy_of(StrategySettings.model_validate({"name": case.what}), folder=Path(folder))
        strategy.begin(base)
        for number, reply in enumerate(replies):
            record = reply.content.array_records["arrays"]
            update = {name: record.pop(name).numpy() for name in list(record)}
            strategy.fold(f"site-{number}", update, 1000.0)
            del reply, record, update
        strategy.finish()


def _flower(case: Case, base: dict[str, Any], replies: Replies) -> None:
    theirs = FLOWERS[case.what]()
    arrays, _ = theirs.aggregate_train(1, replies)
    if arrays is None or set(arrays) != set(base):
        raise RuntimeError(f"Flower's {case.what} combined nothing")


def _resident(field: str) -> int:
    """Bytes of this process's memory as the kernel has them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# --- all children -------------------------------------------------------------------------------------------


def compare(cases: Sequence[Case], *, repeats: int) -> list[dict[str, Any]]:
    """Every case in processes of its own, the repetitions interleaved."""
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for repeat in range(repeats):
        for case in cases:
            typer.echo(f"{case.what}, {case.sites} sites, {case.who}: {repeat + 1} of {repeats}", err=True)
            found[case].append(_child(case))
    return [_row(case, results, found) for case, results in found.items()]


def _child(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this file
    if done.returncode:  # the kernel's own killing included
        reason = f"ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        return {"seconds": None, "wall_seconds": None, "peak_bytes": None, "reason": reason}
    return dict(json.loads(done.stdout))


def _row(
    case: Case, results: list[dict[str, Any]], found: dict[Case, list[dict[str, Any]]]
) -> dict[str, Any]:
    whole = [result for result in results if result["reason"] is None]
    peers = [peer for peer in found if (peer.what, peer.sites, peer.who) == (case.what, case.sites, FLOWER)]
    theirs = [result["seconds"] for peer in peers for result in found[peer] if result["reason"] is None]
    seconds = [result["seconds"] for result in whole]
    peaks = [result["peak_bytes"] for result in results if result["peak_bytes"] is not None]
    peak = max(peaks, default=None)
    return {
        "what": case.what,
        "who": case.who,
        "sites": case.sites,
        "model_bytes": case.megabytes * 10**6,
        "seconds": statistics.median(seconds) if seconds else None,
        "spread": max(seconds) - min(seconds) if seconds else None,
        "wall_seconds": statistics.median(result["wall_seconds"] for result in whole) if whole else None,
        "peak_bytes": peak,
        "peak_models": None if peak is None else peak / (case.megabytes * 10**6),
        "ratio": statistics.median(seconds) / statistics.median(theirs) if seconds and theirs else None,
        "ratio_to": f"{case.what} {FLOWER} {case.sites}",
        "reason": next((result["reason"] for result in results if result["reason"]), None),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with a footnote for each reason why a round was not combined."""
    header = ["strategy", "sites", "who", "s", "spread s", "time x", "wall s"]
    header += ["peak MB", "peak in models", "goal"]
    made = Table(header)
    for row in rows:
        cells = [row["what"], str(row["sites"]), row["who"] + made.mark(row["reason"])]
        cells += [cell(row["seconds"]), cell(row["spread"])]
        cells += [cell(row["ratio"], digits=2), cell(row["wall_seconds"])]
        cells += [cell(row["peak_bytes"], 1e-6, digits=0)]
        made.add([*cells, cell(row["peak_models"], digits=2), _goal(row)])
    return str(made)


def _goal(row: dict[str, Any]) -> str:
    if row["who"] != OURS or row["what"] != "fedavg" or row["peak_models"] is None:
        return ""
    return f"≤ {GOAL_MODELS:g}: {'met' if row['peak_models'] <= GOAL_MODELS else 'missed'}"


# --- the command --------------------------------------------------------------------------------------------


def _known(value: str) -> str:
    for each in value.split(","):
        if each not in FLOWERS:
            raise typer.BadParameter(f"{each!r} is none of {', '.join(FLOWERS)}")
    return value


app = typer.Typer(add_completion=False)


@app.command()
def main(
    strategies: Annotated[
        str, typer.Option(callback=_known, help="Any of " + ", ".join(FLOWERS) + ", with commas.")
    ] = "fedavg",
    sites: Annotated[str, typer.Option(help="Numbers of sites, with commas.")] = ",".join(map(str, SITES)),
    megabytes: Annotated[int | None, typer.Option(min=1, help="Size of the model.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Processes per figure; the median counts.")] = 3,
    limit_gib: Annotated[float, typer.Option(help="Most memory of one process.")] = 10.0,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_MEGABYTES} MB.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare combining a round with Flower's own strategies: peak memory and time, by number of sites.

    Progress goes to stderr, the table to stdout. A process that would pass the limit is reported as out of
    memory, with the number of replies it had taken. What ours keeps on disk lies in the folder the command
    is run from.
    """
    if case is not None:
        typer.echo(json.dumps(measure(Case(**json.loads(case)))))
        return
    size = megabytes or (QUICK_MEGABYTES if quick else MEGABYTES)
    cases = [
        Case(what=what, who=who, sites=int(count), megabytes=size, limit=int(limit_gib * GIB))
        for what in strategies.split(",")
        for count in sites.split(",")
        for who in (OURS, FLOWER)
    ]
    rows = compare(cases, repeats=repeats)
    if as_json is not None:
        write_rows(as_json, "aggregate", rows)
    typer.echo(table(rows))


if __name__ == "__main__":
    app()
