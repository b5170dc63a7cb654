"""What a report says of its patient is masked before it is packed; what it says of findings is labelled."""

import csv
import logging
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset

from client.cohort import Cohort, CohortSettings, CohortSettingsError, SourceMissingError, build_cohort
from client.cohort.dicom_folder import read_header
from client.cohort.outcomes import Code, Rejected, State
from client.cohort.pairing import Pairing
from client.cohort.scan_index import SCAN
from client.cohort.sources import Candidate
from client.reports.index import ReportIndex
from client.reports.report import Report
from client.site import Site
from client.text.keys import text_key
from client.text.labels import default_findings
from clipward.synthetic import synthesize
from clipward.synthetic.findings import FINDINGS

Dicom = Callable[..., Dataset]
HEADER = {
    "PatientName": "Quillfeather^Ottoline",
    "PatientID": "MRN-4711-08",
    "PatientBirthDate": "19510317",
    "StudyDate": "20200229",
    "StudyTime": "093015",
    "AccessionNumber": "RAD99-0815",
    "ReferringPhysicianName": "Zanetti^Bruno^^Dr.",
    "NameOfPhysiciansReadingStudy": ["Okonkwo^Ada", "Lindqvist^Per"],
    "InstitutionName": "Mercyfield Infirmary",
}
PLANTED = (
    "FINDINGS: Mrs. Quillfeather, born on March 17, 1951, is seen at Mercyfield Infirmary. Small effusion.\n"
    "IMPRESSION: Ottoline has edema on 29.02.2020 at 09:30. Read by Lindqvist and Okonkwo for Zanetti, "
    "RAD99-0815, MRN-4711-08."
)
SECRETS = (
    *("Quillfeather", "Ottoline", "Mercyfield", "1951", "2020", "09:30", "Lindqvist", "Okonkwo", "Zanetti"),
    *("0815", "4711"),
)


@pytest.fixture
def hospital(tmp_path: Path, dicom: Dicom) -> CohortSettings:
    """Two patients; the report of the first names everybody whom the header names."""
    root = tmp_path / "export"
    root.mkdir()
    dicom(**HEADER).save_as(root / "0", enforce_file_format=True)
    dicom(PatientID="other", AccessionNumber="A2").save_as(root / "1", enforce_file_format=True)
    dicom(PatientID="third", AccessionNumber="A3").save_as(root / "2", enforce_file_format=True)
    with open(tmp_path / "reports.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("accession_number", "report"),
                (HEADER["AccessionNumber"], PLANTED),
                ("A2", "IMPRESSION: No effusion."),
                ("A3", "IMPRESSION: NO EFFUSION"),
            ]
        )
    return CohortSettings(dicom=root, reports=tmp_path / "reports.csv", image_size=16, salt="s")


