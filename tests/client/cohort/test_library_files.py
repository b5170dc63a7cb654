"""pydicom's own test files, as far as they are on this machine: oddities of real devices, and broken ones."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder

from client.cohort import display
from client.cohort.dicom_file import quietly, read_dataset
from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.outcomes import Code, RefusedError, Rejected, Rendered, State
from client.cohort.sources import Candidate
from client.cohort.workers import Workers
from client.reports.report import Report

INSTALLED = Path(pydicom.__file__).parent / "data"
FETCHED = Path.home() / ".pydicom" / "data"  # where the library keeps what somebody has downloaded
NO_DICOM = {".py", ".pyc", ".json", ".xz"}
FILES = sorted(
    path
    for folder in (INSTALLED, FETCHED)
    for path in folder.rglob("*")
    if path.is_file() and path.suffix not in NO_DICOM
)
HOSPITAL = Path(__file__).parents[3].parent / "shared" / "data" / "dicom-hospital-ccby"
SECONDS = 10.0
LUMA = (0.299, 0.587, 0.114)


@pytest.fixture(scope="module")
def shown() -> dict[Path, Rendered | Rejected]:
    """Every file rendered, whatever its header says, in processes that are given up after a while."""
    with Workers(2, items=len(FILES), seconds_per_file=SECONDS) as pool:
        return dict(zip(FILES, pool.map(partial(DicomFolder.render, size=64), FILES), strict=True))


def test_every_file_ends_in_a_state_by_its_header() -> None:
    assert len(FILES) > 100
    for path in FILES:
        outcome = read_header(path)
        assert isinstance(outcome, Candidate | Report | Rejected), path.name
        if isinstance(outcome, Rejected):
            assert outcome.state in State
            assert outcome.code.meaning


def test_no_file_crashes_or_hangs(shown: dict[Path, Rendered | Rejected]) -> None:
    for path, outcome in shown.items():
        assert isinstance(outcome, Rendered | Rejected), path.name
        if isinstance(outcome, Rejected):
            assert outcome.code not in (Code.E_CRASHED, Code.E_TIMEOUT), path.name


def test_nearly_every_image_is_shown(shown: dict[Path, Rendered | Rejected]) -> None:
    no_image = (Code.E_NOT_DICOM, Code.E_TAG_MISSING, Code.E_EMPTY_FILE)
    failed = {
        path.name: outcome.code
        for path, outcome in shown.items()
        if isinstance(outcome, Rejected) and outcome.code not in no_image and has_pixels(path)
    }
    pictures = sum(isinstance(outcome, Rendered) for outcome in shown.values())
    assert len(failed) <= 0.1 * pictures, failed
    assert failed.get("MR_truncated.dcm") == Code.E_TRUNCATED


def test_what_is_unsupported_says_what_is_missing(shown: dict[Path, Rendered | Rejected]) -> None:
    unsupported = [
        outcome
        for outcome in shown.values()
        if isinstance(outcome, Rejected) and outcome.state is State.UNSUPPORTED
    ]
    assert unsupported
    for outcome in unsupported:
        assert "pip install" in outcome.detail or outcome.code is Code.E_TRANSFER_SYNTAX


@pytest.mark.parametrize(
    ("files", "at_least"),
    [
        pytest.param(FILES, 50, id="library"),
        pytest.param(
            sorted(HOSPITAL.rglob("*.dcm")),
            20,
            id="hospital",
            marks=pytest.mark.skipif(not HOSPITAL.is_dir(), reason="needs the shared folder of real data"),
        ),
    ],
)
def test_pixels_equal_the_textbooks_to_a_grey_level(files: Sequence[Path], at_least: int) -> None:
    compared = 0
    for path in files:
        with quietly([]):
            try:
                expected = textbook(path)
            except Exception:  # noqa: S112 - broken on purpose, or without a window: another test's business
                continue
            dataset, _ = read_dataset(path, keywords=display.KEYWORDS, pixels=True)
            height, width = expected.shape
            size = max(height, width)
            try:
                square, remarks = display.display_image(dataset, size=size)
            except RefusedError:
                assert np.ptp(expected) == 0
                continue
        if Code.W_WINDOW_FALLBACK in remarks:
            continue
        top, left = (size - height) // 2, (size - width) // 2
        difference = np.abs(square[top : top + height, left : left + width] - expected)
        assert difference.max() <= 1, path.name
        compared += 1
    assert compared >= at_least


@cache
def has_pixels(path: Path) -> bool:
    with quietly([]):
        return bool("PixelData" in dcmread(path, force=True, specific_tags=["PixelData"]))


def textbook(path: Path) -> NDArray[np.float64]:
    """Grey levels of the middle frame by pydicom's own functions, at full size."""
    dataset = dcmread(path, force=True)
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    values, _ = decoder.as_array(dataset, index=int(dataset.get("NumberOfFrames") or 1) // 2)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(values, dataset)
        return np.asarray(colours @ np.array(LUMA) / np.iinfo(colours.dtype).max * 255)
    if values.ndim == 3:
        return np.asarray(values @ np.array(LUMA) / (2**dataset.BitsStored - 1) * 255)
    low, high = voi_range(dataset)
    grey = np.asarray(apply_voi_lut(apply_modality_lut(values, dataset), dataset), dtype=np.float64)
    grey = np.asarray(np.clip((grey - low) / (high - low) * 255, 0, 255))
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    if "PixelPaddingValue" in dataset:
        ends = dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)
        grey[(values >= min(ends)) & (values <= max(ends))] = 0
    return grey


def voi_range(dataset: Dataset) -> tuple[Any, Any]:
    """Return what pydicom maps a window or a table to."""
    if "VOILUTSequence" in dataset:
        return 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    if "ModalityLUTSequence" in dataset:
        return 0, 2 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    if not dataset.WindowWidth:
        raise ValueError("no window")
    signed = dataset.PixelRepresentation
    low = -(2 ** (dataset.BitsStored - 1)) if signed else 0
    high = 2 ** (dataset.BitsStored - signed) - 1
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept
