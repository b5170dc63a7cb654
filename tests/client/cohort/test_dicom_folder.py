"""What becomes of every file in an export, whatever it is called and whatever is wrong with it."""

import logging
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import DataElement, Dataset
from pydicom.config import IGNORE
from pydicom.uid import (
    MPEG2MPML,
    UID,
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pydicom.uid import (
    KeyObjectSelectionDocumentStorage as KeyObjectSelection,
)

from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.errors import SourceMissingError
from client.cohort.outcomes import Code, Rejected, Rendered, State
from client.cohort.sources import Candidate
from client.cohort.workers import Workers

Dicom = Callable[..., Dataset]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "anything.bin"


def save(path: Path, dataset: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are broken on purpose
        dataset.save_as(path, enforce_file_format=True)
    return path


def judged(path: Path) -> Rejected:
    outcome = read_header(path)
    assert isinstance(outcome, Rejected)
    return outcome


def candidate(path: Path) -> Candidate:
    outcome = read_header(path)
    assert isinstance(outcome, Candidate)
    return outcome


def test_a_frontal_image_is_a_candidate(dicom: Dicom, path: Path) -> None:
    dataset = dicom(PatientID=" patient-1 ", AccessionNumber="A1 ")
    found = candidate(save(path, dataset))
    assert (found.patient, found.study, found.uid) == (
        "patient-1",
        dataset.StudyInstanceUID,
        dataset.SOPInstanceUID,
    )
    assert found.keys == {
        "accession_number": "A1",
        "issuer": "",
        "study_instance_uid": dataset.StudyInstanceUID,
        "study_id": "",
    }
    assert found.remarks == ()


@pytest.mark.parametrize("view", ["PA", "AP", "", "pa", "RLD", "unheard of"])
def test_frontal_and_unknown_views_are_candidates(dicom: Dicom, path: Path, view: str) -> None:
    dataset = dicom()
    dataset.add(DataElement("ViewPosition", "CS", view, validation_mode=IGNORE))
    candidate(save(path, dataset))


@pytest.mark.parametrize(
    ("attributes", "state", "code", "detail"),
    [
        ({"ViewPosition": "LL"}, State.IGNORED, Code.E_NOT_FRONTAL, ""),
        ({"ViewPosition": "LATERAL"}, State.IGNORED, Code.E_NOT_FRONTAL, ""),
        ({"BurnedInAnnotation": "YES"}, State.QUARANTINED, Code.E_BURNED_IN, ""),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, State.QUARANTINED, Code.E_BURNED_IN, ""),
        ({"SOPClassUID": CTImageStorage}, State.UNSUPPORTED, Code.E_SOP_CLASS, "CT Image Storage"),
        ({"PresentationIntentType": "FOR PROCESSING"}, State.UNSUPPORTED, Code.E_FOR_PROCESSING, ""),
        ({"StudyInstanceUID": None}, State.QUARANTINED, Code.E_TAG_MISSING, "StudyInstanceUID"),
        ({"SOPInstanceUID": ""}, State.QUARANTINED, Code.E_TAG_MISSING, "SOPInstanceUID"),
        ({"SOPClassUID": None}, State.QUARANTINED, Code.E_TAG_MISSING, "SOPClassUID"),
        ({"BitsStored": None}, State.QUARANTINED, Code.E_TAG_MISSING, "BitsStored"),
        ({"SOPClassUID": "1.2.3.99"}, State.UNSUPPORTED, Code.E_SOP_CLASS, "not one of the standard"),
        ({"Rows": None}, State.QUARANTINED, Code.E_TAG_MISSING, "Rows"),
        ({"Rows": None, "SOPClassUID": KeyObjectSelection}, State.IGNORED, Code.E_NOT_IMAGE, ""),
        ({"Rows": None, "SOPClassUID": BasicTextSRStorage}, State.QUARANTINED, Code.E_REPORT_PARTIAL, ""),
    ],
)
def test_a_header_decides_on_an_image(
    dicom: Dicom, path: Path, attributes: dict[str, Any], state: State, code: Code, detail: str
) -> None:
    dataset = dicom()
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    assert judged(save(path, dataset)) == Rejected(state, code, detail)


def test_secondary_capture_that_says_no_is_a_candidate(dicom: Dicom, path: Path) -> None:
    candidate(save(path, dicom(SOPClassUID=SecondaryCaptureImageStorage, BurnedInAnnotation="NO")))


def test_digital_radiographs_are_candidates(dicom: Dicom, path: Path) -> None:
    candidate(save(path, dicom(SOPClassUID=DigitalXRayImageStorageForPresentation)))


def test_video_is_unsupported(dicom: Dicom, path: Path) -> None:
    dataset = dicom(syntax=RLELossless)
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    outcome = judged(save(path, dataset))
    assert (outcome.state, outcome.code) == (State.UNSUPPORTED, Code.E_TRANSFER_SYNTAX)
    assert outcome.detail.startswith("MPEG2")


def test_a_missing_decoder_is_named(dicom: Dicom, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    outcome = judged(save(path, dicom(syntax=RLELossless)))
    remedy = "RLE Lossless: pip install pylibjpeg-rle"
    assert outcome == Rejected(State.UNSUPPORTED, Code.E_DECODER_MISSING, remedy)


@pytest.mark.parametrize(
    ("content", "state", "code"),
    [
        (b"", State.QUARANTINED, Code.E_EMPTY_FILE),
        (b"x", State.IGNORED, Code.E_NOT_DICOM),
        (b"just a readme\n" * 40, State.IGNORED, Code.E_NOT_DICOM),
        (b'{"resourceType": "DiagnosticReport"}', State.IGNORED, Code.E_NOT_DICOM),
        (bytes(128) + b"DICM", State.IGNORED, Code.E_NOT_IMAGE),
    ],
)
def test_files_that_are_no_images_are_told_apart(
    path: Path, content: bytes, state: State, code: Code
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert judged(path) == Rejected(state, code)


@pytest.mark.parametrize(
    "rest", [b"\x02\x00\x00\x00UL\x04\x00", b"\x08\x00\xff\xff\xff\xff\xff\xff", b"\x08\x00"]
)
def test_garbage_that_begins_like_dicom_never_raises(path: Path, rest: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(rest * 50)
    assert isinstance(read_header(path), Rejected)


def test_a_file_cut_at_any_place_is_never_used_and_never_raises(dicom: Dicom, path: Path) -> None:
    whole = save(path, dicom()).read_bytes()
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        if isinstance(read_header(path), Candidate):
            outcome = DicomFolder.render(path, 16)
            assert isinstance(outcome, Rejected)
            assert outcome.state is State.QUARANTINED


def test_a_data_set_without_prefix_and_meta_is_recovered(dicom: Dicom, path: Path) -> None:
    dataset = dicom(WindowCenter=2000, WindowWidth=4000)
    with_meta = DicomFolder.render(save(path.with_name("whole"), dataset), 32)
    del dataset.file_meta
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    assert candidate(path).remarks == (Code.W_NO_PREFIX,)
    bare = DicomFolder.render(path, 32)
    assert isinstance(bare, Rendered)
    assert isinstance(with_meta, Rendered)
    np.testing.assert_array_equal(bare.pixels, with_meta.pixels)


def test_unknown_character_set_costs_a_remark_only(dicom: Dicom, path: Path) -> None:
    outcome = candidate(save(path, dicom(SpecificCharacterSet="ISO_IR 999", PatientName="Müller")))
    assert outcome.remarks == (Code.W_CHARSET,)


def test_broken_values_cost_a_remark_only(dicom: Dicom, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dicom(AccessionNumber="LONGER-THAN-SIXTEEN-CHARACTERS")
    save(path, dataset)
    assert candidate(path).remarks == (Code.W_HEADER,)


def test_many_frames_are_remarked_on(dicom: Dicom, path: Path) -> None:
    assert candidate(save(path, dicom(NumberOfFrames=5))).remarks == (Code.W_MULTIFRAME,)


def test_reading_logs_nothing_and_keeps_pydicoms_logger(
    dicom: Dicom, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    save(path, dicom(SpecificCharacterSet="ISO_IR 999"))
    caplog.clear()
    read_header(path)
    DicomFolder.render(path, 16)
    assert not caplog.records
    assert not logging.getLogger("pydicom").disabled


def test_a_broken_stream_is_quarantined(dicom: Dicom, path: Path) -> None:
    dataset = dicom(syntax=RLELossless)
    dataset.PixelData = dataset.PixelData[:40] + bytes(len(dataset.PixelData) - 40)
    outcome = DicomFolder.render(save(path, dataset), 16)
    assert outcome == Rejected(State.QUARANTINED, Code.E_DECODE)


def test_missing_pixels_are_quarantined(dicom: Dicom, path: Path) -> None:
    dataset = dicom()
    del dataset.PixelData
    outcome = DicomFolder.render(save(path, dataset), 16)
    assert outcome == Rejected(State.QUARANTINED, Code.E_TAG_MISSING, "PixelData")


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_one_compressed_file_among_others_may_end_its_process(
    dicom: Dicom, tmp_path: Path, syntax: UID
) -> None:
    save(tmp_path / "a", dicom())
    save(tmp_path / "b", dicom(syntax=ImplicitVRLittleEndian))
    save(tmp_path / "c", dicom(syntax=DeflatedExplicitVRLittleEndian))
    (tmp_path / "d").write_bytes(b"no DICOM at all")
    (tmp_path / "e").touch()
    assert not DicomFolder(tmp_path).may_end_process()
    compressed = save(tmp_path / "z", dicom(syntax=syntax))
    assert DicomFolder(tmp_path).may_end_process()
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(compressed, "1")
    compressed.unlink()
    assert DicomFolder(tmp_path).may_end_process()


def test_scan_keeps_the_first_of_two_files_with_one_uid(dicom: Dicom, tmp_path: Path) -> None:
    dataset = dicom()
    for name in ("b/2", "a/9.txt", "c"):
        save(tmp_path / name, dataset)
    dataset.SOPInstanceUID = "1.2.3"
    save(tmp_path / "d.dcm", dataset)
    outcomes = {entry.name: entry.outcome for entry in DicomFolder(tmp_path).scan(Workers(1, items=0).map)}
    duplicate = Rejected(State.DUPLICATE, Code.E_DUPLICATE_SOP)
    assert list(outcomes) == ["a/9.txt", "b/2", "c", "d.dcm"]
    assert [outcomes["b/2"], outcomes["c"]] == [duplicate, duplicate]
    assert isinstance(outcomes["a/9.txt"], Candidate)
    assert isinstance(outcomes["d.dcm"], Candidate)


def test_implicit_and_explicit_files_show_the_same(dicom: Dicom, tmp_path: Path) -> None:
    shown = [
        DicomFolder.render(save(tmp_path / str(number), dataset), 24)
        for number, dataset in enumerate((dicom(), dicom(syntax=ImplicitVRLittleEndian)))
    ]
    assert isinstance(shown[0], Rendered)
    assert isinstance(shown[1], Rendered)
    np.testing.assert_array_equal(shown[0].pixels, shown[1].pixels)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"expected the DICOM folder .*/none"):
        len(DicomFolder(tmp_path / "none"))
