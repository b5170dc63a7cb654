"""Sizes that compressed frames declare."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless

from client.cohort.code_streams import coding_style, declared_pixels
from client.cohort.dicom_folder import DicomFolder
from client.cohort.outcomes import Code, Rejected, State
from tests.client.cohort.conftest import dataset_of

GREY = np.add.outer(np.arange(40), np.arange(64)).astype(np.uint8)


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_ls() -> bytes:
    dataset: Dataset = dataset_of(GREY, bits=8, syntax=JPEGLSLossless)
    return bytes(next(generate_frames(dataset.PixelData, number_of_frames=1)))


STREAMS = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True, comment=b"\xff\xc0" * 9),
    "filled": jpeg().replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1),
    "jpeg-ls": jpeg_ls(),
    "jpeg2000": bytes(encode_array(GREY)),
    "jp2": bytes(encode_array(GREY, codec_format=1)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_declares_its_size(name: str) -> None:
    assert declared_pixels(STREAMS[name]) == GREY.size


@given(name=st.sampled_from(list(STREAMS)), end=st.integers(0, 400), noise=st.binary(max_size=8))
def test_no_stream_makes_reading_raise_or_declares_less_than_nothing(
    name: str, end: int, noise: bytes
) -> None:
    damaged = STREAMS[name][:end] + noise + STREAMS[name][end + len(noise) :]
    assert declared_pixels(damaged) >= 0
    assert coding_style(damaged)[0] >= 0
    assert declared_pixels(noise) == 0


def test_a_stream_that_asks_for_more_than_an_image_may_have_is_not_decoded(tmp_path: Path) -> None:
    """Decoders make room for what the stream says, whatever the header does: gigabytes for a kilobyte."""
    side = struct.pack(">II", 20_000, 20_000)
    bomb = bytearray(STREAMS["jpeg2000"])
    bomb[8:16] = bomb[24:32] = side
    other = bytearray(STREAMS["baseline"])
    place = other.index(b"\xff\xc0")
    other[place + 5 : place + 9] = struct.pack(">HH", 20_000, 20_000)
    for stream, syntax in ((bomb, JPEG2000Lossless), (other, JPEGBaseline8Bit)):
        dataset = dataset_of(GREY, bits=8, PixelData=encapsulate([bytes(stream)]))
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "bomb.dcm", enforce_file_format=True)
        assert DicomFolder.render(tmp_path / "bomb.dcm", 16) == Rejected(State.QUARANTINED, Code.E_TOO_LARGE)
