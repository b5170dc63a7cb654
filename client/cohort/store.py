"""The packed cohort on disk: images to be memory-mapped, an index, a manifest."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort.errors import StoredCohortError
from client.cohort.outcomes import Code, State
from client.cohort.packed_images import IMAGES

VERSION = 3
INDEX, MANIFEST, QUARANTINE = "index.npz", "cohort.json", "quarantine.csv"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cohort:
    """A site's image-text pairs, one per row; N rows of P patients, images of S × S pixels.

    Everything here is patient data and stays at the site, the counts included.

    Attributes:
        identity: Hex HMAC of the content under the site's salt: equal content, equal identity.
        images: Grey levels, uint8, shape (N, S, S), memory-mapped read-only.
        texts: N training texts.
        text_ids: Number of each row's text, int32, shape (N,): equal numbers are equal texts, from 0 in the
            order of their first rows. No tokenizer is chosen here: a text is tokenised once by its number,
            and rows that share one are no negatives of each other.
        text_keys: N keys of 32 hexadecimal digits, equal for texts that say the same in the same words,
            whatever their case, punctuation and masks (``client.text.keys.text_key``).
        patients: Patient of each row, 0 to P - 1, int32, shape (N,).
        studies: Study of each row, numbered over all patients, int32, shape (N,).
        is_test: Whether the row's patient is held out, bool, shape (N,).
        labels: Finding to float32, shape (N,); NaN is unknown.
        counts: Inputs per state; the sum is the number of inputs seen.
        codes: Inputs per reason or remark.
        unpaired_reports: Reports that no image asked for.
        text_rules: Rows per part of the report that gave their text, see ``client.text.sections.Rule``.
        masked: What was taken out of the rows' texts, hits by kind, see ``client.text.scrub.Scrubbed``.
        unknown_merges: Patient ids in the table of merges that no image has.
        pipeline: Version of the pipeline, raised with every change of the pixels or texts that come out.
        rules: Hash of everything beside the files that decided on the content: the pipeline's version, the
            settings and the installed decoders.
    """

    identity: str
    images: NDArray[np.uint8]
    texts: tuple[str, ...]
    text_ids: NDArray[np.int32]
    text_keys: tuple[str, ...]
    patients: NDArray[np.int32]
    studies: NDArray[np.int32]
    is_test: NDArray[np.bool_]
    labels: Mapping[str, NDArray[np.float32]]
    counts: Mapping[State, int]
    codes: Mapping[Code, int]
    unpaired_reports: int
    text_rules: Mapping[str, int]
    masked: Mapping[str, int]
    unknown_merges: int
    pipeline: int
    rules: str

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Cohort(identity={self.identity[:8]!r}, image_size={self.images.shape[1]})"

    def train(self) -> NDArray[np.intp]:
        """Return the rows of the patients a model may learn from."""
        return np.flatnonzero(~self.is_test)

    def test(self) -> NDArray[np.intp]:
        """Return the rows of the held-out patients."""
        return np.flatnonzero(self.is_test)


def stored_fingerprint(out: Path) -> str | None:
    """Return the fingerprint of the cohort in ``out``, or None where a new one has to be built."""
    try:
        return str(_manifest(out)["fingerprint"])
    except (StoredCohortError, KeyError):
        return None


def open_cohort(out: Path) -> Cohort:
    """Open a packed cohort; the images are mapped, not read.

    Raises:
        StoredCohortError: ``out`` holds no cohort, one of another version, or a damaged one.
    """
    manifest = _manifest(out)
    try:
        images = np.load(out / IMAGES, mmap_mode="r", allow_pickle=False)
        with open(out / INDEX, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = dict(arrays)
        cohort = Cohort(
            identity=manifest["identity"],
            images=images,
            texts=_texts(index),
            text_ids=index["text_ids"],
            text_keys=_text_keys(index),
            patients=index["patients"],
            studies=index["studies"],
            is_test=index["is_test"],
            labels={
                str(name): index["labels"][:, column] for column, name in enumerate(index["label_names"])
            },
            counts={State(state): count for state, count in manifest["counts"].items()},
            codes={Code[code]: count for code, count in manifest["codes"].items()},
            unpaired_reports=manifest["unpaired_reports"],
            text_rules=manifest["text_rules"],
            masked=manifest["masked"],
            unknown_merges=manifest["unknown_merges"],
            pipeline=manifest["pipeline"],
            rules=manifest["rules"],
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again") from error
    size = manifest["image_size"]
    if images.shape != (len(cohort), size, size) or len(cohort) != manifest["rows"]:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again")
    return cohort


def _manifest(out: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise StoredCohortError(f"there is no cohort in {out}; build one first") from None
    except ValueError as error:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again") from error
    if manifest.get("version") != VERSION:
        raise StoredCohortError(
            f"the cohort in {out} has version {manifest.get('version')}, expected {VERSION}; build it again"
        )
    return manifest


def _texts(index: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """Return the text of every row; equal ones are one object, as most normal reports are."""
    distinct: Sequence[int] = index["text_ends"].tolist()
    stored = index["texts"].tobytes()
    texts = [stored[start:end].decode() for start, end in zip([0, *distinct[:-1]], distinct, strict=True)]
    return tuple(texts[number] for number in index["text_ids"].tolist())


def _text_keys(index: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    distinct = [key.decode() for key in index["text_keys"].tolist()]
    return tuple(distinct[number] for number in index["text_ids"].tolist())
