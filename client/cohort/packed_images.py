"""Images of earlier builds, found by the state of the file they come from: nothing is decoded twice."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGES, KEYS = "images.npy", "keys.bin"
KEY_BYTES = 16
NO_KEY = bytes(KEY_BYTES)  # of an image that is not to be found again


class PackedImages:
    """The rows of ``images.npy`` of other cohorts, or of the beginnings of one, by their keys.

    A file that is absent, damaged or of images of another shape has no rows: its images are decoded again.
    """

    def __init__(self, folders: Iterable[Path] = (), *, shape: tuple[int, ...]) -> None:
        """Map the images in ``folders`` that are of this shape; they may be deleted then."""
        self._packs = [pack for folder in folders if (pack := _Pack.open(folder, shape)) is not None]

    def __len__(self) -> int:
        return sum(len(pack.images) for pack in self._packs)

    def find(self, key: bytes) -> NDArray[np.uint8] | None:
        """Return the image of this key as a view of the file; None if there is none."""
        if key == NO_KEY:
            return None
        found = (pack.find(key) for pack in self._packs)
        return next((image for image in found if image is not None), None)


@dataclass(frozen=True, eq=False)
class _Pack:
    images: NDArray[np.uint8]
    keys: NDArray[np.bytes_]  # sorted
    rows: NDArray[np.intp]  # of the sorted keys

    @classmethod
    def open(cls, folder: Path, image: tuple[int, ...]) -> "_Pack | None":
        try:
            with open(folder / IMAGES, "rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    return None
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
                start, end = file.tell(), os.fstat(file.fileno()).st_size
            keys = np.fromfile(folder / KEYS, dtype=f"S{KEY_BYTES}")
        except (OSError, ValueError):
            return None
        if fortran_order or dtype != np.uint8 or shape[1:] != image:
            return None
        # The header of a cohort in the making says no row; what counts is what lies in both files.
        count = min(len(keys), (end - start) // math.prod(image))
        if not count:
            return None
        images = np.memmap(folder / IMAGES, np.uint8, "r", start, (count, *image))
        rows = np.argsort(keys[:count], kind="stable")
        return cls(images=images, keys=keys[rows], rows=rows)

    def find(self, key: bytes) -> NDArray[np.uint8] | None:
        place = int(np.searchsorted(self.keys, np.bytes_(key)))
        # numpy leaves out trailing zeros of either, so that equal bytes stay equal.
        if place == len(self.keys) or self.keys[place] != key.rstrip(b"\0"):
            return None
        image: NDArray[np.uint8] = self.images[self.rows[place]]
        return image
