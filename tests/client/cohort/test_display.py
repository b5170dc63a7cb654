"""The display pipeline against pydicom's textbook path and the standard's own words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.cohort.display import Window, display_image, grey_image
from client.cohort.outcomes import Code, RefusedError
from client.cohort.resizing import fit_square, shrink

SIZE = 32


def textbook(dataset: Dataset) -> NDArray[np.float64]:
    """Grey levels by pydicom's own functions, at full size: 0 to 255 over the range they document."""
    values = apply_modality_lut(dataset.pixel_array, dataset)
    shown = np.asarray(apply_voi_lut(values, dataset), dtype=np.float64)
    signed = dataset.PixelRepresentation
    low, high = (-(2 ** (dataset.BitsStored - 1)) if signed else 0), 2 ** (dataset.BitsStored - signed) - 1
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    if "VOILUTSequence" in dataset:
        low, high, slope, intercept = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1, 1, 0
    grey = (shown - (low * slope + intercept)) / ((high - low) * slope) * 255
    return np.asarray(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 10, 12, 14, 16]),
    signed=st.booleans(),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    slope=st.sampled_from([None, 1.0, 2.5]),
    centre=st.floats(0.1, 0.9),
    width=st.floats(0.05, 2),
)
def test_windowed_images_equal_the_textbook(
    dicom: Callable[..., Dataset],
    bits: int,
    signed: bool,
    photometric: str,
    function: str,
    slope: float | None,
    centre: float,
    width: float,
) -> None:
    stored = np.linspace(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1, SIZE * SIZE)
    kind = ("i" if signed else "u") + ("1" if bits == 8 else "2")
    pixels = np.rint(stored).astype(kind).reshape(SIZE, SIZE)
    rescale = {} if slope is None else {"RescaleSlope": slope, "RescaleIntercept": -1024.0}
    scale, offset = (1.0, 0.0) if slope is None else (slope, -1024.0)
    dataset = dicom(
        pixels,
        bits=bits,
        PhotometricInterpretation=photometric,
        VOILUTFunction=function,
        WindowCenter=round(float(stored[0] + centre * 2**bits) * scale + offset, 2),
        WindowWidth=round(width * 2**bits * scale, 2),
        **rescale,
    )
    shown, remarks = display_image(dataset, size=SIZE)
    assert np.abs(shown - textbook(dataset)).max() <= 1
    assert not remarks


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_reduced_images_stay_near_the_textbook(dicom: Callable[..., Dataset], photometric: str) -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 4096, (16, 16)), np.ones((12, 12)))
    pixels = np.clip(smooth + rng.normal(0, 40, smooth.shape), 0, 4095).astype(np.uint16)
    dataset = dicom(pixels, PhotometricInterpretation=photometric, WindowCenter=2000, WindowWidth=3000)
    reduced = Image.fromarray(textbook(dataset).astype(np.float32)).resize((64, 64), Image.Resampling.BOX)
    difference = np.abs(display_image(dataset, size=64)[0] - np.asarray(reduced))
    assert difference.mean() < 1
    assert difference.max() <= 9


def test_first_of_several_windows_is_used(dicom: Callable[..., Dataset]) -> None:
    several = dicom(WindowCenter=[2048, 100], WindowWidth=[4096, 10])
    one = dicom(WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(display_image(several, size=SIZE)[0], display_image(one, size=SIZE)[0])


def test_monochrome1_is_inverted_exactly_once(dicom: Callable[..., Dataset]) -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain, _ = display_image(dicom(**window), size=SIZE)
    for inversion in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ):
        inverted, _ = display_image(dicom(**window, **inversion), size=SIZE)
        assert np.abs(inverted.astype(int) + plain - 255).max() <= 1


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 2048},
        {"WindowCenter": 2048, "WindowWidth": 0},
        {"WindowCenter": 2048, "WindowWidth": 0.5},
        {"WindowCenter": -90000, "WindowWidth": 100},
        {"WindowCenter": 90000, "WindowWidth": 100},
    ],
)
def test_a_window_that_shows_nothing_falls_back_to_percentiles(
    dicom: Callable[..., Dataset], window: dict[str, float]
) -> None:
    shown, remarks = display_image(dicom(**window), size=SIZE)
    assert remarks == [Code.W_WINDOW_FALLBACK]
    assert shown.min() == 0
    assert shown.max() == 255
    assert len(np.unique(shown)) > 100


def test_window_of_width_one_is_a_step(dicom: Callable[..., Dataset]) -> None:
    shown, _ = display_image(dicom(WindowCenter=2000, WindowWidth=1), size=SIZE)
    stored = dicom().pixel_array
    np.testing.assert_array_equal(shown, np.where(stored > 1999.5, 255, 0))


def test_voi_lut_goes_before_the_window(dicom: Callable[..., Dataset]) -> None:
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 12]
    lut.LUTData = np.rint(4095 * (np.arange(4096) / 4095) ** 2).astype(np.uint16).tolist()
    lut["LUTData"].VR = "US"
    dataset = dicom(VOILUTSequence=[lut], WindowCenter=100, WindowWidth=10)
    assert np.abs(display_image(dataset, size=SIZE)[0] - textbook(dataset)).max() <= 1


