import errno
import json
import math
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import (
    Event,
    ExporterError,
    PrometheusExporter,
    RunLog,
    RunLogError,
    effective,
    epsilon_spent,
    finished_rounds,
    read_events,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def event(kind: str, *, time: str = "2025-03-04T09:00:00.000+00:00", **fields: Any) -> Event:
    return {"version": 1, "time": time, "kind": kind, **fields}


# The stream


def test_a_recorded_event_is_one_line_that_reads_back(path: Path) -> None:
    heard: list[Event] = []
    RunLog(path, listeners=[heard.append]).record("run_resumed", round=3)
    assert path.read_bytes().count(b"\n") == 1
    (read,) = read_events(path)
    assert (read["version"], read["kind"], read["round"]) == (1, "run_resumed", 3)
    assert read["time"].endswith("+00:00")
    assert heard == [read]


def test_a_new_log_is_an_empty_stream(path: Path) -> None:
    RunLog(path)
    assert read_events(path) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, cut=st.integers(min_value=0))
def test_a_crash_at_any_byte_loses_at_most_the_event_being_written(path: Path, value: Any, cut: int) -> None:
    path.unlink(missing_ok=True)
    log = RunLog(path)
    log.record("first", value=value)
    whole = len(path.read_bytes())
    log.record("second", value=value)
    data = path.read_bytes()
    path.write_bytes(data[: whole + cut % (len(data) - whole)])

    assert [(found["kind"], found["value"]) for found in read_events(path)] == [("first", value)]
    RunLog(path).record("third")
    assert [found["kind"] for found in read_events(path)] == ["first", "third"]


