"""A zip among the files: its members are inputs, whatever they are called and whatever it promises."""

import csv
import struct
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from client.cohort import CohortSettings, State, archives, build_cohort
from client.cohort.archives import container, expanded, opened, size_of
from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.outcomes import Code, Rejected, Rendered
from client.cohort.sources import Candidate, stamp
from client.cohort.workers import Workers

Dicom = Callable[..., Dataset]


def data_of(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def packed(path: Path, members: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some have a name twice
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return path


def judged(path: Path) -> Rejected:
    outcome = read_header(path)
    assert isinstance(outcome, Rejected)
    return outcome


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_a_member_is_read_like_the_file(dicom: Dicom, tmp_path: Path, method: int, syntax: object) -> None:
    dataset = dicom() if syntax is None else dicom(syntax=syntax)
    (tmp_path / "plain").write_bytes(data_of(dataset))
    (member,) = expanded(packed(tmp_path / "a.zip", {"sub/1.dcm": data_of(dataset)}, method=method))
    found, plain = read_header(member), read_header(tmp_path / "plain")
    assert isinstance(found, Candidate)
    assert isinstance(plain, Candidate)
    assert (found.uid, found.patient, found.keys) == (plain.uid, plain.patient, plain.keys)
    images = [DicomFolder.render(path, 32) for path in (member, tmp_path / "plain")]
    assert isinstance(images[0], Rendered)
    assert isinstance(images[1], Rendered)
    np.testing.assert_array_equal(images[0].pixels, images[1].pixels)


def test_a_cohort_of_zips_is_that_of_the_files(dicom: Dicom, tmp_path: Path) -> None:
    files = {f"p{n}/{n}.dcm": data_of(dicom(PatientID=f"p{n}", AccessionNumber=f"A{n}")) for n in range(6)}
    files["readme.txt"] = b"hello"
    for name, data in files.items():
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    names = sorted(files)
    packed(tmp_path / "zipped" / "1.ZIP", {name: files[name] for name in names[:3]})
    packed(tmp_path / "zipped" / "2.zip", {name: files[name] for name in names[3:]})
    reports = "\n".join(["accession_number,report", *(f"A{n},text {n}" for n in range(6))])
    (tmp_path / "reports.csv").write_text(reports)
    cohorts = [
        build_cohort(
            CohortSettings(dicom=tmp_path / kind, reports=tmp_path / "reports.csv", image_size=32, salt="s"),
            tmp_path / f"cohort-{kind}",
            workers=workers,
        )
        for kind, workers in (("plain", 1), ("zipped", 2))
    ]
    assert cohorts[0].identity == cohorts[1].identity
    assert cohorts[0].counts == cohorts[1].counts
    assert (cohorts[1].counts[State.USED], cohorts[1].counts[State.IGNORED]) == (6, 1)
    with open(tmp_path / "cohort-zipped" / "quarantine.csv", encoding="utf-8") as file:
        ignored = [line["path"] for line in csv.DictReader(file) if line["state"] == State.IGNORED]
    assert ignored == ["2.zip!/readme.txt"]


def test_the_same_image_in_and_beside_a_zip_counts_once(dicom: Dicom, tmp_path: Path) -> None:
    data = data_of(dicom())
    packed(tmp_path / "a.zip", {"1": data})
    (tmp_path / "b.dcm").write_bytes(data)
    folder = DicomFolder(tmp_path)
    with Workers(1, items=0) as pool:
        entries = list(folder.scan(pool.map))
    assert len(folder) == len(list(folder.stamps())) == 2
    assert [entry.name for entry in entries] == ["a.zip!/1", "b.dcm"]
    assert entries[1].outcome == Rejected(State.DUPLICATE, Code.E_DUPLICATE_SOP)


def test_a_nested_archive_is_left_alone(dicom: Dicom, tmp_path: Path) -> None:
    inner = packed(tmp_path / "inner.zip", {"1": data_of(dicom())}).read_bytes()
    paths = list(expanded(packed(tmp_path / "a.zip", {"inner.zip": inner, "renamed": inner})))
    assert [judged(path) for path in paths] == [Rejected(State.IGNORED, Code.E_ARCHIVE_NESTED)] * 2


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1000)
    (path,) = expanded(packed(tmp_path / "a.zip", {"bomb": bytes(1001)}))
    assert judged(path) == Rejected(State.QUARANTINED, Code.E_ARCHIVE_TOO_LARGE)
    rendered = DicomFolder.render(path, 32)
    assert rendered == Rejected(State.QUARANTINED, Code.E_ARCHIVE_TOO_LARGE)


def test_a_member_that_lies_about_its_size_gives_no_more(dicom: Dicom, tmp_path: Path) -> None:
    whole = data_of(dicom())
    path = packed(tmp_path / "a.zip", {"1": whole + bytes(10**6)})
    raw = bytearray(path.read_bytes())
    directory = raw.rindex(b"PK\x01\x02")
    struct.pack_into("<L", raw, directory + 24, 500)  # uncompressed size, APPNOTE 4.3.12
    path.write_bytes(raw)
    (member,) = expanded(path)
    assert size_of(member) == 500
    rendered = DicomFolder.render(member, 32)
    assert isinstance(rendered, Rejected)
    assert rendered.state is State.QUARANTINED


def test_a_locked_zip_is_named(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", {"1": b"secret"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    (member,) = expanded(path)
    assert judged(member) == Rejected(State.QUARANTINED, Code.E_ARCHIVE_LOCKED)


@settings(max_examples=40, deadline=None)
@given(cut=st.just(0) | st.integers(0, 1000), flip=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_zip_never_raises(
    dicom: Dicom, tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("zip")
    data = data_of(dicom(SOPInstanceUID="1.2", StudyInstanceUID="1.3"))
    raw = bytearray(packed(folder / "a.zip", {"1": data, "2": b"x"}).read_bytes())
    raw[flip % len(raw)] = byte
    (folder / "a.zip").write_bytes(raw[: max(len(raw) - cut, 0)])
    for path in expanded(folder / "a.zip"):
        assert stamp(path, "")
        if isinstance(read_header(path), Candidate):
            assert isinstance(DicomFolder.render(path, 16), Rendered | Rejected)


def test_a_zip_without_its_end_is_quarantined(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", {"1": bytes(1000)})
    path.write_bytes(path.read_bytes()[:-30])
    assert list(expanded(path)) == [path]
    assert judged(path) == Rejected(State.QUARANTINED, Code.E_ARCHIVE)


def test_an_image_may_be_called_a_zip(dicom: Dicom, tmp_path: Path) -> None:
    path = tmp_path / "image.zip"
    path.write_bytes(data_of(dicom()))
    assert list(expanded(path)) == [path]
    assert isinstance(read_header(path), Candidate)


def test_other_files_that_are_zips_inside_are_no_dicom(tmp_path: Path) -> None:
    path = packed(tmp_path / "letter.docx", {"1": b"x"})
    assert list(expanded(path)) == [path]
    assert judged(path) == Rejected(State.IGNORED, Code.E_NOT_DICOM)


@pytest.mark.parametrize(
    "name", ["", ".", "/etc/passwd", "../../etc/passwd", "a//b", "./c", "b.zip!/d", "ü ñ", "x" * 300]
)
def test_a_member_may_be_called_anything(dicom: Dicom, tmp_path: Path, name: str) -> None:
    (member,) = expanded(packed(tmp_path / "a.zip", {name: data_of(dicom())}))
    assert container(member) == tmp_path / "a.zip"
    assert member.is_relative_to(tmp_path)
    assert isinstance(read_header(member), Candidate)


def test_folders_and_empty_zips_hold_no_inputs(tmp_path: Path) -> None:
    assert list(expanded(packed(tmp_path / "a.zip", {}))) == []
    assert list(expanded(packed(tmp_path / "b.zip", {"folder/": b""}))) == []


def test_a_folder_called_like_a_member_is_a_folder(dicom: Dicom, tmp_path: Path) -> None:
    path = tmp_path / "a.zip!" / "1.dcm"
    path.parent.mkdir()
    path.write_bytes(data_of(dicom()))
    assert container(path) == path
    assert isinstance(read_header(path), Candidate)


def test_a_changed_zip_changes_the_stamps_of_its_members(dicom: Dicom, tmp_path: Path) -> None:
    (member,) = expanded(packed(tmp_path / "a.zip", {"1": data_of(dicom())}))
    before = stamp(member, "1")
    packed(tmp_path / "a.zip", {"1": data_of(dicom()), "2": b"x"})
    assert stamp(member, "1") != before
    assert len(list(expanded(tmp_path / "a.zip"))) == 2
    packed(tmp_path / "a.zip", {"3": b"x"})
    with pytest.raises(FileNotFoundError), opened(member, whole=True):
        pass
    assert judged(member) == Rejected(State.QUARANTINED, Code.E_UNREADABLE)


def test_a_dicomdir_is_recognised_and_not_believed(dicom: Dicom, tmp_path: Path) -> None:
    directory = Dataset()  # PS3.3 F.3, of a disc that says it is empty
    directory.FileSetID, directory.DirectoryRecordSequence = "DISC", []
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2"
    (tmp_path / "DICOMDIR").write_bytes(data_of(directory))
    (tmp_path / "unlisted").write_bytes(data_of(dicom()))
    with Workers(1, items=0) as pool:
        entries = list(DicomFolder(tmp_path).scan(pool.map))
    assert entries[0].name == "DICOMDIR"
    assert entries[0].outcome == Rejected(State.IGNORED, Code.E_DICOMDIR)
    assert [type(entry.outcome) for entry in entries[1:]] == [Candidate]
