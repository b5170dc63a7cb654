"""Public sentences of the kind that begins a radiology caption: plane, technique, region, and a finding."""

from itertools import cycle, islice, product

from tasks.prompts import PROMPTS

PLANES = ("Axial", "Sagittal", "Coronal", "PA", "AP", "Lateral", "Oblique")
TECHNIQUES = (
    "CT",
    "MRI",
    "T1-weighted MRI",
    "T2-weighted MRI",
    "plain radiograph",
    "ultrasound",
    "angiography",
    "fluoroscopy",
    "mammogram",
    "nuclear medicine scan",
    "PET",
)
REGIONS = (
    "head", "brain", "skull", "neck", "chest", "lung", "heart", "aorta", "breast",
    "abdomen", "liver", "kidney", "pelvis", "spine", "shoulder", "hand", "knee", "foot",
)  # fmt: skip


def view_sentences() -> tuple[str, ...]:
    """One sentence for each region and technique, planes and findings by turns: always the same."""
    findings = [text for pair in PROMPTS.values() for text in pair.positive]
    pairs = list(product(REGIONS, TECHNIQUES))
    return tuple(
        f"{plane} {technique} of the {region}: {finding[0].lower()}{finding[1:]}"
        for (region, technique), plane, finding in zip(
            pairs, islice(cycle(PLANES), len(pairs)), islice(cycle(findings), len(pairs)), strict=True
        )
    )
