"""What was asked of whom, and what came of it: ``registry.sqlite`` in the folder of a run."""

import sqlite3
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from server.errors import RunError

VERSION = 1
REGISTRY_FILE = "registry.sqlite"
RELEASED, UNREACHABLE, WAITING, LATE, DROPPED = "released", "unreachable", "waiting", "late", "dropped"
_SCHEMA = """
BEGIN;
CREATE TABLE asks (
    id INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    site TEXT NOT NULL,
    request TEXT NOT NULL,
    sent_at REAL NOT NULL,
    bytes_down INTEGER NOT NULL
) STRICT;
CREATE INDEX asks_by_round ON asks (run, round, site);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    ask INTEGER NOT NULL REFERENCES asks (id),
    answered_at REAL NOT NULL,
    outcome TEXT NOT NULL,
    bytes_up INTEGER NOT NULL
) STRICT;
CREATE INDEX answers_by_ask ON answers (ask);
CREATE TRIGGER asks_stay BEFORE UPDATE ON asks BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER asks_remain BEFORE DELETE ON asks BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER answers_stay BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER answers_remain BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE VIEW exchanges AS
    SELECT asks.id AS ask, run, round, attempt, site, request,
        sent_at, answered_at, outcome, bytes_down, bytes_up
    FROM asks LEFT JOIN answers
        ON answers.id = (SELECT max(id) FROM answers WHERE answers.ask = asks.id)
    ORDER BY asks.id;
PRAGMA user_version = 1;
COMMIT;
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request to one site, a row of the view ``exchanges`` and in its order.

    Attributes:
        ask: Number of the ask, in the order of asking.
        run: Name of the run.
        server_round: From 1.
        attempt: From 1; how often this site was asked in this round, retries and earlier lives included.
        site: Name of the site.
        request: Digest of the request; equal digests are one request.
        sent_at: Unix seconds.
        answered_at: Unix seconds of the last word on it; None: no answer is known, such as after a crash.
        outcome: ``released``; ``unreachable``; the code of a refusal; ``waiting`` after the deadline for a
            release that may still be used, and then ``late`` or ``dropped``; None: no answer.
        bytes_down: Payload of the request.
        bytes_up: Payload of the answer.
    """

    ask: int
    run: str
    server_round: int
    attempt: int
    site: str
    request: str
    sent_at: float
    answered_at: float | None
    outcome: str | None
    bytes_down: int
    bytes_up: int | None


class Registry:
    """The registry of one run.

    Guarantees:
        Rows are appended and never changed: the file itself refuses it. An ask is in the file before the
        message is on its way, so a killed coordinator leaves no request that is not written down; a killed
        process loses nothing, a power failure at most the last rows.

    Args:
        path: The file; made when missing.

    Raises:
        RunError: the file is no registry of this version.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            # A write-ahead log needs no sync a row to survive a kill, and a thousand sites are many rows.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._database.executescript(_SCHEMA)
                version = VERSION
        except sqlite3.DatabaseError as error:
            self.close()
            raise RunError(f"{path} is no registry ({error}): move it away, a new one is begun") from error
        if version != VERSION:
            self.close()
            raise RunError(f"{path} has version {version}, this program reads {VERSION}: move it away")

    def asked(self, *, run: str, server_round: int, site: str, request: str, bytes_down: int) -> int:
        """Write down that a site is about to be asked.

        Args:
            run: Name of the run.
            server_round: From 1.
            site: Name of the site.
            request: Digest of its request.
            bytes_down: Payload of its request.

        Returns:
            The number of the row, for `answered`.
        """
        added = self._database.execute(
            "INSERT INTO asks (run, round, attempt, site, request, sent_at, bytes_down) SELECT ?1, ?2, "
            "1 + (SELECT count(*) FROM asks WHERE run = ?1 AND round = ?2 AND site = ?3), ?3, ?4, ?5, ?6",
            (run, server_round, site, request, time.time(), bytes_down),
        )
        return int(added.lastrowid or 0)

    def answered(self, row: int, *, outcome: str, bytes_up: int = 0) -> None:
        """Write down what came of one ask; the last word counts, the earlier ones stay."""
        self._database.execute(
            "INSERT INTO answers (ask, answered_at, outcome, bytes_up) VALUES (?, ?, ?, ?)",
            (row, time.time(), outcome, bytes_up),
        )

    def entries(self) -> list[Entry]:
        """All asks with the last word on each, oldest first."""
        columns = [field.name for field in fields(Entry)]
        rows = self._database.execute("SELECT * FROM exchanges")
        return [Entry(**dict(zip(columns, row, strict=True))) for row in rows]

    def close(self) -> None:
        """Close the file; harmless when closed."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
