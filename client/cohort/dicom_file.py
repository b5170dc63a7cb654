"""One DICOM file: read whatever was written, decode its pixels, and stay quiet about it."""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from client.cohort.outcomes import Code, RefusedError, State

MAX_PIXELS = 100_000_000  # twice the largest mammogram; a lying header asks for more

# pydicom tries plugins by name; measured on one 2544 x 3056 radiograph: RLE pylibjpeg 15 ms, pydicom 88;
# JPEG-LS pyjpegls 143, gdcm 214; JPEG 2000 openjpeg 717, pillow 725, gdcm 869. Others have one decoder only.
FASTEST_PLUGIN: Mapping[UID, str] = {
    RLELossless: "pylibjpeg",
    JPEGBaseline8Bit: "pillow",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
}
_NATIVE = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_PREFIX_OFFSET, _PREFIX = 128, b"DICM"  # PS3.10 7.1
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")  # 0002, 0008, and 0008 big endian


def read_dataset(path: Path, *, keywords: Collection[str], pixels: bool) -> tuple[Dataset, list[Code]]:
    """Read the named attributes of a file and no others.

    A file without the DICM prefix is read all the same when it begins like a data set.

    Returns:
        The data set, and the remarks made while reading.

    Raises:
        RefusedError: The file is empty or not DICOM.
    """
    remarks: list[Code] = []
    with open(path, "rb") as file:
        head = file.read(_PREFIX_OFFSET + len(_PREFIX))
        if not head:
            raise RefusedError(State.QUARANTINED, Code.E_EMPTY_FILE)
        if head[_PREFIX_OFFSET:] != _PREFIX:
            if not head.startswith(_FIRST_GROUPS):
                raise RefusedError(State.IGNORED, Code.E_NOT_DICOM)
            remarks.append(Code.W_NO_PREFIX)
        file.seek(0)
        dataset = dcmread(file, force=True, stop_before_pixels=not pixels, specific_tags=list(keywords))
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset, remarks


def check_decodable(dataset: Dataset) -> None:
    """Refuse pixels that nothing installed here can decode.

    Raises:
        RefusedError: The transfer syntax is unknown (video, say) or its decoder is not installed.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RefusedError(State.UNSUPPORTED, Code.E_TRANSFER_SYNTAX, str(syntax.name)) from None
    if not decoder.is_available:
        raise RefusedError(State.UNSUPPORTED, Code.E_DECODER_MISSING, str(syntax.name))


def decode(dataset: Dataset) -> NDArray[Any]:
    """Decode one frame, the middle one where there are several.

    Returns:
        Stored values, shape (H, W), or RGB, shape (H, W, 3).

    Raises:
        RefusedError: The pixels are absent, too many or too few.
        Exception: Whatever a decoder raises on a broken stream.
    """
    if "PixelData" not in dataset:
        raise RefusedError(State.QUARANTINED, Code.E_TAG_MISSING, "PixelData")
    pixels = int(dataset.Rows) * int(dataset.Columns)
    if pixels > MAX_PIXELS:
        raise RefusedError(State.QUARANTINED, Code.E_TOO_LARGE)
    frames = frame_count(dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    samples = int(dataset.get("SamplesPerPixel", 1))
    if syntax in _NATIVE and samples == 1:
        expected_bytes = pixels * frames * int(dataset.BitsAllocated) // 8
        if len(dataset.PixelData) < expected_bytes:
            raise RefusedError(State.QUARANTINED, Code.E_TRUNCATED)
    decoder = get_decoder(syntax)
    plugin = FASTEST_PLUGIN.get(syntax, "")
    array, _ = decoder.as_array(
        dataset,
        index=frames // 2,
        decoding_plugin=plugin if plugin in decoder.available_plugins else "",
    )
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
    return np.asarray(array)


def frame_count(dataset: Dataset) -> int:
    """Return the number of frames, 1 where the attribute is absent or empty."""
    return int(dataset.get("NumberOfFrames") or 1)


@contextmanager
def quietly(remarks: list[Code]) -> Iterator[None]:
    """Turn pydicom's warnings into remarks and hold back its log: both quote values from the file."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.disabled = was_disabled
    texts = (str(warning.message).lower() for warning in caught)
    found = {Code.W_CHARSET if "encoding" in text or "charset" in text else Code.W_HEADER for text in texts}
    remarks.extend(sorted(found))
