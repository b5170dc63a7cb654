"""Collections as large as an archive, on disk rather than in memory.

SQLite keeps each in a file without a name, which only this process can open and which is gone with it, even
if it is killed (https://sqlite.org/inmemorydb.html, temporary databases).
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from client.cohort import facts
from client.cohort.outcomes import Code, State
from client.cohort.sources import Candidate

Finding = tuple[str, State, Code, str]  # path, state, code, detail


class _OnDisk:
    _schema: str

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {self._schema}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._database.close()


class SetOnDisk(_OnDisk):
    """A set of strings that tells whether one is new."""

    _schema = "CREATE TABLE seen (value TEXT PRIMARY KEY) WITHOUT ROWID"

    def add(self, value: str) -> bool:
        """Take ``value`` in; return whether it was not there."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (value,)).rowcount == 1


class CandidatesOnDisk(_OnDisk):
    """The images of a source between scan and pairing, in the order in which they were found."""

    _schema = """
        CREATE TABLE candidates (number INTEGER PRIMARY KEY, name BLOB, path BLOB, facts TEXT);
        CREATE TABLE sides (patient TEXT, is_test INTEGER, PRIMARY KEY (patient, is_test)) WITHOUT ROWID;
    """

    def append(self, name: str, candidate: Candidate) -> None:
        """Take an image in."""
        row = (os.fsencode(name), os.fsencode(candidate.path), facts.encode(candidate))
        self._database.execute("INSERT INTO candidates (name, path, facts) VALUES (?, ?, ?)", row)
        if candidate.is_test is not None:
            side = (candidate.patient, candidate.is_test)
            self._database.execute("INSERT OR IGNORE INTO sides VALUES (?, ?)", side)

    def __iter__(self) -> Iterator[tuple[str, Candidate]]:
        rows = self._database.execute("SELECT name, path, facts FROM candidates ORDER BY number")
        for name, path, known in rows:
            candidate = facts.decode(known, Path(os.fsdecode(path)))
            if isinstance(candidate, Candidate):
                yield os.fsdecode(name), candidate

    def sides(self, patient: str) -> set[bool]:
        """Return the splits in which the source has the patient's images: True is held out."""
        rows = self._database.execute("SELECT is_test FROM sides WHERE patient = ?", (patient,))
        return {bool(is_test) for (is_test,) in rows}


class FindingsOnDisk(_OnDisk):
    """What there is to say of inputs, by the inputs' names."""

    _schema = "CREATE TABLE findings (path BLOB, state TEXT, code TEXT, detail TEXT)"

    def add(self, finding: Finding) -> None:
        """Take one in."""
        path, *rest = finding
        self._database.execute("INSERT INTO findings VALUES (?, ?, ?, ?)", (os.fsencode(path), *rest))

    def __iter__(self) -> Iterator[Finding]:
        """Yield them sorted."""
        for path, state, code, detail in self._database.execute(
            "SELECT path, state, code, detail FROM findings ORDER BY path, state, code, detail"
        ):
            yield os.fsdecode(path), State(state), Code[code], detail
