"""One synthetic patient from build to files: images, reports, ground truth and labels."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np

from clipward.synthetic.anatomy import Anatomy, draw_anatomy, draw_pose
from clipward.synthetic.findings import FINDINGS, Study, draw_history
from clipward.synthetic.hospitals import Hospital
from clipward.synthetic.objects import Identity, derive_uid, write_image
from clipward.synthetic.phantom import DrawnFinding, draw_chest
from clipward.synthetic.scanner import expose
from clipward.synthetic.wording import write_report

TABLES = {
    "reports.csv": ("accession_number", "study_instance_uid", "patient_id", "report"),
    "ground-truth.csv": ("accession_number", "finding", "side", "size", "severity", "x0", "y0", "x1", "y1"),
    "labels.csv": ("accession_number", *FINDINGS),
}

Rows = dict[str, list[tuple[str | int, ...]]]  # by table


def write_patient(folder: Path, place: Hospital, *, seed: int, patient: int) -> Rows:
    """Draw one patient: write the images, and return the rows of the tables.

    Guarantees:
        Depends on the arguments alone: the patient has a random generator of its own, so that the order of
        work changes nothing. Studies follow each other by at least a day.

    Args:
        folder: The hospital's folder; images go to ``dicom/`` in it.
        place: The hospital.
        seed: Seed of the whole federation.
        patient: Number of the patient, from 1.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, place.index, patient]))
    anatomy = draw_anatomy(rng)
    patient_id = f"SYN{place.index:02d}-{patient:06d}"
    images = folder / "dicom" / patient_id
    images.mkdir(parents=True)
    made: Rows = {name: [] for name in TABLES}
    day = date(2015, 1, 1) + timedelta(days=int(rng.integers(1500)))
    birth_date = day - timedelta(days=int(rng.integers(18 * 365, 90 * 365)))
    sex = "FM"[int(rng.integers(2))]
    for number, study in enumerate(draw_history(rng, place.mix), start=1):
        bedside = rng.random() < place.scanner.bedside
        identity = Identity(
            patient_id=patient_id,
            patient_name=f"Synthetic^Patient {place.index:02d}-{patient:06d}",
            birth_date=birth_date,
            sex=sex,
            accession_number=f"SYN{place.index:02d}{patient:06d}{number}",
            study_uid=derive_uid(seed, place.index, patient, number),
            study_date=day,
            view="AP" if bedside else "PA",
        )
        drawn = _write_study(
            images / f"{identity.accession_number}.dcm", place, anatomy, study, identity, rng
        )
        made["ground-truth.csv"] += [_truth(finding, identity, place) for finding in drawn]
        report = write_report(study, place.style, rng)
        made["reports.csv"].append((identity.accession_number, identity.study_uid, patient_id, report))
        present = {observation.finding for observation in study.observations}
        made["labels.csv"].append(
            (identity.accession_number, *(int(finding in present) for finding in FINDINGS))
        )
        day += timedelta(days=int(rng.integers(1, 200)))
    return made


def _write_study(
    path: Path, place: Hospital, anatomy: Anatomy, study: Study, identity: Identity, rng: np.random.Generator
) -> list[DrawnFinding]:
    scanner = place.scanner
    chest, drawn = draw_chest(
        anatomy,
        draw_pose(rng, view=identity.view),
        study.observations,
        shape=scanner.drawing_shape,
        bone=scanner.bone,
    )
    write_image(path, expose(chest, scanner, rng), identity, scanner, institution=f"Synthetic {place.name}")
    return drawn


def _truth(finding: DrawnFinding, identity: Identity, place: Hospital) -> tuple[str | int, ...]:
    observation, scanner = finding.observation, place.scanner
    extent = (scanner.columns, scanner.rows) * 2
    box = (round(share * pixels) for share, pixels in zip(finding.box, extent, strict=True))
    return (
        identity.accession_number,
        observation.finding,
        finding.side,
        observation.size,
        observation.severity,
        *box,
    )
