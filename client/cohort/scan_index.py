"""What is known of an archive's files, kept on disk so that none is read twice: `scan.sqlite`.

The index holds what headers say, patient ids and structured reports among it. It lies in the cohort's folder,
only its owner may read it, and it is deleted with that folder.
"""

import hmac
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from client.cohort import facts
from client.cohort.errors import SourceMissingError
from client.cohort.outcomes import Code, Rejected, Rendered
from client.cohort.packed_images import KEY_BYTES, PackedImages
from client.cohort.sources import OrderedMap, stamp
from client.cohort.workers import chunked

SCAN = "scan.sqlite"
SCAN_FILES = frozenset({SCAN, f"{SCAN}-wal", f"{SCAN}-shm", f"{SCAN}-journal"})
BATCH = 1024
SECONDS_BETWEEN_COMMITS = 5.0

# The machine may be to blame, and another day go well: the file is looked at again by the next build.
TRY_AGAIN = frozenset({Code.E_UNREADABLE, Code.E_CRASHED, Code.E_TIMEOUT, Code.E_DECODER_MISSING})

_LAYOUT = 1
# Exclusive: no memory shared beside the file, which a network file system does not have. Deleted facts about
# patients are overwritten.
_OPENING = f"""
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS facts (
    kind TEXT, name BLOB, state TEXT, outcome TEXT, visit INTEGER, PRIMARY KEY (kind, name)
);
PRAGMA user_version = {_LAYOUT};
"""


@dataclass(frozen=True, repr=False)
class FileState:
    """A file by name, and what tells one state of it, read by the same rules, from another."""

    name: bytes
    state: str

    def key(self, secret: bytes) -> bytes:
        """Return a name for the pixels that come of it, which says nothing without the secret."""
        return hmac.digest(secret, b"pixels\0" + self.name + b"\0" + self.state.encode(), "sha256")[
            :KEY_BYTES
        ]


