"""Real images and reports, where they are at hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cohort import Code, Cohort, CohortSettings, State, build_cohort
from client.cohort.resizing import fit_square

DATA = Path(__file__).parents[3].parent / "shared" / "data"
HOSPITAL = DATA / "dicom-hospital-ccby"
RADIOGRAPHS = DATA / "cxr-multisite"
QUESTIONS = DATA / "vqamed2019"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared folder of real data")


def manifest() -> list[dict[str, str]]:
    with open(HOSPITAL / "manifest.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quarantine(cohort_folder: Path) -> list[dict[str, str]]:
    with open(cohort_folder / "quarantine.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Path]:
    """The hospital with a report for every study but the one that has none, found by study UID."""
    folder = tmp_path_factory.mktemp("whole")
    paired = {
        row["study"]: row["row_image"] for row in manifest() if row["expect"] != "unpaired" and row["study"]
    }
    lines = [f"{study},IMPRESSION: {image}" for study, image in paired.items()]
    (folder / "reports.csv").write_text("\n".join(["study_instance_uid,report", *lines]))
    settings = CohortSettings(dicom=HOSPITAL, reports=folder / "reports.csv", image_size=256, salt="s")
    return build_cohort(settings, folder / "cohort"), folder / "cohort"


def test_used_files_show_the_pixels_they_were_made_from(whole: tuple[Cohort, Path]) -> None:
    cohort, folder = whole
    stretched = {line["path"] for line in quarantine(folder) if line["code"] == Code.W_WINDOW_FALLBACK}
    used = sorted((row["file"], row["row_image"]) for row in manifest() if row["expect"].startswith("use"))
    for (file, source), pixels in zip(used, cohort.images, strict=True):
        with Image.open(RADIOGRAPHS / source) as image:
            grey = np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255)
        low, high = np.percentile(grey, (0.5, 99.5)) if file in stretched else (0.0, 1.0)
        shown = np.clip((grey - low) / (high - low), 0, 1).astype(np.float32)
        difference = np.abs(pixels - fit_square(shown, size=256).astype(int))
        assert difference.max() <= 2 / (high - low), file  # a grey level, stretched like the picture


def test_no_identifier_reaches_the_packed_files(whole: tuple[Cohort, Path]) -> None:
    stored = b"".join((whole[1] / name).read_bytes() for name in ("images.npy", "index.arrow", "cohort.json"))
    canaries = json.loads((HOSPITAL / "canaries.json").read_text())
    assert not [canary for canary in canaries if canary.encode() in stored]


def test_one_table_is_cut_into_departments(tmp_path: Path) -> None:
    settings = CohortSettings(
        table=QUESTIONS / "metadata.csv", where={"fl_client": "breast"}, image_size=64, salt="s"
    )
    cohort = build_cohort(settings, tmp_path / "cohort")
    with open(QUESTIONS / "metadata.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fl_client"] == "breast"]
    assert cohort.texts == tuple(" ".join(row["text"].split()) for row in rows)
    np.testing.assert_array_equal(cohort.is_test, [row["split"] == "test" for row in rows])
    assert len(np.unique(cohort.patients)) == len({row["patient_id"] for row in rows})
    assert cohort.counts[State.USED] == len(rows)


def test_radiographs_with_clinical_notes_are_all_used(tmp_path: Path) -> None:
    settings = CohortSettings(table=RADIOGRAPHS / "metadata.csv", image_size=64, salt="s")
    cohort = build_cohort(settings, tmp_path / "cohort", workers=1)
    assert cohort.counts[State.USED] == len(cohort) == 455
    assert not cohort.codes
    assert not set(cohort.patients[cohort.train()]) & set(cohort.patients[cohort.test()])
