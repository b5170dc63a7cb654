"""DICOM structured reports and the text they are written out as."""

import warnings
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
)

from client.cohort.outcomes import Code, Rejected, State
from client.reports.report import Report, Status
from client.reports.sr import MAX_DEPTH, SrReports, read_report
from client.text.sections import training_text


def code(value: str, meaning: str, scheme: str = "DCM") -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Sequence([item])


def item(
    kind: str, name: Sequence | None, *children: Dataset, relation: str = "CONTAINS", **values: object
) -> Dataset:
    found = Dataset()
    found.RelationshipType, found.ValueType = relation, kind
    if name is not None:
        found.ConceptNameCodeSequence = name
    for keyword, value in values.items():
        setattr(found, keyword, value)
    if children:
        found.ContentSequence = Sequence(children)
    return found


def section(value: str, meaning: str, *texts: str) -> Dataset:
    children = (item("TEXT", code("0", "Comment"), TextValue=text) for text in texts)
    return item("CONTAINER", code(value, meaning), *children)


def document(*children: Dataset, **attributes: object) -> Dataset:
    dataset = item("CONTAINER", code("18748-4", "Diagnostic Imaging Report", "LN"), *children)
    del dataset.RelationshipType
    dataset.SOPClassUID = BasicTextSRStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.StudyInstanceUID = "1.2"
    dataset.AccessionNumber = "A1"
    dataset.PatientID = "p1"
    dataset.CompletionFlag, dataset.VerificationFlag = "COMPLETE", "VERIFIED"
    dataset.ContentDate, dataset.ContentTime = "20240102", "030405.67"
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def outcome(folder: Path, dataset: Dataset) -> Report | Rejected:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(folder / "sr", enforce_file_format=True)
    return read_report(folder / "sr")


def report(folder: Path, dataset: Dataset) -> Report:
    found = outcome(folder, dataset)
    assert isinstance(found, Report)
    return found


FINDINGS = section("121070", "Findings", "Heart normal.", "Lungs clear.")
IMPRESSION = section("121072", "Impressions", "Normal.")


def test_a_report_is_written_out_under_its_headings(tmp_path: Path) -> None:
    language = item(
        "CODE",
        code("121049", "Language"),
        relation="HAS CONCEPT MOD",
        ConceptCodeSequence=code("de", "German"),
    )
    observer = item("PNAME", code("121008", "Observer"), relation="HAS OBS CONTEXT", PersonName="DOE^JOHN")
    issuer = Dataset()
    issuer.LocalNamespaceEntityID = "RIS"
    dataset = document(
        language,
        observer,
        FINDINGS,
        IMPRESSION,
        SpecificCharacterSet="ISO_IR 100",
        IssuerOfAccessionNumberSequence=Sequence([issuer]),
    )
    found = report(tmp_path, dataset)
    assert found == Report(
        source="sr",
        accession="A1",
        issuer="RIS",
        study_uid="1.2",
        patient="p1",
        text="FINDINGS:\nHeart normal.\nLungs clear.\n\nIMPRESSION:\nNormal.",
        when="20240102030405",
        language="de",
    )
    assert training_text(found.text) == "Normal. Heart normal. Lungs clear."


@pytest.mark.parametrize(
    ("value", "heading"),
    [
        ("121070", "FINDINGS"),
        ("121071", "FINDINGS"),
        ("121072", "IMPRESSION"),
        ("121073", "IMPRESSION"),
        ("121074", "RECOMMENDATION"),
        ("121076", "IMPRESSION"),
        ("121077", "IMPRESSION"),
        ("18782-3", "FINDINGS"),
        ("19005-8", "IMPRESSION"),
        ("121069", "COMPARISON"),
        ("9999", "NAME OF ITS OWN"),
    ],
)
def test_concept_names_become_headings(tmp_path: Path, value: str, heading: str) -> None:
    assert report(tmp_path, document(section(value, "Name of its own", "x"))).text == f"{heading}:\nx"


def test_texts_without_containers_stand_under_their_own_names(tmp_path: Path) -> None:
    finding = item("TEXT", code("121071", "Finding"), TextValue="Nodule.")
    because = item("TEXT", code("121077", "Conclusion"), finding, TextValue="Cancer.")
    assert report(tmp_path, document(because)).text == "IMPRESSION:\nCancer.\n\nFINDINGS:\nNodule."


def test_what_qualifies_an_item_is_no_sentence(tmp_path: Path) -> None:
    comment = item("TEXT", code("0", "Comment"), relation="HAS CONCEPT MOD", TextValue="by phone")
    finding = item("TEXT", code("121071", "Finding"), comment, TextValue="Nodule.")
    assert report(tmp_path, document(finding)).text == "FINDINGS:\nNodule."


