"""Findings in the image, where the ground truth says they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipward.synthetic.anatomy import Grid, Pose, draw_anatomy, draw_pose
from clipward.synthetic.findings import GRADES, NODULE_SIZES, Observation
from clipward.synthetic.phantom import DrawnFinding, draw_chest

SHAPE = (120, 140)
STRAIGHT = Pose(angle=0.0, zoom=1.0, shift=(0.0, 0.0), heart_zoom=1.0)
EXAMPLES = (
    Observation(finding="opacity", side="right", zone="upper", severity="mild"),
    Observation(finding="consolidation", side="left", zone="mid", severity="mild"),
    Observation(finding="effusion", side="right", size="small"),
    Observation(finding="cardiomegaly", severity="mild"),
    Observation(finding="pneumothorax", side="left", size="small"),
    Observation(finding="nodule", side="right", zone="lower", size="10 mm"),
    Observation(finding="device", side="left", kind="pacemaker"),
    Observation(finding="device", side="right", kind="catheter"),
)


def draw(
    *observations: Observation, seed: int = 0, pose: Pose = STRAIGHT, shape: tuple[int, int] = SHAPE
) -> tuple[Grid, list[DrawnFinding]]:
    return draw_chest(draw_anatomy(np.random.default_rng(seed)), pose, observations, shape=shape)


def inside(box: tuple[float, ...], shape: tuple[int, int], margin: int = 4) -> np.ndarray:
    rows, columns = shape
    x0, y0, x1, y1 = (round(b * s) for b, s in zip(box, (columns, rows, columns, rows), strict=True))
    mask = np.zeros(shape, dtype=bool)
    mask[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin] = True
    return mask


@pytest.mark.parametrize("observation", EXAMPLES, ids=lambda o: o.kind or o.finding)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_most_of_what_a_finding_changes_lies_in_its_box(observation: Observation, seed: int) -> None:
    healthy, _ = draw(seed=seed)
    ill, [drawn] = draw(observation, seed=seed)
    change = np.abs(ill - healthy)
    assert change.max() > 0.06  # five times the public unit's mottle
    assert change[inside(drawn.box, SHAPE)].sum() > 0.75 * change.sum()


@pytest.mark.parametrize("observation", [o for o in EXAMPLES if o.side], ids=lambda o: o.kind or o.finding)
def test_the_patients_left_is_on_the_images_right(observation: Observation) -> None:
    centres = {}
    for side in ("left", "right"):
        _, [drawn] = draw(replace(observation, side=side))
        centres[side] = (drawn.box[0] + drawn.box[2]) / 2
        assert drawn.side == side
    assert centres["right"] < 0.5 < centres["left"]


def test_a_bilateral_finding_is_drawn_once_on_each_side() -> None:
    _, drawn = draw(Observation(finding="effusion", side="bilateral", size="large"))
    assert [finding.side for finding in drawn] == ["left", "right"]


@pytest.mark.parametrize("observation", [o for o in EXAMPLES if o.finding in GRADES], ids=lambda o: o.finding)
def test_each_grade_shows_more_than_the_one_below(observation: Observation) -> None:
    field, ladder = GRADES[observation.finding]
    healthy, _ = draw()
    changes = []
    for grade in ladder:
        graded = {"size": "", "severity": "", field: grade}
        ill, _ = draw(replace(observation, size=graded["size"], severity=graded["severity"]))
        changes.append(float(np.abs(ill - healthy).sum()))
    assert changes == sorted(changes)
    assert changes[-1] > 1.3 * changes[0]


def test_findings_may_overlap_without_leaving_the_range_of_tissue() -> None:
    soft = [o for o in EXAMPLES if o.finding != "device"]
    image, _ = draw(*(replace(o, side="left" if o.side else "") for o in soft))
    assert image.max() < 1.1


def test_a_finding_outside_the_field_of_view_has_an_empty_box() -> None:
    away = replace(STRAIGHT, shift=(5.0, 0.0))
    _, [drawn] = draw(Observation(finding="nodule", side="left", zone="mid", size=NODULE_SIZES[0]), pose=away)
    assert drawn.box == (0.0, 0.0, 0.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(90, 180), columns=st.integers(90, 180))
def test_any_patient_in_any_pose_draws_finite_single_precision_images(
    seed: int, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(seed)
    image, drawn = draw_chest(
        draw_anatomy(rng), draw_pose(rng, view="AP"), EXAMPLES[:7], shape=(rows, columns)
    )
    assert image.shape == (rows, columns)
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    for finding in drawn:
        x0, y0, x1, y1 = finding.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
