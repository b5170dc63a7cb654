"""DICOM objects: conformant, readable, deterministic."""

from __future__ import annotations

import shutil
import subprocess
from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import config
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from clipward.synthetic.hospitals import Hospital, hospital, public_collection
from clipward.synthetic.objects import Identity, derive_uid, write_image
from clipward.synthetic.scanner import expose

PLACES = (public_collection(), *(hospital(index) for index in range(1, 6)))
IDENTITY = Identity(
    patient_id="SYN01-000001",
    patient_name="Synthetic^Patient 01-000001",
    birth_date=date(1950, 2, 3),
    sex="F",
    accession_number="SYN010000011",
    study_uid=derive_uid(7, 1, 1, 1),
    study_date=date(2016, 5, 4),
    view="PA",
)


@pytest.fixture(autouse=True)
def strict_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.settings, "reading_validation_mode", config.RAISE)
    monkeypatch.setattr(config.settings, "writing_validation_mode", config.RAISE)


def pixels_of(place: Hospital) -> np.ndarray:
    gradient = np.linspace(0, 1, place.scanner.drawing_shape[1], dtype=np.float32)
    chest = np.tile(gradient, (place.scanner.drawing_shape[0], 1))
    return expose(chest, place.scanner, np.random.default_rng(place.index))


def write(path: Path, place: Hospital) -> np.ndarray:
    pixels = pixels_of(place)
    write_image(path, pixels, IDENTITY, place.scanner, institution="Synthetic site-1")
    return pixels


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_an_image_reads_back_bit_for_bit_under_strict_validation(place: Hospital, tmp_path: Path) -> None:
    pixels = write(tmp_path / "image.dcm", place)
    image = pydicom.dcmread(tmp_path / "image.dcm")
    for element in image.iterall():
        assert element.value is not None  # reads, and so validates, every value
    assert np.array_equal(image.pixel_array, pixels)
    assert image.file_meta.TransferSyntaxUID == place.scanner.transfer_syntax
    assert image.BitsStored == place.scanner.bits_stored
    assert image.PhotometricInterpretation == ("MONOCHROME1" if place.scanner.inverted else "MONOCHROME2")
    assert ("WindowCenter" in image) == place.scanner.window
    assert image.AccessionNumber == "SYN010000011"
    assert str(image.PatientName).startswith("Synthetic^")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_dciodvfy_finds_no_error(place: Hospital, tmp_path: Path) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not on PATH")
    write(tmp_path / "image.dcm", place)
    if place.scanner.transfer_syntax == DeflatedExplicitVRLittleEndian:  # Debian builds it without zlib
        image = pydicom.dcmread(tmp_path / "image.dcm")
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    checked = subprocess.run([program, tmp_path / "image.dcm"], capture_output=True, text=True, check=False)
    assert "CRImage" in checked.stderr + checked.stdout
    assert "Error" not in checked.stderr + checked.stdout


def test_equal_arguments_write_equal_bytes(tmp_path: Path) -> None:
    for place in PLACES:
        write(tmp_path / "one.dcm", place)
        write(tmp_path / "two.dcm", place)
        assert (tmp_path / "one.dcm").read_bytes() == (tmp_path / "two.dcm").read_bytes()


def test_uids_are_valid_and_differ_with_what_they_name() -> None:
    uids = {
        derive_uid(seed, site, patient) for seed in range(3) for site in range(3) for patient in range(30)
    }
    assert len(uids) == 270
    assert all(pydicom.uid.UID(uid).is_valid and uid.startswith("2.25.") for uid in uids)
    assert derive_uid(1, 23) != derive_uid(12, 3)