def test_modality_lut_is_applied(dicom: Callable[..., Dataset]) -> None:
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 16]
    lut.LUTData = np.arange(4095, -1, -1).tolist()
    lut["LUTData"].VR = "US"
    lut.ModalityLUTType = "US"
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    mapped, _ = display_image(dicom(ModalityLUTSequence=[lut], **window), size=SIZE)
    plain, _ = display_image(dicom(**window), size=SIZE)
    assert np.abs(mapped.astype(int) + plain - 255).max() <= 1


def test_padding_is_black_and_does_not_move_the_percentiles(dicom: Callable[..., Dataset]) -> None:
    pixels = np.tile(np.arange(1000, 1000 + SIZE, dtype=np.uint16), (SIZE, 1))
    pixels[:, :8] = 4000
    shown, _ = display_image(
        dicom(pixels, PixelPaddingValue=4000, PhotometricInterpretation="MONOCHROME1"), size=SIZE
    )
    assert (shown[:, :8] == 0).all()
    assert shown[0, 8] == 255
    assert shown[0, 9] < 255


def test_padding_range_has_two_ends(dicom: Callable[..., Dataset]) -> None:
    dataset = dicom(PixelPaddingValue=0, PixelPaddingRangeLimit=2000, WindowCenter=0, WindowWidth=10)
    shown, _ = display_image(dataset, size=SIZE)
    np.testing.assert_array_equal(shown, np.where(dicom().pixel_array > 2000, 255, 0))


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless],
)
def test_lossless_compressions_change_nothing(dicom: Callable[..., Dataset], syntax: Any) -> None:
    window = {"WindowCenter": 1000, "WindowWidth": 900}
    packed, _ = display_image(dicom(syntax=syntax, **window), size=SIZE)
    plain, _ = display_image(dicom(**window), size=SIZE)
    np.testing.assert_array_equal(packed, plain)


def test_colour_becomes_luminance(dicom: Callable[..., Dataset]) -> None:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:, :16, 0] = 255
    pixels[:, 16:, 1] = 255
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    shown, _ = display_image(dicom(pixels, bits=8, **colour), size=SIZE)
    assert shown[0, 0] == 76  # 0.299 x 255
    assert shown[0, 31] == 150  # 0.587 x 255


def test_middle_frame_stands_for_many(dicom: Callable[..., Dataset]) -> None:
    frames = np.stack(
        [np.full((SIZE, SIZE), 7), np.arange(SIZE * SIZE).reshape(SIZE, SIZE), np.zeros((SIZE, SIZE))]
    )
    dataset = dicom(
        frames[1].astype(np.uint16), NumberOfFrames=3, PixelData=frames.astype(np.uint16).tobytes()
    )
    assert display_image(dataset, size=SIZE)[0].max() == 255


@pytest.mark.parametrize("padding", [{}, {"PixelPaddingValue": 7}])
def test_constant_images_are_blank(dicom: Callable[..., Dataset], padding: dict[str, int]) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(dicom(np.full((SIZE, SIZE), 7, np.uint16), **padding), size=SIZE)
    assert refused.value.rejected.code == Code.E_BLANK


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_too_few_bytes_are_truncated(dicom: Callable[..., Dataset], syntax: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(dicom(syntax=syntax, PixelData=bytes(100)), size=SIZE)
    assert refused.value.rejected.code == Code.E_TRUNCATED


def test_absurd_sizes_are_refused_before_memory_is_asked_for(dicom: Callable[..., Dataset]) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(dicom(Rows=65535, Columns=65535), size=SIZE)
    assert refused.value.rejected.code == Code.E_TOO_LARGE


@given(height=st.integers(2, 90), width=st.integers(2, 90), size=st.sampled_from([16, 33, 64]))
def test_aspect_is_kept_and_the_rest_is_black(height: int, width: int, size: int) -> None:
    grey = np.linspace(0.5, 1, height * width, dtype=np.float32).reshape(height, width)
    square = fit_square(grey, size=size)
    assert square.shape == (size, size)
    rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
    scale = size / max(height, width)
    assert len(rows) == max(1, round(height * scale))
    assert len(columns) == max(1, round(width * scale))
    assert abs(rows[0] - (size - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (size - 1 - columns[-1])) <= 1


def test_reduction_keeps_the_mean() -> None:
    values = np.random.default_rng(0).random((120, 240)).astype(np.float32)
    assert shrink(values, size=24).mean() == pytest.approx(values.mean(), abs=1e-5)


def test_sixteen_bit_values_of_unknown_range_use_percentiles() -> None:
    shown, remarks = grey_image(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60, size=32)
    assert (shown.min(), shown.max(), remarks) == (0, 255, [Code.W_WINDOW_FALLBACK])


def test_mostly_constant_values_still_show_the_rest() -> None:
    values = np.zeros((64, 64), dtype=np.uint16)
    values[3, 3:5] = 9
    assert grey_image(values, size=64)[0].max() == 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), width=st.floats(1, 1e5))
def test_windows_stay_in_the_unit_interval_and_keep_the_order(
    function: str, values: list[float], width: float
) -> None:
    shown = Window(10.0, width, function).apply(np.sort(np.array(values, dtype=np.float32)))
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert (np.diff(shown) >= 0).all()
