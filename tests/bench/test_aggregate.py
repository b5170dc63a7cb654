"""The comparison runs in its smallest setting, each figure in a process of its own."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "aggregate.py"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(BENCH["app"], arguments)


@pytest.mark.slow
def test_ours_and_flower_s_are_measured_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--megabytes", "20", "--sites", "6", "--repeats", "1", "--json", "rows.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["bench"] == "aggregate"
    assert set(found["machine"]) == {"cores", "memory", "torch", "device"}
    ours, flower = found["rows"]
    assert (ours["who"], flower["who"]) == ("ours", "flower")
    assert ours["ratio_to"] == "fedavg flower 6"
    assert flower["ratio"] == 1
    assert 0 < ours["peak_bytes"] < flower["peak_bytes"]
    assert len(result.stdout.strip().splitlines()) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.slow
def test_a_process_that_passes_the_limit_is_a_line_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--megabytes", "40", "--sites", "9", "--repeats", "1", "--limit-gib", "0.2")
    assert result.exit_code == 0, result.output
    ours, flower = result.stdout.splitlines()[2:4]
    assert "met" in ours
    assert "[1]" in flower
    assert "out of memory at the limit of 0.2 GiB after" in result.stdout


def test_a_reply_s_arrays_are_read_as_they_were_written() -> None:
    array = BENCH["_array"]((12, 1000), 3)
    values = array.numpy()
    assert (values.shape, values.dtype) == ((12, 1000), np.float32)
    assert np.isfinite(values).all()
    assert values.std() > 1


def test_the_model_has_the_size_asked_for() -> None:
    sizes = [4 * shape[0] for shape in BENCH["shapes"](350).values()]
    assert sum(sizes) == pytest.approx(350e6, rel=1e-3)
    assert max(sizes) == pytest.approx(350e6 / 4, rel=1e-3)


def test_an_unknown_strategy_is_named() -> None:
    result = run("--strategies", "fedavg,bulyan")
    assert result.exit_code == 2
    assert "bulyan" in result.output
