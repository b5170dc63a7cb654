"""From a hospital's export to a packed cohort."""

import csv
import itertools
import logging
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from client.cohort import (
    PIPELINE,
    Code,
    Cohort,
    CohortSettings,
    CohortSettingsError,
    EmptyCohortError,
    SourceMissingError,
    State,
    StoredCohortError,
    TooManyFailuresError,
    build,
    build_cohort,
    open_cohort,
    packing,
)
from client.cohort.dicom_folder import DicomFolder
from client.cohort.outcomes import Rejected, Rendered
from client.cohort.packing import CohortWriter
from client.cohort.scan_index import SCAN

Dicom = Callable[..., Dataset]
PATIENTS = 6
SIZE = 32

# Some of the hospital's files need a decoder, and a process for it in every test would take a minute.
build_here = partial(build_cohort, workers=1)


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
    cohort = build_here(hospital, tmp_path / "cohort")
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
    cohort = build_here(hospital, tmp_path / "cohort")
    assert cohort.images.shape == (3 * PATIENTS, SIZE, SIZE)
    assert cohort.texts[:3] == ("No. 0 Heart 0.", "No. 1 Heart 0.", "No. 1 Heart 0.")
    assert len(np.unique(cohort.patients)) == cohort.patients.max() + 1 == PATIENTS
    assert len(np.unique(cohort.studies)) == cohort.studies.max() + 1 == 2 * PATIENTS
    assert cohort.studies[1] == cohort.studies[2] != cohort.studies[0]
    np.testing.assert_array_equal(cohort.labels["Edema"], np.tile([0, 1, 1], PATIENTS))
    inverted, plain = cohort.images[0].astype(int), cohort.images[3]
    assert np.abs(inverted + plain - 255).max() <= 1


