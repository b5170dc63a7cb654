"""The display pipeline against pydicom's textbook path and the standard's own words."""

from collections.abc import Callable, Sequence
from pathlib import Path
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
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.cohort import display
from client.cohort.dicom_file import read_dataset
from client.cohort.display import Window, display_image, grey_image
from client.cohort.outcomes import Code, RefusedError, Rejected, State

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
    lut = table_of(np.rint(4095 * (np.arange(4096) / 4095) ** 2))
    dataset = dicom(VOILUTSequence=[lut], WindowCenter=100, WindowWidth=10)
    assert np.abs(display_image(dataset, size=SIZE)[0] - textbook(dataset)).max() <= 1


def table_of(values: NDArray[Any]) -> Dataset:
    lut = Dataset()
    lut.LUTDescriptor = [len(values), 0, 12]
    lut.LUTData = values.astype(int).tolist()
    lut["LUTData"].VR = "US"
    return lut


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


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_tables_are_read_where_they_are_bytes(
    dicom: Callable[..., Dataset], tmp_path: Path, syntax: UID
) -> None:
    """LUT Data may be US or OW; in an implicit file they are OW, and so they are from most CR devices."""
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"

    def table(values: NDArray[Any], bits: int, kind: str) -> Dataset:
        lut = Dataset()
        lut.LUTDescriptor = [len(values), 0, bits]
        lut["LUTDescriptor"].VR = "US"
        lut.ModalityLUTType = "US"
        lut.LUTData = values.astype(order).tobytes() if kind == "OW" else values.astype(int).tolist()
        lut["LUTData"].VR = kind
        return lut

    def shown(kind: str) -> NDArray[np.uint8]:
        modality, voi = np.arange(4095, -1, -1), np.rint(4095 * (np.arange(4096) / 4095) ** 2)
        dataset = dicom(
            syntax=ExplicitVRLittleEndian,
            ModalityLUTSequence=[table(modality, 16, kind)],
            VOILUTSequence=[table(voi, 12, kind)],
        )
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        read, _ = read_dataset(tmp_path / "a.dcm", keywords=display.KEYWORDS, pixels=True)
        image, remarks = display_image(read, size=SIZE)
        assert not remarks
        return image

    np.testing.assert_array_equal(shown("OW"), shown("US"))


def test_padding_is_black_and_does_not_move_the_percentiles(dicom: Callable[..., Dataset]) -> None:
    pixels = np.tile(np.arange(1000, 1000 + SIZE, dtype=np.uint16), (SIZE, 1))
    pixels[:, :8] = 4000
    shown, _ = display_image(
        dicom(pixels, PixelPaddingValue=4000, PhotometricInterpretation="MONOCHROME1"), size=SIZE
    )
    assert (shown[:, :8] == 0).all()
    assert shown[0, 8] == 255
    assert shown[0, 9] < 255


def test_padding_of_signed_pixels_is_found(dicom: Callable[..., Dataset]) -> None:
    pixels = np.tile(np.arange(-1000, -1000 + SIZE, dtype=np.int16), (SIZE, 1))
    pixels[0] = -2000
    dataset = dicom(pixels, bits=16, PixelPaddingValue=-2000, WindowCenter=-990, WindowWidth=10)
    shown, _ = display_image(dataset, size=SIZE)
    assert (shown[0] == 0).all()
    assert shown[1].max() == 255


def test_padding_that_is_everything_is_blank(dicom: Callable[..., Dataset]) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(dicom(PixelPaddingValue=0, PixelPaddingRangeLimit=4095), size=SIZE)
    assert refused.value.rejected.code == Code.E_BLANK


def test_a_window_is_chosen_by_its_index(dicom: Callable[..., Dataset]) -> None:
    several = dicom(WindowCenter=[2048, 1000, 99], WindowWidth=[4096, 500, 10])
    for index, window in ((0, (2048, 4096)), (1, (1000, 500)), (7, (2048, 4096))):
        alone = dicom(WindowCenter=window[0], WindowWidth=window[1])
        np.testing.assert_array_equal(
            display_image(several, size=SIZE, index=index)[0], display_image(alone, size=SIZE)[0]
        )


