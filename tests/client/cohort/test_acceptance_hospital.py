"""A hospital's whole export, images and reports in four forms and faults, held to its manifest row by row."""

import csv
import json
import logging
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.cohort import Code, Cohort, CohortSettings, EmptyCohortError, State, build_cohort
from client.cohort.dicom_folder import DicomFolder
from client.cohort.scan_index import SCAN
from client.cohort.sources import Candidate, Entry
from client.cohort.workers import Workers
from client.reports.report import Report
from client.reports.settings import ReportSettings

DATA = Path(__file__).parents[3].parent / "shared" / "data"
HOSPITAL = DATA / "dicom-hospital-ccby"

pytestmark = pytest.mark.skipif(
    not HOSPITAL.is_dir(), reason="the acceptance hospital is not beside the project"
)

# The manifest's words, its expectation with its reason, in ours. A state without a code is of an input that
# needs no remark; beside it, remarks that cost nothing are allowed.
FATES: Mapping[tuple[str, str], tuple[State, Code | None]] = {
    ("use", "ok"): (State.USED, None),
    ("use", "first of two byte-identical copies"): (State.USED, None),
    ("use", "unknown character set must not lose the image"): (State.USED, Code.W_CHARSET),
    ("use", "WindowWidth 0: fall back to percentiles"): (State.USED, Code.W_WINDOW_FALLBACK),
    ("use-or-quarantine", "no preamble and DICM prefix (readable with force)"): (
        State.USED,
        Code.W_NO_PREFIX,
    ),
    ("report", "DICOM SR"): (State.REPORT, None),
    ("report", "HL7 ORU^R01"): (State.REPORT, None),
    ("report", "FHIR DiagnosticReport"): (State.REPORT, None),
    ("duplicate", "same SOPInstanceUID"): (State.DUPLICATE, Code.E_DUPLICATE_SOP),
    ("unpaired", "no accession number and no report"): (State.UNPAIRED, Code.E_NO_REPORT),
    ("quarantine", "pixel data shorter than Rows x Columns"): (State.QUARANTINED, Code.E_TRUNCATED),
    ("quarantine", "BitsStored missing"): (State.QUARANTINED, Code.E_TAG_MISSING),
    ("quarantine", "StudyInstanceUID missing"): (State.QUARANTINED, Code.E_TAG_MISSING),
    ("quarantine", "constant image"): (State.QUARANTINED, Code.E_BLANK),
    ("quarantine", "BurnedInAnnotation YES"): (State.QUARANTINED, Code.E_BURNED_IN),
    ("quarantine", "unsupported transfer syntax (MPEG2 video)"): (State.UNSUPPORTED, Code.E_TRANSFER_SYNTAX),
    ("quarantine", "zero bytes"): (State.QUARANTINED, Code.E_EMPTY_FILE),
    ("ignore", "not DICOM"): (State.IGNORED, Code.E_NOT_DICOM),
    ("ignore", "broken DICOMDIR"): (State.IGNORED, Code.E_NOT_IMAGE),
}
REMARKS = {"", Code.W_PRELIMINARY, Code.W_WINDOW_FALLBACK}  # the structured reports are not verified


@dataclass(frozen=True, kw_only=True)
class Built:
    cohort: Cohort
    folder: Path
    found: list[dict[str, str]]
    said: str
    settings: CohortSettings


