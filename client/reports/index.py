"""Every report of a site, found by the keys of an image, and which version of it counts."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.reports.headings import ADDENDUM
from client.reports.report import Report, Status

_COLUMNS = (
    *("source", "accession", "issuer", "study_uid", "study_id", "patient", "text"),
    *("status", "when", "language", "labels", "remarks"),
)
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE reports (number INTEGER PRIMARY KEY, digest BLOB UNIQUE, {_NAMES});
CREATE INDEX by_accession ON reports (accession) WHERE accession != '';
CREATE INDEX by_study_uid ON reports (study_uid) WHERE study_uid != '';
CREATE INDEX by_study_id ON reports (study_id, patient) WHERE study_id != '';
"""
_FIND = f"""
SELECT number, {_NAMES} FROM reports WHERE accession != '' AND accession = :accession
UNION SELECT number, {_NAMES} FROM reports WHERE study_uid != '' AND study_uid = :study_uid
UNION SELECT number, {_NAMES} FROM reports
    WHERE study_id != '' AND study_id = :study_id AND patient != '' AND patient = :patient
ORDER BY number
"""  # noqa: S608 - the names are the constants above
_INSERT = f"INSERT OR IGNORE INTO reports (digest, {_NAMES}) VALUES (?{', ?' * len(_COLUMNS)})"  # noqa: S608

# Two reports with equal keys, time and text are one that was sent or exported twice.
_SAME = ("accession", "issuer", "study_uid", "study_id", "patient", "text", "status", "when")


class ReportIndex:
    """The reports of any number of sources, on disk rather than in memory.

    SQLite keeps them in a file without a name, which only this process can open and which is gone with it,
    even if it is killed.

    A report belongs to an image by accession number (of the same issuer, where both name one) and by study
    UID, or by patient and StudyID together. Patient and date never pair.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # https://sqlite.org/inmemorydb.html, temporary databases
        self._database.executescript(_SCHEMA)
        self._asked: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of reports, duplicates not counted."""
        count: int = self._database.execute("SELECT count(*) FROM reports").fetchone()[0]
        return count

    @property
    def unpaired(self) -> int:
        """How many reports, in whatever version, no image has asked for."""
        return len(self) - len(self._asked)

    def close(self) -> None:
        """Forget every report."""
        self._database.close()

    def add(self, report: Report) -> Rejected | None:
        """Take a report in; among versions without a time, later ones count as later.

        Returns:
            None, or the rejection of a report that is here already.
        """
        same = json.dumps([getattr(report, name) for name in _SAME])
        row = (
            hashlib.sha256(same.encode()).digest(),
            *(getattr(report, name) for name in _COLUMNS[:-2]),
            json.dumps(dict(report.labels)),
            json.dumps(report.remarks),
        )
        if self._database.execute(_INSERT, row).rowcount == 0:
            return Rejected(State.DUPLICATE, Code.E_DUPLICATE_REPORT)
        return None

    def find(self, keys: Mapping[str, str], *, patient: str) -> Report | None:
        """Return the report of the image with these keys, or None.

        The latest final or corrected version counts, a preliminary one for want of any other, and addenda
        that are not older follow its text. Reports that agree with every key of the image go before those
        that contradict one of them, so two studies under one accession number keep their own.

        Args:
            keys: ``accession_number``, ``issuer``, ``study_instance_uid`` and ``study_id``, as far as the
                image has them.
            patient: The image's patient id; may be empty.

        Raises:
            RefusedError: The keys name reports of different studies, the report names another patient, it
                was withdrawn, or only its addendum is there.
        """
        wanted = {
            "accession": keys.get("accession_number", ""),
            "study_uid": keys.get("study_instance_uid", ""),
            "study_id": keys.get("study_id", ""),
            "patient": patient,
        }
        issuer = keys.get("issuer", "")
        found = [
            (number, report)
            for number, report in map(_restored, self._database.execute(_FIND, wanted))
            if _reached(report, wanted, issuer)
        ]
        if not found:
            return None
        self._asked.update(number for number, _ in found)
        versions = [report for _, report in found]
        agreeing = [report for report in versions if _agrees(report, wanted, issuer)]
        if not agreeing and len({_study(report) for report in versions}) > 1:
            raise RefusedError(State.QUARANTINED, Code.E_REPORT_CONFLICT)
        report = valid_version(agreeing or versions)
        if patient and report.patient not in ("", patient):
            raise RefusedError(State.QUARANTINED, Code.E_PATIENT_MISMATCH)
        return report


