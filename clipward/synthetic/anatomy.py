"""A chest without findings: one patient's build, and how an exposure shows it.

Coordinates are those of the body: ``u`` grows to the image's right (the patient's left), ``v`` downwards; one
unit is half of the shorter side of the field of view, about 18 cm. Grey is density as displayed: 0 is air and
black, 1 bone and white.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grid = NDArray[np.float32]

LUNG_CENTRE = (0.43, -0.08)  # |u|, v
LUNG_HALF_HEIGHT = 0.80
HEART_CENTRE = (0.10, 0.33)  # u, v
SOFT_TISSUE = 0.62


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One patient's build; every study of the patient shows it again.

    Attributes:
        body_width: Half width of the trunk, in units.
        lung_width: Half width of one lung.
        base: Height v of the right and left diaphragm.
        heart: Half width and half height of the heart.
        ribs: Ribs per unit of height, phase of the first one, and slope.
        bone: Brightness of bone, 1 on average.
        breast: Brightness of soft tissue over the lower zones.
        markings: Vessels and texture of the lung, shape (20, 20), standard normal.
    """

    body_width: float
    lung_width: float
    base: tuple[float, float]
    heart: tuple[float, float]
    ribs: tuple[float, float, float]
    bone: float
    breast: float
    markings: Grid


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How one exposure shows the patient.

    Attributes:
        angle: Rotation, radians.
        zoom: Magnification, 1 on average.
        shift: Of the body, in units.
        heart_zoom: Magnification of the heart alone, which lies further from the detector in an AP view.
    """

    angle: float
    zoom: float
    shift: tuple[float, float]
    heart_zoom: float


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw one patient's build."""
    return Anatomy(
        body_width=rng.uniform(0.86, 0.98),
        lung_width=rng.uniform(0.32, 0.37),
        base=(rng.uniform(0.46, 0.58), rng.uniform(0.50, 0.62)),
        heart=(rng.uniform(0.235, 0.285), rng.uniform(0.28, 0.34)),
        ribs=(rng.uniform(4.2, 5.0), rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.4)),
        bone=rng.uniform(0.8, 1.2),
        breast=rng.uniform(0, 0.10),
        markings=rng.standard_normal((20, 20), dtype=np.float32),
    )


def draw_pose(rng: np.random.Generator, *, view: str) -> Pose:
    """Draw one exposure's position: up to 4 degrees, 7 % and 0.05 units off."""
    return Pose(
        angle=rng.uniform(-0.07, 0.07),
        zoom=rng.uniform(0.93, 1.07),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)),
        heart_zoom=1.12 if view == "AP" else 1.0,
    )