class ScanIndex:
    """Facts about files by name, size, modification time and the rules they were read by.

    Guarantees:
        What was committed survives the death of the process at any moment; that is everything but the last
        seconds. A fact about a file that has changed since, or was read by other rules, is never used.
    """

    def __init__(self, path: Path, *, root: Path) -> None:
        """Open the index at ``path``, or make it; files are named from ``root`` on."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._database = _opened(path)
        self._visit: int = self._one("SELECT coalesce(max(visit), 0) + 1 FROM facts")
        self._committed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of files of which a header is known."""
        count: int = self._one("SELECT count(*) FROM facts WHERE kind = 'header'")
        return count

    def close(self) -> None:
        """Commit and close; the index is one file then."""
        self._database.commit()
        self._database.close()

    def forget_the_rest(self) -> None:
        """Delete what is known of files that nobody has asked for since the index was opened."""
        self._database.execute("DELETE FROM facts WHERE visit != ?", (self._visit,))

    def headers(self, ordered_map: OrderedMap, *, rules: str) -> OrderedMap:
        """Return a map over paths that calls only for headers that are not known by these ``rules``."""
        return _Remembering(self, ordered_map, rules, _Headers())

    def displays(
        self, ordered_map: OrderedMap, *, rules: str, packed: PackedImages, secret: bytes
    ) -> OrderedMap:
        """Return a map over paths that renders only what is not in ``packed`` by these ``rules``.

        Args:
            ordered_map: Renders the others.
            rules: All that decides on the pixels beside the file.
            packed: Images of earlier builds.
            secret: What their keys are made with.
        """
        return _Remembering(self, ordered_map, rules, _Displays(packed, secret))

    def packed(self, secret: bytes) -> Iterator[tuple[bytes, str, facts.Outcome | None]]:
        """Yield key, name and header of every file that was rendered; None where no header is kept."""
        for name, state, header in self._database.execute(
            "SELECT display.name, display.state, header.outcome FROM facts AS display "
            "LEFT JOIN facts AS header ON header.kind = 'header' AND header.name = display.name "
            "WHERE display.kind = 'display' ORDER BY display.name"
        ):
            path = Path(os.fsdecode(name))
            known = None if header is None else facts.decode(header, path)
            yield FileState(name, state).key(secret), os.fsdecode(name), known

    def state(self, path: Path, rules: str) -> FileState | None:
        """Return the state of a file, None if it is gone."""
        try:
            line = stamp(path, "")
        except SourceMissingError:
            return None
        with suppress(ValueError):
            path = path.relative_to(self._root)
        return FileState(os.fsencode(path), f"{line}\0{sha256(rules.encode()).hexdigest()[:16]}")

    def recall(self, kind: str, file: FileState) -> str | None:
        """Return what is known of a file in this very state."""
        row = self._database.execute(
            "SELECT rowid, outcome FROM facts WHERE kind = ? AND name = ? AND state = ?",
            (kind, file.name, file.state),
        ).fetchone()
        if row is None:
            return None
        self._database.execute("UPDATE facts SET visit = ? WHERE rowid = ?", (self._visit, row[0]))
        return str(row[1])

    def keep(self, kind: str, file: FileState, outcome: str) -> None:
        """Keep what was found out about a file."""
        self._database.execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)",
            (kind, file.name, file.state, outcome, self._visit),
        )
        if time.monotonic() - self._committed > SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Make what is kept outlive this process."""
        self._database.commit()
        self._committed = time.monotonic()

    def _one(self, query: str) -> Any:
        return self._database.execute(query).fetchone()[0]


class _Kind(Protocol):
    """What is remembered of the results of one function."""

    name: str

    def encode(self, result: Any) -> str: ...

    def decode(self, text: str, path: Path, file: FileState) -> Any:
        """Return the result, or None where the text alone is not enough for it."""
        ...

    def of(self, result: Any, file: FileState) -> Any:
        """Return a new result, told which state of the file it was made from."""
        ...


class _Headers:
    name = "header"

    def encode(self, result: facts.Outcome) -> str:
        return facts.encode(result)

    def decode(self, text: str, path: Path, file: FileState) -> facts.Outcome:
        return facts.decode(text, path)

    def of(self, result: facts.Outcome, file: FileState) -> facts.Outcome:
        return result


class _Displays:
    name = "display"

    def __init__(self, packed: PackedImages, secret: bytes) -> None:
        self._packed, self._secret = packed, secret

    def encode(self, result: Rendered | Rejected) -> str:
        return facts.encode(result) if isinstance(result, Rejected) else json.dumps([*result.remarks])

    def decode(self, text: str, path: Path, file: FileState) -> Rendered | facts.Outcome | None:
        known = json.loads(text)
        if known[:1] == ["rejected"]:
            return facts.decode(text, path)
        key = file.key(self._secret)
        pixels = self._packed.find(key)
        return None if pixels is None else Rendered(pixels, facts.codes(known), key)

    def of(self, result: Rendered | Rejected, file: FileState) -> Rendered | Rejected:
        return result if isinstance(result, Rejected) else replace(result, key=file.key(self._secret))


class _Remembering:
    """An ordered map over paths that asks the index first."""

    def __init__(self, index: ScanIndex, ordered_map: OrderedMap, rules: str, kind: _Kind) -> None:
        self._index, self._map, self._rules, self._kind = index, ordered_map, rules, kind

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for batch in chunked(items, BATCH):
            files = [self._index.state(path, self._rules) for path in batch]
            known = [self._recall(path, file) for path, file in zip(batch, files, strict=True)]
            unknown = [path for path, result in zip(batch, known, strict=True) if result is None]
            fresh = iter(self._map(function, unknown))
            for file, result in zip(files, known, strict=True):
                yield self._kept(file, next(fresh)) if result is None else result
            self._index.commit()

    def _recall(self, path: Path, file: FileState | None) -> Any:
        text = self._index.recall(self._kind.name, file) if file is not None else None
        return None if text is None or file is None else self._kind.decode(text, path, file)

    def _kept(self, file: FileState | None, result: Any) -> Any:
        if file is None:
            return result
        if not (isinstance(result, Rejected) and result.code in TRY_AGAIN):
            self._index.keep(self._kind.name, file, self._kind.encode(result))
        return self._kind.of(result, file)


def _opened(path: Path) -> sqlite3.Connection:
    """Open a database of this layout; one that cannot be used gives way, since files can be read again."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path)
    try:
        layout = database.execute("PRAGMA user_version").fetchone()[0]
        if layout in (0, _LAYOUT):
            database.executescript(_OPENING)
            return database
    except sqlite3.OperationalError:  # no space, no right to write: nothing that another file would cure
        database.close()
        raise
    except sqlite3.DatabaseError:
        pass
    database.close()
    for name in SCAN_FILES:
        path.with_name(name).unlink(missing_ok=True)
    return _opened(path)
