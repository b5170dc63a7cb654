"""The comparison runs in its smallest setting, and a figure that is missing says why."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import JPEGLosslessSV1
from typer.testing import CliRunner

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "ingest.py"))
SIDES = ["--rows", "96", "--columns", "64", "--size", "32"]
SMALLEST = [*SIDES, "--repeats", "1", "--files", "2", "--workers", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(BENCH["app"], arguments)


def test_every_syntax_is_measured_beside_the_textbook(tmp_path: Path) -> None:
    result = run(*SMALLEST, "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["bench"] == "ingest"
    assert found["machine"]["cores"] > 0
    assert found["machine"]["pydicom"]
    by_name = {(row["what"], row["who"]): row for row in found["rows"]}
    for syntax in BENCH["WRITERS"]:
        ours, textbook = by_name[syntax, "ours"], by_name[syntax, "textbook"]
        assert ours["reason"] is None
        assert ours["seconds"] > 0
        assert ours["peak_bytes"] < textbook["peak_bytes"]
        assert ours["mean_difference"] < 3  # 0.2 on a whole radiograph: here an edge is a pixel wide
        assert ours["ratio"] == pytest.approx(ours["seconds"] / textbook["seconds"])
        assert ours["ratio_to"] == f"{syntax} textbook"
        assert textbook["mean_difference"] == textbook["most_difference"] == 0
        assert textbook["ratio"] == textbook["peak_ratio"] == 1
    rest = found["rows"][len(BENCH["WRITERS"]) * len(BENCH["READERS"]) :]
    assert [row["what"] for row in rest] == ["explicit headers", "explicit images", "packed cohort"]
    assert all(row["seconds"] > 0 and row["spread"] >= 0 for row in rest)
    assert rest[-1]["seconds"] < 1 / 50_000


def test_quick_is_less_of_the_same() -> None:
    result = run(*SIDES, "--quick", "--syntaxes", "explicit", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "repetition 3 of 3" in result.stderr
    assert "headers of 64 files" in result.stderr


def test_the_table_has_a_line_a_reader_and_progress_goes_elsewhere() -> None:
    result = run(*SMALLEST, "--syntaxes", "explicit,rle")
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 2 * len(BENCH["READERS"])
    assert "packed cohort: " in lines[-1]
    assert "repetition 1 of 1" in result.stderr


def test_lossless_jpeg_is_what_it_says(tmp_path: Path) -> None:
    made = BENCH["radiograph"](64, 48)
    values = made.pixel_array.copy()
    BENCH["WRITERS"]["jpeg-lossless"](tmp_path / "x", made)
    found = dcmread(tmp_path / "x")
    assert found.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    np.testing.assert_array_equal(found.pixel_array, values)


def test_an_encoder_that_is_not_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, dataset: Any) -> None:
        raise RuntimeError("no encoder")

    monkeypatch.setitem(BENCH["WRITERS"], "rle", broken)
    found = BENCH["measure"](tmp_path, ["rle"], rows=32, columns=32, size=16, repeats=1)
    text = BENCH["table"](BENCH["rows_of"](found))
    assert "| rle | – | ours [1] | – |" in text  # noqa: RUF001
    assert text.endswith("\n[1] no encoder")


def test_monais_loader_is_read_columns_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LoadImage:
        def __init__(self, *, reader: str, image_only: bool) -> None:
            assert (reader, image_only) == ("PydicomReader", True)

        def __call__(self, path: Path) -> Any:
            return dcmread(path).pixel_array.T[..., None]

    transforms = ModuleType("monai.transforms")
    transforms.LoadImage = LoadImage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "monai.transforms", transforms)
    BENCH["_monais_loader"].cache_clear()
    BENCH["WRITERS"]["explicit"](tmp_path / "x", BENCH["radiograph"](64, 48))
    shown, textbook = BENCH["monai"](tmp_path / "x", 32), BENCH["textbook"](tmp_path / "x", 32)
    assert shown.shape == (32, 32)
    assert np.corrcoef(shown[:, 4:28].ravel(), textbook[:, 4:28].ravel())[0, 1] < -0.9  # not inverted
    BENCH["_monais_loader"].cache_clear()


def test_goals_are_met_or_missed() -> None:
    made = BENCH["Measurement"]
    rows = BENCH["rows_of"](
        [
            made(what="explicit", who="textbook", seconds=(2.4, 9.0, 2.0)),
            made(what="explicit", who="ours", seconds=(0.5, 0.4, 0.6)),
        ]
    )
    assert rows[1]["ratio"] == pytest.approx(0.5 / 2.4)
    assert rows[1]["spread"] == pytest.approx(0.2)
    assert "≥ 5: missed" in BENCH["table"](rows)
    assert "≥ 50000: met" in BENCH["sentences"]([], {"seconds": 1 / 50_001})


def test_an_unknown_syntax_is_named() -> None:
    result = run("--syntaxes", "mpeg")
    assert result.exit_code == 2
    assert "'mpeg' is none of explicit" in " ".join(result.stderr.replace("│", " ").split())