def test_nothing_of_the_header_is_packed(
    hospital: CohortSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert cohort.texts[0].startswith("___ has edema on ___ at ___.")
    assert cohort.texts[0].endswith("is seen at ___. Small effusion.")
    assert cohort.texts[1] == "No effusion."
    packed = [path for path in (tmp_path / "cohort").iterdir() if path.name != SCAN]
    told = b"".join(path.read_bytes() for path in packed).decode("latin-1")
    told += " ".join(cohort.texts) + repr(cohort) + caplog.text
    assert [secret for secret in SECRETS if secret in told] == []
    assert stat.S_IMODE((tmp_path / "cohort" / SCAN).stat().st_mode) == 0o600  # where the header is kept


def test_hits_are_counted_by_kind(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert set(cohort.masked) >= {"name", "date", "time", "id", "place"}
    assert cohort.masked["date"] == 2
    assert cohort.masked["time"] == 1
    assert cohort.masked["id"] == 2


def test_what_the_header_says_is_remembered_between_builds(
    hospital: CohortSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cohort(hospital, tmp_path / "cohort")
    assert isinstance(hospital.reports, Path)
    hospital.reports.write_text("accession_number,report\nRAD99-0815,IMPRESSION: Ottoline has a nodule.\n")
    monkeypatch.setattr("client.cohort.dicom_folder.read_header", lambda *_: pytest.fail("read again"))
    assert build_cohort(hospital, tmp_path / "cohort").texts == ("___ has a nodule.",)


def test_the_header_is_told_with_all_its_values(tmp_path: Path, dicom: Dicom) -> None:
    dicom(**HEADER).save_as(tmp_path / "image", enforce_file_format=True)
    found = read_header(tmp_path / "image")
    assert isinstance(found, Candidate)
    assert found.header["NameOfPhysiciansReadingStudy"] == "Okonkwo^Ada\\Lindqvist^Per"
    assert {keyword: found.header[keyword] for keyword in HEADER if isinstance(HEADER[keyword], str)} == {
        keyword: value for keyword, value in HEADER.items() if isinstance(value, str)
    }
    assert "Quillfeather" not in repr(found)


def test_values_that_break_the_standard_cost_neither_image_nor_remark(tmp_path: Path, dicom: Dicom) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dicom(PatientBirthDate="in spring", StudyTime="noon", PatientName="A=B=C=D^E")
        dataset.save_as(tmp_path / "image", enforce_file_format=True)
    found = read_header(tmp_path / "image")
    assert isinstance(found, Candidate)
    assert found.remarks == ()
    assert found.header["PatientBirthDate"] == "in spring"


def paired(text: str, *, header: Mapping[str, str] | None = None, **report: str) -> Candidate | Rejected:
    image = Candidate(
        path=Path("x"), patient="", study="1.2", keys={"accession_number": "A1"}, uid="1", header=header or {}
    )
    told = {"source": "test", "accession": "A1", "patient": "PAT-77-1", "text": text, **report}
    with ReportIndex() as index:
        index.add(Report(**told))  # type: ignore[arg-type]
        return Pairing(reports=index, labels=None).complete(image)


def test_the_number_that_only_the_report_knows_is_masked() -> None:
    found = paired("Edema, see PAT-77-1.")
    assert isinstance(found, Candidate)
    assert found.text == "Edema, see ___."
    assert found.masked == {"id": 1}


def test_a_report_of_nothing_but_names_is_empty() -> None:
    header = {"PatientName": "Quillfeather^Ottoline"}
    assert paired("IMPRESSION: Ottoline Quillfeather", header=header) == Rejected(
        State.UNPAIRED, Code.E_REPORT_EMPTY
    )


def test_texts_of_a_table_are_masked_by_what_names_anybody(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,text,patient_id\na.png,Seen by Dr. Zanetti on 12.03.2019.,p1\n")
    cohort = build_cohort(
        CohortSettings(table=tmp_path / "t.csv", image_size=16, salt="s"), tmp_path / "cohort"
    )
    assert cohort.texts == ("Seen by Dr. ___ on ___.",)
    assert cohort.masked == {"date": 1, "name": 1}


def test_texts_of_the_same_words_have_one_key(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(hospital, tmp_path / "cohort")
    assert cohort.text_ids.tolist() == [0, 1, 2]
    assert cohort.text_keys == tuple(map(text_key, cohort.texts))
    assert cohort.text_keys[1] == cohort.text_keys[2] != cohort.text_keys[0]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CohortSettings, Cohort]:
    """A synthetic hospital, and its cohort with the labels it was drawn with."""
    folder = tmp_path_factory.mktemp("synthetic")
    settings = Site.open(synthesize(folder / "h", sites=1, patients=40, workers=1)[0]).cohort_settings()
    settings = replace(settings, image_size=16)
    return settings, build_cohort(settings, folder / "cohort", workers=1)


def test_synthetic_reports_name_nobody_and_stay_as_they_are(generated: tuple[CohortSettings, Cohort]) -> None:
    _, cohort = generated
    assert cohort.masked == {}
    assert set(cohort.labels) == set(FINDINGS)


def test_read_labels_are_those_the_hospital_was_drawn_with(
    generated: tuple[CohortSettings, Cohort], tmp_path: Path
) -> None:
    settings, drawn = generated
    read = build_cohort(replace(settings, labels=None, label_reports=True), tmp_path / "cohort", workers=1)
    assert set(read.labels) == set(default_findings().names)
    for finding in FINDINGS:
        truth, said = drawn.labels[finding] == 1, read.labels[finding] == 1
        assert 2 * (truth & said).sum() >= 0.95 * (truth.sum() + said.sum()) > 0, finding


def test_the_sites_own_labels_win_finding_by_finding(
    generated: tuple[CohortSettings, Cohort], tmp_path: Path
) -> None:
    """Also where they are unknown, contradict the words, or are written otherwise."""
    settings, _ = generated
    assert settings.labels is not None
    with open(settings.labels, newline="") as file:
        numbers = [row["accession_number"] for row in csv.DictReader(file)]
    own = ["1", "0", "", "-1"] * len(numbers)
    lines = [f"{number},{value}" for number, value in zip(numbers[1:], own, strict=False)]
    (tmp_path / "own.csv").write_text("\n".join(["accession_number,Pleural_Thickening", *lines]))
    settings = replace(settings, labels=tmp_path / "own.csv", label_reports=True)
    cohort = build_cohort(settings, tmp_path / "cohort", workers=1)
    assert "pleural thickening" not in cohort.labels
    assert set(cohort.labels) == {"Pleural_Thickening", *default_findings().names} - {"pleural thickening"}
    known = cohort.labels["Pleural_Thickening"]
    np.testing.assert_array_equal(known[:5], [np.nan, 1, 0, np.nan, np.nan])


def test_a_site_may_name_its_findings(hospital: CohortSettings, tmp_path: Path) -> None:
    file = tmp_path / "findings.yaml"
    file.write_text("findings:\n  fluid:\n    terms: {en: [effusion*]}\n")
    settings = replace(hospital, label_reports=True, findings=file)
    assert build_cohort(settings, tmp_path / "cohort").labels["fluid"].tolist() == [1, 0, 0]
    file.write_text("findings:\n  water:\n    terms: {en: [edema]}\n")
    labels = build_cohort(settings, tmp_path / "cohort").labels
    assert {name: values.tolist() for name, values in labels.items()} == {"water": [1, 0, 0]}


def test_nothing_is_labelled_unless_it_is_asked_for(hospital: CohortSettings, tmp_path: Path) -> None:
    assert build_cohort(hospital, tmp_path / "cohort").labels == {}


def test_wrong_findings_are_named_before_anything_is_read(hospital: CohortSettings, tmp_path: Path) -> None:
    file = tmp_path / "findings.yaml"
    file.write_text("findings: {}")
    with pytest.raises(CohortSettingsError, match=r"cohort\.findings: .*hold the key findings"):
        build_cohort(replace(hospital, label_reports=True, findings=file), tmp_path / "cohort")
    with pytest.raises(SourceMissingError, match=r"expected the file .*none\.yaml"):
        build_cohort(
            replace(hospital, label_reports=True, findings=tmp_path / "none.yaml"), tmp_path / "cohort"
        )
    with pytest.raises(CohortSettingsError, match=r"findings only with cohort\.label_reports"):
        replace(hospital, findings=file)
