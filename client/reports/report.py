"""One report, and what every kind of source of reports offers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from client.cohort.outcomes import Code, RefusedError, Rejected, State

# A whole patient history in one report stays below this; a text above it is something else.
MAX_TEXT_CHARACTERS = 16 * 2**20

_MOMENT = re.compile(
    r"(?P<year>\d{4})([-/.]?)(?P<month>\d\d)\2(?P<day>\d\d)"
    r"(?:[T ]?(?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d))?)?)?"
)
_DAY_FIRST = re.compile(r"(?P<day>\d\d)\.(?P<month>\d\d)\.(?P<year>\d{4})")


class Status(StrEnum):
    """How far a report can be relied on, in the words of no one standard.

    ``CORRECTED`` is a whole report that replaces an earlier one; ``ADDENDUM`` is a text to append to one.
    """

    FINAL = "final"
    PRELIMINARY = "preliminary"
    CORRECTED = "corrected"
    ADDENDUM = "addendum"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """The report of one study in one version.

    Attributes:
        source: Kind of source, such as ``hl7``.
        accession: Accession number.
        issuer: Who gave the accession number, by name or OID; may be empty.
        study_uid: StudyInstanceUID.
        study_id: StudyID, which pairs only together with the patient.
        patient: The patient's id as images have it; may be empty.
        text: The whole text, line ends kept, headings before their sections; empty if withdrawn.
        status: Which of several versions counts.
        when: Moment of this version as the digits YYYYMMDDhhmmss, which sort as text; may be empty.
        language: Tag such as ``de``, where the source tells it.
        labels: Finding to value, where the source brings them along.
        remarks: Noted while reading.
    """

    source: str
    accession: str = ""
    issuer: str = ""
    study_uid: str = ""
    study_id: str = ""
    patient: str = ""
    text: str
    status: Status = Status.FINAL
    when: str = ""
    language: str = ""
    labels: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[Code, ...] = ()

    def __repr__(self) -> str:
        return f"Report(source={self.source!r}, status={self.status.value!r})"


@dataclass(frozen=True, repr=False)
class ReportEntry:
    """One input by its name, and the report it holds or why it holds none."""

    name: str
    outcome: Report | Rejected


class ReportSource(Protocol):
    """Where a site's reports come from."""

    def files(self) -> Iterable[Path]:
        """Yield the files that are read, so that nobody else reads them as something else.

        Raises:
            SourceMissingError: The file or folder is absent.
        """
        ...

    def stamps(self) -> Iterable[str]:
        """Yield name, size and modification time of every file the reports depend on."""
        ...

    def read(self) -> Iterable[ReportEntry]:
        """Yield one entry per input in a fixed order, holding a few of them in memory at a time.

        Nothing an input holds makes this raise. A source that is absent as a whole, or a table without the
        columns that are needed, does.

        Raises:
            CohortError: The message names the file and the remedy.
        """
        ...


def checked(report: Report) -> Report:
    """Return ``report`` if an image could be paired with it and learn from it.

    Half a character, as JSON may spell one, becomes a question mark: nothing could store it.

    Raises:
        RefusedError: It has no key, no text or too much of it.
    """
    if not (report.accession or report.study_uid or (report.study_id and report.patient)):
        raise RefusedError(State.QUARANTINED, Code.E_NO_KEY)
    if len(report.text) > MAX_TEXT_CHARACTERS:
        raise RefusedError(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)
    if not report.text.strip() and report.status is not Status.WITHDRAWN:
        raise RefusedError(State.UNPAIRED, Code.E_REPORT_EMPTY)
    strings: dict[str, Any] = {name: value for name, value in vars(report).items() if type(value) is str}
    whole: dict[str, Any] = {name: value.encode(errors="replace").decode() for name, value in strings.items()}
    return report if whole == strings else replace(report, **whole)


def moment(text: str) -> str:
    """Return a date and time as digits that sort, empty where it cannot be told.

    Reads ISO 8601, DICOM and HL7 spellings, and 31.12.2024. A time zone is left out: versions of one report
    come from one place. 12/31/2024 is not read, since 11/12/2024 has two meanings.
    """
    found = _MOMENT.match(text.strip()) or _DAY_FIRST.match(text.strip())
    if found is None:
        return ""
    parts = found.groupdict()
    clock = (parts.get(name) or "00" for name in ("hour", "minute", "second"))
    return "".join((parts["year"], parts["month"], parts["day"], *clock))
