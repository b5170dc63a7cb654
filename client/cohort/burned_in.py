"""Text in the pixels: where a packed image looks as if something were written on it.

A heuristic, and no proof of absence: it sees lines of four characters or more that are still legible after
packing, brighter or darker than what they are written on, near the image's border, where scanners write. Side
markers of one letter are not meant; "SUPINE" or "PORTABLE" is found like a name would be. A slice of CT is
taken for text now and then.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Measured on 455 public chest images at 224 pixels: of lines of 11 and 19 characters drawn near the corners,
# legible and 8 to 14 pixels high, 96 in 100 are found. Without one, 16 are
# flagged: 14 have writing of their own, 2 are slices of CT.
STROKE_PIXELS = 5  # strokes are narrower
STROKE_CONTRAST = 40  # grey levels
HEIGHT = (4, 24)  # of a line
MIN_WIDTH, MIN_ASPECT = 20, 2.5
FILL = (0.12, 0.75)  # of a line's box with strokes
MIN_CHANGES = 0.18  # from stroke to ground and back, per pixel along a line
MIN_CHARACTERS, MIN_CHARACTER_PIXELS = 4, 3  # apart from each other: a cable is one piece
CHARACTER_HEIGHT = (0.6, 1.5)  # as a share of what is typical of the line
MAX_SCATTER = 0.2  # of their middles about the line, as a share of the same
BORDER = 0.25  # of the side: a line whose middle is nearer to an edge counts

_NEAR = np.ones((1, 7), dtype=bool)  # characters of one line
_TOUCHING = np.ones((3, 3), dtype=bool)


def has_text(image: NDArray[np.uint8]) -> bool:
    """Return whether an image, (S, S), or a channel of (S, S, C), looks as if written on near its border."""
    channels = np.moveaxis(image.reshape(*image.shape[:2], -1), -1, 0)
    differ = np.ptp(channels, axis=0).any()  # those of an image that is no CT do not
    return any(map(_has_writing, channels if differ else channels[:1]))


def _has_writing(grey: NDArray[np.uint8]) -> bool:
    levels = grey.astype(np.int16)
    size = (STROKE_PIXELS, STROKE_PIXELS)
    bright = levels - ndimage.grey_opening(levels, size)
    dark = ndimage.grey_closing(levels, size) - levels
    return any(_has_line(strokes > STROKE_CONTRAST) for strokes in (bright, dark))


def _has_line(strokes: NDArray[np.bool_]) -> bool:
    margin = _NEAR.shape[1]
    padded = np.pad(strokes, margin)
    joined = ndimage.binary_closing(padded, _NEAR)[margin:-margin, margin:-margin]
    labels, _ = ndimage.label(joined, _TOUCHING)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if _may_be_line(box, len(strokes)) and _is_written(strokes[box] & (labels[box] == number)):
            return True
    return False


def _may_be_line(box: tuple[slice, slice], side: int) -> bool:
    (top, bottom), (left, right) = ((part.start, part.stop) for part in box)
    height, width = bottom - top, right - left
    if not (HEIGHT[0] <= height <= HEIGHT[1] and width >= max(MIN_WIDTH, MIN_ASPECT * height)):
        return False
    middle = np.array([top + bottom, left + right]) / (2 * side)
    return bool(np.minimum(middle, 1 - middle).min() < BORDER)


def _is_written(strokes: NDArray[np.bool_]) -> bool:
    height, width = strokes.shape
    changes = np.abs(np.diff(strokes.astype(np.int8), axis=1)).sum(axis=1) / width
    busiest = np.sort(changes)[-max(3, height // 2) :]
    dense = FILL[0] < strokes.mean() < FILL[1]
    return bool(dense and np.median(busiest) > MIN_CHANGES) and _has_characters(strokes)


def _has_characters(strokes: NDArray[np.bool_]) -> bool:
    """Return whether the strokes are pieces of about one height in one line."""
    rows = [box[0] for box in ndimage.find_objects(ndimage.label(strokes, _TOUCHING)[0])]
    heights = np.array([part.stop - part.start for part in rows])
    middles = np.array([part.stop + part.start for part in rows]) / 2
    tall = heights >= MIN_CHARACTER_PIXELS
    if tall.sum() < MIN_CHARACTERS:
        return False
    typical = np.median(heights[tall])
    low, high = (share * typical for share in CHARACTER_HEIGHT)
    in_line = middles[tall & (heights >= low) & (heights <= high)]
    return len(in_line) >= MIN_CHARACTERS and bool(in_line.std() < MAX_SCATTER * typical)
