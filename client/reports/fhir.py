"""FHIR DiagnosticReport resources: single ones, in Bundles, or one to a line as bulk exports have them.

The few elements that a report needs are read from plain JSON. Libraries for FHIR check whole resources
against one release and refuse those of another; what is read here is spelled alike in STU3, R4 and R5, or
both spellings are read.

Source: https://hl7.org/fhir/diagnosticreport.html, https://hl7.org/fhir/imagingstudy.html.
"""

import base64
import json
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.reports.files import NOT_REPORT, TOO_LARGE, UNREADABLE, ReportFiles, decoded, outcome_of
from client.reports.headings import IMPRESSION
from client.reports.markup import plain_text
from client.reports.report import Report, Status, moment

MAX_JSON_BYTES = 64 * 2**20  # a Bundle is parsed as a whole; larger exports come one resource to a line

Resource = Mapping[str, Any]

# https://hl7.org/fhir/valueset-diagnostic-report-status.html; "appended" is a whole report with an addition.
_STATUS: Mapping[str, Status] = {
    "final": Status.FINAL,
    **dict.fromkeys(("amended", "corrected", "appended"), Status.CORRECTED),
    **dict.fromkeys(("registered", "partial", "preliminary", "modified"), Status.PRELIMINARY),
    **dict.fromkeys(("cancelled", "entered-in-error"), Status.WITHDRAWN),
}
_OID = "urn:oid:"
_BY_LINE = (".ndjson", ".jsonl")  # by these names even if the first line is damaged


class FhirReports(ReportFiles):
    """DiagnosticReports in JSON files or NDJSON files; each gives one report per imaging study it names.

    Patients, orders and imaging studies are looked up in the Bundle or among the contained resources. A
    patient is known by an identifier (a medical record number first), never by the server's own id, which
    images do not carry.
    """

    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        for document in _documents(path):
            if isinstance(document, Rejected):
                yield document
                continue
            found = False
            for resource, others in _reports_in(document):
                found = True
                studies = _related(resource, others, "imagingStudy", "study") or [{}]
                for study in studies:
                    yield outcome_of(partial(_report, resource, study, others))
            if not found:
                yield NOT_REPORT


def _documents(path: Path) -> Iterator[Any]:
    """Yield every JSON document of a file, or a rejection in its place."""
    with open(path, "rb") as file:
        first = file.readline(MAX_JSON_BYTES)
        second = file.readline(MAX_JSON_BYTES)
        while second and not second.strip():
            second = file.readline(MAX_JSON_BYTES)
        by_line = path.suffix.lower() in _BY_LINE or not isinstance(_parsed(first), Rejected)
        if second and by_line:
            for line in (first, second):
                yield _parsed(line)
            for line in iter(partial(file.readline, MAX_JSON_BYTES), b""):
                if line.strip():
                    yield _parsed(line)
        elif path.stat().st_size > MAX_JSON_BYTES:
            yield TOO_LARGE
        else:
            file.seek(0)
            if data := file.read():
                yield _parsed(data)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(decoded(data))
    except (ValueError, RecursionError):
        return UNREADABLE


def _reports_in(document: Any) -> Iterator[tuple[Resource, Mapping[str, Resource]]]:
    """Yield every DiagnosticReport, with the resources it may refer to by their names in references."""
    if isinstance(document, list):
        parts = [document]
        while parts:
            part = parts.pop()
            if isinstance(part, list):
                parts.extend(reversed(part))
            else:
                yield from _reports_in(part)
        return
    entries = _items(document, "entry") if _string(document, "resourceType") == "Bundle" else []
    resources = [(_string(entry, "fullUrl"), _item(entry, "resource")) for entry in entries]
    shared: dict[str, Resource] = {
        name: resource
        for url, resource in resources
        for name in (url, f"{_string(resource, 'resourceType')}/{_string(resource, 'id')}")
        if name
    }
    for resource in [resource for _, resource in resources] or [document]:
        if _string(resource, "resourceType") == "DiagnosticReport":
            contained = {f"#{_string(part, 'id')}": part for part in _items(resource, "contained")}
            yield resource, ChainMap(contained, shared)  # a copy each would be quadratic in the Bundle


