"""Synthetic image-report pairs in memory: public anchors that belong to no hospital."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from clipward.synthetic.anatomy import draw_anatomy, draw_pose
from clipward.synthetic.findings import Study, draw_history
from clipward.synthetic.hospitals import PUBLIC_INDEX, Hospital, public_collection
from clipward.synthetic.phantom import draw_chest
from clipward.synthetic.scanner import expose
from clipward.synthetic.wording import write_report

STREAM = 1  # the public collection's patients are drawn without it, so these are others


def synthetic_pairs(
    count: int, *, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Draw ``count`` studies of the public collection's kind, each of a patient of its own.

    Guarantees:
        The first pairs are those of a smaller count; equal arguments give equal bytes.

    Returns:
        Display grey, uint8 (count, 256, 256), and the reports, whole.
    """
    place = public_collection()
    shape = (count, place.scanner.rows, place.scanner.columns)
    images, reports = np.empty(shape, dtype=np.uint8), []
    for row in range(count):
        rng = np.random.default_rng(np.random.SeedSequence([seed, PUBLIC_INDEX, row, STREAM]))
        study = draw_history(rng, place.mix)[0]
        images[row] = _image(study, place, rng)
        reports.append(write_report(study, place.style, rng))
        if on_progress:
            on_progress(row + 1, count)
    return images, tuple(reports)


def _image(study: Study, place: Hospital, rng: np.random.Generator) -> NDArray[np.uint8]:
    scanner = place.scanner
    chest, _ = draw_chest(
        draw_anatomy(rng),
        draw_pose(rng, view="PA"),
        study.observations,
        shape=scanner.drawing_shape,
        bone=scanner.bone,
    )
    low, high = scanner.grey_range
    grey = (expose(chest, scanner, rng).astype(np.float32) - low) / (high - low)
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)