def test_a_patient_is_on_one_side(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_here(replace(hospital, test_fraction=0.5), tmp_path / "cohort")
    for patient in range(PATIENTS):
        assert len(set(cohort.is_test[cohort.patients == patient])) == 1
    assert 0 < len(cohort.test()) < len(cohort)


def test_split_keeps_its_patients_when_the_fraction_grows(hospital: CohortSettings, tmp_path: Path) -> None:
    held_out = [
        build_here(replace(hospital, test_fraction=fraction), tmp_path / "cohort").is_test
        for fraction in (0.0, 0.3, 0.6, 0.99)
    ]
    assert not held_out[0].any()
    for fewer, more in itertools.pairwise(held_out):
        assert (more | ~fewer).all()


def test_split_depends_on_the_salt(hospital: CohortSettings, tmp_path: Path) -> None:
    splits = {
        tuple(build_here(replace(hospital, test_fraction=0.5, salt=salt), tmp_path / "cohort").is_test)
        for salt in "abcd"
    }
    assert len(splits) > 1


def test_building_again_opens_what_is_there(hospital: CohortSettings, tmp_path: Path) -> None:
    first = build_here(hospital, tmp_path / "cohort")
    before = (tmp_path / "cohort/images.npy").stat()
    second = build_here(hospital, tmp_path / "cohort", on_progress=lambda done, total: pytest.fail("rebuilt"))
    assert (tmp_path / "cohort/images.npy").stat() == before
    assert same(first, second)
    assert same(first, open_cohort(tmp_path / "cohort"))


@pytest.mark.parametrize("change", ["file", "touch", "reports", "size", "salt"])
def test_any_change_builds_again(hospital: CohortSettings, tmp_path: Path, change: str) -> None:
    build_here(hospital, tmp_path / "cohort")
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
    build_here(hospital, tmp_path / "cohort")
    assert (tmp_path / "cohort/images.npy").stat().st_ino != before


def test_workers_change_nothing(hospital: CohortSettings, tmp_path: Path) -> None:
    assert same(
        build_cohort(hospital, tmp_path / "one", workers=1),
        build_cohort(hospital, tmp_path / "two", workers=2),
    )


def test_a_file_that_ends_its_decoders_process_costs_itself_in_a_small_build_too(
    hospital: CohortSettings, tmp_path: Path, dicom: Dicom
) -> None:
    """GDCM, the one decoder of lossless JPEG, writes where it may not when told of samples of 255 bits."""
    stream = bytes.fromhex(
        "ffd8ffc3000bff0020002001011100"  # the byte before 32 rows and columns is the precision
        "ffc40020000003010101000203010100000000000008090a070605000401030b020f"
        "ffda0008010100010000ffd9"
    )
    deadly = dicom(AccessionNumber="A1-1")
    deadly.file_meta.TransferSyntaxUID, deadly.PixelData = JPEGLosslessSV1, encapsulate([stream])
    deadly["PixelData"].VR, deadly["PixelData"].is_undefined_length = "OB", True
    assert hospital.dicom is not None
    deadly.save_as(hospital.dicom / "deadly", enforce_file_format=True)
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert cohort.codes[Code.E_CRASHED] == 1
    assert len(cohort) == 3 * PATIENTS
    assert "deadly,quarantined,E_CRASHED" in (tmp_path / "cohort/quarantine.csv").read_text()


@pytest.mark.parametrize(("workers", "asked"), [(None, True), (1, False), (2, False)])
def test_a_decoder_is_looked_for_where_that_decides_something(
    hospital: CohortSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
    asked: bool,
) -> None:
    calls: list[bool] = []

    def may_end_process(self: DicomFolder) -> bool:
        calls.append(True)
        return False

    monkeypatch.setattr(DicomFolder, "may_end_process", may_end_process)
    build_cohort(hospital, tmp_path / "cohort", workers=workers)
    build_cohort(hospital, tmp_path / "cohort", workers=workers)  # is there already
    assert calls == [True] * asked


def test_progress_rises_to_its_end(hospital: CohortSettings, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    build_here(hospital, tmp_path / "cohort", on_progress=lambda done, total: steps.append((done, total)))
    total = 2 * (3 * PATIENTS + 8)
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_nothing_of_a_patient_is_logged_or_shown(
    hospital: CohortSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cohort = build_here(hospital, tmp_path / "cohort")
    text = caplog.text + repr(cohort) + repr(hospital)
    for secret in ("MRN", "A0-0", "Heart", "export", "1.2.", str(tmp_path)):
        assert secret not in text
    packed = (path for path in (tmp_path / "cohort").iterdir() if path.name != SCAN)
    assert b"MRN" not in b"".join(path.read_bytes() for path in packed)
    assert stat.S_IMODE((tmp_path / "cohort" / SCAN).stat().st_mode) == 0o600  # its one place inside


def test_an_unpaired_hospital_names_its_reasons(hospital: CohortSettings, tmp_path: Path) -> None:
    assert isinstance(hospital.reports, Path)
    hospital.reports.write_text("accession,report\nA99,Nothing.\n")
    with pytest.raises(
        EmptyCohortError, match=r"no usable pair among 27 inputs, .*21 x E_NO_REPORT \(no report"
    ):
        build_here(hospital, tmp_path / "cohort")
    assert (tmp_path / "cohort/quarantine.csv").exists()


def test_missing_sources_are_named(hospital: CohortSettings, tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"expected the file .*/none\.csv"):
        build_here(replace(hospital, reports=tmp_path / "none.csv"), tmp_path / "cohort")
    with pytest.raises(SourceMissingError, match=r"expected the DICOM folder .*/nowhere"):
        build_here(replace(hospital, dicom=tmp_path / "nowhere"), tmp_path / "cohort")


def test_the_cohort_lies_outside_of_its_source(hospital: CohortSettings) -> None:
    assert hospital.dicom is not None
    with pytest.raises(CohortSettingsError, match="outside of"):
        build_here(hospital, hospital.dicom / "cohort")
    assert not (hospital.dicom / "cohort").exists()


def test_a_folder_of_something_else_is_left_alone(hospital: CohortSettings, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/diary.txt").touch()
    with pytest.raises(StoredCohortError, match="other than a cohort"):
        build_here(hospital, tmp_path / "home")
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
    cohort = build_here(settings, tmp_path / "cohort")
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
    cohort = build_here(settings, tmp_path / "cohort")
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
        timeout=600,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.stdout.strip() == str(3 * PATIENTS)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are decoded from now on, as they are."""
    names: list[str] = []
    render = DicomFolder.render

    def noted(path: Path, size: int, **options: Any) -> Rendered | Rejected:
        names.append(path.parent.name + "/" + path.name)
        return render(path, size, **options)

    monkeypatch.setattr(DicomFolder, "render", staticmethod(noted))
    return names


def packed_bytes(folder: Path) -> dict[str, bytes]:
    files = ("images.npy", "index.arrow", "keys.bin", "cohort.json", "quarantine.csv")
    return {name: (folder / name).read_bytes() for name in files}


def change_archive(hospital: CohortSettings) -> None:
    """Add a study in the middle, change one, and remove one."""
    root, reports = hospital.dicom, hospital.reports
    assert root is not None
    assert isinstance(reports, Path)
    shutil.copy(root / "5/0-0", root / "2/0-1")
    (root / "3/0-0").write_bytes((root / "4/0-0").read_bytes())
    (root / "0/1-1").unlink()
    reports.write_text(reports.read_text().replace("Heart 1.", "Heart one."))


def test_only_what_has_changed_is_decoded_and_the_result_is_a_fresh_builds(
    hospital: CohortSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_here(hospital, tmp_path / "cohort")
    change_archive(hospital)
    names = decoded(monkeypatch)
    cohort = build_here(hospital, tmp_path / "cohort")
    assert names == ["2/0-1", "3/0-0"]
    build_here(hospital, tmp_path / "fresh")
    assert packed_bytes(tmp_path / "cohort") == packed_bytes(tmp_path / "fresh")
    assert "No. 0 Heart one." in cohort.texts
    assert cohort.counts[State.DUPLICATE] == 3


def test_a_build_that_is_killed_goes_on_where_it_was(
    hospital: CohortSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_here(hospital, tmp_path / "fresh")
    names = decoded(monkeypatch)
    monkeypatch.setattr(CohortWriter, "finish", kill)
    monkeypatch.setattr(packing, "_BYTES_BETWEEN_SYNCS", 4 * SIZE**2)
    with pytest.raises(ZeroDivisionError):
        build_here(hospital, tmp_path / "cohort")
    assert len(names) == 3 * PATIENTS + 2
    monkeypatch.undo()
    names = decoded(monkeypatch)
    build_here(hospital, tmp_path / "cohort")
    assert names == []
    assert packed_bytes(tmp_path / "cohort") == packed_bytes(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".cohort")} == {".cohort.lock"}


def kill(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def test_too_many_failures_leave_the_cohort_of_before(hospital: CohortSettings, tmp_path: Path) -> None:
    build_here(hospital, tmp_path / "cohort")
    before = packed_bytes(tmp_path / "cohort")
    used, failed = 3 * PATIENTS + 2 * PATIENTS + 1, 5  # reports are inputs that succeed
    share = failed / (used + failed)
    build_here(replace(hospital, max_failure_share=share), tmp_path / "enough")
    with pytest.raises(TooManyFailuresError) as caught:
        build_here(replace(hospital, max_failure_share=share - 1e-9), tmp_path / "cohort")
    assert "5 of 36 inputs cannot be used, a larger share than cohort.max-failure-share" in str(caught.value)
    assert f"see {tmp_path}/cohort/quarantine.csv: " in str(caught.value)
    assert "1 x E_NO_REPORT (no report" in str(caught.value)
    assert packed_bytes(tmp_path / "cohort") == before
    assert len(open_cohort(tmp_path / "cohort")) == 3 * PATIENTS


def test_a_patient_under_several_ids_is_one(hospital: CohortSettings, tmp_path: Path) -> None:
    (tmp_path / "merge.csv").write_text(
        "patient_id,same_as\nMRN-1,MRN-0\nMRN-0,MRN-3\nMRN-3,MRN-1\nMRN-7,MRN-5\nMRN-7,MRN-8\n,\n"
    )
    for fraction in (0.2, 0.5, 0.8):
        settings = replace(hospital, merge=tmp_path / "merge.csv", test_fraction=fraction)
        cohort = build_here(settings, tmp_path / "cohort")
        number = cohort.patients[::3]
        assert number[0] == number[1] == number[3]
        assert len(set(number)) == PATIENTS - 2
        assert cohort.is_test[0] == cohort.is_test[3] == cohort.is_test[9]
        assert cohort.unknown_merges == 2


def test_images_and_reports_of_merged_ids_belong_together(hospital: CohortSettings, tmp_path: Path) -> None:
    reports, labels, merge = (tmp_path / f"{name}.csv" for name in ("r", "l", "m"))
    reports.write_text("accession_number,patient_id,report\nA0-0,OLD-0,One.\nA1-0,OLD-1,Two.\n")
    labels.write_text("accession_number,patient_id,Edema\nA0-0,OLDER-0,1\n")
    merge.write_text("patient_id,same_as\nMRN-0,OLD-0\nOLD-0,OLDER-0\n")
    settings = replace(hospital, reports=reports, labels=labels, merge=merge)
    cohort = build_here(settings, tmp_path / "cohort")
    assert cohort.texts == ("One.",)
    assert cohort.labels["Edema"].tolist() == [1]
    assert cohort.codes[Code.E_PATIENT_MISMATCH] == 3  # that of OLD-1, and two faults with a number of others


def test_splits_of_merged_ids_that_differ_become_training(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(
        "image,text,patient_id,split\n"
        "a.png,one,p1,train\na.png,two,p2,test\na.png,three,p3,\na.png,four,p4,test\na.png,five,p5,\n"
    )
    (tmp_path / "m.csv").write_text("patient_id,same_as\np1,p2\np2,p3\np4,p5\n")
    settings = CohortSettings(
        table=tmp_path / "t.csv", merge=tmp_path / "m.csv", image_size=SIZE, salt="s", test_fraction=0.5
    )
    cohort = build_here(settings, tmp_path / "cohort")
    assert cohort.is_test.tolist() == [False, False, False, True, True]
    assert cohort.codes == {Code.W_SPLIT_CONFLICT: 3}


def test_equal_texts_have_one_number(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_here(hospital, tmp_path / "cohort")
    assert cohort.text_ids.tolist()[:7] == [0, 1, 1, 2, 3, 3, 4]
    assert cohort.texts[1] is cohort.texts[2]
    assert cohort.text_rules == {"impression and findings": 3 * PATIENTS}
    assert cohort.pipeline == PIPELINE


def test_another_decoder_builds_again(
    hospital: CohortSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_here(hospital, tmp_path / "cohort")
    monkeypatch.setattr(build, "_decoders", lambda: {"1.2.840.10008.1.2.5": ("better",)})
    names = decoded(monkeypatch)
    second = build_here(hospital, tmp_path / "cohort")
    assert len(names) == 3 * PATIENTS + 2
    assert first.identity == second.identity
    assert first.rules != second.rules
