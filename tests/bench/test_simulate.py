"""The comparison runs in its smallest setting, and a figure that is missing says why."""

import json
import os
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "simulate.py"))
OURS, RAY, PFL = BENCH["OURS"], BENCH["RAY"], BENCH["PFL"]


def case(model: str = "1 MB", sites: int = 3, who: str = OURS) -> Any:
    return BENCH["Case"](model=model, sites=sites, who=who)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(BENCH["app"], arguments)


@pytest.mark.parametrize("model", ["1 MB", "prototypes"])
def test_every_round_is_timed(model: str) -> None:
    found = BENCH["measure"](case(model))
    assert len(found["rounds"]) == BENCH["ROUNDS"]
    assert all(0 < seconds < found["total"] for seconds in found["rounds"])
    assert sum(found["rounds"]) <= found["total"]
    assert len(found["processor"]) == BENCH["ROUNDS"]
    assert all(seconds >= 0 for seconds in found["processor"])


def test_a_model_has_the_bytes_it_says() -> None:
    assert case("350 MB").model_bytes == pytest.approx(350e6, rel=1e-6)
    assert case("prototypes").model_bytes == 28 * 2 * 129 * 4
    assert len(case("10 MB").shapes) == 25


@pytest.mark.slow
def test_a_child_process_is_measured_with_its_memory() -> None:
    found = BENCH["_child"](case(sites=2))
    assert found["reason"] is None
    assert len(found["rounds"]) == BENCH["ROUNDS"]
    assert 50e6 < found["peak_bytes"] < 2e9


@pytest.mark.slow
def test_a_child_that_fails_says_why() -> None:
    found = BENCH["_child"](case(model="much MB"))
    assert found["reason"].startswith("status 1: ValueError: invalid literal")
    assert found["total"] is None


def test_a_peer_that_is_not_installed_is_a_footnote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = BENCH["_child"](case(who=PFL))
    row = BENCH["_row"](case(who=PFL), found, {case(who=PFL): found})
    assert row["seconds"] is None
    said = BENCH["table"]([row])
    assert "| pfl-research [1] |" in said
    assert said.endswith("[1] pfl is not installed")


def result(*rounds: float, total: float = 9.0) -> dict[str, Any]:
    processor = [seconds / 2 for seconds in rounds]
    times = {"rounds": [99.0, *rounds], "processor": [99.0, *processor], "total": total}
    return {**times, "peak_bytes": 10**9, "reason": None}


def rows(found: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    return [BENCH["_row"](each, own, found) for each, own in found.items()]


def test_overhead_is_of_a_site_and_round_without_the_first_and_over_ours() -> None:
    ours, ray = case("350 MB", 8), case("350 MB", 8, RAY)
    first, second = rows({ours: result(8.0, 16.0), ray: result(48.0, 80.0)})
    assert (first["seconds"], first["spread"], first["ratio"]) == (1.5, 1.0, 1.0)
    assert (second["seconds"], second["ratio"]) == (8.0, pytest.approx(16 / 3))
    assert (second["processor_seconds"], second["processor_ratio"]) == (4.0, pytest.approx(16 / 3))
    assert (first["what"], second["ratio_to"]) == ("350 MB", "350 MB, 8 sites, in-process")
    assert "≥ 5 times ours: met" in BENCH["table"]([first, second])


@pytest.mark.parametrize(("seconds", "verdict"), [(59.0, "met"), (60.0, "missed")])
def test_the_goal_for_many_sites_is_of_the_whole_run(seconds: float, verdict: str) -> None:
    [row] = rows({case("prototypes", 1000): result(1.0, total=seconds)})
    assert f"< 60 s: {verdict}" in BENCH["table"]([row])


def test_the_processes_below_one_are_found_with_it() -> None:
    assert os.getpid() in BENCH["tree"](os.getppid())
    assert BENCH["_proportional_bytes"](os.getpid()) > 10**7
    assert BENCH["_proportional_bytes"](2**22 + 1) == 0


def test_the_processors_work_is_counted() -> None:
    before, own = BENCH["_processor_seconds"](), time.process_time()
    while time.process_time() < own + 0.2:
        pass
    assert 0.15 < BENCH["_processor_seconds"]() - before < 5
    assert BENCH["_worked"](2**22 + 1) == 0


def test_a_line_that_is_not_measured_names_those_that_are() -> None:
    failed = run("--quick", "--only", "7 MB,1")
    assert failed.exit_code == 2
    assert "'7 MB,1' is none of prototypes,1000;" in failed.output


def test_the_rows_go_into_a_file_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCH["main"].__globals__, "_child", lambda case: result(1.0, 2.0))
    done = run("--quick", "--only", "10 MB,2", "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["bench"] == "simulate"
    assert {"cores", "memory", "torch", "device", "ray"} <= set(written["machine"])
    assert [row["who"] for row in written["rows"]] == [OURS, RAY, PFL]
