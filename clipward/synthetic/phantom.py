"""Findings drawn into a chest, each with the box around it.

Sizes are caricatures: a 12 mm nodule is drawn near three times its size, so that 64 pixels still show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipward.synthetic.anatomy import LUNG_CENTRE, Anatomy, Chest, Grid, Pose
from clipward.synthetic.findings import NODULE_SIZES, SEVERITIES, SIZES, ZONES, Observation

Box = tuple[float, float, float, float]

ZONE_HEIGHTS = dict(zip(ZONES, (-0.48, -0.12, 0.24), strict=True))  # v
HEART_ENLARGEMENTS = dict(zip(SEVERITIES, (1.16, 1.30, 1.50), strict=True))
OPACITY_DENSITIES = dict(zip(SEVERITIES, (0.25, 0.36, 0.50), strict=True))  # share of the air that is gone
CONSOLIDATION_DENSITIES = dict(zip(SEVERITIES, (0.65, 0.78, 0.92), strict=True))
CONSOLIDATION_RADII = dict(zip(SEVERITIES, (0.16, 0.185, 0.21), strict=True))
EFFUSION_HEIGHTS = dict(zip(SIZES, (0.13, 0.30, 0.52), strict=True))
PNEUMOTHORAX_COLLAPSES = dict(zip(SIZES, (0.17, 0.28, 0.45), strict=True))
NODULE_RADII = dict(zip(NODULE_SIZES, (0.080, 0.084, 0.090, 0.098, 0.106, 0.115), strict=True))


@dataclass(frozen=True, kw_only=True)
class DrawnFinding:
    """Where a finding was drawn.

    Attributes:
        observation: The finding; a bilateral one is drawn twice.
        side: "left", "right", or empty.
        box: x0, y0, x1, y1 as shares of the image's width and height; all 0 when it left the field of view.
    """

    observation: Observation
    side: str
    box: Box


def draw_chest(
    anatomy: Anatomy,
    pose: Pose,
    observations: Sequence[Observation],
    *,
    shape: tuple[int, int],
    bone: float = 1.0,
) -> tuple[Grid, list[DrawnFinding]]:
    """Draw one frontal radiograph.

    Args:
        anatomy: The patient's build.
        pose: The exposure's position.
        observations: What the study shows.
        shape: Rows and columns of the grid.
        bone: Factor on the brightness of bone.

    Returns:
        The image, shape ``shape``, nominally in [0, 1] and not clipped; and where each finding was drawn,
        once per side.
    """
    enlargements = (HEART_ENLARGEMENTS[o.severity] for o in observations if o.finding == "cardiomegaly")
    chest = Chest(anatomy, pose, shape=shape, enlargement=max(enlargements, default=1.0))
    drawn = [
        DrawnFinding(observation=observation, side=side, box=_box(_draw(chest, observation, side)))
        for observation in observations
        for side in (("left", "right") if observation.side == "bilateral" else (observation.side,))
    ]
    return chest.image(bone=bone), drawn


def _draw(chest: Chest, observation: Observation, side: str) -> Grid:
    """Draw one finding on one side; returns the mask of what was drawn."""
    sign = -1 if side == "right" else 1
    match observation.finding:
        case "opacity":
            return _draw_opacity(chest, observation, sign)
        case "consolidation":
            return _draw_consolidation(chest, observation, sign)
        case "effusion":
            return _draw_effusion(chest, observation, sign)
        case "cardiomegaly":  # the heart was laid out enlarged
            return chest.heart
        case "pneumothorax":
            return _draw_pneumothorax(chest, observation, sign)
        case "nodule":
            return _draw_nodule(chest, observation, sign)
        case _:
            return (_draw_pacemaker if observation.kind == "pacemaker" else _draw_catheter)(
                chest, observation, sign
            )


def _offsets(chest: Chest, observation: Observation, sign: int, *, reach: float) -> tuple[Grid, Grid]:
    """Distance from the lesion's centre across and along the lung."""
    across, along = observation.place
    centre = sign * (LUNG_CENTRE[0] + 0.03 + reach * across)
    return chest.u - centre, chest.v - (ZONE_HEIGHTS[observation.zone] + reach * along)


