"""A hospital's X-ray unit: what turns a phantom into the pixels of its archive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from clipward.synthetic.anatomy import Grid

DRAWING_SCALE = 0.6  # phantoms are drawn coarser than the matrix: the focal spot blurs that much anyway
LETTERS = {  # 5 x 7 pixels each
    "L": ("1....", "1....", "1....", "1....", "1....", "1....", "11111"),
    "R": ("1111.", "1...1", "1...1", "1111.", "1.1..", "1..1.", "1...1"),
}


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One unit's image character and file format.

    Attributes:
        manufacturer: Goes into the header, with ``model``.
        model: Name of the unit.
        rows: Height of the matrix, pixels.
        columns: Width of the matrix, pixels.
        bits_stored: 8, 10, 12 or 14.
        inverted: True stores MONOCHROME1, False MONOCHROME2.
        window: Whether the header carries WindowCenter and WindowWidth.
        transfer_syntax: Transfer syntax UID.
        annotated: Whether the header says BurnedInAnnotation NO, or nothing.
        gamma: Exponent of the display curve; above 1 is darker.
        contrast: Slope of the display curve at mid-grey.
        brightness: Added to display grey.
        blur: Standard deviation of the detector's blur, in drawing pixels.
        noise: Standard deviation of the quantum noise of one pixel, in display grey.
        mottle: The same for noise of about 6 pixels' grain, which survives reduction.
        exposure: Standard deviation of an exposure's brightness.
        bone: Factor on the brightness of bone.
        border: Share of the field that the collimator shuts on each side, at most.
        marker: The lead letter at the patient's side: "L", "R" or "" for none.
        bedside: Share of exposures made at the bedside: AP, heart magnified.
    """

    manufacturer: str
    model: str
    rows: int
    columns: int
    bits_stored: int
    inverted: bool
    window: bool
    transfer_syntax: str
    annotated: bool
    gamma: float
    contrast: float
    brightness: float
    blur: float
    noise: float
    mottle: float
    exposure: float
    bone: float
    border: float
    marker: str
    bedside: float

    @property
    def drawing_shape(self) -> tuple[int, int]:
        """Rows and columns of the grid that phantoms for this unit are drawn on."""
        return round(self.rows * DRAWING_SCALE), round(self.columns * DRAWING_SCALE)

    @property
    def grey_range(self) -> tuple[int, int]:
        """Stored values of display black and white, before inversion; noise and air lie within."""
        top = 2**self.bits_stored - 1
        return round(0.06 * top), round(0.90 * top)

    @property
    def window_centre_width(self) -> tuple[float, float]:
        """The window that shows the whole grey range (PS3.3 C.11.2.1.2), in stored values."""
        low, high = self.grey_range
        top = 2**self.bits_stored - 1
        centre = (low + high + 1) / 2
        return (top - centre + 1 if self.inverted else centre), high - low + 1


def expose(chest: Grid, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.uint8 | np.uint16]:
    """Turn a phantom into stored pixels.

    Args:
        chest: Display grey on ``scanner.drawing_shape``.
        scanner: The unit.
        rng: Draws noise, exposure and collimation.

    Returns:
        Stored values below ``2**bits_stored``, shape (rows, columns), uint8 for 8 bits and uint16 above.
    """
    rows, columns = scanner.rows, scanner.columns
    grain = rng.standard_normal((rows // 6, columns // 6), dtype=np.float32)
    noise = rng.standard_normal((rows, columns), dtype=np.float32)
    brightness = scanner.brightness + scanner.exposure * rng.standard_normal()
    if scanner.blur:
        chest = gaussian_filter(chest, scanner.blur, truncate=2.5)
    grey = _resize(chest, rows, columns) + np.float32(scanner.mottle) * _resize(grain, rows, columns)
    grey += np.float32(scanner.noise) * noise
    grey = (grey - np.float32(0.5)) * np.float32(scanner.contrast) + np.float32(0.5 + brightness)
    grey = np.clip(grey, 0, 1) ** np.float32(scanner.gamma)
    _collimate(grey, scanner.border, rng)
    _mark(grey, scanner.marker)
    low, high = scanner.grey_range
    stored = np.rint(grey * np.float32(high - low) + np.float32(low))
    if scanner.inverted:
        stored = 2**scanner.bits_stored - 1 - stored
    pixels: NDArray[np.uint8 | np.uint16] = stored.astype(np.uint8 if scanner.bits_stored == 8 else np.uint16)
    return pixels


def _resize(grid: Grid, rows: int, columns: int) -> Grid:
    return np.asarray(Image.fromarray(grid).resize((columns, rows), Image.Resampling.BILINEAR))


def _collimate(grey: Grid, border: float, rng: np.random.Generator) -> None:
    """Blacken what the shutters cover, in place."""
    rows, columns = grey.shape
    top, bottom = (rng.uniform(0, border, 2) * rows).astype(int)
    left, right = (rng.uniform(0, border, 2) * columns).astype(int)
    grey[:top] = grey[rows - bottom :] = 0
    grey[:, :left] = grey[:, columns - right :] = 0


def _mark(grey: Grid, marker: str) -> None:
    """Put the lead letter above the shoulder, in place; the patient's left is on the image's right."""
    if not marker:
        return
    rows, columns = grey.shape
    letter = np.array([[pixel == "1" for pixel in line] for line in LETTERS[marker]])
    letter = np.kron(letter, np.ones((3, 3), dtype=bool))
    height, width = letter.shape
    y, x = rows // 16, columns // 20
    if marker == "L":
        x = columns - x - width
    grey[y : y + height, x : x + width][letter] = 1
