"""Whether two cohorts share images, told without showing either to the other.

Each side turns its SOPInstanceUIDs and perceptual hashes into HMACs under a key that both have agreed on by
another way, and one hands its list over. Whoever lacks the key learns nothing from it, not even how many
images there are; whoever has it can ask the list about an image that they hold themselves: its purpose.
"""

import hmac
import json
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from client.cohort.errors import OverlapError
from client.cohort.origins import Origin
from client.cohort.similar import low_frequencies, packed_bits

VERSION = 1
MIN_KEY_BYTES = 16
ROUND_TO = 1000  # decoys fill a list up, so that its length does not tell a cohort's
_MARK_BYTES = 16
_BLOCK = 256
_UNSURE_BITS = 6  # the same picture, through another export, may have these otherwise
_SEPARATORS = re.compile(r"[\s,;|\"'\[\]{}:]+")


@dataclass(frozen=True, repr=False)
class Key:
    """What two sides have agreed on."""

    secret: bytes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the key in the file ``path``.

        Raises:
            OverlapError: There is none, or it can be guessed.
        """
        try:
            secret = path.read_bytes().strip()
        except OSError as error:
            raise OverlapError(
                f"expected the key that both sides share in {path}: {error.strerror}"
            ) from None
        if len(secret) < MIN_KEY_BYTES:
            raise OverlapError(
                f"expected {MIN_KEY_BYTES} bytes or more in {path}, got {len(secret)}; make one with: "
                f"openssl rand -hex 32"
            )
        return cls(secret)

    def mark(self, kind: str, value: bytes) -> str:
        """Return what stands for a value of this kind."""
        return hmac.digest(self.secret, kind.encode() + b"\0" + value, "sha256")[:_MARK_BYTES].hex()


def exported(key: Key, rows: Sequence[Origin], images: NDArray[np.uint8]) -> str:
    """Return the list that is handed over, as JSON: marks in their own order, filled up with decoys."""
    uids = {key.mark("uid", row.uid.encode()) for row in rows if row.uid}
    pictures = {key.mark("picture", bits) for bits in map(_bytes, _hashes(images))}
    return json.dumps(
        {
            "version": VERSION,
            "key": key.mark("key", b""),
            "uids": _filled_up(uids),
            "pictures": _filled_up(pictures),
        },
        indent=0,
    )


def shared(
    against: Path, key: Key | None, rows: Sequence[Origin], images: NDArray[np.uint8]
) -> Sequence[int]:
    """Return the rows of the own side that the other side, or a public list, has as well.

    Args:
        against: What the other side has exported; or any text with ids, such as a benchmark's table.
        key: The shared key; a text needs none.
        rows: The own cohort's origins.
        images: Its images.

    Raises:
        OverlapError: The file cannot be read, or was exported under another key.
    """
    try:
        text = against.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OverlapError(f"expected the other side's list in {against}: {error.strerror}") from None
    document = _document(text)
    if document is None:
        names = set(_SEPARATORS.split(text))
        return [number for number, row in enumerate(rows) if row.ids & names]
    if key is None:
        raise OverlapError(f"{against} holds keyed marks: name the key that both sides share with --key-file")
    if document.get("version") != VERSION or document.get("key") != key.mark("key", b""):
        raise OverlapError(f"{against} was made under another key or by another version; agree on one")
    uids, pictures = set(document["uids"]), set(document["pictures"])
    found = {
        number for number, row in enumerate(rows) if row.uid and key.mark("uid", row.uid.encode()) in uids
    }
    found.update(_same_pictures(key, pictures, images))
    return sorted(found)


def _same_pictures(key: Key, pictures: Collection[str], images: NDArray[np.uint8]) -> Iterator[int]:
    for start in range(0, len(images), _BLOCK):
        frequencies = low_frequencies(images[start : start + _BLOCK])
        unsure = np.argsort(np.abs(frequencies), axis=1)[:, :_UNSURE_BITS]
        hashes = packed_bits(frequencies).tolist()
        for row, (bits, places) in enumerate(zip(hashes, unsure.tolist(), strict=True)):
            flips = (_flip(mask, places) for mask in range(2**_UNSURE_BITS))
            if any(key.mark("picture", _bytes(bits ^ flip)) in pictures for flip in flips):
                yield start + row


def _flip(mask: int, places: Sequence[int]) -> int:
    return sum(1 << place for bit, place in enumerate(places) if mask >> bit & 1)


def _hashes(images: NDArray[np.uint8]) -> Iterator[int]:
    for start in range(0, len(images), _BLOCK):
        yield from packed_bits(low_frequencies(images[start : start + _BLOCK])).tolist()


def _bytes(bits: int) -> bytes:
    return bits.to_bytes(8)


def _filled_up(marks: Collection[str]) -> list[str]:
    missing = -len(marks) % ROUND_TO
    return sorted([*marks, *(secrets.token_hex(_MARK_BYTES) for _ in range(missing))])


def _document(text: str) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) and {"key", "uids", "pictures"} <= set(document) else None
