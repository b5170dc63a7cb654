"""From an image of any size to the square that is packed: area averages, in strips, and rounding."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.cohort.outcomes import Code, RefusedError, State
from client.cohort.pixels import Frame

Grey8: TypeAlias = NDArray[np.uint8]
Grey16: TypeAlias = NDArray[np.uint16]
Grey: TypeAlias = NDArray[np.float32]

_STRIP_VALUES = 2**18  # converted at a time: 1 MB of floats, which a processor's cache holds
_KEPT_BYTES = 2**24


def shrink(values: Grey, *, size: int) -> Grey:
    """Resize to a longer side of ``size`` pixels, aspect kept; reduced by area, enlarged bilinearly."""
    rows, columns = _target(values.shape, size)
    if (rows, columns) == values.shape[:2]:
        return values
    method = Image.Resampling.BOX if size < max(values.shape) else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(values).resize((columns, rows), method), dtype=np.float32)


def shrink_frame(frame: Frame, convert: Callable[[NDArray[Any]], Grey], *, size: int) -> Grey:
    """Return ``shrink(convert(frame.values))`` without ever holding the converted image.

    Args:
        frame: The stored values, with a longer side of any length.
        convert: Maps some rows of the values, shape (R, W) or (R, W, 3), to shape (R, W).
        size: Longer side of the result, in pixels.
    """
    _keep_freed_memory()
    rows, columns = _target(frame.shape, size)
    if frame.halvings:
        return _from_halved(frame, convert(frame.values), (columns, rows))
    height, width = frame.shape
    if size >= max(frame.shape):
        return shrink(convert(frame.values), size=size)
    shrunk = np.empty((rows, columns), dtype=np.float32)
    for top, bottom in _strips(rows, height * width):
        # A row more on either side: rounding may put a row's centre across the strip's edge.
        first, last = top * height / rows, bottom * height / rows
        above, below = max(0, int(first) - 1), min(height, int(last) + 2)
        strip = Image.fromarray(convert(frame.values[above:below]))
        box = (0, first - above, width, last - above)
        shrunk[top:bottom] = np.asarray(strip.resize((columns, bottom - top), Image.Resampling.BOX, box=box))
    return shrunk


@overload
def fit_square(grey: Grey, *, size: int) -> Grey8: ...


@overload
def fit_square(grey: Grey, *, size: int, bits: Literal[8, 16]) -> Grey8 | Grey16: ...


def fit_square(grey: Grey, *, size: int, bits: Literal[8, 16] = 8) -> Grey8 | Grey16:
    """Round grey values in [0, 1] to 8 or 16 bit in the middle of a black square of ``size`` pixels.

    Args:
        grey: Shape (H, W) of any size, or with channels (H, W, C) with a longer side of ``size``.
        size: Side S of the square, in pixels.
        bits: Of a grey level.

    Returns:
        Shape (S, S) or (S, S, C).

    Raises:
        RefusedError: Every value is the same, in every channel.
    """
    grey = shrink(grey, size=size)
    levels = np.rint(grey * np.float32(2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    if is_blank(levels):
        raise RefusedError(State.QUARANTINED, Code.E_BLANK)
    height, width = levels.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size, *levels.shape[2:]), dtype=levels.dtype)
    square[top : top + height, left : left + width] = levels
    return square


def is_blank(image: NDArray[Any]) -> bool:
    """Return whether no channel of an image, shape (H, W) or (H, W, C), shows anything."""
    return bool((image.min(axis=(0, 1)) == image.max(axis=(0, 1))).all())


@cache
def _keep_freed_memory() -> None:
    """Free one large block, once in a process.

    Until then glibc hands every strip's memory back and the kernel clears the same pages for the next one,
    which is half of the time. It learns from the largest block freed (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(_KEPT_BYTES, dtype=np.uint8)


def _target(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    scale = size / max(shape[:2])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _strips(rows: int, values: int) -> Iterator[tuple[int, int]]:
    step = max(1, rows * _STRIP_VALUES // values)
    for top in range(0, rows, step):
        yield top, min(top + step, rows)


def _from_halved(frame: Frame, values: Grey, target: tuple[int, int]) -> Grey:
    """Resize what a wavelet left: sample i lies on row 2^k i, not in the middle of 2^k rows.

    Unless that is undone the image moves by half of 2^k rows, which costs 1.8 of 255 grey levels on average
    where the rest costs 0.3. The Hamming filter fits a ratio below 2 better than the area does.
    """
    part = 2.0**-frame.halvings
    shift = (1 - part) / 2
    left, top, right, bottom = (shift + part * edge for edge in (0, 0, frame.shape[1], frame.shape[0]))
    image = Image.fromarray(np.pad(values, ((0, 1), (0, 1)), mode="edge"))
    resized = image.resize(target, Image.Resampling.HAMMING, box=(left, top, right, bottom))
    return np.asarray(resized, dtype=np.float32)
