"""One damaged file on its way through a build, and everything that must hold whatever the damage is.

The build swallows what a damaged file raises, and leaves that file out. So it is not enough that nothing is
raised: what comes out has to be usable by the next step, and an intact neighbour must not be lost as well.
"""

import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pydicom.datadict import dictionary_has_tag
from pydicom.uid import UID_dictionary

from client.cohort import facts
from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.display import Window
from client.cohort.errors import CohortError
from client.cohort.image_table import ImageTable
from client.cohort.merges import PatientMerges
from client.cohort.on_disk import CandidatesOnDisk, Finding, FindingsOnDisk, SetOnDisk
from client.cohort.outcomes import Rejected, Rendered, State
from client.cohort.pairing import Pairing
from client.cohort.sources import Candidate, Entry
from client.cohort.tables import read_table
from client.cohort.workers import Workers
from client.reports.fhir import FhirReports
from client.reports.hl7 import Hl7Reports
from client.reports.index import ReportIndex
from client.reports.report import Report, ReportEntry
from client.reports.table import ReportTable
from client.text.labels import Findings, default_findings
from tests.client.cohort.mutations import damaged
from tests.memory import anonymous_bytes, peak_of_this_process

SIZE = 32
DETAILS = {"", "MSH", "not one of the standard", *(name for name, *_ in UID_dictionary.values())}
MOST_PAIRED = 20  # of one file: each report of the same study is looked at for each image
WINDOWS = (Window(-600, 1500), Window(40, 400))
INTACT = "intact"  # accession number of the neighbour behind the damage, where a file holds several
NEIGHBOURS = {
    ".hl7": b"\rMSH|^~\\&|||||||ORU^R01|1|P|2.5\rOBR|1||intact\rOBX|1|TX|||Clear lungs.||||||F\r",
    ".ndjson": b'\n{"resourceType": "DiagnosticReport", "status": "final", "conclusion": "Clear lungs.", '
    b'"identifier": [{"type": {"coding": [{"code": "ACSN"}]}, "value": "intact"}]}\n',
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A damaged file: ``damaged(kind, seed.read_bytes(), number=number)`` gives it again.

    Attributes:
        kind: Of the file, and so of its reader; a key of ``MUTATIONS``.
        seed: The file that is damaged.
        number: What decides on the damage.
    """

    kind: str
    seed: Path
    number: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a case.

    Attributes:
        case: The case.
        mutations: What was done to the file.
        codes: Where its inputs have ended.
        complaint: What should not have happened, empty if nothing.
        seconds: Wall time.
        process: Which process has read it.
        held_bytes: The process's anonymous memory after it.
        peak_bytes: The most memory the process has ever had, without what is mapped from files.
        descriptors: Files it has open after it.
    """

    case: Case
    mutations: tuple[str, ...]
    codes: tuple[str, ...]
    complaint: str
    seconds: float
    process: int
    held_bytes: int
    peak_bytes: int
    descriptors: int


def examine(case: Case) -> Verdict:
    """Damage the file and read it as a build does."""
    data, mutations = damaged(case.kind, case.seed.read_bytes(), number=case.number)
    codes, complaint = [], ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input{case.seed.suffix}"
        path.write_bytes(data + NEIGHBOURS.get(path.suffix, b""))
        began = time.perf_counter()
        try:
            for outcome in _outcomes(case.kind, path):
                codes.append(_code(outcome))
            seconds = time.perf_counter() - began
        except Exception:
            seconds, complaint = time.perf_counter() - began, traceback.format_exc()
    return Verdict(
        case=case,
        mutations=mutations,
        codes=tuple(codes),
        complaint=complaint,
        seconds=seconds,
        process=os.getpid(),
        held_bytes=anonymous_bytes(),
        peak_bytes=peak_of_this_process(),
        descriptors=len(os.listdir("/proc/self/fd")),
    )


def examine_again(cases: Sequence[Case]) -> list[Verdict]:
    """Examine all cases three times over in one process; return the last verdict of each time."""
    return [[examine(case) for case in cases][-1] for _ in range(3)]


def _code(outcome: "Candidate | Report | Rejected | Rendered | CohortError") -> str:
    if isinstance(outcome, Rejected):
        return outcome.code.value
    return type(outcome).__name__


def _outcomes(kind: str, path: Path) -> "Iterator[Candidate | Report | Rejected | Rendered | CohortError]":
    if kind in ("dicom", "sr"):
        for with_ct in (False, True):
            header = read_header(path, with_ct=with_ct)
            yield from _usable([Entry(path.name, header)])
        windows = WINDOWS if path.stat().st_size % 2 else ()
        image = DicomFolder.render(path, SIZE, windows)
        if isinstance(image, Rendered):
            shape = (SIZE, SIZE, 3) if windows else (SIZE, SIZE)
            need(image.pixels.shape == shape and image.pixels.dtype == np.uint8, "not the packed form")
            need(image.pixels.min() != image.pixels.max(), "a blank image")
        else:
            _hold_to_rules(image)
        yield image
        return
    try:
        if kind == "images":
            (path.parent / "0.png").touch()
            table = ImageTable(path)
            need(len(list(table.stamps())) > 1, "an image without a stamp")
            entries: Sequence[Entry | ReportEntry] = list(table.scan(Workers(1, items=0).map))
            need(len(entries) == len(table), "a row without an outcome")
        elif kind in ("csv", "parquet"):
            entries = list(ReportTable(path).read())
            if kind == "csv":
                PatientMerges.read(path)
                Pairing(reports=ReportIndex(), labels=read_table(path))
        else:
            entries = list((Hl7Reports if kind == "hl7" else FhirReports)(path).read())
            found = [each.outcome for each in entries if isinstance(each.outcome, Report)]
            alone = path.suffix not in NEIGHBOURS
            need(alone or any(each.accession == INTACT for each in found), "an intact neighbour is lost")
    except CohortError as error:  # the documented end of a table that is none
        need(kind in ("images", "csv", "parquet"), "one file stops the whole build")
        need(str(path) in str(error), "an error that does not name the file")
        yield error
        return
    need(bool(entries), "an input without an outcome")
    yield from _usable(entries)


def _usable(entries: Iterable[Entry | ReportEntry]) -> Iterator[Candidate | Report | Rejected]:
    """Do with outcomes what the build does with them, and yield them."""
    images, rejected = list[tuple[str, str]](), list[Finding]()
    with ReportIndex() as reports, CandidatesOnDisk() as candidates, FindingsOnDisk() as said:
        for entry in entries:
            outcome = entry.outcome
            place = outcome.path if isinstance(outcome, Candidate) else Path()
            known = facts.encode(outcome)  # as text, where NaN equals NaN
            need(facts.encode(facts.decode(known, place)) == known, "kept otherwise than found")
            if isinstance(outcome, Rejected):
                _hold_to_rules(outcome)
                rejected.append((entry.name, outcome.state, outcome.code, outcome.detail))
                said.add(rejected[-1])
            elif isinstance(outcome, Report):
                reports.add(outcome)
            else:
                with SetOnDisk() as seen:
                    need(seen.add(outcome.uid) and not seen.add(outcome.uid), "a UID that is not found again")
                candidates.append(entry.name, outcome)
                candidates.sides(outcome.patient)
                images.append((entry.name, known))
            yield outcome
            if isinstance(outcome, Report | Candidate) and len(images) + len(reports) < MOST_PAIRED:
                paired = Pairing(reports=reports, labels=None, findings=_findings()).complete(_image(outcome))
                need(
                    isinstance(paired, Rejected) or bool((paired.text or "").encode()), "paired with nothing"
                )
        need(
            [(name, facts.encode(each)) for name, each in candidates] == images, "stored otherwise than found"
        )
        need(sorted(said) == sorted(rejected), "listed otherwise than rejected")


def _image(outcome: Report | Candidate) -> Candidate:
    """Return an image to which the report belongs, or the image itself."""
    if isinstance(outcome, Candidate):
        return outcome
    keys = {"accession_number": outcome.accession, "issuer": outcome.issuer, "study_id": outcome.study_id}
    keys["study_instance_uid"] = outcome.study_uid
    header = {"PatientName": "Doe^Jane", "StudyDate": "20240102", "PatientID": outcome.patient}
    return Candidate(
        path=Path(), patient=outcome.patient or "p", study="s", keys=keys, uid="1", header=header
    )


def _hold_to_rules(outcome: Rejected) -> None:
    need(outcome.state not in (State.USED, State.REPORT), "rejected and used")
    known = re.sub(r": pip install .*$", "", outcome.detail)
    need(known in DETAILS or dictionary_has_tag(known), "a detail that quotes the file")


@cache
def _findings() -> Findings:
    return default_findings()


class Complaint(Exception):
    """Something that must hold does not."""


def need(holds: bool, complaint: str) -> None:
    """Complain unless it holds."""
    if not holds:
        raise Complaint(complaint)
