"""From a hospital's export to a packed cohort."""

import csv
import itertools
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from client.cohort import (
    Code,
    Cohort,
    CohortSettings,
    CohortSettingsError,
    EmptyCohortError,
    SourceMissingError,
    State,
    StoredCohortError,
    build_cohort,
    open_cohort,
)

Dicom = Callable[..., Dataset]
PATIENTS = 6
SIZE = 32


@pytest.fixture
def hospital(tmp_path: Path, dicom: Dicom) -> CohortSettings:
    """Six patients with two studies each, the second with two images, among files of every other fate."""
    root = tmp_path / "export"
    root.mkdir()
    reports = ["accession_number,report,Edema"]

    def save(name: str, dataset: Dataset) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (root / name).parent.mkdir(exist_ok=True)
            dataset.save_as(root / name, enforce_file_format=True)

    syntaxes = [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless]
    for patient in range(PATIENTS):
        for study in range(2):
            shared = {
                "PatientID": f"MRN-{patient}",
                "StudyInstanceUID": generate_uid(),
                "AccessionNumber": f"A{patient}-{study}",
                "WindowCenter": 2000,
                "WindowWidth": 4000,
                "PhotometricInterpretation": f"MONOCHROME{1 + patient % 2}",
            }
            for image in range(1 + study):
                save(f"{patient}/{study}-{image}", dicom(syntax=syntaxes[patient % 3], **shared))
            reports.append(
                f'A{patient}-{study},"FINDINGS: Heart {patient}.\nIMPRESSION: No. {study}",{study}'
            )
    truncated = dicom(AccessionNumber="A0-0", PixelData=bytes(9))
    save("faults/truncated", truncated)
    save("faults/blank", dicom(np.full((8, 8), 5, np.uint16), AccessionNumber="A0-0"))
    save("faults/lateral", dicom(ViewPosition="LL"))
    save("faults/burned", dicom(BurnedInAnnotation="YES"))
    save("faults/alone", dicom(AccessionNumber="nobody's"))
    save("faults/again", truncated)
    (root / "notes.txt").write_text("bring milk")
    (root / "empty.dcm").touch()
    (tmp_path / "reports.csv").write_text("\n".join([*reports, "A9,Nobody was there.,"]))
    return CohortSettings(dicom=root, reports=tmp_path / "reports.csv", image_size=SIZE, salt="salt")


def same(first: Cohort, second: Cohort) -> bool:
    return first.identity == second.identity and bool((first.images == second.images).all())


