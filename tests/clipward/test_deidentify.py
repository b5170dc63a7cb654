"""Copies of DICOM folders without names: what they hide, keep, and admit to have left."""

import csv
import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
import typer
from click.testing import Result
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from clipward.deidentify import DeidentifyError, copy_folder, deidentify
from clipward.synthetic import synthesize

HOSPITAL = Path(__file__).parents[2].parent / "shared" / "data" / "dicom-hospital-ccby"
SEED = b"a secret of more than sixteen bytes"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic hospital of three patients with private attributes, overlays and file names that tell."""
    folder = tmp_path_factory.mktemp("in")
    [site] = synthesize(folder / "made", sites=1, patients=3, workers=1)
    root = folder / "export"
    for number, path in enumerate(sorted((site / "dicom").rglob("*.dcm"))):
        dataset = pydicom.dcmread(path)
        dataset.private_block(0x0011, "MAKER", create=True).add_new(1, "LO", f"Doe^John {number}")
        dataset.DeviceSerialNumber = "SN-4711"
        dataset.ImageComments = "seen by Dr. Smith" if number == 0 else ""
        dataset.file_meta.SourceApplicationEntityTitle = "ST_ELSEWHERE"
        dataset.preamble = b"Doe^John".ljust(128, b"\0")
        (root / f"Doe^John {number}").mkdir(parents=True)
        dataset.save_as(root / f"Doe^John {number}" / "1.dcm")
    (root / "notes.txt").write_text("Doe^John")
    return root


def read(folder: Path) -> Iterator[Dataset]:
    return (pydicom.dcmread(path) for path in sorted(folder.iterdir()))


def test_nothing_that_names_is_left_and_pixels_are_the_same(hospital: Path, tmp_path: Path) -> None:
    copied = copy_folder(hospital, tmp_path / "out", seed=SEED)
    originals = [pydicom.dcmread(path) for path in sorted(hospital.rglob("*.dcm"))]
    copies = list(read(tmp_path / "out"))
    assert copied.files == len(copies) == len(originals)
    names = ("PatientID", "AccessionNumber", "SOPInstanceUID", "StudyInstanceUID", "PatientName", "StudyDate")
    for original, copy in zip(originals, copies, strict=True):
        assert copy.PatientIdentityRemoved == "YES"
        assert copy.PixelData == original.PixelData
        for name in names:
            assert not original.get(name) or copy[name].value != original[name].value, name
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    secrets = {str(original[name].value) for original in originals for name in names if original.get(name)}
    for secret in {*secrets, "Doe^John", "SN-4711", "ST_ELSEWHERE"}:
        assert secret.encode() not in stored


def test_what_belongs_together_still_does(hospital: Path, tmp_path: Path) -> None:
    copied = copy_folder(hospital, tmp_path / "out", seed=SEED)
    originals = [pydicom.dcmread(path) for path in sorted(hospital.rglob("*.dcm"))]
    for name in ("PatientID", "StudyInstanceUID"):
        pairs = {
            (one[name].value, two[name].value)
            for one, two in zip(originals, read(tmp_path / "out"), strict=True)
        }
        assert len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
    again = copy_folder(hospital, tmp_path / "again", seed=SEED)
    other = copy_folder(hospital, tmp_path / "other", seed=b"another secret of enough bytes")
    assert again.keys == copied.keys
    assert {new[3:] for new in copied.keys}.isdisjoint(new[3:] for new in other.keys)


def test_what_is_left_and_what_is_not_copied_is_counted(hospital: Path, tmp_path: Path) -> None:
    copied = copy_folder(hospital, tmp_path / "out", seed=SEED)
    assert copied.refused == {"not a DICOM file": 1}
    assert copied.left["free text"] == 1
    assert "overlays" not in copied.left


def test_only_the_owner_may_read_the_copies(hospital: Path, tmp_path: Path) -> None:
    copy_folder(hospital, tmp_path / "out", seed=SEED)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o600}


@pytest.mark.skipif(not HOSPITAL.is_dir(), reason="the acceptance hospital is not beside the project")
def test_no_canary_of_the_acceptance_hospital_is_left(tmp_path: Path) -> None:
    shutil.copytree(HOSPITAL, tmp_path / "in")
    copied = copy_folder(tmp_path / "in", tmp_path / "out", seed=SEED)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    canaries = json.loads((HOSPITAL / "canaries.json").read_text())
    assert [canary for canary in canaries if canary.encode() in stored] == []
    assert copied.files + sum(copied.refused.values()) == sum(path.is_file() for path in HOSPITAL.rglob("*"))
    assert copied.files > 50
    assert copied.left["free text"] >= 10  # the structured reports


def run(*arguments: str | Path) -> Result:
    program = typer.Typer()
    program.command()(deidentify)
    return CliRunner().invoke(program, [str(one) for one in arguments])


def test_the_command_says_what_it_did_and_writes_keys_apart(hospital: Path, tmp_path: Path) -> None:
    result = run(hospital, tmp_path / "out", "--keys", tmp_path / "keys.csv")
    assert result.exit_code == 0
    assert "1 not copied: not a DICOM file" in result.output
    assert "A person has to look" in result.output
    assert stat.S_IMODE((tmp_path / "keys.csv").stat().st_mode) == 0o600
    with open(tmp_path / "keys.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    old = {str(pydicom.dcmread(path).AccessionNumber) for path in hospital.rglob("*.dcm")}
    new = {str(one.AccessionNumber) for one in read(tmp_path / "out")}
    assert {row["accession_number"] for row in rows} == old
    assert {row["new_accession_number"] for row in rows} == new


def test_folders_that_would_mix_are_refused(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(DeidentifyError, match=r"there is there already: name a new folder"):
        copy_folder(hospital, tmp_path / "there", seed=SEED)
    with pytest.raises(DeidentifyError, match="outside of"):
        copy_folder(hospital, hospital / "out", seed=SEED)
    with pytest.raises(DeidentifyError, match=r"expected the DICOM folder .*none"):
        copy_folder(tmp_path / "none", tmp_path / "out", seed=SEED)
    assert run(hospital, tmp_path / "there").exit_code == 2