def test_a_voi_lut_is_chosen_by_its_index(dicom: Callable[..., Dataset]) -> None:
    tables = [table_of(np.arange(4096)), table_of(np.arange(4096)[::-1])]
    shown = [display_image(dicom(VOILUTSequence=tables), size=SIZE, index=index)[0] for index in (0, 1, 2)]
    assert np.abs(shown[0].astype(int) + shown[1] - 255).max() <= 1
    np.testing.assert_array_equal(shown[0], shown[2])


def enhanced(dicom: Callable[..., Dataset], *, shared: Sequence[str]) -> Dataset:
    """Three frames, each with a transformation of its own, of which some may stand among the shared ones."""
    frames = np.stack([dicom().pixel_array + 300 * number for number in range(3)]).astype(np.uint16)
    dataset = dicom(frames[1], NumberOfFrames=3, PixelData=frames.tobytes())
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [Dataset()], []
    for number in range(3):
        rescale, window, group = Dataset(), Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 2, -100 * number, "US"
        window.WindowCenter, window.WindowWidth = 3000 + number, 2500
        for name, macro in (
            ("PixelValueTransformationSequence", rescale),
            ("FrameVOILUTSequence", window),
        ):
            if name not in shared:
                setattr(group, name, [macro])
            elif number == 1:
                setattr(dataset.SharedFunctionalGroupsSequence[0], name, [macro])
        dataset.PerFrameFunctionalGroupsSequence.append(group)
    return dataset


@pytest.mark.parametrize(
    "shared",
    [[], ["FrameVOILUTSequence"], ["PixelValueTransformationSequence", "FrameVOILUTSequence"]],
)
def test_enhanced_objects_have_their_attributes_in_groups(
    dicom: Callable[..., Dataset], shared: Sequence[str]
) -> None:
    plain = dicom(
        (dicom().pixel_array + 300).astype(np.uint16),
        RescaleSlope=2,
        RescaleIntercept=-100,
        WindowCenter=3001,
        WindowWidth=2500,
    )
    shown, remarks = display_image(enhanced(dicom, shared=shared), size=SIZE)
    np.testing.assert_array_equal(shown, display_image(plain, size=SIZE)[0])
    assert not remarks


def computed_tomography(dicom: Callable[..., Dataset], **attributes: object) -> Dataset:
    pixels = np.tile(np.linspace(0, 3000, SIZE), (SIZE, 1)).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 9, "WindowWidth": 2}
    return dicom(pixels, SOPClassUID=CTImageStorage, **{**rescale, **attributes})


LUNG, MEDIASTINUM, BONE = Window(-600, 1500), Window(40, 400), Window(600, 2800)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("windows", "channels"),
    [
        ([LUNG, MEDIASTINUM, BONE], [LUNG, MEDIASTINUM, BONE]),
        ([BONE, LUNG, MEDIASTINUM], [BONE, LUNG, MEDIASTINUM]),
        ([MEDIASTINUM, LUNG], [MEDIASTINUM, LUNG, LUNG]),
    ],
)
def test_each_window_of_ct_is_a_channel_in_their_order(
    windows: list[Window], channels: list[Window], padded: bool, dicom: Callable[..., Dataset]
) -> None:
    """With padding, stored values are mapped one by one; without, they are averaged first."""
    padding = {"PixelPaddingValue": 0} if padded else {}
    slice_of_ct = computed_tomography(dicom, **padding)
    shown, remarks = display_image(slice_of_ct, size=SIZE, ct_windows=windows, bits=16)
    assert shown.shape == (SIZE, SIZE, 3)
    hounsfield = np.linspace(0, 3000, SIZE).astype(np.uint16).astype(np.float32) - 1024
    expected = np.stack([window.apply(hounsfield) for window in channels], axis=-1) * 65535
    expected[0] *= not padded  # black in every channel
    assert np.abs(shown[0] - expected).max() <= 1
    assert not remarks


def test_one_window_of_ct_is_a_grey_image(dicom: Callable[..., Dataset]) -> None:
    shown, _ = display_image(computed_tomography(dicom), size=SIZE, ct_windows=[LUNG], bits=16)
    hounsfield = np.linspace(0, 3000, SIZE).astype(np.uint16).astype(np.float32) - 1024
    assert shown.shape == (SIZE, SIZE)
    assert np.abs(shown[0] - LUNG.apply(hounsfield) * 65535).max() <= 1


