"""From stored pixels to what a radiologist sees: the greyscale display pipeline of PS3.3 C.7.6.3 and C.11."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage

from client.cohort import pixels
from client.cohort.outcomes import Code, RefusedError, State
from client.cohort.pixels import Frame, decode, frame_count
from client.cohort.resizing import Grey, Grey8, Grey16, fit_square, is_blank, shrink, shrink_frame

_SHOWN = (
    "PhotometricInterpretation",
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
    "RescaleType",
)
_FRAME_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
KEYWORDS = (*pixels.KEYWORDS, *_SHOWN, _SHARED, _PER_FRAME, "SOPClassUID")
CT_CLASSES = frozenset({CTImageStorage, EnhancedCTImageStorage})

T = TypeVar("T")
Transformation: TypeAlias = Callable[[NDArray[Any]], Grey]

CHANNELS = 3  # of an image tower's input

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


@overload
def display_image(
    dataset: Dataset, *, size: int, index: int = 0, ct_windows: Sequence[Window] = ()
) -> tuple[Grey8, list[Code]]: ...


@overload
def display_image(
    dataset: Dataset, *, size: int, index: int = 0, ct_windows: Sequence[Window] = (), bits: Literal[8, 16]
) -> tuple[Grey8 | Grey16, list[Code]]: ...


def display_image(
    dataset: Dataset,
    *,
    size: int,
    index: int = 0,
    ct_windows: Sequence[Window] = (),
    bits: Literal[8, 16] = 8,
) -> tuple[Grey8 | Grey16, list[Code]]:
    """Turn a data set into the square image that is packed.

    Guarantees:
        Modality LUT, then VOI LUT or window, then inversion for MONOCHROME1 or INVERSE exactly once; grey
        levels are those of the window, never of the image's own minimum and maximum. The aspect is kept,
        the rest padded black; overlays are not drawn. Where the mapping is a window, the image is reduced
        before it is windowed, 0.05 of 255 grey levels away on average, and JPEG 2000 is decoded at a lower
        resolution, 0.3 away.

    Args:
        dataset: Holds the attributes of ``KEYWORDS``, as far as the file has them.
        size: Side S of the result, in pixels.
        index: Which of several VOI LUTs or windows, from 0; the first where there are fewer.
        ct_windows: In Hounsfield units. A CT image is shown by them instead of by its own window. One leaves
            it grey; of more, each is a channel, in their order, see `channels`.
        bits: 8, or 16 for uses other than packing. A window has chosen the range by then, so 8 bit round by
            at most 0.2 % of what a radiologist would see; an image tower starts from 8 bit anyway.

    Returns:
        Grey levels, and the remarks made on the way. Their shape is (S, S), or (S, S, 3) where ``ct_windows``
        ask for channels: every image then has them, and in those of one that is no CT they are equal.

    Raises:
        RefusedError: The image is blank, truncated or too large, or a CT image lacks its Hounsfield units.

    Source:
        PS3.3 C.7.6.3.1, C.7.6.16.2.9, C.7.6.16.2.10, C.11.1, C.11.2 and C.11.6.
    """
    shown = _of_frame(dataset)
    frame = decode(dataset, longer_side=size if _is_linear(shown) else None)
    if frame.values.ndim == 3:
        grey = shrink_frame(frame, lambda colours: _unit(colours @ _LUMA, frame.top), size=size)
        return _packed(grey, ct_windows, size=size, bits=bits), []
    pipeline = _Pipeline(shown, frame, size)
    is_ct = dataset.get("SOPClassUID") in CT_CLASSES
    for each, remarks in pipeline.transformations(index, ct_windows if is_ct else ()):
        image = _stacked([pipeline.apply(voi) for voi in each])
        if not is_blank(image):
            return _packed(image, ct_windows, size=size, bits=bits), remarks
    raise RefusedError(State.QUARANTINED, Code.E_BLANK)


def channels(ct_windows: Sequence[T]) -> Sequence[T]:
    """Return the window of each channel of an image: none or one where it is grey, else three.

    Of two windows the second is shown twice: no channel is empty, and none mixes what was asked for.
    """
    return (*ct_windows, *ct_windows[-1:])[:CHANNELS] if len(ct_windows) > 1 else ct_windows


def grey_image(values: NDArray[Any], *, size: int) -> tuple[Grey8, list[Code]]:
    """Turn grey values of unknown range, shape (H, W), into the packed image by their percentiles.

    Raises:
        RefusedError: Every value is the same.
    """
    window = _percentile_window(_sample(values))
    grey = window.apply(shrink(values.astype(np.float32), size=size))
    return fit_square(grey, size=size), [Code.W_WINDOW_FALLBACK]


def _stacked(shown: Sequence[Grey]) -> Grey:
    return shown[0] if len(shown) == 1 else np.stack(shown, axis=-1)


def _packed(image: Grey, ct_windows: Sequence[Window], *, size: int, bits: Literal[8, 16]) -> Grey8 | Grey16:
    """Return the square of an image, with channels where the cohort has them."""
    if len(ct_windows) > 1 and image.ndim == 2:
        image = np.stack([image] * CHANNELS, axis=-1)
    return fit_square(image, size=size, bits=bits)


def _of_frame(dataset: Dataset) -> Dataset:
    """Return the attributes of display; an enhanced object has them in groups, for all frames or for each."""
    middle = frame_count(dataset) // 2
    groups = [*_items(dataset, _SHARED)[:1], *_items(dataset, _PER_FRAME)[middle : middle + 1]]
    macros = [item for group in groups for name in _FRAME_MACROS for item in _items(group, name)[:1]]
    shown = Dataset()
    shown.file_meta = dataset.file_meta  # a table's bytes are read in the order that the file has
    for holder in (dataset, *macros):
        for name in _SHOWN:
            if holder.get(name) not in (None, ""):
                shown[name] = holder[name]
    return shown


def _items(dataset: Dataset, name: str) -> Sequence[Dataset]:
    return dataset.get(name) or ()


def _is_linear(shown: Dataset) -> bool:
    """Whether values may be averaged before they are mapped: tables and padding are only for single ones."""
    return not any(name in shown for name in ("PixelPaddingValue", "ModalityLUTSequence", "VOILUTSequence"))


@dataclass(frozen=True, eq=False, repr=False)
class _Pipeline:
    """The way of one grey frame to a longer side of ``size`` pixels."""

    shown: Dataset
    frame: Frame
    size: int

    def transformations(
        self, index: int, ct_windows: Sequence[Window]
    ) -> Iterator[tuple[Sequence[Transformation], list[Code]]]:
        """Yield what maps modality values to display values, the file's own wish before what always works.

        There is one map for each channel.
        """
        if ct_windows:
            if _number(self.shown, "RescaleIntercept") is None or self.shown.get("RescaleType", "HU") != "HU":
                raise RefusedError(State.QUARANTINED, Code.E_TAG_MISSING, "RescaleIntercept")
            yield [window.apply for window in channels(ct_windows)], []
            return
        tables = _items(self.shown, "VOILUTSequence")
        if tables:
            chosen = index if index < len(tables) else 0
            bits = int(tables[chosen].LUTDescriptor[2])  # PS3.3 C.11.2.1.1
            yield [lambda values: _unit(apply_voi(values, self.shown, index=chosen), 2**bits - 1)], []
        elif (window := _stored_window(self.shown, index)) is not None:
            yield [window.apply], []
        yield [self._percentiles().apply], [Code.W_WINDOW_FALLBACK]

    def apply(self, voi: Transformation) -> Grey:
        """Return display values in [0, 1], reduced."""
        frame = self.frame
        if _is_linear(self.shown):
            return self._display(voi, self._reduced)
        if frame.values.itemsize > 2:
            return shrink_frame(
                frame, lambda rows: self._display(voi, frame.meaningful(rows)), size=self.size
            )
        # One display value per stored value: looking it up costs a tenth of computing it for every pixel.
        code = np.dtype(f"u{frame.values.itemsize}")
        every = np.arange(2 ** (8 * code.itemsize), dtype=code).view(frame.values.dtype)
        table = self._display(voi, frame.meaningful(every))
        return shrink_frame(frame, lambda rows: table[rows.view(code)], size=self.size)

    @cached_property
    def _reduced(self) -> Grey:
        frame = self.frame
        return shrink_frame(frame, lambda rows: frame.meaningful(rows).astype(np.float32), size=self.size)

    def _display(self, voi: Transformation, stored: NDArray[Any]) -> Grey:
        grey = voi(_modality(self.shown, stored))
        # One statement in two places: a DX image says both, and is still inverted once (PS3.3 C.8.11.3.1).
        if self.shown.PhotometricInterpretation == "MONOCHROME1" or (
            self.shown.get("PresentationLUTShape") == "INVERSE"
        ):
            grey = 1 - grey
        padding = _padding(self.shown, self.frame)
        if padding is not None:  # "shall not be displayed" (PS3.3 C.7.5.1.1.2): black like the surroundings
            grey[_within(stored, padding)] = 0
        return grey

    def _percentiles(self) -> Window:
        sample = self.frame.meaningful(_sample(self.frame.values))
        padding = _padding(self.shown, self.frame)
        if padding is not None:
            sample = sample[~_within(sample, padding)]
        return _percentile_window(_modality(self.shown, sample))


def _modality(shown: Dataset, stored: NDArray[Any]) -> NDArray[Any]:
    if "ModalityLUTSequence" in shown:
        return np.asarray(apply_modality_lut(stored, shown))
    slope, intercept = _number(shown, "RescaleSlope"), _number(shown, "RescaleIntercept")
    return stored if slope is None or intercept is None else stored * slope + intercept


def _stored_window(shown: Dataset, index: int) -> Window | None:
    centre, width = _number(shown, "WindowCenter", index), _number(shown, "WindowWidth", index)
    function = str(shown.get("VOILUTFunction") or "LINEAR")
    if centre is None or width is None or not width > 0:
        return None
    if function == "LINEAR" and width < 1:  # illegal for LINEAR (PS3.3 C.11.2.1.2.1), and it occurs
        return None
    return Window(centre, width, function)


def _percentile_window(sample: NDArray[Any]) -> Window:
    if not sample.size:
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    low, high = (float(bound) for bound in np.percentile(sample, _FALLBACK_PERCENTILES))
    if low == high:
        low, high = float(sample.min()), float(sample.max())
    if low == high:
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    return Window((low + high) / 2, high - low, "LINEAR_EXACT")


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    rows, columns = (max(1, length // _PERCENTILE_SAMPLE) for length in values.shape)
    return values[::rows, ::columns]


def _padding(shown: Dataset, frame: Frame) -> tuple[float, float] | None:
    """Return the least and the greatest stored value that is padding."""
    first = _number(shown, "PixelPaddingValue")
    if first is None:
        return None
    last = _number(shown, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return low, high


def _within(stored: NDArray[Any], bounds: tuple[float, float]) -> NDArray[np.bool_]:
    return np.asarray((stored >= bounds[0]) & (stored <= bounds[1]))


def _number(shown: Dataset, keyword: str, index: int = 0) -> float | None:
    """Return an attribute's value at ``index``, the first where it has fewer; None if that is no number."""
    value = shown.get(keyword)
    if value is not None and not isinstance(value, (str, int, float)):
        value = value[index if index < len(value) else 0] if len(value) else None
    try:
        number = float(value) if value is not None else np.nan
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _unit(values: NDArray[Any], top: int) -> Grey:
    return np.asarray(np.clip(values / np.float32(top), 0, 1), dtype=np.float32)
