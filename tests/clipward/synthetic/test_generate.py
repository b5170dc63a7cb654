"""Trees of synthetic hospitals: complete, deterministic, idempotent."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pydicom
import pytest

from clipward.synthetic import FINDINGS, SyntheticError, synthesize


def make(out: Path, *, patients: int = 12, seed: int = 7, workers: int = 1) -> list[Path]:
    return synthesize(out, sites=2, patients=patients, public_patients=3, seed=seed, workers=workers)


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hospitals") / "out"
    make(out)
    return out


def test_the_tree_is_the_same_whatever_the_number_of_workers(tree: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", workers=2)
    assert digests(tmp_path / "out") == digests(tree)


def test_another_seed_gives_other_patients(tree: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", seed=8)
    ours, theirs = digests(tree), digests(tmp_path / "out")
    assert not {ours[name] for name in ours if name.endswith(".dcm")} & set(theirs.values())


def test_more_patients_and_sites_leave_the_first_ones_as_they_were(tree: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "out", sites=3, patients=14, workers=1)
    ours, theirs = digests(tree), digests(tmp_path / "out")
    images = [name for name in ours if name.endswith(".dcm") and name.startswith("site-")]
    assert {name: ours[name] for name in images} == {name: theirs[name] for name in images}


def test_site_folders_come_back_without_the_public_one(tree: Path) -> None:
    assert make(tree) == [tree / "site-1", tree / "site-2"]
    assert sorted(path.name for path in tree.iterdir()) == ["public", "site-1", "site-2", "synthetic.json"]
    assert not (tree / "public" / "site.toml").exists()


@pytest.mark.parametrize("name", ["site-1", "site-2", "public"])
def test_tables_and_images_agree(tree: Path, name: str) -> None:
    folder = tree / name
    images = [pydicom.dcmread(path) for path in sorted(folder.glob("dicom/*/*.dcm"))]
    reports = {row["accession_number"]: row for row in table(folder / "reports.csv")}
    labels = {row["accession_number"]: row for row in table(folder / "labels.csv")}
    truth = table(folder / "ground-truth.csv")
    assert list(reports) == list(labels) == [image.AccessionNumber for image in images]
    for image in images:
        report = reports[image.AccessionNumber]
        assert report["study_instance_uid"] == image.StudyInstanceUID
        assert report["patient_id"] == image.PatientID
        assert "findings:" in report["report"].lower()
        assert "impression:" in report["report"].lower()
        drawn = [row for row in truth if row["accession_number"] == image.AccessionNumber]
        positive = {finding for finding in FINDINGS if labels[image.AccessionNumber][finding] == "1"}
        assert positive == {row["finding"] for row in drawn}
        for row in drawn:
            assert 0 <= int(row["x0"]) < int(row["x1"]) <= image.Columns
            assert 0 <= int(row["y0"]) < int(row["y1"]) <= image.Rows


def test_a_patients_studies_share_the_patient_and_follow_each_other(tree: Path) -> None:
    for folder in sorted(tree.glob("*/dicom/*")):
        images = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.iterdir())]
        same = {(i.PatientID, str(i.PatientName), i.PatientBirthDate, i.PatientSex) for i in images}
        assert len(same) == 1
        dates = [image.StudyDate for image in images]
        assert dates == sorted(set(dates))
        assert len({image.SOPInstanceUID for image in images}) == len(images)


def test_the_site_file_has_exactly_the_keys_a_site_reads(tree: Path) -> None:
    site = tomllib.loads((tree / "site-2" / "site.toml").read_text(encoding="utf-8"))
    assert site == {
        "version": 1,
        "name": "site-2",
        "cohort": {
            "dicom": "dicom",
            "reports": "reports.csv",
            "labels": "labels.csv",
            "patients-declared": 12,
            "image-size": 128,
            "salt": "clipward/site-2",
        },
        "policy": {"require-dp": True, "epsilon-max": 8.0, "delta": 1e-3, "min-patients": 12},
    }


@pytest.mark.parametrize(
    ("patients", "delta"), [(1, 1e-1), (2, 1e-2), (10, 1e-2), (11, 1e-3), (100, 1e-3), (101, 1e-4)]
)
def test_delta_is_the_largest_power_of_ten_up_to_a_tenth_of_one_patients_share(
    tmp_path: Path, patients: int, delta: float
) -> None:
    [folder] = synthesize(tmp_path, sites=1, patients=patients, workers=1)
    site = tomllib.loads((folder / "site.toml").read_text(encoding="utf-8"))
    assert site["policy"]["delta"] == delta
    assert delta <= 1 / (10 * patients) < 10 * delta


def test_a_finished_tree_is_left_alone(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    make(tree)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_other_parameters_are_refused_with_folder_and_remedy(tree: Path) -> None:
    with pytest.raises(
        SyntheticError, match=r"out holds synthetic hospitals of other parameters.*delete that folder"
    ):
        make(tree, patients=13)


def test_an_interrupted_tree_is_started_over_and_keeps_what_a_site_added(tree: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        raise Interrupted

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        synthesize(out, sites=4, patients=12, workers=1, on_progress=interrupt)
    assert not (out / "synthetic.json").exists()
    (out / "site-1" / "ledger.sqlite").write_bytes(b"spent")
    make(out)
    assert (out / "site-1" / "ledger.sqlite").read_bytes() == b"spent"
    (out / "site-1" / "ledger.sqlite").unlink()
    assert digests(out) == digests(tree)


def test_a_tree_with_a_folder_missing_is_made_whole(tmp_path: Path) -> None:
    synthesize(tmp_path, sites=2, patients=1, workers=1)
    before = digests(tmp_path)
    (tmp_path / "site-2").rename(tmp_path / "elsewhere")
    synthesize(tmp_path, sites=2, patients=1, workers=1)
    assert {name: digest for name, digest in digests(tmp_path).items() if "elsewhere" not in name} == before


@pytest.mark.parametrize("stranger", ["site-1", "site-9", "public"])
def test_a_folder_of_other_making_is_not_touched(tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger / "dicom").mkdir(parents=True)
    (tmp_path / stranger / "dicom" / "real.dcm").write_bytes(b"a patient")
    with pytest.raises(SyntheticError, match=f"holds a {stranger} that was not made here"):
        synthesize(tmp_path, sites=1, patients=1, workers=1)
    assert (tmp_path / stranger / "dicom" / "real.dcm").read_bytes() == b"a patient"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": 0}, "sites=0 to be at least 1"),
        ({"patients": 0}, "patients=0 to be at least 1"),
        ({"public_patients": -1}, "public_patients=-1 to be at least 0"),
        ({"seed": -1}, "seed=-1 to be at least 0"),
        ({"workers": 0}, "workers=0 to be at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(SyntheticError, match=message):
        synthesize(tmp_path, **{"sites": 1, "patients": 1, **arguments})  # type: ignore[arg-type]


def test_progress_counts_patients_up_to_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(
        tmp_path,
        sites=2,
        patients=11,
        public_patients=1,
        workers=1,
        on_progress=lambda *call: seen.append(call),
    )
    assert seen == [(10, 23), (11, 23), (21, 23), (22, 23), (23, 23)]


def test_the_manifest_names_version_and_parameters(tree: Path) -> None:
    manifest = json.loads((tree / "synthetic.json").read_text(encoding="utf-8"))
    assert manifest == {"version": 1, "sites": 2, "patients": 12, "public_patients": 3, "seed": 7}


def test_generating_needs_no_torch() -> None:
    code = "import clipward.synthetic, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
