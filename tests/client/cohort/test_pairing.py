"""Which report belongs to which image, and when that is not sure enough."""

from pathlib import Path

import numpy as np
import pytest

from client.cohort.errors import ColumnMissingError
from client.cohort.outcomes import Code, Rejected, State
from client.cohort.pairing import Pairing
from client.cohort.sources import Candidate
from client.cohort.tables import Table, read_table


def image(
    accession: str = "A1", study: str = "1.2", patient: str = "p1", text: str | None = None
) -> Candidate:
    keys = {"accession_number": accession, "study_instance_uid": study}
    return Candidate(path=Path("x"), patient=patient, study=study, keys=keys, uid="1.2.3", text=text)


def table(folder: Path, content: str, name: str = "t.csv") -> Table:
    (folder / name).write_text(content)
    return read_table(folder / name)


def test_accession_number_pairs(tmp_path: Path) -> None:
    pairing = Pairing(
        reports=table(tmp_path, "accession,report,edema\nA1,IMPRESSION: Edema.,1\n"), labels=None
    )
    completed = pairing.complete(image())
    assert isinstance(completed, Candidate)
    assert (completed.text, completed.labels, completed.patient) == ("Edema.", {"edema": 1.0}, "p1")
    assert pairing.unpaired_reports == 0


def test_study_uid_pairs_where_there_is_no_accession_number(tmp_path: Path) -> None:
    pairing = Pairing(reports=table(tmp_path, "study_instance_uid,report\n1.2,Edema.\n"), labels=None)
    assert isinstance(pairing.complete(image(accession="")), Candidate)


@pytest.mark.parametrize(
    ("row", "candidate", "expected"),
    [
        ("A2,1.3,p1,Edema.", image(), Rejected(State.UNPAIRED, Code.E_NO_REPORT)),
        (",,p1,Edema.", image(accession=""), Rejected(State.UNPAIRED, Code.E_NO_REPORT)),
        ("A1,1.2,p1,", image(), Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)),
        ("A1,1.2,p1,INDICATION: cough", image(), Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)),
        ("A1,1.2,p2,Edema.", image(), Rejected(State.QUARANTINED, Code.E_PATIENT_MISMATCH)),
        ("A1,1.2,,Edema.", image(patient=""), Rejected(State.QUARANTINED, Code.E_NO_PATIENT)),
        ("A1,1.3,p1,x\nA2,1.2,p1,y", image(), Rejected(State.QUARANTINED, Code.E_REPORT_CONFLICT)),
    ],
)
def test_doubtful_pairs_are_left_out(
    tmp_path: Path, row: str, candidate: Candidate, expected: Rejected
) -> None:
    reports = table(tmp_path, f"accession_number,study_instance_uid,patient_id,report\n{row}\n")
    assert Pairing(reports=reports, labels=None).complete(candidate) == expected


def test_the_report_names_the_patient_where_the_image_does_not(tmp_path: Path) -> None:
    reports = table(tmp_path, "accession_number,patient_id,report\nA1,p7,Edema.\n")
    completed = Pairing(reports=reports, labels=None).complete(image(patient=""))
    assert isinstance(completed, Candidate)
    assert completed.patient == "p7"


def test_unpaired_reports_are_counted(tmp_path: Path) -> None:
    pairing = Pairing(reports=table(tmp_path, "accession,report\nA1,x\nA2,y\nA3,z\n"), labels=None)
    pairing.complete(image())
    pairing.complete(image(study="1.9"))
    assert pairing.unpaired_reports == 2


def test_labels_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    reports = table(tmp_path, "accession,report,edema,mass\nA1,x,1,0\nA2,y,0,0\n")
    labels = table(tmp_path, "study_instance_uid,edema,nodule\n1.2,-1,1\n", "labels.csv")
    pairing = Pairing(reports=reports, labels=labels)
    completed, other = pairing.complete(image()), pairing.complete(image(accession="A2", study="1.9"))
    assert isinstance(completed, Candidate)
    assert isinstance(other, Candidate)
    assert set(completed.labels) == {"edema", "mass", "nodule"}
    assert np.isnan(completed.labels["edema"])
    assert other.labels == {"edema": 0, "mass": 0}


def test_a_text_that_came_with_the_image_is_kept(tmp_path: Path) -> None:
    completed = Pairing(reports=None, labels=None).complete(image(text="FINDINGS: own."))
    assert isinstance(completed, Candidate)
    assert completed.text == "own."


def test_reports_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ColumnMissingError, match=r"no column 'report' \(did you mean 'reprot'\?\)"):
        Pairing(reports=table(tmp_path, "accession,reprot\nA1,x\n"), labels=None)
