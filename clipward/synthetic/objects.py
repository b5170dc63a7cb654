"""Stored pixels as DICOM: Computed Radiography Image objects (PS3.3 A.2) in a hospital's transfer syntax."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, JPEGLSLossless, RLELossless

from clipward.synthetic.scanner import Scanner

UID_NAMESPACE = uuid.UUID("6f4f5d7e-6c0a-5b3c-9b60-2f6e2d1f8a11")
IMPLEMENTATION = UID(f"2.25.{uuid.uuid5(UID_NAMESPACE, 'implementation').int}")
FIELD_MM = 360  # shorter side of the detector
FASTEST_ENCODER = {RLELossless: "gdcm", JPEGLSLossless: "pyjpegls"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who and when, as in the header: all of it invented.

    Attributes:
        patient_id: PatientID.
        patient_name: PatientName, plainly synthetic.
        birth_date: PatientBirthDate.
        sex: "F" or "M".
        accession_number: AccessionNumber.
        study_uid: StudyInstanceUID.
        study_date: StudyDate.
        view: ViewPosition, "PA" or "AP".
    """

    patient_id: str
    patient_name: str
    birth_date: date
    sex: str
    accession_number: str
    study_uid: str
    study_date: date
    view: str


def derive_uid(*parts: object) -> str:
    """A UID from what it names: UUID-derived (PS3.5 B.2), equal parts give equal UIDs."""
    return f"2.25.{uuid.uuid5(UID_NAMESPACE, '/'.join(map(str, parts))).int}"


def write_image(
    path: Path,
    pixels: NDArray[np.uint8 | np.uint16],
    identity: Identity,
    scanner: Scanner,
    *,
    institution: str,
) -> None:
    """Write one image object.

    Guarantees:
        The same arguments write the same bytes.

    Args:
        path: Where to; the folder exists.
        pixels: Stored values, shape (rows, columns), as ``scanner.expose`` gives them.
        identity: The patient and study.
        scanner: The unit: format and header.
        institution: InstitutionName.
    """
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = UID(scanner.transfer_syntax)
    image.file_meta.ImplementationClassUID = IMPLEMENTATION
    image.file_meta.ImplementationVersionName = "CLIPWARD"
    _describe_study(image, identity, institution)
    _describe_acquisition(image, identity, scanner)
    _store_pixels(image, pixels, scanner)
    image.save_as(path, enforce_file_format=True)


def _describe_study(image: Dataset, identity: Identity, institution: str) -> None:
    image.SOPClassUID = ComputedRadiographyImageStorage
    image.SOPInstanceUID = derive_uid(identity.study_uid, "image")
    image.PatientName = identity.patient_name
    image.PatientID = identity.patient_id
    image.PatientBirthDate = f"{identity.birth_date:%Y%m%d}"
    image.PatientSex = identity.sex
    image.QualityControlSubject = "YES"  # a phantom, and says so
    image.StudyInstanceUID = identity.study_uid
    image.StudyDate = image.SeriesDate = image.ContentDate = f"{identity.study_date:%Y%m%d}"
    image.StudyTime = image.SeriesTime = image.ContentTime = "120000"
    image.StudyID = "1"
    image.ReferringPhysicianName = ""
    image.AccessionNumber = identity.accession_number
    image.StudyDescription = "Chest radiograph"
    image.SeriesInstanceUID = derive_uid(identity.study_uid, "series")
    image.SeriesNumber = 1
    image.InstanceNumber = 1
    image.InstitutionName = institution


def _describe_acquisition(image: Dataset, identity: Identity, scanner: Scanner) -> None:
    image.Modality = "CR"
    image.Manufacturer = scanner.manufacturer
    image.ManufacturerModelName = scanner.model
    image.BodyPartExamined = "CHEST"
    image.ViewPosition = identity.view
    image.PatientOrientation = ["L", "F"]
    image.ImageType = ["ORIGINAL", "PRIMARY"]
    spacing = f"{FIELD_MM / min(scanner.rows, scanner.columns):.4f}"
    image.ImagerPixelSpacing = [spacing, spacing]
    if scanner.annotated:
        image.BurnedInAnnotation = "NO"
    if scanner.window:
        image.WindowCenter, image.WindowWidth = (f"{value:g}" for value in scanner.window_centre_width)


def _store_pixels(image: Dataset, pixels: NDArray[np.uint8 | np.uint16], scanner: Scanner) -> None:
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated = 8 * pixels.itemsize
    image.BitsStored = scanner.bits_stored
    image.HighBit = scanner.bits_stored - 1
    image.PixelRepresentation = 0
    syntax = image.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        image.compress(syntax, pixels, encoding_plugin=FASTEST_ENCODER[syntax], generate_instance_uid=False)
    else:
        image.PixelData = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
        image["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