def _draw_opacity(chest: Chest, observation: Observation, sign: int) -> Grid:
    off_u, off_v = _offsets(chest, observation, sign, reach=0.06)
    mask: Grid = chest.aerated * np.clip(1.25 - (off_u / 0.36) ** 2 - (off_v / 0.32) ** 2, 0, 1)
    chest.air *= 1 - mask * (OPACITY_DENSITIES[observation.severity] + 0.04 * chest.markings)
    return mask


def _draw_consolidation(chest: Chest, observation: Observation, sign: int) -> Grid:
    off_u, off_v = _offsets(chest, observation, sign, reach=0.08)
    ragged = (
        1 - (off_u**2 + off_v**2) / CONSOLIDATION_RADII[observation.severity] ** 2 + 0.35 * chest.markings
    )
    mask: Grid = chest.aerated * np.clip(ragged * 2.5, 0, 1)
    chest.air *= 1 - mask * CONSOLIDATION_DENSITIES[observation.severity]
    return mask


def _draw_effusion(chest: Chest, observation: Observation, sign: int) -> Grid:
    level = chest.base[sign > 0] + 0.04 - EFFUSION_HEIGHTS[observation.size]
    meniscus = level - 1.8 * np.clip(chest.across - 0.45, 0, 1) ** 2
    mask: Grid = chest.aerated * np.clip((chest.v - meniscus) * 14, 0, 1) * (chest.u * sign > 0)
    chest.air *= 1 - 0.92 * mask
    return mask


def _draw_pneumothorax(chest: Chest, observation: Observation, sign: int) -> Grid:
    collapse = PNEUMOTHORAX_COLLAPSES[observation.size]
    # The lung falls towards its hilum: an ellipse shrunk and moved down and inwards.
    rest_u = (chest.lung_u + 0.8 * collapse) / (1 - 0.7 * collapse)
    rest_v = (chest.lung_v - 0.5 * collapse) / (1 - 0.6 * collapse)
    edge = rest_u**2 + rest_v**2 - 1
    side = chest.aerated * (chest.u * sign > 0)
    mask: Grid = side * np.clip(edge * 6, 0, 1)
    chest.air *= 1 + 0.38 * mask - 0.2 * collapse * side * (1 - mask)
    chest.added += 0.10 * side * np.clip(1 - np.abs(edge) * 9, 0, 1)
    return mask


def _draw_nodule(chest: Chest, observation: Observation, sign: int) -> Grid:
    off_u, off_v = _offsets(chest, observation, sign, reach=0.07)
    mask: Grid = np.clip((1 - (off_u**2 + off_v**2) / NODULE_RADII[observation.size] ** 2) * 2, 0, 1)
    chest.air *= 1 - mask
    chest.added += 0.10 * mask
    return mask


def _draw_pacemaker(chest: Chest, observation: Observation, sign: int) -> Grid:
    across, along = observation.place
    centre_u, centre_v = sign * (0.52 + 0.05 * across), -0.50 + 0.05 * along
    off = np.maximum(np.abs(chest.u - centre_u) / 0.10, np.abs(chest.v - centre_v) / 0.085)
    case = np.clip((1 - off) * 6, 0, 1)
    progress = np.clip((chest.v - centre_v) / (0.42 - centre_v), 0, 1)
    path = centre_u + (0.20 - centre_u) * np.sin(progress * (np.pi / 2)) ** 0.6
    lead = np.clip(1.5 - np.abs(chest.u - path) / 0.016, 0, 1) * ((progress > 0) & (progress < 1))
    chest.added += np.maximum(0.42 * case, 0.26 * lead)
    mask: Grid = np.maximum(case, lead)
    return mask


def _draw_catheter(chest: Chest, observation: Observation, sign: int) -> Grid:
    start, tip = sign * 0.22, -0.06 + 0.03 * observation.place[0]
    progress = np.clip((chest.v + 1.0) / (1.05 + 0.1 * observation.place[1]), 0, 1)
    path = start + (tip - start) * progress**1.5
    mask: Grid = np.clip(1.5 - np.abs(chest.u - path) / 0.020, 0, 1) * (progress < 1)
    chest.added += 0.34 * mask
    return mask


def _box(mask: Grid) -> Box:
    """Bounds of what is drawn at half strength or more."""
    drawn = mask > 0.5 * max(float(mask.max()), 1e-6)
    y, x = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(y):
        return (0.0, 0.0, 0.0, 0.0)
    rows, columns = mask.shape
    return (x[0] / columns, y[0] / rows, (x[-1] + 1) / columns, (y[-1] + 1) / rows)