def test_coded_findings_are_read_by_their_meaning(tmp_path: Path) -> None:
    coded = item("CODE", code("121071", "Finding"), ConceptCodeSequence=code("1", "Pneumothorax", "SCT"))
    site = item(
        "CODE", code("363698007", "Finding Site", "SCT"), ConceptCodeSequence=code("2", "Lung", "SCT")
    )
    assert report(tmp_path, document(coded, site)).text == "FINDINGS:\nPneumothorax"


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ({}, Status.FINAL),
        ({"VerificationFlag": "UNVERIFIED"}, Status.PRELIMINARY),
        ({"PreliminaryFlag": "PRELIMINARY"}, Status.PRELIMINARY),
        ({"VerificationFlag": "UNVERIFIED", "PreliminaryFlag": "FINAL"}, Status.FINAL),
    ],
)
def test_verified_reports_go_before_others(tmp_path: Path, flags: dict[str, str], status: Status) -> None:
    assert report(tmp_path, document(FINDINGS, **flags)).status is status


def test_an_order_names_the_accession_number_where_the_report_does_not(tmp_path: Path) -> None:
    request = Dataset()
    request.AccessionNumber = "A9"
    dataset = document(FINDINGS, AccessionNumber="", ReferencedRequestSequence=Sequence([request]))
    assert report(tmp_path, dataset).accession == "A9"


def measurement() -> Dataset:
    return item("NUM", code("118565006", "Volume", "SCT"))


def nested(depth: int) -> Dataset:
    found = item("TEXT", None, TextValue="deep")
    for _ in range(depth - 1):
        found = item("CONTAINER", None, found)
    return found


@pytest.mark.parametrize(
    ("dataset", "state", "code"),
    [
        (document(FINDINGS, CompletionFlag="PARTIAL"), State.QUARANTINED, Code.E_REPORT_PARTIAL),
        (document(FINDINGS, CompletionFlag=""), State.QUARANTINED, Code.E_REPORT_PARTIAL),
        (document(measurement(), SOPClassUID=ComprehensiveSRStorage), State.UNSUPPORTED, Code.E_MEASUREMENTS),
        (document(), State.UNPAIRED, Code.E_REPORT_EMPTY),
        (document(nested(MAX_DEPTH + 1)), State.QUARANTINED, Code.E_REPORT_TOO_LARGE),
        (document(FINDINGS, SOPClassUID=KeyObjectSelectionDocumentStorage), State.IGNORED, Code.E_NOT_REPORT),
        (document(FINDINGS, AccessionNumber="", StudyInstanceUID=""), State.QUARANTINED, Code.E_NO_KEY),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, dataset: Dataset, state: State, code: Code) -> None:
    assert outcome(tmp_path, dataset) == Rejected(state, code)


def test_measurements_beside_sentences_do_no_harm(tmp_path: Path) -> None:
    assert report(tmp_path, document(measurement(), FINDINGS)).text.startswith("FINDINGS:\nHeart")


def test_the_deepest_tree_that_is_read(tmp_path: Path) -> None:
    assert report(tmp_path, document(nested(MAX_DEPTH))).text == "deep"


@pytest.mark.parametrize("depth", [100, 10_000])
def test_a_tree_that_no_report_has_is_refused(tmp_path: Path, depth: int) -> None:
    """Made of bytes, since pydicom writes by recursion; the deeper tree is one that it cannot read either."""
    outcome(tmp_path, document())
    data = (tmp_path / "sr").read_bytes()
    without_end = b"\xff\xff\xff\xff"
    opening = b"\x40\x00\x30\xa7SQ\x00\x00" + without_end + b"\xfe\xff\x00\xe0" + without_end
    closing = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00" + b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    (tmp_path / "sr").write_bytes(data + depth * opening + depth * closing)
    found = read_report(tmp_path / "sr")
    assert isinstance(found, Rejected)
    assert found.code in (Code.E_REPORT_TOO_LARGE, Code.E_UNREADABLE)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_told_and_stops_nothing(tmp_path: Path, share: float) -> None:
    outcome(tmp_path, document(FINDINGS, IMPRESSION))
    data = (tmp_path / "sr").read_bytes()
    (tmp_path / "sr").write_bytes(data[: int(len(data) * share)])
    assert isinstance(read_report(tmp_path / "sr"), Rejected)


def test_a_folder_of_reports_is_a_source(tmp_path: Path) -> None:
    outcome(tmp_path, document(FINDINGS))
    (tmp_path / "notes.txt").write_text("bring milk")
    found = {entry.name.partition("/")[2]: entry.outcome for entry in SrReports(tmp_path).read()}
    assert found["notes.txt"] == Rejected(State.IGNORED, Code.E_NOT_DICOM)
    assert isinstance(found["sr"], Report)