def test_a_file_torn_in_its_first_line_starts_anew(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"version": 1, "ki')
    assert read_events(path) == []
    RunLog(path).record("run_started")
    assert [found["kind"] for found in read_events(path)] == ["run_started"]


def test_a_line_torn_while_the_log_is_open_is_repaired_too(path: Path) -> None:
    log = RunLog(path)
    log.record("first")
    with path.open("ab") as file:
        file.write(b'{"torn')
    log.record("second")
    assert [found["kind"] for found in read_events(path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"version": 1, "ki', "metrics.jsonl, line 2 is damaged"),
        (b"\x00\xff", "line 2 is damaged"),
        (b"[1]", "line 2 is not an event"),
        (b'{"version": 1}', "line 2 is not an event"),
        (b'{"version": 2, "kind": "x"}', "line 2 has version=2: this Clipward reads 1"),
    ],
)
def test_a_bad_line_in_the_middle_is_an_error_that_names_it(path: Path, line: bytes, message: str) -> None:
    log = RunLog(path)
    log.record("first")
    with path.open("ab") as file:
        file.write(line + b"\n")
    log.record("third")
    with pytest.raises(RunLogError, match=message):
        read_events(path)


def test_nan_is_written_as_null(path: Path) -> None:
    heard: list[Event] = []
    RunLog(path, listeners=[heard.append]).record(
        "evaluated", per_class={"edema": math.nan}, all=[math.nan, 1.0]
    )
    assert heard == read_events(path)
    assert (heard[0]["per_class"], heard[0]["all"]) == ({"edema": None}, [None, 1.0])


@pytest.mark.parametrize("value", [math.inf, -math.inf, object(), {"deep": [b"bytes"]}])
def test_what_is_not_finite_json_is_refused_and_not_written(path: Path, value: Any) -> None:
    log = RunLog(path)
    with pytest.raises(RunLogError, match=r"event 'evaluated' is not JSON: .*pass plain, finite values"):
        log.record("evaluated", value=value)
    assert read_events(path) == []


@pytest.mark.parametrize("name", ["version", "time"])
def test_reserved_fields_are_refused(path: Path, name: str) -> None:
    with pytest.raises(RunLogError, match=f"reserved field '{name}'"):
        RunLog(path).record("x", **{name: 1})


def test_a_failing_listener_stops_neither_the_run_nor_the_others(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []

    def broken(_: Event) -> None:
        raise BrokenPipeError

    RunLog(path, listeners=[broken, heard.append]).record("run_started")
    assert len(heard) == len(read_events(path)) == 1
    assert "a listener failed on event run_started" in caplog.text


def test_the_last_of_repeated_events_counts() -> None:
    events = [
        event("site_replied", round=1, site="a", steps=1),
        event("site_replied", round=1, site="b", steps=1),
        event("round_finished", round=1),
        event("site_replied", round=2, site="a", steps=1),
        event("run_resumed", round=1),
        event("site_replied", round=2, site="b", steps=1),
        event("site_replied", round=2, site="a", steps=2),
    ]
    assert effective(events) == [*events[:3], *events[4:]]
    assert finished_rounds(events) == {1}


def test_a_later_refusal_replaces_a_reply_but_not_what_it_spent() -> None:
    events = [
        event("site_replied", round=1, site="a", epsilon=0.5),
        event("site_refused", round=1, site="a", code="budget"),
        event("site_replied", round=2, site="a", epsilon=0.3),
        event("site_replied", round=2, site="b", epsilon=None),
    ]
    assert [found["kind"] for found in effective(events)] == ["site_refused", "site_replied", "site_replied"]
    assert epsilon_spent(events) == {"a": 0.5}


def test_what_a_late_release_spent_counts() -> None:
    events = [event("site_replied", round=1, site="a", epsilon=0.5)]
    late = event("late_arrived", round=3, asked_in_round=2, site="a", epsilon=0.8)
    assert epsilon_spent([*events, late]) == {"a": 0.8}


def test_every_kind_of_event_is_explained_to_people() -> None:
    """In docs/running.md, and nothing is explained there that nobody records."""
    source = "".join(path.read_text("utf-8") for path in (ROOT / "server").glob("*.py"))
    recorded = set(re.findall(r"\.record\(\s*\"([a-z_]+)\"", source))
    page = (ROOT / "docs" / "running.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `([a-z]+_[a-z_]+|evaluated)` \|", page, flags=re.MULTILINE))
    assert recorded <= explained
    assert {kind for kind in explained if f'"{kind}"' not in source} == set()


# The exporter


def started(**fields: Any) -> Event:
    privacy = {"mode": "dp", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "formal_guarantee": True}
    return event(
        "run_started", run="demo", rounds=10, sites=["a", "b"], privacy=privacy, part="heads", **fields
    )


def reply(server_round: int, site: str, **fields: Any) -> Event:
    facts = {
        "bytes_up": 100,
        "bytes_down": 1000,
        "steps": 5,
        "epsilon": 0.5,
        "epsilon_max": 3.0,
        "delta": 1e-5,
    }
    return event("site_replied", round=server_round, site=site, **{**facts, **fields})


RETRIEVAL = {
    "r1": 0.1,
    "r5": 0.3,
    "r10": 0.5,
    "chance_r1": 0.01,
    "chance_r5": 0.05,
    "chance_r10": 0.1,
    "n": 100,
}
RUN = [
    started(),
    event("round_started", round=1, sites=["a", "b"]),
    reply(1, "a"),
    event("site_refused", round=1, site="b", code="failed", incident="12345678"),
    event(
        "evaluated",
        round=1,
        seconds=4.0,
        evaluation={
            "retrieval": {"image_to_text": RETRIEVAL, "text_to_image": None},
            "zero_shot": {"macro_auroc": 0.7, "chance": 0.5, "per_class": {"edema": 0.7}},
        },
    ),
    event(
        "round_finished",
        round=1,
        seconds={"train": 9.0, "communicate": 1.0, "aggregate": 0.1, "checkpoint": None},
    ),
    event("round_started", round=2, sites=["a", "b"]),
    reply(2, "a", epsilon=0.8),
    reply(2, "b", epsilon=None, epsilon_max=None, delta=None),
    event(
        "round_finished",
        round=2,
        seconds={"train": 8.0, "communicate": 2.0, "aggregate": 0.2, "checkpoint": None},
    ),
]


def scrape(exporter: PrometheusExporter) -> str:
    return generate_latest(exporter.registry).decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("clipward_"), *(sample.labels[label] for label in sorted(sample.labels))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def exporter_of(events: list[Event]) -> PrometheusExporter:
    exporter = PrometheusExporter()
    exporter.replay(events)
    return exporter


def test_the_metrics_are_served_over_http() -> None:
    with exporter_of(RUN) as exporter:
        port = exporter.serve(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            assert samples(answer.read().decode()) == samples(scrape(exporter))


def test_every_event_has_its_metrics() -> None:
    found = samples(scrape(exporter_of(RUN)))
    assert found.pop(("last_event_timestamp_seconds",)) == 1741078800.0
    assert found == {
        ("up",): 1,
        ("run_info", "true", "heads", "dp", "patient", "demo"): 1,
        ("rounds_planned",): 10,
        ("round",): 2,
        ("sites_replied",): 2,
        ("sites_refused",): 0,
        ("phase_seconds", "train"): 8.0,
        ("phase_seconds", "communicate"): 2.0,
        ("phase_seconds", "aggregate"): 0.2,
        ("phase_seconds", "evaluate"): 4.0,
        ("epsilon_spent", "a"): 0.8,
        ("epsilon_budget", "a"): 3.0,
        ("delta", "a"): 1e-5,
        ("steps_total", "a"): 10,
        ("steps_total", "b"): 5,
        ("bytes_total", "up", "a"): 200,
        ("bytes_total", "up", "b"): 100,
        ("bytes_total", "down", "a"): 2000,
        ("bytes_total", "down", "b"): 1000,
        ("refusals_total", "failed", "b"): 1,
        ("evaluation", "r1", "image_to_text"): 0.1,
        ("evaluation", "r5", "image_to_text"): 0.3,
        ("evaluation", "r10", "image_to_text"): 0.5,
        ("evaluation", "macro_auroc", "zero_shot"): 0.7,
        ("evaluation_chance", "r1", "image_to_text"): 0.01,
        ("evaluation_chance", "r5", "image_to_text"): 0.05,
        ("evaluation_chance", "r10", "image_to_text"): 0.1,
        ("evaluation_chance", "macro_auroc", "zero_shot"): 0.5,
    }


def test_before_the_first_event_there_is_little_to_say() -> None:
    assert samples(scrape(PrometheusExporter())) == {("up",): 0, ("round",): 0}


@pytest.mark.parametrize("cut", range(len(RUN)))
def test_replaying_the_past_and_repeating_a_round_changes_no_metric(cut: int) -> None:
    listening = PrometheusExporter()
    for past in RUN:
        listening(past)
    assert samples(scrape(exporter_of(RUN[:cut] + RUN))) == samples(scrape(listening))


def test_up_falls_when_the_run_is_over_and_rises_when_it_goes_on() -> None:
    over = event("run_finished", rounds=2, seconds=9.0, time="2025-03-04T10:00:00.000+00:00")
    again = event("run_resumed", round=2, time="2025-03-04T11:00:00.000+00:00")
    assert samples(scrape(exporter_of([*RUN, over])))[("up",)] == 0
    assert samples(scrape(exporter_of([*RUN, over, again])))[("up",)] == 1


def test_nothing_but_names_codes_and_numbers_reaches_the_metrics() -> None:
    markers = {
        "path": "/data/DOE^JANE.dcm",
        "patient": "PAT-4711",
        "uid": "1.2.840.99999",
        "phrase": "honeycombing",
    }

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()} | markers
        return value

    stranger = {"site": markers["patient"]}
    events = [marked(past) for past in RUN]
    events.append(event("site_refused", round=2, code="failed", incident="1", **stranger))
    events.append(reply(2, markers["patient"]))
    events.append(reply(3, "a", steps=0, epsilon_max=markers["path"]))
    events.append(event("site_refused", round=3, site="b", code=markers["path"], incident=markers["uid"]))
    events.append(event("leak", **markers))
    text = scrape(exporter_of(events))
    assert not [marker for marker in markers.values() if marker in text]
    assert samples(text)[("refusals_total", "other", "b")] == 1


def test_a_port_in_use_is_an_error_that_names_port_and_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ExporterError, match=f"port {port} on 127.0.0.1 is in use: choose another, or 0 for any"
        ):
            PrometheusExporter().serve(port)


def test_another_failure_to_bind_names_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("server.metrics.start_http_server", refuse)
    with pytest.raises(ExporterError, match=r"port 80 on 127.0.0.1 cannot be bound .*Permission denied"):
        PrometheusExporter().serve(80)


def test_a_closed_exporter_frees_its_port_and_can_serve_again() -> None:
    exporter = PrometheusExporter()
    exporter.close()
    port = exporter.serve(0)
    with pytest.raises(ExporterError, match="served already"):
        exporter.serve(0)
    exporter.close()
    assert exporter.serve(port) == port
    exporter.close()


def test_the_stream_is_plain_json_lines(path: Path) -> None:
    RunLog(path).record("run_started", run="Zürich\u2028\n")
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["run"] == "Zürich\u2028\n"
