"""DICOM structured reports: the tree of content items, written out as text with headings.

Source: PS3.3 A.35 (the SR objects), C.17.2 (completion and verification), C.17.3 (content tree); PS3.16
TID 2000 (Basic Diagnostic Imaging Report) and TID 1500 (Measurement Report).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExtensibleSRStorage,
)

from client.cohort.archives import size_of
from client.cohort.dicom_file import quietly, read_dataset
from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.reports.files import NOT_REPORT, TOO_LARGE, UNREADABLE, ReportFiles
from client.reports.headings import FINDINGS, HEADINGS, IMPRESSION
from client.reports.report import MAX_TEXT_CHARACTERS, Report, Status, checked, moment

# Key objects, dose reports, procedure logs and CAD results are SR too, and no radiologist's sentences.
REPORT_CLASSES = frozenset(
    {
        BasicTextSRStorage,
        EnhancedSRStorage,
        ComprehensiveSRStorage,
        Comprehensive3DSRStorage,
        ExtensibleSRStorage,
    }
)
MAX_DEPTH, MAX_ITEMS = 32, 20_000  # reports have three or four levels; lung CAD has thousands of items
MAX_FILE_BYTES = 64 * 2**20

_KEYWORDS = (
    *("SOPClassUID", "SpecificCharacterSet", "AccessionNumber", "IssuerOfAccessionNumberSequence"),
    *("StudyInstanceUID", "StudyID", "PatientID", "ContentDate", "ContentTime", "ReferencedRequestSequence"),
    *("CompletionFlag", "VerificationFlag", "PreliminaryFlag", "ContentSequence"),
)
# Who observed what on whom, and what qualifies a concept's name, are no sentences of the report.
_BESIDE = frozenset({"HAS OBS CONTEXT", "HAS ACQ CONTEXT", "HAS CONCEPT MOD", "HAS PROPERTIES"})
_LANGUAGE = "121049"  # DCM: Language of Content Item and Descendants


class SrReports(ReportFiles):
    """Structured reports in a folder of their own; those among images are found with the images."""

    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        yield read_report(path)


def read_report(path: Path) -> Report | Rejected:
    """Read one structured report; nothing a file holds makes this raise."""
    remarks: list[Code] = []
    try:
        if size_of(path) > MAX_FILE_BYTES:
            return TOO_LARGE
        with quietly(remarks):
            dataset, noted = read_dataset(path, keywords=_KEYWORDS, pixels=False)
            if dataset.get("SOPClassUID") not in REPORT_CLASSES:
                return NOT_REPORT
            report = _report(dataset)
        return checked(replace(report, remarks=(*noted, *remarks)))
    except RefusedError as refusal:
        return refusal.rejected
    except EOFError:
        return Rejected(State.QUARANTINED, Code.E_TRUNCATED)
    except Exception:  # pydicom raises any type on a damaged file
        return UNREADABLE


def _report(dataset: Dataset) -> Report:
    if _string(dataset, "CompletionFlag") != "COMPLETE":
        raise RefusedError(State.QUARANTINED, Code.E_REPORT_PARTIAL)
    preliminary, verified = (_string(dataset, name) for name in ("PreliminaryFlag", "VerificationFlag"))
    is_final = preliminary == "FINAL" or (verified == "VERIFIED" and preliminary != "PRELIMINARY")
    accession = _string(dataset, "AccessionNumber") or next(
        (
            text
            for item in dataset.get("ReferencedRequestSequence") or ()
            if (text := _string(item, "AccessionNumber"))
        ),
        "",
    )
    return Report(
        source="sr",
        accession=accession,
        issuer=issuer_of(dataset),
        study_uid=_string(dataset, "StudyInstanceUID"),
        patient=_string(dataset, "PatientID"),
        text=_text(dataset),
        status=Status.FINAL if is_final else Status.PRELIMINARY,
        when=moment(_string(dataset, "ContentDate") + _string(dataset, "ContentTime")),
        language=_language(dataset),
    )


def issuer_of(dataset: Dataset) -> str:
    """Return who issued the accession number: its OID, or else its local name (PS3.3 10.14)."""
    for issuer in dataset.get("IssuerOfAccessionNumberSequence") or ():
        return _string(issuer, "UniversalEntityID") or _string(issuer, "LocalNamespaceEntityID")
    return ""


def _text(dataset: Dataset) -> str:
    """Return the sentences in reading order, a heading before those of one section.

    Raises:
        RefusedError: There are measurements only, or the tree is too deep or too large.
    """
    parts: list[tuple[str, str]] = []
    measured, size = False, 0
    for section, item in _walk(dataset):
        kind = _string(item, "ValueType")
        measured = measured or kind == "NUM"
        text = _string(item, "TextValue") if kind == "TEXT" else ""
        if kind == "CODE" and HEADINGS.get(_code(item, "ConceptNameCodeSequence")) in (FINDINGS, IMPRESSION):
            text = _code(item, "ConceptCodeSequence", "CodeMeaning")
        if text:
            parts.append((section, text))
            size += len(text)
        if size > MAX_TEXT_CHARACTERS:
            raise RefusedError(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)
    if measured and not parts:
        raise RefusedError(State.UNSUPPORTED, Code.E_MEASUREMENTS)
    return "\n\n".join(
        (f"{section}:\n" if section else "") + "\n".join(text for _, text in group)
        for section, group in groupby(parts, key=lambda part: part[0])
    )


def _walk(dataset: Dataset) -> Iterator[tuple[str, Dataset]]:
    """Yield every content item depth first with the heading it stands under.

    Raises:
        RefusedError: There are too many, or they are nested too deep.
    """
    waiting = [("", 1, item) for item in reversed(dataset.get("ContentSequence") or ())]
    seen = 0
    while waiting:
        section, depth, item = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_ITEMS:
            raise RefusedError(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)
        if _string(item, "RelationshipType") in _BESIDE:
            continue
        known = HEADINGS.get(_code(item, "ConceptNameCodeSequence"))
        if known is None and _string(item, "ValueType") == "CONTAINER":
            known = _code(item, "ConceptNameCodeSequence", "CodeMeaning").upper()
        section = known or section
        yield section, item
        children = item.get("ContentSequence") or ()
        waiting.extend((section, depth + 1, child) for child in reversed(children))


def _language(dataset: Dataset) -> str:
    for item in dataset.get("ContentSequence") or ():
        if _code(item, "ConceptNameCodeSequence") == _LANGUAGE:
            return _code(item, "ConceptCodeSequence")
    return ""


def _code(item: Dataset, keyword: str, part: str = "CodeValue") -> str:
    return next((_string(code, part) for code in item.get(keyword) or ()), "")


def _string(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip()
