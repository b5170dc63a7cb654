"""The packed cohort on disk: images to be memory-mapped, an index, a manifest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort.errors import StoredCohortError
from client.cohort.index_file import INDEX, MappedIndex
from client.cohort.outcomes import Code, State
from client.cohort.packed_images import IMAGES
from client.cohort.token_file import TOKENS, MappedTokens

VERSION = 5
MANIFEST, QUARANTINE = "cohort.json", "quarantine.csv"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cohort:
    """A site's image-text pairs, one per row; N rows of P patients, images of S × S pixels.

    Everything here is patient data and stays at the site, the counts included.

    Attributes:
        identity: Hex HMAC of the content under the site's salt: equal content, equal identity.
        images: Grey levels, uint8, shape (N, S, S), memory-mapped read-only. With two or three CT windows
            (N, S, S, 3): each channel shows a window, and those of an image that is no CT are equal.
        texts: N training texts.
        text_ids: Number of each row's text, int32, shape (N,): equal numbers are equal texts, from 0 in the
            order of their first rows. Rows that share one are no negatives of each other.
        tokens: Ids of each text's pieces under the shipped vocabulary, by the text's number. A model may have
            another tokenizer: see ``client.workbench.tokenised``.
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
    tokens: MappedTokens
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


def stored_version(out: Path) -> int:
    """Return the version of the cohort in ``out``, perhaps an older one; 0 where there is none."""
    try:
        return int(json.loads((out / MANIFEST).read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def open_cohort(out: Path) -> Cohort:
    """Open a packed cohort; the images are mapped, not read.

    Raises:
        StoredCohortError: ``out`` holds no cohort, one of another version, or a damaged one.
    """
    manifest = _manifest(out)
    try:
        images = np.load(out / IMAGES, mmap_mode="r", allow_pickle=False)
        index, tokens = MappedIndex.open(out / INDEX), MappedTokens.open(out / TOKENS)
        cohort = Cohort(
            identity=manifest["identity"],
            images=images,
            texts=index.texts,
            text_ids=index.text_ids,
            tokens=tokens,
            text_keys=index.text_keys,
            patients=index.patients,
            studies=index.studies,
            is_test=index.is_test,
            labels=index.labels,
            counts={State(state): count for state, count in manifest["counts"].items()},
            codes={Code[code]: count for code, count in manifest["codes"].items()},
            unpaired_reports=manifest["unpaired_reports"],
            text_rules=manifest["text_rules"],
            masked=manifest["masked"],
            unknown_merges=manifest["unknown_merges"],
            pipeline=manifest["pipeline"],
            rules=manifest["rules"],
        )
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again") from error
    whole = images.shape == (len(cohort), *manifest["image_shape"]) and len(cohort) == manifest["rows"]
    whole &= len(tokens) == int(cohort.text_ids.max(initial=-1)) + 1
    if not whole or {each.facts.get("identity") for each in (index, tokens)} != {cohort.identity}:
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
