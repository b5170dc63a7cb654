"""What a site keeps of an attempt between two messages, so that any process of it can answer the next one."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_bytes
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from strategies.files import sync, write_text
from strategies.secure_sum.masks import KEY_BYTES
from strategies.secure_sum.messages import KeyOffer, SealedShare, Strict, Terms, require_hex

MOST = 4  # of runs that a site takes part in at the same time
_WHOLE = ".json"


@dataclass(frozen=True, kw_only=True)
class Kept(Strict):
    """One site's attempt. Whoever reads it, and hears what the site sends, can take its masks away.

    Attributes:
        terms: What the attempt is about.
        mask_key: Private half, X25519; all keys and shares are hexadecimal digits.
        seal_key: Private half, X25519.
        seed: Of the mask that the site puts on alone.
        offers: All keys of the attempt; empty: the site has dealt nothing yet.
        dealt: What it dealt.
        shares: By dealer, what was dealt to it, of seed and key; empty: nothing was masked yet.
        survivors: The sum that it agreed to; empty: none yet.
    """

    terms: Terms
    mask_key: str = field(repr=False)
    seal_key: str = field(repr=False)
    seed: str = field(repr=False)
    offers: tuple[KeyOffer, ...] = ()
    dealt: tuple[SealedShare, ...] = ()
    shares: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    survivors: tuple[str, ...] = ()
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        for name in ("mask_key", "seal_key", "seed"):
            require_hex(name, getattr(self, name), KEY_BYTES)

    @classmethod
    def fresh(cls, terms: Terms) -> "Kept":
        """An attempt with keys that were never used."""
        keys = (X25519PrivateKey.generate().private_bytes_raw().hex() for _ in range(2))
        return cls(terms=terms, mask_key=next(keys), seal_key=next(keys), seed=token_bytes(KEY_BYTES).hex())


_FORM = TypeAdapter(Kept)


@dataclass(frozen=True, kw_only=True)
class AttemptBook:
    """A folder with one small file for each attempt under way, readable by its owner alone.

    Guarantees:
        One process at a time holds the folder. What was kept survives a crash, whole, and is gone for good
        once the attempt is over, or the next one of its run has begun; never more than `MOST` are there.
        What a crash left half-written is removed before anything else is done.
    """

    folder: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else reads or writes an attempt meanwhile."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            for path in self.folder.glob(".*"):
                path.unlink()
            yield
        finally:
            os.close(folder)

    def of(self, session: str) -> Kept | None:
        """The attempt; null where there is none, or its file is not whole."""
        require_hex("session", session, 32)
        return self._read(self.folder / f"{session}{_WHOLE}")

    def begin(self, kept: Kept) -> None:
        """Keep a new attempt, and nothing more of earlier ones of its run."""
        others = sorted(self.folder.glob(f"*{_WHOLE}"), key=lambda path: path.stat().st_mtime_ns)
        read = {path: self._read(path) for path in others}
        over = [path for path, one in read.items() if one is None or one.terms.run == kept.terms.run]
        left = [path for path in others if path not in over]
        for path in [*over, *left[: max(0, len(left) - MOST + 1)]]:
            path.unlink()
        self.keep(kept)

    def keep(self, kept: Kept) -> None:
        """Write it down; durable before it returns."""
        path = self.folder / f"{kept.terms.session}{_WHOLE}"
        write_text(path, _FORM.dump_json(kept).decode(), mode=0o600)

    def end(self, session: str) -> None:
        """Forget an attempt."""
        (self.folder / f"{session}{_WHOLE}").unlink(missing_ok=True)
        sync(self.folder)

    @staticmethod
    def _read(path: Path) -> Kept | None:
        with suppress(FileNotFoundError, ValidationError, ValueError):
            return _FORM.validate_json(path.read_bytes())
        return None
