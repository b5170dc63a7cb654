"""Hospitals that share prototypes alone: other encoders and image sizes, images or reports by themselves."""

import csv
import shutil
from pathlib import Path
from typing import Any

import tomli_w

from client.site import SITE_FILE, Site
from tests.encoders.micro import micro_encoder
from tests.small_hospitals import PATIENTS, change_site, write_federation

FINDINGS = ("effusion", "opacity")
SITES = ("common", "images", "texts", "tiny")  # in the order in which they are asked
SEED = 11
ROUNDS = 3


def four_hospitals(made: Path, root: Path, *, rounds: int = ROUNDS, **changes: Any) -> Path:
    """Their folders below ``root``, and a federation file over them.

    ``common`` trains the run's model, ``tiny`` one with larger images and wider embeddings; ``images`` has no
    report and a model of 48 pixels, all of whose image side is trained; ``texts`` has no image.
    """
    (root / "micro").symlink_to(made / "micro")
    _linked(made / "hospitals" / "site-1", root / "hospitals" / "common")
    _linked(made / "hospitals" / "site-2", root / "hospitals" / "tiny")
    _linked(made / "hospitals" / "site-3", root / "hospitals" / "images", packed=False)
    change_site(root / "hospitals" / "tiny", model={"encoder": "tiny", "image-size": 64, "max-tokens": 16})
    micro_encoder(seed=5, image_size=48).export(root / "hospitals" / "images" / "own")
    change_site(
        root / "hospitals" / "images",
        cohort={"modality": "images", "reports": None, "image-size": 48},
        model={"encoder": "own", "part": "full"},
    )
    _texts_of(made / "hospitals" / "site-2", root / "hospitals" / "texts")
    table = {"findings": list(FINDINGS), "noise-multiplier": 10.0}
    settings: dict[str, Any] = {
        "share": {"part": "prototypes"},
        "prototypes": table,
        "training": {"rounds": rounds},
    }
    write_federation(root, **{**settings, **changes})
    return root


def _linked(made: Path, folder: Path, *, packed: bool = True) -> None:
    left_out = ("dicom",) if packed else ("dicom", "cohort", "cohort.salt")
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns(*left_out))
    (folder / "dicom").symlink_to(made / "dicom", target_is_directory=True)
    change_site(folder, name=folder.name, testing={"insecure-noise-seed": SEED})


def _texts_of(made: Path, folder: Path) -> None:
    cohort = Site.open(made).cohort()
    folder.mkdir(parents=True)
    with (folder / "reports.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient_id", "text", *FINDINGS])
        for row, text in enumerate(cohort.texts):
            labels = [cohort.labels[finding][row] for finding in FINDINGS if finding in cohort.labels]
            table.writerow([f"p{cohort.patients[row]}", text, *(f"{label:g}" for label in labels)])
    settings = {
        "version": 1,
        "name": folder.name,
        "cohort": {
            "table": "reports.csv",
            "modality": "texts",
            "patients-declared": PATIENTS,
            "salt": "texts",
        },
        "policy": {"min-patients": 10},
        "device": {"threads": 1},
        "testing": {"insecure-noise-seed": SEED},
    }
    (folder / SITE_FILE).write_text(tomli_w.dumps(settings))
