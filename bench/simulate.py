"""What a simulated round costs beside training: this process, Flower's Ray engine, and pfl-research.

Every site answers with an update that is ready, so what is left is moving models: messages, their isolation
and checking, the combination. Ours and Ray run the same coordinator (`server.app.coordinate`) and the same
ClientApp; pfl-research sums the same updates by its own loop, which has no messages.
"""

import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clipward.backends import run_in_process, run_on_ray
from processes import tree
from reporting import Table, cell, write_rows
from server.app import coordinate
from server.federation import Federation
from server.rounds import Start
from strategies.messages import (
    Arrays,
    PublicBundle,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    TrainRequest,
    decode,
    encode,
)

OURS, RAY, PFL = "in-process", "flower-ray", "pfl-research"
PROTOTYPES = "prototypes"
SHAPES = {PROTOTYPES: {"sums": (28, 2, 129)}}  # 28 concepts, a sum for image and text and its count
ROUNDS, GIB = 3, 2**30
RAY_STORE_BYTES = 4 * GIB  # so that what travels at a time need not go by way of the disk
GOAL_OVERHEAD, GOAL_SITES, GOAL_MODEL = 5.0, 8, "350 MB"
GOAL_SECONDS, MANY = 60.0, 1000
SAMPLED_EVERY_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one child process measures.

    Attributes:
        model: What travels: ``prototypes``, or a size as ``350 MB``.
        sites: Sites, all of which answer in every round.
        who: Whose engine.
    """

    model: str
    sites: int
    who: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays; of a model 25, the first a quarter of the whole, as CLIP's token embedding is."""
        if self.model in SHAPES:
            return dict(SHAPES[self.model])
        values = int(self.model.removesuffix(" MB")) * 10**6 // 4
        return {"00": (values // 4,), **{f"{number:02}": (values // 32,) for number in range(1, 25)}}

    @property
    def model_bytes(self) -> int:
        """Of float32 values."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())


# --- the sites ----------------------------------------------------------------------------------------------

client_app = ClientApp()
_ready: Arrays = {}


@client_app.query("hello")  # type: ignore[untyped-decorator]
def hello(message: Message, context: Context) -> Message:
    """Say who the site is; it has the public bundle, which travels once a run and not once a round."""
    facts = SiteFacts(site=_name(context), patients_declared=1000, has_bundle=True)
    return Message(encode(facts), reply_to=message)


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Read the request as a site does, and send what is ready."""
    request = decode(message.content)
    if not isinstance(request, TrainRequest):
        refusal = Refusal(site=_name(context), code=RefusalCode.MESSAGE, incident="none")
        return Message(encode(refusal), reply_to=message)
    if _ready.keys() != request.arrays.keys():  # once a process
        _ready.clear()
        _ready.update({name: np.full_like(value, 1e-3) for name, value in request.arrays.items()})
    facts = ReleaseFacts(
        site=_name(context),
        server_round=request.server_round,
        patients_declared=1000,
        steps=1,
        seconds=0.0,
        epsilon=None,
        epsilon_max=None,
        delta=None,
        noise_multiplier=None,
        sample_rate=None,
        max_grad_norm=None,
        anchor=None,
        insecure_seed=False,
        replayed=False,
    )
    return Message(encode(Release(facts=facts, update=_ready)), reply_to=message)


def _name(context: Context) -> str:
    return str(context.node_config["site"])


# --- one child ----------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Run `ROUNDS` rounds in this process.

    Returns:
        ``rounds``: seconds of each round, exchange and combination; ``processor``: seconds that processors
        worked on it for this process and all below it, the checkpoint's included; ``total``: seconds from
        the first message to the last.
    """
    return _pfl_rounds(case) if case.who == PFL else _our_rounds(case)


def _our_rounds(case: Case) -> dict[str, Any]:
    federation = Federation.parse(
        {
            "version": 1,
            "name": "overhead",
            "privacy": {"mode": "none"},
            "objective": {"name": "infonce"},
            "training": {"rounds": ROUNDS, "steps": 1, "batch": 1},
            "strategy": {"min-sites": case.sites},
            "checkpoints": {"keep": 1},
        },
        source="bench",
    )
    start = Start(
        bundle=PublicBundle(
            model={}, weights={}, anchor_texts=(), anchor_images=np.zeros((0, 1, 1), dtype=np.uint8)
        ),
        arrays={name: np.ones(shape, dtype=np.float32) for name, shape in case.shapes.items()},
        public_start=False,
    )
    events: list[dict[str, Any]] = []
    worked: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        if event["kind"] in ("round_started", "round_finished"):
            worked.append(_processor_seconds())

    server_app = ServerApp()
    with tempfile.TemporaryDirectory() as folder:

        @server_app.main()  # type: ignore[untyped-decorator]
        def main(grid: Grid, context: Context) -> None:
            coordinate(grid, federation, start=start, run_dir=Path(folder), resume=False, listeners=[listen])

        configs = [{"site": f"site-{number}"} for number in range(case.sites)]
        if case.who == RAY:
            store = RAY_STORE_BYTES
            run_on_ray(server_app, client_app, node_configs=configs, run_config={}, object_store_bytes=store)
        else:
            run_in_process(server_app, client_app, node_configs=configs, run_config={})
    finished = [event for event in events if event["kind"] == "round_finished"]
    if [event["replied"] for event in finished] != [case.sites] * ROUNDS:
        raise RuntimeError(f"expected {ROUNDS} rounds of {case.sites} replies, got {finished}")
    [whole] = [event["seconds"] for event in events if event["kind"] == "run_finished"]
    parts = ("train", "communicate", "aggregate")
    return {
        "rounds": [sum(event["seconds"][part] for part in parts) for event in finished],
        "processor": [end - begin for begin, end in zip(worked[::2], worked[1::2], strict=True)],
        "total": whole,
    }


def _pfl_rounds(case: Case) -> dict[str, Any]:
    """The same updates from as many users through pfl-research's `SimulatedBackend`, without torch."""
    dataset, cohorts, stats, metrics = (
        importlib.import_module(f"pfl.{name}")
        for name in ("data.dataset", "data.federated_dataset", "stats", "metrics")
    )
    backend = importlib.import_module("pfl.aggregate.simulate").SimulatedBackend
    context = importlib.import_module("pfl.context").CentralContext
    population = importlib.import_module("pfl.common_types").Population.TRAIN
    ready = {name: np.full(shape, 1e-3, dtype=np.float32) for name, shape in case.shapes.items()}
    weights = {name: np.ones(shape, dtype=np.float32) for name, shape in case.shapes.items()}

    class Ready:
        """An algorithm whose local part has been done."""

        def simulate_one_user(self, model: Any, user: Any, central: Any) -> tuple[Any, Any]:
            return stats.MappedVectorStatistics(dict(ready), weight=1.0), metrics.Metrics()

    users = cycle(range(case.sites))
    cohort = cohorts.FederatedDataset(
        lambda user: dataset.Dataset((np.zeros(1),), user_id=str(user)), lambda: next(users)
    )
    simulated = backend(training_data=cohort, val_data=cohort)
    rounds, processor, begin = [], [], time.monotonic()
    for iteration in range(ROUNDS):
        started, worked = time.monotonic(), _processor_seconds()
        central = context(
            current_central_iteration=iteration,
            do_evaluation=False,
            cohort_size=case.sites,
            population=population,
            algorithm_params=None,
            model_train_params=None,
        )
        combined, _ = simulated.gather_results(None, Ready(), central_context=central)
        combined.average()
        for name in weights:
            weights[name] += combined[name]
        rounds.append(time.monotonic() - started)
        processor.append(_processor_seconds() - worked)
    return {"rounds": rounds, "processor": processor, "total": time.monotonic() - begin}


def _processor_seconds() -> float:
    """Seconds that processors have worked for this process and those below it that are alive."""
    return sum(map(_worked, tree(os.getpid()))) / os.sysconf("SC_CLK_TCK")


def _worked(pid: int) -> int:
    """Clock ticks of a process, those of its children that have ended included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0
    return sum(map(int, fields[11:15]))


def child(text: str) -> None:
    """Measure the case of this JSON; the result is the last line of the output."""
    found = measure(Case(**json.loads(text)))
    typer.echo(json.dumps(found))


# --- all children -------------------------------------------------------------------------------------------


def compare(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Every case in a process of its own, one after the other."""
    found = {}
    for case in cases:
        typer.echo(f"{case.model}, {case.sites} sites, {case.who} ...", err=True)
        found[case] = _child(case)
        typer.echo(f"  {json.dumps(found[case])}", err=True)
    return [_row(case, result, found) for case, result in found.items()]


def _child(case: Case) -> dict[str, Any]:
    """Run one case; its processes' memory is watched from here."""
    nothing: dict[str, Any] = {"rounds": [], "processor": [], "total": None, "peak_bytes": None}
    if case.who == PFL and importlib.util.find_spec("pfl") is None:
        return {**nothing, "reason": "pfl is not installed"}
    here = Path(__file__).resolve().parent
    code = f"import sys; sys.path.append({str(here)!r})"
    code += f"; from bench.simulate import child; child({json.dumps(asdict(case))!r})"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=here.parent, stdout=out, stderr=err)  # noqa: S603
        peak = _watched(process)
        out.seek(0)
        err.seek(0)
        said, failed = out.read().strip().splitlines(), err.read().strip().splitlines()
    if process.returncode:
        last = failed[-1] if failed else "no message"
        return {**nothing, "peak_bytes": peak, "reason": f"status {process.returncode}: {last[:200]}"}
    return {**json.loads(said[-1]), "peak_bytes": peak, "reason": None}


def _watched(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process; the most memory that it and all below it had at a time, shared pages once."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLED_EVERY_SECONDS):
            peak = max(peak, sum(map(_proportional_bytes, tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    ended.set()
    watcher.join()
    return peak


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _row(case: Case, result: Mapping[str, Any], found: Mapping[Case, Mapping[str, Any]]) -> dict[str, Any]:
    ours = found.get(Case(model=case.model, sites=case.sites, who=OURS), {"rounds": [], "processor": []})
    seconds, processor = (_per_site(case, result[name]) for name in ("rounds", "processor"))
    return {
        "what": case.model,
        "who": case.who,
        "sites": case.sites,
        "model_bytes": case.model_bytes,
        "seconds": statistics.median(seconds) if seconds else None,
        "spread": max(seconds) - min(seconds) if seconds else None,
        "processor_seconds": statistics.median(processor) if processor else None,
        "total_seconds": result["total"],
        "peak_bytes": result["peak_bytes"],
        "ratio": _ratio(seconds, _per_site(case, ours["rounds"])),
        "processor_ratio": _ratio(processor, _per_site(case, ours["processor"])),
        "ratio_to": f"{case.model}, {case.sites} sites, {OURS}",
        "reason": result["reason"],
    }


def _per_site(case: Case, rounds: Sequence[float]) -> list[float]:
    """Seconds a site and round; the first round, in which engines start, is left out."""
    return [seconds / case.sites for seconds in rounds[1:]]


def _ratio(own: Sequence[float], ours: Sequence[float]) -> float | None:
    return statistics.median(own) / statistics.median(ours) if own and ours else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, with a footnote for each reason why there is no figure."""
    header = ["what travels", "sites", "engine", "ms a site and round", "spread", "times ours"]
    header += ["processor ms", "times ours", "run s", "peak MB", "goal"]
    made = Table(header)
    for row in rows:
        cells = [row["what"], str(row["sites"]), row["who"] + made.mark(row["reason"])]
        cells += [cell(row["seconds"], 1e3, digits=2), cell(row["spread"], 1e3, digits=2)]
        cells += [cell(row["ratio"], digits=2), cell(row["processor_seconds"], 1e3, digits=2)]
        cells += [cell(row["processor_ratio"], digits=2), cell(row["total_seconds"])]
        made.add([*cells, cell(row["peak_bytes"], 1e-6, digits=0), _goal(row)])
    return str(made)


def _goal(row: Mapping[str, Any]) -> str:
    case = (row["what"], row["sites"], row["who"])
    if case == (GOAL_MODEL, GOAL_SITES, RAY) and row["ratio"] is not None:
        return f"≥ {GOAL_OVERHEAD:g} times ours: {'met' if row['ratio'] >= GOAL_OVERHEAD else 'missed'}"
    if case == (PROTOTYPES, MANY, OURS) and row["total_seconds"] is not None:
        return f"< {GOAL_SECONDS:g} s: {'met' if row['total_seconds'] < GOAL_SECONDS else 'missed'}"
    return ""


# --- the command --------------------------------------------------------------------------------------------

# What travels, sites, engines. Ray's rounds of very many sites take minutes, and say nothing new.
WHOLE = [
    ("350 MB", 8, (OURS, RAY, PFL)),
    (PROTOTYPES, 1000, (OURS, PFL)),
    ("10 MB", 8, (OURS, RAY, PFL)),
    ("10 MB", 2, (OURS, RAY, PFL)),
    ("10 MB", 100, (OURS, RAY, PFL)),
    ("350 MB", 2, (OURS, RAY, PFL)),
    ("10 MB", 1000, (OURS, PFL)),
]
QUICK = [
    (PROTOTYPES, 1000, (OURS, PFL)),
    ("10 MB", 2, (OURS, RAY, PFL)),
    ("10 MB", 8, (OURS, RAY, PFL)),
    ("10 MB", 100, (OURS, PFL)),
    ("40 MB", 8, (OURS, RAY, PFL)),
]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help="A line to measure, as '350 MB,8'; can be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models and fewer sites.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Compare what a simulated round costs beside training, by engine, size and number of sites.

    Progress goes to stderr, the table to stdout. pfl-research takes part where Python finds it.
    """
    lines = [(what, sites, engines) for what, sites, engines in (QUICK if quick else WHOLE)]
    known = {f"{what},{sites}": (what, sites, engines) for what, sites, engines in lines}
    if unknown := sorted(set(only or known) - set(known)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {'; '.join(known)}", param_hint="--only")
    cases = [
        Case(model=what, sites=sites, who=who)
        for line, (what, sites, engines) in known.items()
        if line in (only or known)
        for who in engines
    ]
    rows = compare(cases)
    if as_json is not None:
        write_rows(as_json, "simulate", rows, packages=("torch", "flwr", "ray", "pfl"))
    typer.echo(table(rows))


if __name__ == "__main__":
    app()
