"""The stored values of one frame, by the cheapest way that its transfer syntax allows."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, get_decoder
from pydicom.pixels.utils import get_j2k_parameters
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from client.cohort.code_streams import coding_style, declared_pixels
from client.cohort.dicom_file import uid_name
from client.cohort.outcomes import Code, RefusedError, State

KEYWORDS = (
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "HighBit",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "PixelData",
    "PixelRepresentation",
    "PlanarConfiguration",
    "Rows",
    "SamplesPerPixel",
    *(
        f"{form}{colour}PaletteColorLookupTable{part}"
        for form, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
        for colour in ("Red", "Green", "Blue")
    ),
)
MAX_PIXELS = 100_000_000  # twice the largest mammogram; a lying header asks for more
MAX_FRAME_BYTES = 2 * MAX_PIXELS  # a decoder holds a frame several times, and memory stays below 1 GB


@dataclass(frozen=True)
class Decoder:
    """The fastest of pydicom's plugins for a transfer syntax, and the package that brings it."""

    plugin: str
    package: str


# Measured on one 2544 x 3056 radiograph, ms: RLE pylibjpeg 15, pydicom 88; JPEG-LS pyjpegls 143, gdcm 214;
# JPEG lossless gdcm 203, libjpeg 293; JPEG 2000 openjpeg 717, pillow 725, gdcm 869.
_OPENJPEG = Decoder("pylibjpeg", "pylibjpeg-openjpeg")
FASTEST: Mapping[UID, Decoder] = {
    RLELossless: Decoder("pylibjpeg", "pylibjpeg-rle"),
    JPEGBaseline8Bit: Decoder("pillow", "pillow"),
    # The one decoder of 12 bit that there is has the GPL: the user's own choice, never ours.
    JPEGExtended12Bit: Decoder("pylibjpeg", "pylibjpeg-libjpeg (GPL v3)"),
    JPEGLossless: Decoder("gdcm", "python-gdcm"),
    JPEGLosslessSV1: Decoder("gdcm", "python-gdcm"),
    JPEGLSLossless: Decoder("pyjpegls", "pyjpegls"),
    JPEGLSNearLossless: Decoder("pyjpegls", "pyjpegls"),
    JPEG2000Lossless: _OPENJPEG,
    JPEG2000: _OPENJPEG,
    HTJ2KLossless: _OPENJPEG,
    HTJ2KLosslessRPCL: _OPENJPEG,
    HTJ2K: _OPENJPEG,
}
LITTLE_ENDIAN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
_NATIVE = (*LITTLE_ENDIAN, ExplicitVRBigEndian)
_SPARE = 1.25  # pixels to spare at a lower resolution: with none the filter's edge shows, 0.5 grey levels
_ROUNDED_UP = 0.5  # what the integer wavelet adds to a mean at each level, in stored values: measured 0.48
_TABLES_OF_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Frame:
    """One frame as it is stored, perhaps still in its file.

    Attributes:
        values: Shape (H, W), or RGB of shape (H, W, 3); float32 where there are ``halvings``.
        shape: Rows and columns of the frame itself.
        halvings: k where ``values`` are the frame's averages around every 2^k-th row and column, 0 where
            they are the frame.
        unused_bits: High bits of each value that mean nothing; ``meaningful`` drops them.
        top: The largest value a pixel may have.
    """

    values: NDArray[Any]
    shape: tuple[int, int]
    halvings: int = 0
    unused_bits: int = 0
    top: int

    def meaningful(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return some of ``values`` without their unused bits, sign kept (PS3.5 8.1.1)."""
        return (values << self.unused_bits) >> self.unused_bits if self.unused_bits else values


def check_decodable(dataset: Dataset) -> None:
    """Refuse pixels that nothing installed here can decode.

    Raises:
        RefusedError: The transfer syntax is unknown (video, say) or its decoder is not installed.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RefusedError(State.UNSUPPORTED, Code.E_TRANSFER_SYNTAX, uid_name(syntax)) from None
    if not decoder.is_available:
        raise _decoder_missing(syntax)


def frame_count(dataset: Dataset) -> int:
    """Return the number of frames, 1 where the attribute is absent or empty."""
    return int(dataset.get("NumberOfFrames") or 1)


def decode(dataset: Dataset, *, longer_side: int | None = None) -> Frame:
    """Decode one frame, the middle one where there are several.

    Args:
        dataset: Holds the attributes of ``KEYWORDS``, as far as the file has them.
        longer_side: Pixels that are enough. JPEG 2000 is then decoded at a half, a quarter and so on of its
            size, as far as a quarter more pixels remain: a fortieth of the time at an eighth.

    Raises:
        RefusedError: The pixels are absent, too many or too few, or their decoder is missing.
        Exception: Whatever a decoder raises on a broken stream.
    """
    if "PixelData" not in dataset:
        raise RefusedError(State.QUARANTINED, Code.E_TAG_MISSING, "PixelData")
    shape = int(dataset.Rows), int(dataset.Columns)
    if shape[0] * shape[1] > MAX_PIXELS or _frame_bytes(dataset) > MAX_FRAME_BYTES:
        raise RefusedError(State.QUARANTINED, Code.E_TOO_LARGE)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _NATIVE:
        _refuse_truncated(dataset)
    elif declared_pixels(_stream(dataset)) > MAX_PIXELS:
        raise RefusedError(State.QUARANTINED, Code.E_TOO_LARGE)
    palette = dataset.PhotometricInterpretation == "PALETTE COLOR"
    frame = None
    if syntax in LITTLE_ENDIAN:
        frame = _in_place(dataset, shape)
    elif syntax in (JPEG2000Lossless, JPEG2000) and longer_side is not None and not palette:
        frame = _halved(dataset, shape, longer_side)
    if frame is None:
        values = _by_plugin(dataset)
        frame = Frame(values=values, shape=shape, top=2 ** int(dataset.BitsStored) - 1)
    if palette:
        colours = apply_color_lut(frame.meaningful(frame.values), dataset)
        return Frame(values=colours, shape=shape, top=np.iinfo(colours.dtype).max)
    return frame


def _frame_bytes(dataset: Dataset) -> int:
    samples = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel", 1))
    return samples * int(dataset.BitsAllocated) // 8


def _refuse_truncated(dataset: Dataset) -> None:
    # PS3.3 C.7.6.3.1.2: two samples of YBR_FULL_422 stand for three.
    halved = dataset.PhotometricInterpretation == "YBR_FULL_422"
    samples = 2 if halved else int(dataset.get("SamplesPerPixel", 1))
    count = int(dataset.Rows) * int(dataset.Columns) * frame_count(dataset) * samples
    if len(dataset.PixelData) < count * int(dataset.BitsAllocated) // 8:
        raise RefusedError(State.QUARANTINED, Code.E_TRUNCATED)


def _in_place(dataset: Dataset, shape: tuple[int, int]) -> Frame | None:
    """View the frame in the bytes it lies in; None where they are no plain grey integers."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    one_sample = int(dataset.get("SamplesPerPixel", 1)) == 1
    grey = dataset.PhotometricInterpretation in _TABLES_OF_GREY
    if not (one_sample and grey and allocated in (8, 16, 32) and 1 <= stored <= allocated):
        return None
    kind = "i" if dataset.get("PixelRepresentation") == 1 else "u"
    count = shape[0] * shape[1]
    values = np.frombuffer(
        dataset.PixelData,
        dtype=f"<{kind}{allocated // 8}",
        count=count,
        offset=frame_count(dataset) // 2 * count * allocated // 8,
    )
    return Frame(values=values.reshape(shape), shape=shape, unused_bits=allocated - stored, top=2**stored - 1)


def _halved(dataset: Dataset, shape: tuple[int, int], longer_side: int) -> Frame | None:
    """Decode JPEG 2000 without the wavelet levels nobody will see; None where that is not safe.

    Source:
        ISO/IEC 15444-1 Annex A.6.1 (coding style), B.5 (resolutions) and F.3 (inverse transformation).
    """
    halvings = int(np.log2(max(1, max(shape) / (_SPARE * longer_side))))
    if halvings == 0 or int(dataset.get("SamplesPerPixel", 1)) != 1:
        return None
    stream = _stream(dataset)
    signed, stored = dataset.get("PixelRepresentation") == 1, int(dataset.BitsStored)
    found = get_j2k_parameters(stream)
    if (found.get("is_signed"), found.get("precision"), found.get("jp2")) != (signed, stored, False):
        return None  # header and code stream disagree: pydicom knows which to trust
    levels, reversible = coding_style(stream)
    halvings = min(halvings, levels)
    size = tuple(-(-length // 2**halvings) for length in shape)
    try:
        with Image.open(io.BytesIO(stream), formats=["JPEG2000"]) as image:
            # Pillow halves sizes to the nearest, OpenJPEG to the next, and then Pillow refuses the answer.
            image._size = size[1] << halvings, size[0] << halvings
            image.reduce = halvings  # type: ignore[method-assign, assignment]
            levels_shown = np.asarray(image)
    except (OSError, ValueError, SyntaxError):
        return None
    if levels_shown.shape != size or levels_shown.dtype not in (np.uint8, np.uint16):
        return None
    # Pillow lifts signed values above zero, and all of them to the high end of 8 or 16 bits.
    values = (levels_shown >> (8 * levels_shown.itemsize - stored)).astype(np.float32)
    values -= (2 ** (stored - 1) if signed else 0) + (_ROUNDED_UP * halvings if reversible else 0)
    return Frame(values=values, shape=shape, halvings=halvings, top=2**stored - 1)


def _stream(dataset: Dataset) -> bytes:
    """Return the compressed bytes of the middle frame."""
    frames = frame_count(dataset)
    offsets, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    extended = (offsets, lengths) if offsets and lengths else None
    stream: bytes = get_frame(
        dataset.PixelData, frames // 2, number_of_frames=frames, extended_offsets=extended
    )
    return stream


def _by_plugin(dataset: Dataset) -> NDArray[Any]:
    """Decode with the fastest plugin that is installed, then with the others in turn."""
    syntax = dataset.file_meta.TransferSyntaxUID
    decoder, index = get_decoder(syntax), frame_count(dataset) // 2
    installed = decoder.available_plugins
    fastest = FASTEST[syntax].plugin if syntax in FASTEST else ""
    # GDCM ends the process on many a damaged stream, and reads none that all the others refuse.
    safe = [plugin for plugin in installed if plugin != "gdcm"] or installed
    for plugin in sorted(safe, key=lambda name: name != fastest) or ("",):  # "": none is needed
        try:
            values, _ = decoder.as_array(dataset, index=index, decoding_plugin=plugin)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # pylibjpeg's decoders in Rust panic, and a panic is no Exception
            failure = error if isinstance(error, Exception) else ValueError("the decoder panicked")
        else:
            return np.asarray(values, dtype=values.dtype.newbyteorder("="))
    if syntax == JPEGExtended12Bit and int(dataset.BitsStored) > 8 and fastest not in installed:
        raise _decoder_missing(syntax)
    raise failure


def _decoder_missing(syntax: UID) -> RefusedError:
    needed = FASTEST.get(syntax)
    remedy = f": pip install {needed.package}" if needed else ""
    return RefusedError(State.UNSUPPORTED, Code.E_DECODER_MISSING, f"{syntax.name}{remedy}")
