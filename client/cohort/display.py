"""From stored pixels to what a radiologist sees: the greyscale display pipeline of PS3.3 C.7.6.3 and C.11."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi

from client.cohort.dicom_file import decode
from client.cohort.outcomes import Code, RefusedError, State

KEYWORDS = (
    "PhotometricInterpretation",
    "PixelData",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PresentationLUTShape",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
)

Grey8: TypeAlias = NDArray[np.uint8]
Grey: TypeAlias = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, what RGB to YBR_FULL uses in DICOM
_FALLBACK_PERCENTILES = (0.5, 99.5)
_PERCENTILE_SAMPLE = 512  # rows and columns at most: the percentiles of 7 Mpixel cost more than decoding them


@dataclass(frozen=True)
class Window:
    """A window in modality units with its VOI LUT function (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    centre: float
    width: float
    function: str = "LINEAR"

    def apply(self, values: Grey) -> Grey:
        """Map modality values to display values in [0, 1]."""
        offset = values - np.float32(self.centre)
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * offset / np.float32(self.width), -80, 80)  # exp(89) overflows float32
            return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float32)
        if self.function == "LINEAR":
            # Width 1 is a step at centre - 0.5; a tiny slope keeps it one formula.
            unit = (offset + np.float32(0.5)) / np.float32(max(self.width - 1, 1e-6)) + np.float32(0.5)
        else:
            unit = offset / np.float32(self.width) + np.float32(0.5)
        return np.asarray(np.clip(unit, 0, 1), dtype=np.float32)


def display_image(dataset: Dataset, *, size: int) -> tuple[Grey8, list[Code]]:
    """Turn a data set into the square grey image that is packed.

    Guarantees:
        Modality LUT, then VOI LUT or window, then inversion for MONOCHROME1 or INVERSE exactly once; grey
        levels are those of the window, never of the image's own minimum and maximum. The aspect is kept,
        the rest padded black; overlays are not drawn. Where the mapping is a window, the image is reduced
        before it is windowed: four times as fast, 0.05 of 255 grey levels apart on average.

    Args:
        dataset: Holds the attributes of ``KEYWORDS``, as far as the file has them.
        size: Side S of the result, in pixels.

    Returns:
        Grey levels, shape (S, S), and the remarks made on the way.

    Raises:
        RefusedError: The image is blank, truncated or too large.

    Source:
        PS3.3 C.7.6.3.1, C.11.1, C.11.2 and C.11.6.
    """
    stored = decode(dataset)
    if stored.ndim == 3:
        return fit_square(_unit(stored @ _LUMA, np.iinfo(stored.dtype).max), size=size), []
    padding = _padding(dataset, stored)
    if padding is not None:
        return _window_first(dataset, stored, padding, size)
    if "ModalityLUTSequence" in dataset or "VOILUTSequence" in dataset:
        return _window_first(dataset, stored, np.zeros(stored.shape, dtype=bool), size)
    reduced = _rescale(dataset, shrink(stored.astype(np.float32), size=size))
    grey, remarks = _windowed(dataset, reduced, sample=_rescale(dataset, _sample(stored)))
    return fit_square(_invert(dataset, grey), size=size), remarks


def grey_image(values: NDArray[Any], *, size: int) -> tuple[Grey8, list[Code]]:
    """Turn grey values of unknown range, shape (H, W), into the packed image by their percentiles.

    Raises:
        RefusedError: Every value is the same.
    """
    window = _percentile_window(_sample(values))
    grey = window.apply(shrink(values.astype(np.float32), size=size))
    return fit_square(grey, size=size), [Code.W_WINDOW_FALLBACK]


def shrink(values: Grey, *, size: int) -> Grey:
    """Resize to a longer side of ``size`` pixels, aspect kept; reduced by area, enlarged bilinearly."""
    height, width = values.shape
    scale = size / max(height, width)
    if scale == 1:
        return values
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(values).resize(shape, method), dtype=np.float32)


def fit_square(grey: Grey, *, size: int) -> Grey8:
    """Round grey values in [0, 1] to 8 bit in the middle of a black square of ``size`` pixels.

    Raises:
        RefusedError: Every value is the same.
    """
    grey = shrink(grey, size=size)
    levels = np.rint(grey * np.float32(255)).astype(np.uint8)
    if levels.min() == levels.max():
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    height, width = levels.shape
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size), dtype=np.uint8)
    square[top : top + height, left : left + width] = levels
    return square


def _window_first(
    dataset: Dataset, stored: NDArray[Any], padding: NDArray[np.bool_], size: int
) -> tuple[Grey8, list[Code]]:
    """Map at full size, as look-up tables and padding need: averaging first would mix what they part."""
    if padding.all():
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    values = np.asarray(apply_modality_lut(stored, dataset))
    remarks: list[Code] = []
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])  # PS3.3 C.11.2.1.1
        grey = _unit(apply_voi(values, dataset).astype(np.float32), 2**bits - 1)
    else:
        floats = values.astype(np.float32)
        grey, remarks = _windowed(dataset, floats, sample=floats[~padding])
    grey = _invert(dataset, grey)
    grey[padding] = 0  # "shall not be displayed" (PS3.3 C.7.5.1.1.2): black like the surroundings
    return fit_square(grey, size=size), remarks


def _windowed(dataset: Dataset, values: Grey, *, sample: Grey) -> tuple[Grey, list[Code]]:
    """Apply the file's first window; its percentiles where there is none or it shows nothing."""
    window = _stored_window(dataset)
    if window is not None:
        grey = window.apply(values)
        if grey.min() != grey.max():
            return grey, []
    return _percentile_window(sample).apply(values), [Code.W_WINDOW_FALLBACK]


def _stored_window(dataset: Dataset) -> Window | None:
    centre, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if centre is None or width is None or not width > 0:
        return None
    if function == "LINEAR" and width < 1:  # illegal for LINEAR (PS3.3 C.11.2.1.2.1), and it occurs
        return None
    return Window(centre, width, function)


def _percentile_window(sample: NDArray[Any]) -> Window:
    low, high = (float(bound) for bound in np.percentile(sample, _FALLBACK_PERCENTILES))
    if low == high:
        low, high = float(sample.min()), float(sample.max())
    if low == high:
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    return Window((low + high) / 2, high - low, "LINEAR_EXACT")


def _sample(values: NDArray[Any]) -> Grey:
    rows, columns = (max(1, length // _PERCENTILE_SAMPLE) for length in values.shape)
    return values[::rows, ::columns].astype(np.float32)


def _rescale(dataset: Dataset, stored: Grey) -> Grey:
    slope, intercept = _first_number(dataset, "RescaleSlope"), _first_number(dataset, "RescaleIntercept")
    if slope is None or intercept is None:
        return stored
    return stored * np.float32(slope) + np.float32(intercept)


def _invert(dataset: Dataset, grey: Grey) -> Grey:
    # One statement in two places: a DX image says both, and is still inverted once (PS3.3 C.8.11.3.1).
    inverted = (
        dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE"
    )
    return 1 - grey if inverted else grey


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    first = _first_number(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = _first_number(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    mask = (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _first_number(dataset: Dataset, keyword: str) -> float | None:
    """Return an attribute's first value, or None where it is absent, empty or no finite number."""
    value = dataset.get(keyword)
    if value is not None and not isinstance(value, (str, int, float)):
        value = value[0] if len(value) else None
    try:
        number = float(value) if value is not None else np.nan
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _unit(values: Grey, top: int) -> Grey:
    return np.asarray(np.clip(values / np.float32(top), 0, 1), dtype=np.float32)
