"""FHIR DiagnosticReports of several releases."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.outcomes import Code, Rejected, State
from client.reports import fhir
from client.reports.fhir import FhirReports
from client.reports.report import Report, Status

NOT_REPORT = Rejected(State.IGNORED, Code.E_NOT_REPORT)
UNREADABLE = Rejected(State.QUARANTINED, Code.E_UNREADABLE)
ACSN = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]}
MR = {"coding": [{"code": "MR"}]}


def form(text: str, kind: str = "text/plain") -> dict[str, str]:
    return {"contentType": kind, "data": base64.b64encode(text.encode()).decode()}


def resource(**elements: Any) -> dict[str, Any]:
    return {
        "resourceType": "DiagnosticReport",
        "status": "final",
        "identifier": [{"type": ACSN, "value": "A1"}],
        "conclusion": "Normal.",
    } | elements


def bundle(*resources: dict[str, Any]) -> dict[str, Any]:
    return {"resourceType": "Bundle", "entry": [{"resource": each} for each in resources]}


def outcomes(folder: Path, *lines: Any) -> list[Report | Rejected]:
    path = folder / "r.json"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return [entry.outcome for entry in FhirReports(path).read()]


def report(folder: Path, document: Any) -> Report:
    (outcome,) = outcomes(folder, document)
    assert isinstance(outcome, Report)
    return outcome


def test_a_report_is_read_whole(tmp_path: Path) -> None:
    document = resource(
        identifier=[{"value": "R9"}, {"type": ACSN, "value": "A1", "system": "urn:oid:1.2.3"}],
        subject={"reference": "Patient/server-id", "identifier": {"value": "p1"}},
        imagingStudy=[{"identifier": {"system": "urn:dicom:uid", "value": "urn:oid:1.2.9"}}],
        issued="2024-01-02T03:04:05+01:00",
        language="en",
        presentedForm=[form("FINDINGS: Clear.")],
    )
    assert report(tmp_path, document) == Report(
        source="fhir",
        accession="A1",
        issuer="1.2.3",
        study_uid="1.2.9",
        patient="p1",
        text="FINDINGS: Clear.\n\nIMPRESSION:\nNormal.",
        when="20240102030405",
        language="en",
    )


@pytest.mark.parametrize(
    ("word", "status", "remarks"),
    [
        ("final", Status.FINAL, ()),
        ("amended", Status.CORRECTED, ()),
        ("corrected", Status.CORRECTED, ()),
        ("appended", Status.CORRECTED, ()),
        ("preliminary", Status.PRELIMINARY, ()),
        ("entered-in-error", Status.WITHDRAWN, ()),
        ("cancelled", Status.WITHDRAWN, ()),
        ("unknown", Status.PRELIMINARY, (Code.W_STATUS,)),
        (7, Status.PRELIMINARY, (Code.W_STATUS,)),
    ],
)
def test_every_status_is_known(tmp_path: Path, word: Any, status: Status, remarks: tuple[Code, ...]) -> None:
    found = report(tmp_path, resource(status=word))
    assert (found.status, found.remarks) == (status, remarks)


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        ({}, "IMPRESSION:\nNormal."),
        (
            {"presentedForm": [form("FINDINGS: x\nIMPRESSION:  Normal. ")]},
            "FINDINGS: x\nIMPRESSION:  Normal.",
        ),
        ({"presentedForm": [form("<p>a</p><p>Normal.</p>", "text/html; charset=utf-8")]}, "a\n\nNormal."),
        ({"presentedForm": form("Is now\n  small."), "conclusion": "Is now small."}, "Is now\n  small."),
        ({"presentedForm": form("Normal. Really.")}, "Normal. Really."),
        ({"presentedForm": [form("x", "application/pdf")]}, "IMPRESSION:\nNormal."),
        ({"presentedForm": [form("Ö Normal.", "text/plain; charset=latin-9000")]}, "Ö Normal."),
    ],
)
def test_texts_come_from_form_and_conclusion(tmp_path: Path, elements: dict[str, Any], text: str) -> None:
    assert report(tmp_path, resource(**elements)).text == text


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"conclusion": "", "presentedForm": [form("x", "application/pdf")]}, Code.E_REPORT_FORM),
        (
            {"conclusion": "", "presentedForm": [{"url": "http://x/y", "contentType": "text/plain"}]},
            Code.E_REPORT_FORM,
        ),
        ({"conclusion": None}, Code.E_REPORT_EMPTY),
        ({"identifier": []}, Code.E_NO_KEY),
        ({"identifier": [{"value": "untyped"}]}, Code.E_NO_KEY),
        (
            {"presentedForm": [{"contentType": "text/plain", "data": "A"}], "conclusion": ""},
            Code.E_UNREADABLE,
        ),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, elements: dict[str, Any], code: Code) -> None:
    (outcome,) = outcomes(tmp_path, resource(**elements))
    assert isinstance(outcome, Rejected)
    assert outcome.code is code


def test_references_are_followed_within_a_bundle_and_among_the_contained(tmp_path: Path) -> None:
    patient = {
        "resourceType": "Patient",
        "id": "9",
        "identifier": [{"value": "ssn"}, {"type": MR, "value": "p1"}],
    }
    order = {"resourceType": "ServiceRequest", "id": "o", "identifier": [{"type": ACSN, "value": "A7"}]}
    study = {"resourceType": "ImagingStudy", "id": "s", "identifier": [{"value": "urn:oid:1.2.9"}]}
    document = resource(
        identifier=[],
        subject={"reference": "https://server/fhir/Patient/9"},
        basedOn=[{"reference": "ServiceRequest/o"}],
        study=[{"reference": "#s"}],
        contained=[study],
    )
    found = report(tmp_path, bundle(patient, order, document))
    assert (found.patient, found.accession, found.study_uid) == ("p1", "A7", "1.2.9")


def test_a_patient_known_to_the_server_only_is_unknown(tmp_path: Path) -> None:
    assert report(tmp_path, resource(subject={"reference": "Patient/9"})).patient == ""


def test_a_report_on_two_studies_is_told_for_both(tmp_path: Path) -> None:
    references = [{"reference": "urn:oid:1.2.3"}, {"reference": "urn:oid:1.2.4"}]
    found = outcomes(tmp_path, resource(imagingStudy=references))
    assert [each.study_uid for each in found if isinstance(each, Report)] == ["1.2.3", "1.2.4"]


def test_one_resource_to_a_line_costs_only_damaged_lines(tmp_path: Path) -> None:
    patient = {"resourceType": "Patient", "id": "9"}
    found = outcomes(tmp_path, resource(), "", "{broken", patient, resource(status="amended"))
    assert isinstance(found[0], Report)
    assert found[1:3] == [UNREADABLE, NOT_REPORT]
    assert isinstance(found[3], Report)
    (tmp_path / "r.ndjson").write_text("{broken\n" + json.dumps(resource()) + "\n")
    first, second = (entry.outcome for entry in FhirReports(tmp_path / "r.ndjson").read())
    assert first == UNREADABLE
    assert isinstance(second, Report)


def test_lists_in_lists_cost_no_other_line(tmp_path: Path) -> None:
    depth = 900  # Python's parser reads it; a generator in a generator in a generator would not
    found = outcomes(tmp_path, "[" * depth + json.dumps(resource()) + "]" * depth, resource())
    assert all(isinstance(each, Report) for each in found)
    assert len(found) == 2


def test_a_list_and_indented_json_are_read(tmp_path: Path) -> None:
    assert len(outcomes(tmp_path, [resource(), resource()])) == 2
    assert isinstance(outcomes(tmp_path, json.dumps(resource(), indent=2))[0], Report)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", Rejected(State.QUARANTINED, Code.E_EMPTY_FILE)),
        ("no json", UNREADABLE),
        ("[" * 100_000, UNREADABLE),
        ("null", NOT_REPORT),
        ('"DiagnosticReport"', NOT_REPORT),
        ('{"resourceType": "Bundle", "entry": [{}, 3, {"resource": null}]}', NOT_REPORT),
    ],
)
def test_what_is_no_report_says_so(tmp_path: Path, content: str, expected: Rejected) -> None:
    assert outcomes(tmp_path, content) == [expected]


def test_a_document_beyond_all_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fhir, "MAX_JSON_BYTES", 100)
    assert outcomes(tmp_path, resource()) == [Rejected(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_ELEMENTS = (
    "status",
    "identifier",
    "subject",
    "imagingStudy",
    "basedOn",
    "presentedForm",
    "conclusion",
    "contained",
)


@given(element=st.sampled_from(_ELEMENTS), value=_JSON)
def test_no_shape_of_an_element_makes_reading_raise(
    tmp_path_factory: pytest.TempPathFactory, element: str, value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert outcomes(folder, resource(**{element: value}))
    assert outcomes(folder, bundle(resource(**{element: [{"type": value, "coding": value, "data": value}]})))