def valid_version(versions: Sequence[Report]) -> Report:
    """Return what counts among the versions of one report, in the order in which they were read.

    Its remarks are those on the choice; what was noted while reading was told of the input itself.

    Times decide if every version has one, else the order does, and a correction follows what it corrects.

    Raises:
        RefusedError: It was withdrawn, there are addenda only, or two parts name different patients.
    """
    dated = all(report.when for report in versions)
    order = {id(report): (report.when if dated else "", _RANK[report.status]) for report in versions}
    ordered = sorted(versions, key=lambda report: order[id(report)])  # stable: what was read later is later
    issued = [report for report in ordered if report.status in _ISSUED]
    whole = issued or [report for report in ordered if report.status is Status.PRELIMINARY]
    if not whole:
        raise RefusedError(State.UNPAIRED, Code.E_ADDENDUM_ONLY)
    last = whole[-1]
    if last.status is Status.WITHDRAWN:
        raise RefusedError(State.UNPAIRED, Code.E_REPORT_WITHDRAWN)
    addenda = [
        report
        for report in ordered
        if report.status is Status.ADDENDUM and not (dated and report.when < last.when)
    ]
    patients = {report.patient for report in (last, *addenda) if report.patient}
    if len(patients) > 1:
        raise RefusedError(State.QUARANTINED, Code.E_PATIENT_MISMATCH)
    texts = dict.fromkeys(report.text.strip() for report in addenda)
    return replace(
        last,
        text="\n\n".join([last.text, *(f"{ADDENDUM}:\n{text}" for text in texts)]),
        patient=next(iter(patients), ""),
        remarks=() if issued else (Code.W_PRELIMINARY,),
    )


_ISSUED = (Status.FINAL, Status.CORRECTED, Status.WITHDRAWN)
_RANK = {status: rank for rank, status in enumerate((Status.PRELIMINARY, *_ISSUED, Status.ADDENDUM))}


def _restored(row: tuple[Any, ...]) -> tuple[int, Report]:
    number, *values = row
    fields = dict(zip(_COLUMNS, values, strict=True))
    fields["status"] = Status(fields["status"])
    fields["labels"] = json.loads(fields["labels"])
    fields["remarks"] = tuple(Code[remark] for remark in json.loads(fields["remarks"]))
    return number, Report(**fields)


def _reached(report: Report, wanted: Mapping[str, str], issuer: str) -> bool:
    """Return whether a key leads to ``report`` after all: an accession number of another issuer does not."""
    by_accession = report.accession == wanted["accession"] != "" and not _contradict(report.issuer, issuer)
    by_patient = report.patient == wanted["patient"] != "" and report.study_id == wanted["study_id"] != ""
    return by_accession or by_patient or report.study_uid == wanted["study_uid"] != ""


def _agrees(report: Report, wanted: Mapping[str, str], issuer: str) -> bool:
    if report.accession and _contradict(report.issuer, issuer):
        return False
    return all(
        not wanted[name] or getattr(report, name) in ("", wanted[name]) for name in ("accession", "study_uid")
    )


def _contradict(issuer: str, other: str) -> bool:
    """Return whether two issuers differ; a name and an OID may mean the same one (PS3.3 10.14)."""
    return bool(issuer and other) and issuer != other and _is_oid(issuer) == _is_oid(other)


def _is_oid(text: str) -> bool:
    return text.replace(".", "").isdigit()


def _study(report: Report) -> tuple[str, ...]:
    return (report.accession, report.issuer, report.study_uid, report.study_id)
