"""How far a fetch has come, on disk: a killed one goes on where it was.

A fetch is one sweep over all studies that the queries name. The journal knows which of them this sweep has
done, which instances they hold and which of those did not come; whether a file is there, the spool knows.
"""

import csv
import io
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from client.cohort.outcomes import Code, Rejected
from client.pacs.errors import SpoolError
from client.pacs.source import Study
from client.pacs.spool import digest
from strategies.files import write_text

BATCH = 256  # studies read ahead

_TABLES = """
CREATE TABLE IF NOT EXISTS sweep (number INTEGER NOT NULL, query TEXT NOT NULL, finished INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS studies (
    uid TEXT PRIMARY KEY, sweep INTEGER NOT NULL, instances INTEGER NOT NULL, done INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS listed (digest BLOB PRIMARY KEY, sweep INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    study TEXT NOT NULL, item TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS failed_studies ON failures (study);
"""


@dataclass(frozen=True, kw_only=True, repr=False)
class Harvest:
    """What came of one study.

    Attributes:
        study: Its UID.
        instances: The UIDs it lists.
        new: How many of them this run has brought.
        failures: Name of what did not come, and why.
        passing: Whether asking again may help.
    """

    study: str
    instances: Sequence[str] = ()
    new: int = 0
    failures: Sequence[tuple[str, Rejected]] = ()
    passing: bool = False


class Journal:
    """The journal of one spool; for one thread."""

    def __init__(self, connection: sqlite3.Connection, *, query: str) -> None:
        """Go on with the unfinished sweep of ``query``, or begin one."""
        self._connection = connection
        connection.executescript(_TABLES)
        number, asked, finished = connection.execute(
            "SELECT number, query, finished FROM sweep UNION ALL SELECT 0, '', 1 LIMIT 1"
        ).fetchone()
        self._sweep = number
        if finished or asked != query:
            self._sweep += 1
            with connection:
                connection.execute("DELETE FROM sweep")
                connection.execute("INSERT INTO sweep VALUES (?, ?, 0)", (self._sweep, query))
                connection.execute("DELETE FROM failures")
        self._done = self._total = 0

    @classmethod
    @contextmanager
    def opened(cls, path: Path, *, query: Mapping[str, object]) -> Iterator[Self]:
        """Open the journal at ``path``, made if there is none, for a fetch of ``query``.

        Raises:
            SpoolError: The file is no journal.
        """
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(path)) as connection:
            try:
                # What a power failure takes with it is asked for again: no need to wait for the disk.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                journal = cls(connection, query=json.dumps(query, sort_keys=True, default=str))
            except sqlite3.DatabaseError as error:
                raise SpoolError(f"{path} is damaged: remove it, the files that are fetched stay") from error
            yield journal

    def add(self, studies: Iterable[Study]) -> int:
        """Note studies to fetch; return how many were given."""
        rows = [(study.uid, self._sweep, study.instances) for study in studies]
        with self._connection:
            self._connection.executemany(
                "INSERT INTO studies VALUES (?, ?, ?, 0) ON CONFLICT (uid) DO UPDATE SET"
                " sweep = excluded.sweep, instances = excluded.instances, done = 0"
                " WHERE sweep <> excluded.sweep",
                rows,
            )
        return len(rows)

    def pending(self) -> Iterator[str]:
        """Yield the studies that this sweep has not done, each once, while they are recorded."""
        last = 0
        query = (
            "SELECT rowid, uid FROM studies WHERE sweep = ? AND done = 0 AND rowid > ? ORDER BY rowid LIMIT ?"
        )
        while rows := self._connection.execute(query, (self._sweep, last, BATCH)).fetchall():
            yield from (uid for _, uid in rows)
            last = rows[-1][0]

    def record(self, harvest: Harvest, *, done: bool) -> None:
        """Note what came of a study; one that is not ``done`` stays pending."""
        study, instances = harvest.study, len(harvest.instances)
        expected = "SELECT instances FROM studies WHERE uid = ?"
        with self._connection:
            for (count,) in self._connection.execute(expected, (study,)).fetchall():
                self._total += instances - count
                self._done += instances * done
            self._connection.execute("DELETE FROM failures WHERE study = ?", (study,))
            self._connection.executemany(
                "INSERT INTO failures VALUES (?, ?, ?, ?)",
                [(study, item, rejected.code, rejected.detail) for item, rejected in harvest.failures],
            )
            self._connection.executemany(
                "INSERT INTO listed VALUES (?, ?) ON CONFLICT (digest) DO UPDATE SET sweep = excluded.sweep",
                [(digest(uid), self._sweep) for uid in harvest.instances],
            )
            self._connection.execute(
                "UPDATE studies SET instances = ?, done = ? WHERE uid = ?",
                (instances, done, study),
            )

    def progress(self) -> tuple[int, int]:
        """Return instances in the studies that are done, and in all."""
        return self._done, self._total

    def count(self) -> None:
        """Count anew what ``progress`` tells, after studies were added."""
        self._done, self._total = map(
            int,
            self._connection.execute(
                "SELECT total(done * instances), total(instances) FROM studies WHERE sweep = ?",
                (self._sweep,),
            ).fetchone(),
        )

    def is_listed(self, name: bytes) -> bool:
        """Return whether this sweep has found the instance of this ``digest``."""
        query = "SELECT 1 FROM listed WHERE digest = ? AND sweep = ?"
        return self._connection.execute(query, (name, self._sweep)).fetchone() is not None

    def is_complete(self) -> bool:
        """Return whether every study has said what it holds: what is not listed is then gone."""
        query = "SELECT 1 FROM failures WHERE code = ?"
        return self._connection.execute(query, (Code.E_FETCH_LIST,)).fetchone() is None

    def finish(self) -> None:
        """End the sweep: the next fetch begins another."""
        with self._connection:
            self._connection.execute("UPDATE sweep SET finished = 1")
            self._connection.execute("DELETE FROM studies WHERE sweep < ?", (self._sweep,))
            self._connection.execute("DELETE FROM listed WHERE sweep < ?", (self._sweep,))

    def codes(self) -> Counter[Code]:
        """Return how many items did not come, by reason."""
        rows = self._connection.execute("SELECT code, count(*) FROM failures GROUP BY code ORDER BY code")
        return Counter({Code[code]: count for code, count in rows})

    def write_failures(self, path: Path) -> None:
        """Write what did not come as CSV, for the hospital's eyes alone: it names studies and instances."""
        text = io.StringIO()
        lines = csv.writer(text)
        lines.writerow(("item", "code", "detail", "meaning"))
        for item, code, detail in self._connection.execute(
            "SELECT item, code, detail FROM failures ORDER BY item"
        ):
            lines.writerow((item, code, detail, Code[code].meaning))
        write_text(path, text.getvalue())
        path.chmod(0o600)