def test_every_file_ends_in_one_state(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert hospital.dicom is not None
    files = [path for path in hospital.dicom.rglob("*") if path.is_file()]
    assert len(files) == 3 * PATIENTS + 8
    assert sum(cohort.counts.values()) == len(files) + 2 * PATIENTS + 1
    assert cohort.counts == {
        State.USED: 3 * PATIENTS,
        State.DUPLICATE: 1,
        State.UNPAIRED: 1,
        State.UNSUPPORTED: 0,
        State.QUARANTINED: 4,
        State.IGNORED: 2,
        State.REPORT: 2 * PATIENTS + 1,
    }
    with open(tmp_path / "cohort/quarantine.csv") as file:
        lines = {line["path"]: line["code"] for line in csv.DictReader(file)}
    assert lines == {
        "empty.dcm": "E_EMPTY_FILE",
        "faults/again": "E_TRUNCATED",
        "faults/alone": "E_NO_REPORT",
        "faults/blank": "E_BLANK",
        "faults/burned": "E_BURNED_IN",
        "faults/lateral": "E_NOT_FRONTAL",
        "faults/truncated": "E_DUPLICATE_SOP",
        "notes.txt": "E_NOT_DICOM",
    }
    assert cohort.unpaired_reports == 1


def test_rows_are_image_text_pairs(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert cohort.images.shape == (3 * PATIENTS, SIZE, SIZE)
    assert cohort.texts[:3] == ("No. 0 Heart 0.", "No. 1 Heart 0.", "No. 1 Heart 0.")
    assert len(np.unique(cohort.patients)) == cohort.patients.max() + 1 == PATIENTS
    assert len(np.unique(cohort.studies)) == cohort.studies.max() + 1 == 2 * PATIENTS
    assert cohort.studies[1] == cohort.studies[2] != cohort.studies[0]
    np.testing.assert_array_equal(cohort.labels["Edema"], np.tile([0, 1, 1], PATIENTS))
    inverted, plain = cohort.images[0].astype(int), cohort.images[3]
    assert np.abs(inverted + plain - 255).max() <= 1


def test_a_patient_is_on_one_side(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(replace(hospital, test_fraction=0.5), tmp_path / "cohort")
    for patient in range(PATIENTS):
        assert len(set(cohort.is_test[cohort.patients == patient])) == 1
    assert 0 < len(cohort.test()) < len(cohort)


def test_split_keeps_its_patients_when_the_fraction_grows(hospital: CohortSettings, tmp_path: Path) -> None:
    held_out = [
        build_cohort(replace(hospital, test_fraction=fraction), tmp_path / "cohort").is_test
        for fraction in (0.0, 0.3, 0.6, 0.99)
    ]
    assert not held_out[0].any()
    for fewer, more in itertools.pairwise(held_out):
        assert (more | ~fewer).all()


def test_split_depends_on_the_salt(hospital: CohortSettings, tmp_path: Path) -> None:
    splits = {
        tuple(build_cohort(replace(hospital, test_fraction=0.5, salt=salt), tmp_path / "cohort").is_test)
        for salt in "abcd"
    }
    assert len(splits) > 1


def test_building_again_opens_what_is_there(hospital: CohortSettings, tmp_path: Path) -> None:
    first = build_cohort(hospital, tmp_path / "cohort")
    before = (tmp_path / "cohort/images.npy").stat()
    second = build_cohort(
        hospital, tmp_path / "cohort", on_progress=lambda done, total: pytest.fail("rebuilt")
    )
    assert (tmp_path / "cohort/images.npy").stat() == before
    assert same(first, second)
    assert same(first, open_cohort(tmp_path / "cohort"))


@pytest.mark.parametrize("change", ["file", "touch", "reports", "size", "salt"])
def test_any_change_builds_again(hospital: CohortSettings, tmp_path: Path, change: str) -> None:
    build_cohort(hospital, tmp_path / "cohort")
    before = (tmp_path / "cohort/images.npy").stat().st_ino
    assert hospital.dicom is not None
    assert isinstance(hospital.reports, Path)
    if change == "file":
        (hospital.dicom / "another").touch()
    elif change == "touch":
        os.utime(hospital.dicom / "notes.txt", (1, 1))
    elif change == "reports":
        hospital.reports.write_text(hospital.reports.read_text() + "\nA10,Late.,")
    elif change == "size":
        hospital = replace(hospital, image_size=16)
    else:
        hospital = replace(hospital, salt="other")
    build_cohort(hospital, tmp_path / "cohort")
    assert (tmp_path / "cohort/images.npy").stat().st_ino != before


def test_workers_change_nothing(hospital: CohortSettings, tmp_path: Path) -> None:
    assert same(
        build_cohort(hospital, tmp_path / "one", workers=1),
        build_cohort(hospital, tmp_path / "two", workers=2),
    )


def test_progress_rises_to_its_end(hospital: CohortSettings, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    build_cohort(hospital, tmp_path / "cohort", on_progress=lambda done, total: steps.append((done, total)))
    total = 2 * (3 * PATIENTS + 8)
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_nothing_of_a_patient_is_logged_or_shown(
    hospital: CohortSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cohort = build_cohort(hospital, tmp_path / "cohort")
    text = caplog.text + repr(cohort) + repr(hospital)
    for secret in ("MRN", "A0-0", "Heart", "export", "1.2.", str(tmp_path)):
        assert secret not in text
    stored = b"".join(path.read_bytes() for path in (tmp_path / "cohort").iterdir())
    assert b"MRN" not in stored


def test_an_unpaired_hospital_names_its_reasons(hospital: CohortSettings, tmp_path: Path) -> None:
    assert isinstance(hospital.reports, Path)
    hospital.reports.write_text("accession,report\nA99,Nothing.\n")
    with pytest.raises(
        EmptyCohortError, match=r"no usable pair among 27 inputs, .*21 x E_NO_REPORT \(no report"
    ):
        build_cohort(hospital, tmp_path / "cohort")
    assert (tmp_path / "cohort/quarantine.csv").exists()


def test_missing_sources_are_named(hospital: CohortSettings, tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"expected the file .*/none\.csv"):
        build_cohort(replace(hospital, reports=tmp_path / "none.csv"), tmp_path / "cohort")
    with pytest.raises(SourceMissingError, match=r"expected the DICOM folder .*/nowhere"):
        build_cohort(replace(hospital, dicom=tmp_path / "nowhere"), tmp_path / "cohort")


def test_the_cohort_lies_outside_of_its_source(hospital: CohortSettings) -> None:
    assert hospital.dicom is not None
    with pytest.raises(CohortSettingsError, match="outside of"):
        build_cohort(hospital, hospital.dicom / "cohort")
    assert not (hospital.dicom / "cohort").exists()


def test_a_folder_of_something_else_is_left_alone(hospital: CohortSettings, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/diary.txt").touch()
    with pytest.raises(StoredCohortError, match="other than a cohort"):
        build_cohort(hospital, tmp_path / "home")
    assert (tmp_path / "home/diary.txt").exists()


def test_a_table_of_one_site_becomes_its_cohort(tmp_path: Path) -> None:
    lines = ["image,text,patient_id,site,split,mass"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        split = "test" if number // 2 % 3 == 0 else "train"
        lines.append(f"{number}.png,Note {number}.,p{number // 2},{number % 2},{split},{number % 3 % 2}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    settings = CohortSettings(table=tmp_path / "t.csv", where={"site": "1"}, image_size=SIZE, salt="s")
    cohort = build_cohort(settings, tmp_path / "cohort")
    assert cohort.texts == tuple(f"Note {number}." for number in range(1, 12, 2))
    np.testing.assert_array_equal(cohort.is_test, [True, False, False, True, False, False])
    np.testing.assert_array_equal(cohort.labels["mass"], [1, 0, 0, 1, 0, 0])
    assert set(cohort.labels) == {"mass"}
    assert not cohort.images[:, :5].any()  # 20 x 30 pixels: padded above and below
    assert not cohort.codes


def test_a_patient_in_both_splits_never_reaches_the_test_side(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(
        "image,text,patient_id,split\na.png,one,p1,train\na.png,two,p1,test\na.png,three,p2,test\n"
    )
    settings = CohortSettings(table=tmp_path / "t.csv", image_size=SIZE, salt="s")
    cohort = build_cohort(settings, tmp_path / "cohort")
    np.testing.assert_array_equal(cohort.is_test, [False, False, True])
    assert cohort.codes == {Code.W_SPLIT_CONFLICT: 2}
    assert cohort.counts[State.USED] == 3


def run_python(code: str, **variables: Any) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | variables
    ).stdout


def test_reading_needs_neither_torch_nor_flower() -> None:
    code = "import sys, client.cohort; print({'torch', 'flwr', 'transformers'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_a_script_without_a_main_guard_still_builds(hospital: CohortSettings, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from client.cohort import CohortSettings, build_cohort\n"
        f"dicom, reports = Path({str(hospital.dicom)!r}), Path({str(hospital.reports)!r})\n"
        "settings = CohortSettings(dicom=dicom, reports=reports, image_size=16, salt='s')\n"
        f"print(len(build_cohort(settings, Path({str(tmp_path / 'cohort')!r}), workers=2)))\n"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.stdout.strip() == str(3 * PATIENTS)