def _report(resource: Resource, study: Resource, others: Mapping[str, Resource]) -> Report:
    word = _string(resource, "status").lower()
    status = _STATUS.get(word, Status.PRELIMINARY)
    accession, issuer = _accession(resource, study, others)
    patients = _related(resource, others, "subject", "patient")
    return Report(
        source="fhir",
        accession=accession,
        issuer=issuer,
        study_uid=_study_uid(study),
        patient=next((number for patient in patients if (number := _record_number(patient))), ""),
        text="" if status is Status.WITHDRAWN else _text(resource),
        status=status,
        when=moment(_string(resource, "issued")) or moment(_string(resource, "effectiveDateTime")),
        language=_string(resource, "language"),
        remarks=() if word in _STATUS else (Code.W_STATUS,),
    )


def _related(resource: Resource, others: Mapping[str, Resource], *elements: str) -> list[Resource]:
    """Return what the references in ``elements`` lead to.

    An identifier in the reference itself stands before those of the resource; of one that is not at hand
    nothing else is known. The reference stays beside it, since it may be the UID of a study.
    """
    found: list[Resource] = []
    for reference in (item for element in elements for item in _items(resource, element)):
        target = _string(reference, "reference")
        other = others.get(target) or others.get("/".join(target.split("/")[-2:]), {})
        identifiers = [*_items(reference, "identifier"), *_items(other, "identifier")]
        found.append({**other, "identifier": identifiers, "reference": target})
    return found


def _accession(resource: Resource, study: Resource, others: Mapping[str, Resource]) -> tuple[str, str]:
    """Return the accession number of study, report or order, and its issuer where that is an OID."""
    for owner in (study, resource, *_related(resource, others, "basedOn", "request")):
        for identifier in _items(owner, "identifier"):
            if _is_type(identifier, "ACSN") and (value := _string(identifier, "value")):
                system = _string(identifier, "system")
                return value, system.removeprefix(_OID) if system.startswith(_OID) else ""
    return "", ""


def _study_uid(study: Resource) -> str:
    # R4 writes urn:oid:1.2.3 with the system urn:dicom:uid; STU3 had an element of its own, an oid.
    own = (_string(study, "reference"), _string(study, "uid"))
    values = (*own, *(_string(each, "value") for each in _items(study, "identifier")))
    found = (re.fullmatch(r"(?:urn:oid:)?([0-9]+(?:\.[0-9]+)+)", value) for value in values)
    return next((match[1] for match in found if match), "")


def _record_number(patient: Resource) -> str:
    ordered = sorted(_items(patient, "identifier"), key=lambda each: not _is_type(each, "MR"))
    return next((value for each in ordered if (value := _string(each, "value"))), "")


def _text(resource: Resource) -> str:
    """Return the presented form, and the conclusion where the form does not hold it.

    Raises:
        RefusedError: There is a form, but none in text.
    """
    forms = _items(resource, "presentedForm")
    texts = [text for form in forms if (text := _form_text(form))]
    conclusion = _string(resource, "conclusion")
    if conclusion and not any(_words(conclusion) in _words(text) for text in texts):
        texts.append(f"{IMPRESSION}:\n{conclusion}")
    if forms and not texts:
        raise RefusedError(State.UNSUPPORTED, Code.E_REPORT_FORM)
    return "\n\n".join(dict.fromkeys(texts))


def _form_text(form: Resource) -> str:
    kind, *parameters = _string(form, "contentType").lower().split(";")
    data = base64.b64decode(_string(form, "data"))
    charset = next((part.partition("=")[2].strip(' "') for part in parameters if "charset" in part), "")
    try:
        text = data.decode(charset) if charset else decoded(data)
    except (UnicodeError, LookupError):
        text = decoded(data)
    if kind.strip() in ("text/html", "application/xhtml+xml"):
        return plain_text(text)
    return text.strip() if kind.strip() in ("text/plain", "text/markdown", "") else ""


def _words(text: str) -> str:
    return " ".join(text.split())


def _is_type(identifier: Resource, code: str) -> bool:
    # https://terminology.hl7.org/CodeSystem-v2-0203.html
    return any(_string(coding, "code") == code for coding in _items(_item(identifier, "type"), "coding"))


def _string(resource: Any, element: str) -> str:
    value = resource.get(element) if isinstance(resource, dict) else None
    return value.strip() if isinstance(value, str) else ""


def _items(resource: Any, element: str) -> list[Resource]:
    """Return the objects of an element, whether it repeats or not."""
    value = resource.get(element) if isinstance(resource, dict) else None
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def _item(resource: Any, element: str) -> Resource:
    return next(iter(_items(resource, element)), {})