def test_a_slice_of_which_one_window_shows_nothing_is_not_blank(dicom: Callable[..., Dataset]) -> None:
    nothing = Window(20_000, 100)
    shown, _ = display_image(computed_tomography(dicom), size=SIZE, ct_windows=[nothing, LUNG])
    assert not shown[..., 0].any()
    assert shown[..., 1].any()
    with pytest.raises(RefusedError) as refused:
        display_image(computed_tomography(dicom), size=SIZE, ct_windows=[nothing, Window(-20_000, 100)])
    assert refused.value.rejected == Rejected(State.QUARANTINED, Code.E_BLANK)


def test_a_slice_that_is_no_square_is_padded_in_every_channel(dicom: Callable[..., Dataset]) -> None:
    wide = np.tile(np.linspace(500, 2000, 2 * SIZE), (SIZE, 1)).astype(np.uint16)
    told = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    dataset = dicom(wide, SOPClassUID=CTImageStorage, **told)
    shown, _ = display_image(dataset, size=SIZE, ct_windows=[LUNG, MEDIASTINUM, BONE])
    for channel, window in enumerate((LUNG, MEDIASTINUM, BONE)):
        alone, _ = display_image(dataset, size=SIZE, ct_windows=[window])
        np.testing.assert_array_equal(shown[..., channel], alone)
    assert not shown[: SIZE // 4].any()


@pytest.mark.parametrize("windows", [[MEDIASTINUM], [LUNG, MEDIASTINUM], [LUNG, MEDIASTINUM, BONE]])
def test_other_images_keep_their_own_window_beside_ct(
    windows: list[Window], dicom: Callable[..., Dataset]
) -> None:
    dataset = dicom(WindowCenter=2000, WindowWidth=3000)
    grey, _ = display_image(dataset, size=SIZE)
    with_windows, _ = display_image(dataset, size=SIZE, ct_windows=windows)
    assert with_windows.ndim == (2 if len(windows) == 1 else 3)
    for channel in np.moveaxis(np.atleast_3d(with_windows), -1, 0):
        np.testing.assert_array_equal(channel, grey)


@pytest.mark.parametrize("wrong", [{"RescaleIntercept": ""}, {"RescaleType": "US"}])
def test_ct_without_hounsfield_units_is_refused(dicom: Callable[..., Dataset], wrong: dict[str, str]) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(computed_tomography(dicom, **wrong), size=SIZE, ct_windows=[Window(40, 400)])
    assert refused.value.rejected == Rejected(State.QUARANTINED, Code.E_TAG_MISSING, "RescaleIntercept")


def test_sixteen_bit_keep_what_eight_round(dicom: Callable[..., Dataset]) -> None:
    dataset = dicom(WindowCenter=2000, WindowWidth=3000)
    eight, _ = display_image(dataset, size=SIZE)
    sixteen, _ = display_image(dataset, size=SIZE, bits=16)
    assert eight.dtype == np.uint8
    assert sixteen.dtype == np.uint16
    assert np.abs(eight * 257.0 - sixteen).max() <= 129
    assert len(np.unique(sixteen)) > len(np.unique(eight))


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


@pytest.mark.parametrize("bits", [8, 12])
def test_palette_colours_become_luminance(dicom: Callable[..., Dataset], bits: int) -> None:
    entries = 2**bits
    palette: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        ramp = np.linspace(0, 65535, entries) * (colour == "Green")
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [entries, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = ramp.astype("<u2").tobytes()
    dataset = dicom(bits=bits, **palette)
    shown, _ = display_image(dataset, size=SIZE)
    expected = 0.587 * 255 * dataset.pixel_array / (entries - 1)
    assert np.abs(shown - expected).max() <= 1


def test_colour_of_twelve_bit_has_its_own_white(dicom: Callable[..., Dataset]) -> None:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint16)
    pixels[:, :16] = 4095
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    assert display_image(dicom(pixels, **colour), size=SIZE)[0].max() == 255


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


@pytest.mark.parametrize(
    "sizes",
    [
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 10000, "Columns": 10000, "BitsAllocated": 32},
        {"Rows": 10000, "Columns": 9000, "SamplesPerPixel": 3},
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(
    dicom: Callable[..., Dataset], sizes: dict[str, int]
) -> None:
    with pytest.raises(RefusedError) as refused:
        display_image(dicom(**sizes), size=SIZE)
    assert refused.value.rejected.code == Code.E_TOO_LARGE


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
