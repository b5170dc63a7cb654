"""One stream of events per run, and Prometheus metrics as a function of it.

``metrics.jsonl`` is the stream: one JSON object a line, appended and synced as things happen. Whatever else
tells the world about a run (the exporter here, the progress display, the summary, the report) reads nothing
but this stream, so all of them agree, also after a ``kill -9``.
"""

import errno
import json
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from strategies.files import sync

logger = logging.getLogger(f"clipward.{__name__}")

VERSION = 1
PHASES = ("train", "communicate", "aggregate", "evaluate", "checkpoint")
RECALLS = ("r1", "r5", "r10")
DIRECTIONS = ("image_to_text", "text_to_image")
RELEASED = (
    "site_replied",
    "centre_replied",
    "prototypes_replied",
    "losses_replied",
    "late_arrived",
)  # a release cost its site what it cost, used or not
SENT = (*RELEASED, "site_masked")

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
Event: TypeAlias = dict[str, Any]


class RunLogError(ValueError):
    """An event cannot be written, or the file of events cannot be believed."""


class ExporterError(RuntimeError):
    """The metrics cannot be served."""


class RunLog:
    """Appends the events of one run to its file and tells the listeners.

    Guarantees:
        When ``record`` returns, the event is on the disk. Listeners receive exactly what ``read_events``
        would return for it. A listener that fails is logged and never stops the run. A line torn by a crash
        is cut off before the next one is appended.

    Args:
        path: The file; it and its folder are made when missing.
        listeners: Called with each event, in order, after it is on the disk.
    """

    def __init__(self, path: Path, *, listeners: Sequence[Callable[[Event], None]] = ()) -> None:
        self._path = path
        self._listeners = tuple(listeners)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _cut_torn_tail(file)
        sync(path.parent)

    def record(self, kind: str, **fields: JSON) -> None:
        """Append one event.

        Args:
            kind: What happened, such as ``"round_finished"``.
            fields: JSON values. A NaN is written as null: JSON knows no NaN, and unknown is null here.

        Raises:
            RunLogError: a field uses a reserved name, is infinite, or is no JSON value.
        """
        if reserved := sorted(fields.keys() & {"version", "time"}):
            raise RunLogError(f"event {kind!r} uses the reserved field {reserved[0]!r}: rename it")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"version": VERSION, "time": now, "kind": kind, **fields}
        try:
            line = json.dumps(_nan_to_null(event), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RunLogError(f"event {kind!r} is not JSON: {error}; pass plain, finite values") from error
        with self._path.open("ab+") as file:
            _cut_torn_tail(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._tell(json.loads(line))

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # a broken display or exporter must not end hours of training
                logger.exception("a listener failed on event %s", event["kind"])


def read_events(path: Path) -> list[Event]:
    """Read the events of a run, oldest first.

    An event counts once its newline is written: what follows the last newline was torn by a crash and is
    left out.

    Raises:
        RunLogError: a complete line is not an event of this version; the message names the line.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_parse(line, number=number, path=path) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, *, number: int, path: Path) -> Event:
    where = f"{path.name}, line {number}"
    try:
        event = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both its children
        raise RunLogError(f"{where} is damaged ({error}): restore the file or delete this line") from error
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise RunLogError(f"{where} is not an event: expected an object with a 'kind'")
    if event.get("version") != VERSION:
        raise RunLogError(f"{where} has version={event.get('version')!r}: this Clipward reads {VERSION}")
    return event


_ANSWERS = {
    "site_replied": "train",
    "site_refused": "train",
    "centre_replied": "centre",
    "centre_refused": "centre",
    "prototypes_replied": "prototypes",
    "prototypes_refused": "prototypes",
    "losses_replied": "losses",
    "losses_refused": "losses",
}


def effective(events: Sequence[Event]) -> list[Event]:
    """Keep what counts when rounds were repeated after a crash.

    Guarantees:
        Of events that say the same thing (same kind, round, phase and site) only the last remains, in order.
        A reply and a refusal are two answers to the same question, so the later of them wins.
    """
    last: dict[tuple[Any, ...], Event] = {}
    for event in reversed(events):
        question = _ANSWERS.get(event["kind"], event["kind"])
        last.setdefault((question, *(event.get(key) for key in ("round", "phase", "site"))), event)
    return list(reversed(last.values()))


def finished_rounds(events: Iterable[Event]) -> set[int]:
    """Rounds that count: those with a ``round_finished``."""
    return {event["round"] for event in events if event["kind"] == "round_finished"}


def epsilon_spent(events: Iterable[Event]) -> dict[str, float]:
    """Largest epsilon each site reported, in rounds that count or not: what was spent stays spent."""
    spent: dict[str, float] = {}
    for event in events:
        if event["kind"] in RELEASED and event.get("epsilon") is not None:
            spent[event["site"]] = max(spent.get(event["site"], 0.0), event["epsilon"])
    return spent


class PrometheusExporter(Collector):
    """Serves a run's state to Prometheus; a listener of ``RunLog``.

    Guarantees:
        The metrics are a function of the events seen, so replaying the past ones restores them after a
        resume. Fields are read by name and labels hold announced site names, short codes, phases and metric
        names only: nothing else in an event reaches ``/metrics``.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        self._events.append(event)

    def replay(self, events: Iterable[Event]) -> None:
        """Take in the events of the run's past."""
        self._events.extend(events)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Answer scrapes in the background until ``close``.

        Args:
            port: 0 lets the operating system choose.
            host: Address to listen on; the default is reachable from this machine only.

        Returns:
            The port really bound.

        Raises:
            ExporterError: it serves already, or the address cannot be bound.
        """
        if self._server is not None:
            raise ExporterError("the metrics are served already: close the exporter first")
        try:
            self._server = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            cause = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error})"
            raise ExporterError(
                f"metrics port {port} on {host} {cause}: choose another, or 0 for any"
            ) from error
        return int(self._server[0].server_port)

    def close(self) -> None:
        """Stop serving and free the port; harmless when not serving."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def collect(self) -> Iterator[Metric]:
        """Compute every metric from the events seen so far; called by each scrape."""
        seen = self._events.copy()  # a scrape runs in its own thread while events arrive
        events = effective(seen)
        announced = _announced_sites(events)
        yield from _run_metrics(events)
        yield from _round_metrics(events)
        yield from _site_metrics([event for event in events if event.get("site") in announced])
        yield from _evaluation_metrics(events)


_Samples: TypeAlias = Iterable[tuple[tuple[str, ...], Any]]


def _run_metrics(events: Sequence[Event]) -> Iterator[Metric]:
    started = _last(events, "run_started")
    finished = _last(events, "run_finished")
    resumed = _last(events, "run_resumed")
    begun = [event["time"] for event in (started, resumed) if event]
    running = bool(begun) and (not finished or finished["time"] < max(begun))
    yield _gauge("up", "1 while the run is under way, else 0.", [((), int(running))])
    if events:
        yield _gauge(
            "last_event_timestamp_seconds", "When the run last said something.", [((), _unix(events[-1]))]
        )
    if started:
        privacy = started.get("privacy") or {}
        labels = {
            "run": started.get("run"),
            "part": started.get("part"),
            "privacy_mode": privacy.get("mode"),
            "privacy_unit": privacy.get("unit"),
            "formal_guarantee": str(bool(privacy.get("formal_guarantee"))).lower(),
        }
        values = tuple("" if value is None else str(value) for value in labels.values())
        yield _gauge("run_info", "What runs; always 1.", [(values, 1)], labels=tuple(labels))
        yield _gauge("rounds_planned", "Rounds asked for.", [((), started.get("rounds"))])


def _round_metrics(events: Sequence[Event]) -> Iterator[Metric]:
    yield _gauge(
        "round", "Last finished round; 0 before the first.", [((), max(finished_rounds(events), default=0))]
    )
    if asked := _last(events, "round_started"):
        answers = Counter(event["kind"] for event in events if event.get("round") == asked["round"])
        yield _gauge(
            "sites_replied", "Sites that replied in the last round.", [((), answers["site_replied"])]
        )
        yield _gauge("sites_refused", "Sites that refused the last round.", [((), answers["site_refused"])])
    seconds = dict((_last(events, "round_finished") or {}).get("seconds") or {})
    seconds["evaluate"] = (_last(events, "evaluated") or {}).get("seconds")
    samples = [((phase,), seconds.get(phase)) for phase in PHASES]
    yield _gauge("phase_seconds", "Seconds each phase last took.", samples, labels=("phase",))


def _site_metrics(events: Sequence[Event]) -> Iterator[Metric]:
    replies = [event for event in events if event["kind"] in RELEASED]
    refusals = [event for event in events if event["kind"] == "site_refused"]
    latest = {event["site"]: event for event in replies}
    moved = [event for event in events if event["kind"] in SENT]

    def now(name: str) -> _Samples:
        return [((site,), event.get(name)) for site, event in latest.items()]

    spent = [((site,), epsilon) for site, epsilon in epsilon_spent(replies).items()]
    yield _gauge("epsilon_spent", "Epsilon this site's cohort has spent.", spent, labels=("site",))
    yield _gauge("epsilon_budget", "Most epsilon this site allows.", now("epsilon_max"), labels=("site",))
    yield _gauge("delta", "Delta at which the site's epsilon holds.", now("delta"), labels=("site",))
    yield _counter("steps", "Training steps, by site.", _totals(replies, "steps"), labels=("site",))
    sent = [
        ((direction, site), total)
        for direction in ("up", "down")
        for (site,), total in _totals(moved, f"bytes_{direction}")
    ]
    yield _counter("bytes", "Bytes moved, seen from the site.", sent, labels=("direction", "site"))
    codes = Counter((event["site"], _code(event)) for event in refusals)
    yield _counter("refusals", "Rounds refused, by site and code.", codes.items(), labels=("site", "code"))


def _evaluation_metrics(events: Sequence[Event]) -> Iterator[Metric]:
    evaluation = (_last(events, "evaluated") or {}).get("evaluation") or {}
    values: list[tuple[tuple[str, ...], Any]] = []
    chances: list[tuple[tuple[str, ...], Any]] = []
    for task in DIRECTIONS:
        found = (evaluation.get("retrieval") or {}).get(task) or {}
        values += [((task, recall), found.get(recall)) for recall in RECALLS]
        chances += [((task, recall), found.get(f"chance_{recall}")) for recall in RECALLS]
    zero_shot = evaluation.get("zero_shot") or {}
    values.append((("zero_shot", "macro_auroc"), zero_shot.get("macro_auroc")))
    chances.append((("zero_shot", "macro_auroc"), zero_shot.get("chance")))
    yield _gauge("evaluation", "Last evaluation.", values, labels=("task", "metric"))
    yield _gauge("evaluation_chance", "What guessing would reach.", chances, labels=("task", "metric"))


def _gauge(name: str, help_: str, samples: _Samples, *, labels: tuple[str, ...] = ()) -> Metric:
    return _filled(GaugeMetricFamily(f"clipward_{name}", help_, labels=labels), samples)


def _counter(name: str, help_: str, samples: _Samples, *, labels: tuple[str, ...] = ()) -> Metric:
    return _filled(CounterMetricFamily(f"clipward_{name}", help_, labels=labels), samples)


def _filled(family: Any, samples: _Samples) -> Metric:
    for values, value in samples:
        if isinstance(value, int | float):  # unknown stays absent: a series of zeros would be made up
            family.add_metric(values, value)
    return family  # type: ignore[no-any-return]


def _announced_sites(events: Sequence[Event]) -> set[str]:
    """Sites the coordinator itself named: a label must not carry what a stranger sent."""
    lists = (event.get("sites") for event in events if event["kind"] in ("run_started", "round_started"))
    return {site for sites in lists for site in sites or ()}


def _code(event: Event) -> str:
    code = str(event.get("code"))
    return code if re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", code) else "other"


def _totals(events: Sequence[Event], name: str) -> list[tuple[tuple[str, ...], Any]]:
    totals: Counter[str] = Counter()
    for event in events:
        totals[event["site"]] += event.get(name) or 0
    return [((site,), total) for site, total in totals.items()]


def _last(events: Sequence[Event], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event["kind"] == kind), None)


def _unix(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _nan_to_null(value: Any) -> Any:
    match value:
        case float() if math.isnan(value):
            return None
        case Mapping():
            return {key: _nan_to_null(item) for key, item in value.items()}
        case list() | tuple():
            return [_nan_to_null(item) for item in value]
        case _:
            return value


def _cut_torn_tail(file: BinaryIO) -> None:
    """Truncate to the last newline."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        kept = file.read().rfind(b"\n") + 1
        logger.warning("cut %d bytes of a torn last line off the run's events", end - kept)
        file.truncate(kept)