def rows() -> list[dict[str, str]]:
    with open(HOSPITAL / "manifest.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def notes() -> dict[str, dict[str, str]]:
    """The rows of the data set from which the hospital was made, by image."""
    with open(DATA / "cxr-multisite" / "metadata.csv", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def canaries() -> list[bytes]:
    return [canary.encode() for canary in json.loads((HOSPITAL / "canaries.json").read_text())]


def settings_of(folder: Path) -> CohortSettings:
    """The export as it is, and a second table with reports for the faults, which it leaves without."""
    lines = [
        f"{row['study']},IMPRESSION: {row['file']}"
        for row in rows()
        if row["study"]
        and row["file"].startswith("faults")
        and row["expect"] not in ("unpaired", "duplicate")
    ]
    (folder / "faults.csv").write_text("\n".join(["study_instance_uid,report", *lines]))
    reports = ReportSettings(
        tables=[HOSPITAL / "reports.csv", folder / "faults.csv"],
        hl7=[HOSPITAL / "hl7"],
        fhir=[HOSPITAL / "fhir"],
    )
    return CohortSettings(dicom=HOSPITAL, reports=reports, image_size=64, salt="s")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("site")
    log = logging.getLogger()
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(str(vars(record)) + record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        settings = settings_of(folder)
        cohort = build_cohort(settings, folder / "cohort", workers=1)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    with open(folder / "cohort/quarantine.csv", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return Built(cohort=cohort, folder=folder, found=found, said="".join(heard), settings=settings)


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return list(DicomFolder(HOSPITAL).scan(Workers(1, items=0).map))


def test_every_file_ends_as_the_manifest_says(built: Built) -> None:
    fates: dict[str, list[dict[str, str]]] = {}
    for line in built.found:
        fates.setdefault(line["path"], []).append(line)
    for row in rows():
        state, code = FATES[row["expect"], row["reason"]]
        lines = fates.pop(row["file"], [])
        assert {line["state"] for line in lines} <= {state}, row["file"]
        assert {line["code"] for line in lines} - REMARKS == ({code} if code else set()) - REMARKS, row[
            "file"
        ]
        assert code is None or code in {line["code"] for line in lines}, row["file"]
    assert {path: lines[0]["code"] for path, lines in fates.items()} == dict.fromkeys(
        ("README.md", "canaries.json", "manifest.csv"), Code.E_NOT_DICOM
    )


def test_the_states_add_up_to_the_files_and_the_rows_of_the_tables(built: Built) -> None:
    expected = Counter(FATES[row["expect"], row["reason"]][0] for row in rows())
    expected[State.IGNORED] += 3  # the hospital's own description, which the manifest leaves out
    expected[State.REPORT] += 11 + 10  # rows of the two tables
    assert built.cohort.counts == {state: expected[state] for state in State}
    assert built.cohort.unpaired_reports == 1 + 4  # the orphan, and those of faults without a usable header


def test_every_form_of_report_gives_the_text_it_was_made_from(built: Built) -> None:
    source = notes()
    used = sorted((row for row in rows() if row["expect"].startswith("use")), key=lambda row: row["file"])
    for row, text in zip(used, built.cohort.texts, strict=True):
        note = source[row["row_image"]]
        end = "" if row["report_source"] == "hl7" else "."  # the message has the finding as a word
        expected = f"{note['finding']}{end} {note['text']}" if row["report_source"] else row["file"]
        assert text == expected, row["file"]
    assert Counter(row["report_source"] for row in used) == {
        "sr": 10,
        "csv": 10,
        "hl7": 10,
        "fhir": 10,
        "": 4,
    }


def test_structured_reports_are_found_among_the_images(entries: list[Entry]) -> None:
    told = {entry.name: entry.outcome for entry in entries if isinstance(entry.outcome, Report)}
    assert sorted(told) == sorted(row["file"] for row in rows() if row["reason"] == "DICOM SR")
    studies = {row["file"]: row["study"] for row in rows()}
    assert all(report.study_uid == studies[name] for name, report in told.items())


def test_no_canary_is_told_anywhere_but_in_the_cohorts_folder(built: Built, entries: list[Entry]) -> None:
    reports = [entry for source in built.settings.report_settings.sources() for entry in source.read()]
    shown = built.said + repr(
        [built.cohort, built.settings, built.settings.reports, entries, reports]
        + [entry.outcome for entry in entries]
        + [entry.outcome for entry in reports]
    )
    assert not [canary for canary in canaries() if canary in shown.encode()]
    assert not any(note["text"] in shown for note in notes().values())
    outside = [path for path in built.folder.rglob("*") if path.is_file() and path.parent == built.folder]
    assert {path.name for path in outside} == {"faults.csv", ".cohort.lock"}


def test_no_canary_is_packed(built: Built) -> None:
    files = (path for path in (built.folder / "cohort").iterdir() if path.name != SCAN)  # that is headers
    stored = b"".join(path.read_bytes() for path in files)
    assert not [canary for canary in canaries() if canary in stored]


def test_a_hospital_without_any_pair_quotes_no_patient(tmp_path: Path) -> None:
    """The one exception that sums up a whole export holds names of reasons and of its own folder only."""
    (tmp_path / "reports.csv").write_text("accession,report\nA99,Nothing.\n")
    settings = CohortSettings(
        dicom=HOSPITAL / "faults", reports=tmp_path / "reports.csv", image_size=64, salt="s"
    )
    with pytest.raises(EmptyCohortError) as refused:
        build_cohort(settings, tmp_path / "cohort", workers=1)
    told = "".join(traceback.format_exception(refused.value)).encode()
    assert not [canary for canary in canaries() if canary in told]


def test_candidates_and_reports_of_a_study_carry_the_same_keys(entries: list[Entry]) -> None:
    """What pairs them is in the files themselves, not in the order of names."""
    images = {e.outcome.study: e.outcome for e in entries if isinstance(e.outcome, Candidate)}
    for entry in entries:
        if isinstance(entry.outcome, Report):
            assert images[entry.outcome.study_uid].keys["accession_number"] == entry.outcome.accession
            assert images[entry.outcome.study_uid].patient == entry.outcome.patient
