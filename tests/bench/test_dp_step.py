"""The comparison runs in its smallest setting, and a figure that is missing says why."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "dp_step.py"))
SMALLEST = ["--parts", "heads", "--batch", "2", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(BENCH["app"], arguments)


def measurement(**values: Any) -> Any:
    settled = {"model": "tiny", "part": "full", "batch": 4, "variant": "ours", **values}
    return BENCH["Measurement"](**settled)


def test_every_engine_is_measured_beside_the_step_without_privacy() -> None:
    result = run(*SMALLEST, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["variant"] for row in rows] == list(BENCH["VARIANTS"])
    for row in rows:
        assert row["reason"] is None
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1
    hooks = next(row for row in rows if row["variant"] == "opacus-hooks")
    assert hooks["memory_ratio"] > 2  # it holds a gradient a patient


def test_the_table_has_a_line_an_engine_and_progress_goes_elsewhere() -> None:
    result = run(*SMALLEST)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 2 + len(BENCH["VARIANTS"])
    assert all(line.startswith("|") for line in lines)
    assert "repetition 1 of 1" in result.stderr


def test_memory_is_the_most_that_is_held_at_once() -> None:
    kept = []

    def step() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        kept.append(second * 2)

    assert BENCH["_peak_bytes"](step, torch.device("cpu")) == pytest.approx(8000, abs=64)


def test_what_an_engine_cannot_do_is_a_dash_with_its_reason() -> None:
    plain = measurement(variant="non-private", seconds=0.1, peak_bytes=10**6)
    rows = BENCH["ratios"]([plain, measurement(reason="no such layer"), measurement(reason="no memory")])
    text = BENCH["table"](rows, images_per_second=True)
    assert "| tiny | full | 4 | ours [1] | – | – | – | – | – |" in text  # noqa: RUF001
    assert text.endswith("[1] tiny full, ours: no such layer\n[2] tiny full, ours: no memory")


def test_goals_stand_beside_what_they_are_held_to() -> None:
    plain = measurement(variant="non-private", seconds=0.1, peak_bytes=10**6)
    ours = measurement(seconds=0.109, peak_bytes=1_160_000)
    lora = [measurement(part="lora", variant="non-private", seconds=0.05, peak_bytes=10**6)]
    lora.append(measurement(part="lora", seconds=0.11, peak_bytes=10**6))
    text = BENCH["table"](BENCH["ratios"]([plain, ours, *lora]), images_per_second=False)
    assert "| 1.09 | 1.09 | 1.2 | 1.16 | time ≤ 1.10: met, memory ≤ 1.15: missed |" in text
    assert "| 2.20 | 1.10 | 1.0 | 1.00 | time x full ≤ 1.00: missed |" in text


def test_a_gpu_adds_images_a_second() -> None:
    rows = BENCH["ratios"]([measurement(variant="non-private", seconds=0.5, peak_bytes=1)])
    assert BENCH["table"](rows, images_per_second=True).splitlines()[-1].endswith("|  | 8 |")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--models", "tiny,vit"], "'vit' is none of tiny, vit-b-16"),
        (["--parts", "body"], "'body' is none of full, lora, heads"),
        (["--batch", "8,0"], "expected whole numbers > 0"),
        (["--engines", "fastdp"], "'fastdp' is none of ours, opacus-hooks, opacus-ghost, vmap"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--parts", "lora"], "lora is compared with the full step"),
    ],
)
def test_what_it_does_not_know_is_refused(arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


def test_help_names_every_option() -> None:
    text = run("--help").stdout
    for option in (
        "--models",
        "--parts",
        "--batch",
        "--engines",
        "--threads",
        "--repeats",
        "--device",
        "--json",
    ):
        assert option in text
