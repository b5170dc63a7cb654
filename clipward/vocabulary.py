"""Makes the vocabulary that ships with the project, from text that is public or our own.

``python -m clipward.vocabulary`` writes it anew; a test holds the shipped file to this.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pydicom
from pydicom.datadict import DicomDictionary
from pydicom.sr._concepts_dict import concepts

import encoders
from clipward.synthetic import all_wording
from encoders.tokenizer import VOCABULARY, train_vocabulary
from tasks.prompts import PROMPTS

SIZE = 8192
# Report wording is rare beside the standard's 24,000 entries, and it is what models read.
WORDING_WEIGHT = 20


def public_text() -> list[str]:
    """DICOM names (PS3.6), coded concepts (PS3.16), report wording, prompts."""
    attributes = [entry[2] for entry in DicomDictionary.values()]
    # As pydicom ships them: libraries imported beside this one add to the dictionary that is in memory.
    unchanged = runpy.run_path(str(Path(pydicom.__file__).with_name("_uid_dict.py")))
    registered = [entry[0] for entry in unchanged["UID_dictionary"].values()]
    coded = [
        meaning
        for scheme in concepts.values()
        for codes in scheme.values()
        for meaning, _ in codes.values()
    ]  # fmt: skip
    prompts = [text for pair in PROMPTS.values() for text in (*pair.positive, *pair.negative)]
    return attributes + registered + coded + (all_wording() + prompts) * WORDING_WEIGHT


def make() -> dict[str, Any]:
    """The vocabulary; the same on every machine."""
    return train_vocabulary(public_text(), size=SIZE)


def shipped() -> Path:
    """Where the vocabulary ships."""
    return Path(encoders.__file__).parent / "vocabulary" / VOCABULARY


if __name__ == "__main__":
    shipped().write_text(json.dumps(make(), sort_keys=True) + "\n", encoding="utf-8")
