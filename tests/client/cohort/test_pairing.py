"""Which report and labels belong to an image, and when that is not sure enough."""

from pathlib import Path

import numpy as np
import pytest

from client.cohort.outcomes import Code, Rejected, State
from client.cohort.pairing import Pairing
from client.cohort.sources import Candidate
from client.cohort.tables import Table, read_table
from client.reports.index import ReportIndex
from client.reports.report import Report, Status


def image(
    accession: str = "A1", study: str = "1.2", patient: str = "p1", text: str | None = None
) -> Candidate:
    keys = {"accession_number": accession, "study_instance_uid": study}
    return Candidate(path=Path("x"), patient=patient, study=study, keys=keys, uid="1.2.3", text=text)


def table(folder: Path, content: str) -> Table:
    (folder / "t.csv").write_text(content)
    return read_table(folder / "t.csv")


def report(text: str = "IMPRESSION: Edema.", **fields: object) -> Report:
    return Report(**{"source": "test", "accession": "A1", "text": text} | fields)  # type: ignore[arg-type]


def completed(image: Candidate, *reports: Report, labels: Table | None = None) -> Candidate | Rejected:
    with ReportIndex() as index:
        for each in reports:
            assert index.add(each) is None
        return Pairing(reports=index, labels=labels).complete(image)


def test_the_image_gets_the_reports_training_text_labels_and_remarks() -> None:
    found = completed(image(), report(labels={"edema": 1.0}, status=Status.PRELIMINARY))
    assert isinstance(found, Candidate)
    assert (found.text, found.labels, found.patient) == ("Edema.", {"edema": 1.0}, "p1")
    assert found.remarks == (Code.W_PRELIMINARY,)


@pytest.mark.parametrize(
    ("candidate", "told", "expected"),
    [
        (image(), {"accession": "A2"}, Rejected(State.UNPAIRED, Code.E_NO_REPORT)),
        (image(), {"text": "INDICATION: cough"}, Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)),
        (image(), {"patient": "p2"}, Rejected(State.QUARANTINED, Code.E_PATIENT_MISMATCH)),
        (image(patient=""), {}, Rejected(State.QUARANTINED, Code.E_NO_PATIENT)),
        (image(), {"status": Status.WITHDRAWN}, Rejected(State.UNPAIRED, Code.E_REPORT_WITHDRAWN)),
    ],
)
def test_doubtful_pairs_are_left_out(
    candidate: Candidate, told: dict[str, object], expected: Rejected
) -> None:
    assert completed(candidate, report(**told)) == expected  # type: ignore[arg-type]


def test_the_report_names_the_patient_where_the_image_does_not() -> None:
    found = completed(image(patient=""), report(patient="p7"))
    assert isinstance(found, Candidate)
    assert found.patient == "p7"


def test_labels_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    labels = table(tmp_path, "study_instance_uid,edema,nodule\n1.2,-1,1\n")
    told = report(labels={"edema": 1.0, "mass": 0.0})
    found, other = (completed(image(study=study), told, labels=labels) for study in ("1.2", "1.9"))
    assert isinstance(found, Candidate)
    assert isinstance(other, Candidate)
    assert set(found.labels) == {"edema", "mass", "nodule"}
    assert np.isnan(found.labels["edema"])
    assert other.labels == {"edema": 1, "mass": 0}


@pytest.mark.parametrize(
    ("rows", "code"),
    [("A1,1.2,p2,1", Code.E_PATIENT_MISMATCH), ("A1,1.3,p1,1\nA2,1.2,p1,0", Code.E_REPORT_CONFLICT)],
)
def test_labels_of_another_patient_or_of_two_studies_are_refused(
    rows: str, code: Code, tmp_path: Path
) -> None:
    labels = table(tmp_path, f"accession_number,study_instance_uid,patient_id,edema\n{rows}\n")
    assert completed(image(), report(), labels=labels) == Rejected(State.QUARANTINED, code)


def test_a_text_that_came_with_the_image_is_kept() -> None:
    found = completed(image(text="FINDINGS: own."), report())
    assert isinstance(found, Candidate)
    assert found.text == "own."
