"""Decoding against pydicom's own decoding: every transfer syntax, every fast path, every fall-back."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder as LibraryDecoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from client.cohort import display, pixels
from client.cohort.dicom_file import read_dataset
from client.cohort.display import display_image
from client.cohort.outcomes import Code, RefusedError, State
from client.cohort.pixels import FASTEST, Frame, check_decodable, decode

Dicom = Callable[..., Dataset]


def read_back(dataset: Dataset, path: Path) -> Dataset:
    dataset.save_as(path, enforce_file_format=True)
    return read_dataset(path, keywords=display.KEYWORDS, pixels=True)[0]


def stored(dataset: Dataset) -> NDArray[Any]:
    frame = decode(dataset)
    return frame.meaningful(frame.values)


def smooth(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint16]:
    """Something like a radiograph: large shapes, an edge and noise, 12 bit."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(200, 3600, (9, 7)).astype(np.uint16)
    shapes = np.array(Image.fromarray(coarse.astype(np.float32)).resize((width, height), 3))
    shapes[height // 3 : height // 2, width // 4 : width // 2] += 400
    return np.clip(shapes + rng.normal(0, 15, shapes.shape), 0, 4095).astype(np.uint16)


def jpeg2000(dicom: Dicom, values: NDArray[Any], *, bits: int = 12, **attributes: object) -> Dataset:
    dataset = dicom(values, bits=bits, **attributes)
    dataset.PixelData = encapsulate([encode_array(values, bits_stored=bits)])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return dataset


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_every_syntax_gives_the_stored_values(dicom: Dicom, tmp_path: Path, syntax: UID, bits: int) -> None:
    dataset = dicom(bits=bits, syntax=syntax)
    np.testing.assert_array_equal(stored(read_back(dataset, tmp_path / "x")), dataset.pixel_array)


@settings(max_examples=40, deadline=None)
@given(
    container=st.sampled_from([8, 16, 32]),
    unused=st.integers(0, 7),
    signed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_unused_bits_are_dropped_and_the_sign_kept(
    dicom: Dicom, container: int, unused: int, signed: bool, seed: int
) -> None:
    raw = np.random.default_rng(seed).integers(0, 2**container, (5, 4), dtype=f"u{container // 8}")
    dataset = dicom(raw.view(f"i{container // 8}") if signed else raw, bits=container - unused)
    np.testing.assert_array_equal(stored(dataset), dataset.pixel_array)


@pytest.mark.parametrize("bits", [8, 12])
def test_big_endian_pixels_are_read(dicom: Dicom, tmp_path: Path, bits: int) -> None:
    little = dicom(bits=bits)
    values = little.pixel_array
    big = dicom(bits=bits, PixelData=values.astype(values.dtype.newbyteorder(">")).tobytes())
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    found = stored(read_back(big, tmp_path / "x"))
    np.testing.assert_array_equal(found, values)
    assert found.dtype.isnative


def test_uncompressed_pixels_are_mapped_and_not_read(dicom: Dicom, tmp_path: Path) -> None:
    dataset = read_back(dicom(), tmp_path / "x")
    assert isinstance(dataset.PixelData, memoryview)
    values = decode(dataset).values
    assert not values.flags.owndata
    assert not values.flags.writeable


def test_a_file_that_ends_early_is_truncated(dicom: Dicom, tmp_path: Path) -> None:
    path = tmp_path / "x"
    read_back(dicom(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RefusedError) as refused:
        decode(read_dataset(path, keywords=display.KEYWORDS, pixels=True)[0])
    assert refused.value.rejected.code == Code.E_TRUNCATED


def test_colour_that_ends_early_is_truncated(dicom: Dicom) -> None:
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    dataset = dicom(np.zeros((8, 8, 3), np.uint8), bits=8, **colour)
    dataset.PixelData = dataset.PixelData[:-2]
    with pytest.raises(RefusedError) as refused:
        decode(dataset)
    assert refused.value.rejected.code == Code.E_TRUNCATED


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_a_lower_resolution_of_jpeg2000_shows_the_same_image(
    dicom: Dicom, monkeypatch: pytest.MonkeyPatch, bits: int, signed: bool, halvings: int
) -> None:
    values = smooth(523, 411).astype(np.float64) / 4096 * 2**bits - (2 ** (bits - 1) if signed else 0)
    values = values.astype(("i" if signed else "u") + ("1" if bits == 8 else "2"))
    low, high = float(values.min()), float(values.max())
    window = {"WindowCenter": round((low + high) / 2), "WindowWidth": round(high - low)}
    size = int(523 / 2**halvings / 1.3)
    dataset = jpeg2000(dicom, values, bits=bits, **window)
    assert decode(dataset, longer_side=size).halvings == halvings
    fast = display_image(dataset, size=size)[0].astype(int)
    monkeypatch.setattr(pixels, "_halved", lambda *_: None)
    difference = display_image(dataset, size=size)[0] - fast
    assert np.abs(difference).mean() < 0.6  # 0.3 on radiographs: these are 50 pixels of the same shapes
    assert abs(difference.mean()) < 0.1
    assert np.percentile(np.abs(difference), 99) <= 3


def test_jpeg2000_is_decoded_whole_where_that_is_not_safe(dicom: Dicom) -> None:
    values = smooth(64, 64)
    assert decode(jpeg2000(dicom, values), longer_side=25).halvings == 1
    assert decode(jpeg2000(dicom, values), longer_side=26).halvings == 0  # not enough to spare
    assert decode(jpeg2000(dicom, values)).halvings == 0
    for padded in ({"BitsStored": 16}, {"PixelRepresentation": 1}):  # the header contradicts the stream
        assert decode(jpeg2000(dicom, values, **padded), longer_side=16).halvings == 0
    few_levels = jpeg2000(dicom, values)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG2000", no_jp2=True, num_resolutions=2)
    few_levels.PixelData = encapsulate([stream.getvalue()])
    few_levels.BitsStored = 16
    assert decode(few_levels, longer_side=8).halvings == 1  # all there are


def test_the_middle_frame_of_jpeg2000_is_decoded(dicom: Dicom) -> None:
    frames = [smooth(64, 64, seed=seed) for seed in range(3)]
    dataset = jpeg2000(dicom, frames[0], NumberOfFrames=3)
    dataset.PixelData = encapsulate([encode_array(frame, bits_stored=12) for frame in frames])
    np.testing.assert_array_equal(decode(dataset).values, frames[1])
    halved = decode(dataset, longer_side=20).values
    assert halved.shape == (32, 32)
    distances = [np.abs(halved - frame[::2, ::2]).mean() for frame in frames]
    assert int(np.argmin(distances)) == 1


def test_values_that_tables_map_are_never_averaged_first(
    dicom: Dicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def spied(dataset: Dataset, *, longer_side: int | None) -> Frame:
        asked.append(longer_side)
        return decode(dataset, longer_side=longer_side)

    monkeypatch.setattr(display, "decode", spied)
    window = {"WindowCenter": 2000, "WindowWidth": 4000}
    display_image(dicom(PixelPaddingValue=0, **window), size=16)
    display_image(dicom(**window), size=16)
    assert asked == [None, 16]


def test_the_next_plugin_is_asked_where_the_fastest_fails(
    dicom: Dicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = LibraryDecoder.as_array

    def as_array(self: LibraryDecoder, *arguments: Any, **options: Any) -> Any:
        asked.append(options["decoding_plugin"])
        if options["decoding_plugin"] == "pylibjpeg":
            raise RuntimeError("not today")
        return original(self, *arguments, **options)

    monkeypatch.setattr(LibraryDecoder, "as_array", as_array)
    dataset = dicom(syntax=RLELossless)
    assert decode(dataset).values.shape == (32, 32)
    assert asked == ["pylibjpeg", "pydicom"]


class Panic(BaseException):
    """What a library in Rust raises instead of crashing; no Exception by intention."""


def test_a_decoder_that_panics_costs_its_file_only(dicom: Dicom, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_array(self: LibraryDecoder, *arguments: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(LibraryDecoder, "as_array", as_array)
    raised: BaseException = Panic()
    with pytest.raises(ValueError, match="the decoder panicked"):
        decode(dicom(syntax=RLELossless))
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        decode(dicom(syntax=RLELossless))


@pytest.mark.parametrize("installed", [("gdcm",), ("gdcm", "pillow")])
def test_a_decoder_that_ends_its_process_is_asked_for_want_of_any_other(
    dicom: Dicom, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...]
) -> None:
    asked: list[str] = []

    def as_array(self: LibraryDecoder, *arguments: Any, decoding_plugin: str, **options: Any) -> Any:
        asked.append(decoding_plugin)
        raise RuntimeError("damaged")

    monkeypatch.setattr(LibraryDecoder, "as_array", as_array)
    monkeypatch.setattr(LibraryDecoder, "available_plugins", installed)
    with pytest.raises(RuntimeError, match="damaged"):
        decode(dicom(syntax=JPEG2000Lossless))
    assert asked == [installed[-1]]


def test_every_fastest_plugin_is_known_to_the_library() -> None:
    for syntax, fastest in FASTEST.items():
        decoder = get_decoder(syntax)
        assert fastest.plugin in (
            *decoder.available_plugins,
            *(text.split()[0] for text in decoder.missing_dependencies),
        )


def test_twelve_bit_jpeg_names_the_package_that_is_the_users_own_choice(dicom: Dicom) -> None:
    if "pylibjpeg" in get_decoder(JPEGExtended12Bit).available_plugins:
        pytest.skip("pylibjpeg-libjpeg is installed")
    dataset = dicom(PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))
    dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    with pytest.raises(RefusedError) as refused:
        decode(dataset)
    rejected = refused.value.rejected
    assert (rejected.state, rejected.code) == (State.UNSUPPORTED, Code.E_DECODER_MISSING)
    assert rejected.detail.endswith("pip install pylibjpeg-libjpeg (GPL v3)")
    dataset.BitsStored = 8
    with pytest.raises(RuntimeError, match="Unable to decode"):
        decode(dataset)


def test_video_is_a_compression_nobody_reads(dicom: Dicom) -> None:
    dataset = dicom()
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")
    with pytest.raises(RefusedError) as refused:
        check_decodable(dataset)
    assert refused.value.rejected.code == Code.E_TRANSFER_SYNTAX
    assert "MPEG2" in refused.value.rejected.detail


def test_a_compression_that_is_in_no_standard_is_not_quoted(dicom: Dicom) -> None:
    dataset = dicom()
    dataset.file_meta.TransferSyntaxUID = UID("1.2.19500102")  # a date of birth, for all anybody knows
    with pytest.raises(RefusedError) as refused:
        check_decodable(dataset)
    assert refused.value.rejected.detail == "not one of the standard"
