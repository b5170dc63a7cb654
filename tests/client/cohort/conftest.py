"""A hospital of tiny DICOM files, made on the spot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid


@pytest.fixture(scope="session")
def dicom() -> Callable[..., Dataset]:
    """Return a maker of data sets: pixels, bits, transfer syntax, and any attribute (None leaves it out)."""
    return dataset_of


def dataset_of(
    pixels: NDArray[Any] | None = None,
    *,
    bits: int = 12,
    syntax: UID = ExplicitVRLittleEndian,
    **attributes: object,
) -> Dataset:
    if pixels is None:
        ramp = np.add.outer(np.linspace(0, 0.1, 32), np.linspace(0, 0.9, 32))
        pixels = np.rint(ramp * (2**bits - 1)).astype(np.uint16 if bits > 8 else np.uint8)
    dataset = Dataset()
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = generate_uid()
    dataset.PatientID = "patient-1"
    dataset.AccessionNumber = "A1"
    dataset.ViewPosition = "PA"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.SamplesPerPixel = 1
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize == 2 else "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if syntax.is_encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset
