"""What an image shows of whom, and by what technique: public words, and how captions begin."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tasks.prompts import PROMPTS

ViewKind = Literal["planes", "techniques", "regions"]
VIEW_KINDS: tuple[ViewKind, ...] = get_args(ViewKind)

# Each term, and how else reports write it.
VIEWS: Mapping[ViewKind, Mapping[str, tuple[str, ...]]] = {
    "planes": {
        "axial": ("transverse",),
        "sagittal": (),
        "coronal": (),
        "PA": ("posteroanterior",),
        "AP": ("anteroposterior",),
        "lateral": (),
        "oblique": (),
    },
    "techniques": {
        "CT": ("computed tomography",),
        "MRI": ("MR", "magnetic resonance"),
        "T1-weighted MRI": ("T1", "T1w"),
        "T2-weighted MRI": ("T2", "T2w"),
        "plain radiograph": ("radiograph", "x-ray", "plain film"),
        "ultrasound": ("sonogram", "sonography", "doppler"),
        "angiography": ("angiogram", "venogram", "venography"),
        "fluoroscopy": ("barium swallow", "barium enema", "upper GI"),
        "mammogram": ("mammograph", "mammography"),
        "nuclear medicine scan": ("nuclear medicine", "scintigraphy", "bone scan"),
        "PET": ("positron emission",),
    },
    "regions": {
        "head": ("skull",),
        "brain": ("cerebral", "intracranial"),
        "face": ("sinuses", "orbit", "orbits"),
        "neck": ("cervical",),
        "chest": ("thorax", "thoracic", "mediastinum"),
        "lung": ("lungs", "pulmonary", "pleura", "pleural"),
        "heart": ("cardiac", "great vessels"),
        "vascular system": ("vascular", "aorta", "artery", "vein"),
        "breast": (),
        "abdomen": ("abdominal",),
        "liver": ("hepatic",),
        "gastrointestinal tract": ("gastrointestinal", "bowel", "colon"),
        "kidney": ("kidneys", "renal"),
        "genitourinary tract": ("genitourinary", "bladder", "urinary"),
        "pelvis": ("pelvic",),
        "spine": ("spinal", "vertebral", "lumbar"),
        "musculoskeletal system": ("musculoskeletal", "bone", "joint"),
        "shoulder": (),
        "hand": ("wrist",),
        "knee": (),
        "foot": ("ankle",),
    },
}


def view_sentences() -> tuple[str, ...]:
    """One sentence for each region and technique, planes and findings by turns: always the same."""
    findings = [text for pair in PROMPTS.values() for text in pair.positive]
    pairs = list(product(VIEWS["regions"], VIEWS["techniques"]))
    return tuple(
        f"{capital(plane)} {technique} of the {region}: {finding[0].lower()}{finding[1:]}"
        for (region, technique), plane, finding in zip(
            pairs,
            islice(cycle(VIEWS["planes"]), len(pairs)),
            islice(cycle(findings), len(pairs)),
            strict=True,
        )
    )


def example_sentences(kind: ViewKind, term: str) -> tuple[str, ...]:
    """Short public sentences with a term, over the terms of another kind."""
    match kind:
        case "planes":
            return tuple(f"{capital(term)} {technique}." for technique in VIEWS["techniques"])
        case "techniques":
            return tuple(f"{capital(term)} of the {region}." for region in VIEWS["regions"])
        case "regions":
            return tuple(f"{capital(technique)} of the {term}." for technique in VIEWS["techniques"])


def mentions(kind: ViewKind, term: str, texts: Sequence[str]) -> NDArray[np.bool_]:
    """Which texts have the term, or another word for it, whatever its case. Shape (N,).

    An abbreviation is all in capitals or all in small letters: "Mr" is nobody's MR.
    """
    words = [re.escape(word) for word in (term, *VIEWS[kind][term])]
    either = "|".join(f"{word}|{word.lower()}" if word.isupper() else f"(?i:{word})" for word in words)
    pattern = re.compile(rf"\b(?:{either})\b")
    return np.array([pattern.search(text) is not None for text in texts], dtype=bool)


def capital(words: str) -> str:
    """The words as a sentence begins with them."""
    return words[0].upper() + words[1:]