class Chest:
    """Organs on a grid, and what findings change: the air in the lungs, and what is added in front of them.

    Attributes:
        u: Coordinate towards the patient's left, shape ``shape`` like all grids.
        v: Coordinate downwards.
        across: Distance from the midline.
        base: Height v of the right and left diaphragm.
        heart: Mask of the heart, in [0, 1].
        lung_u: Position inside the lung across it: -1 medial, 1 lateral border.
        lung_v: The same along it: -1 apex, 1 below the diaphragm.
        aerated: Mask of the lung beside the heart.
        markings: Texture of the lung, standard normal.
        air: How much darker than soft tissue the lung makes the image.
        added: What is brighter than the body: metal, calcium, pleura.
    """

    def __init__(
        self, anatomy: Anatomy, pose: Pose, *, shape: tuple[int, int], enlargement: float = 1.0
    ) -> None:
        """Lay out a patient's organs on a grid of ``shape``, the heart larger by ``enlargement``."""
        self._anatomy = anatomy
        self.u, self.v = _coordinates(pose, shape)
        self.across = np.abs(self.u)
        self.base = anatomy.base
        self.heart = self._heart(enlargement, pose.heart_zoom)
        taper = 1 - 0.30 * np.clip(-self.v, 0, 1)
        self.lung_u = (self.across - LUNG_CENTRE[0]) / (anatomy.lung_width * taper)
        self.lung_v = (self.v - LUNG_CENTRE[1]) / LUNG_HALF_HEIGHT
        cage = np.clip((1 - self.lung_u**2 - self.lung_v**2) * 4, 0, 1)
        right, left = map(np.float32, anatomy.base)
        dome = np.where(self.u < 0, right, left) + 0.9 * (self.across - 0.36) ** 2
        lung = cage * np.clip((dome - self.v) * 15, 0, 1)
        self.aerated = lung * (1 - self.heart)
        self.markings = _resized(anatomy.markings, shape)
        self.air = self._air(lung)
        self.added = np.zeros(shape, dtype=np.float32)

    def image(self, *, bone: float) -> Grid:
        """The radiograph with all that was drawn.

        Args:
            bone: Factor on the brightness of bone: what the beam's energy does.

        Returns:
            Nominally in [0, 1], not clipped.
        """
        shoulders = self._anatomy.body_width - 2.2 * np.clip(-0.70 - self.v, 0, 0.28)
        body = np.clip((shoulders - self.across) * 12, 0, 1)
        trachea = 0.12 * np.clip((0.05 - self.across) * 30, 0, 1) * np.clip((-0.3 - self.v) * 8, 0, 1)
        arch = 0.12 / (1 + ((self.u - 0.13) ** 2 + (self.v + 0.32) ** 2) * 150)
        organs = SOFT_TISSUE + arch + 0.08 * self.heart - self.air - trachea
        image: Grid = body * (organs + self._bones(self._anatomy.bone * bone)) + self.added
        return image

    def _heart(self, enlargement: float, zoom: float) -> Grid:
        width, height = self._anatomy.heart
        off_u = (self.u - HEART_CENTRE[0] * enlargement) / (width * enlargement * zoom)
        off_v = (self.v - HEART_CENTRE[1]) / (height * (0.6 + 0.4 * enlargement * zoom))
        heart: Grid = np.clip((1 - off_u**2 - off_v**2 + 0.5 * off_u * off_v) * 4, 0, 1)
        return heart

    def _air(self, lung: Grid) -> Grid:
        breast = self._anatomy.breast * np.clip(self.v * 3, 0, 1)
        hila = 0.16 / (1 + ((self.across - 0.2) ** 2 + (self.v + 0.02) ** 2) * 60)
        air: Grid = lung * (0.46 + 0.035 * self.markings - breast - hila) * (1 - 0.92 * self.heart)
        return air

    def _bones(self, brightness: float) -> Grid:
        count, phase, slope = self._anatomy.ribs
        posterior = np.cos((self.v - slope * self.across) * (2 * np.pi * count) + phase)
        anterior = np.cos((self.v + 0.6 * self.across) * (2 * np.pi * count) - phase)
        cage = np.clip((self._anatomy.body_width - 0.08 - self.across) * 20, 0, 1) * np.clip(
            3.75 - 5 * self.v, 0, 1
        )
        ribs = cage * (np.clip(posterior, 0.1, 1) * 0.09 + np.clip(anterior, 0.4, 1) * 0.05)
        clavicle = np.clip(1.4 - np.abs(self.v + 0.66 - 0.16 * self.across) / 0.028, 0, 1)
        clavicle *= np.clip((0.72 - self.across) * 20, 0, 1) * np.clip((self.across - 0.07) * 20, 0, 1)
        spine = np.clip((0.11 - self.across) * 20, 0, 1) * (0.07 + 0.03 * np.cos(self.v * 26))
        bones: Grid = brightness * (ribs + 0.10 * clavicle + spine)
        return bones


def _coordinates(pose: Pose, shape: tuple[int, int]) -> tuple[Grid, Grid]:
    rows, columns = shape
    half = min(shape) / 2 * pose.zoom
    x = ((np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) / half)[None, :]
    y = ((np.arange(rows, dtype=np.float32) + 0.5 - rows / 2) / half)[:, None]
    cosine, sine = np.float32(np.cos(pose.angle)), np.float32(np.sin(pose.angle))
    shift_u, shift_v = map(np.float32, pose.shift)
    return cosine * x + (sine * y - shift_u), cosine * y - (sine * x + shift_v)


def _resized(grid: Grid, shape: tuple[int, int]) -> Grid:
    rows, columns = shape
    return np.asarray(Image.fromarray(grid).resize((columns, rows), Image.Resampling.BICUBIC))
