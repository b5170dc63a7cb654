"""The privacy budget of one cohort: an append-only, hash-chained record of what was done to it.

One SQLite file per cohort, kept by the site for the lifetime of the cohort, over all runs and coordinators.
The order is *reserve, compute, store the release, released, send*:

- `Ledger.reserve` is durable before it returns, so a charge exists before the first gradient.
- The release is stored, then recorded by `Ledger.released`, and only then leaves the site.
- A failure that is reported outward is recorded by `Ledger.abandoned` before the report leaves.

Why no order of crashes, retries and races under-counts: what an outsider can see of a computation is its
release or its failure. Both are recorded before they are sent, a reservation takes only one of the two, and
whoever comes second is refused. So each reservation stands for at most one visible result, and is charged
for ever, whatever becomes of it. Taking up an open reservation again is free because nothing of the first
attempt was seen; after a failure was seen, the same request is charged anew.

The chain shows any change to rows that does not also rewrite every later hash. A history cut short at the
end, started afresh or rewritten as a whole is itself a valid chain: that shows only against a head
(`Ledger.head`) kept elsewhere.
"""

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from privacy.accounting import PoissonGaussian, epsilon
from privacy.errors import AlreadyReleased, BudgetExceeded, LedgerTampered, ReservationClosed, WrongLedger

_VERSION = 1
_BEFORE_THE_FIRST = "0" * 64
_LOCK_TIMEOUT_SECONDS = 60.0
# The triggers stop slips of our own code; against others stands the chain.
_SCHEMA = (
    """CREATE TABLE rows (
        seq INTEGER PRIMARY KEY, previous TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT""",
    "CREATE TRIGGER never_updated BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER never_deleted BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'append-only'); END",
)


@dataclass(frozen=True, kw_only=True)
class ReservationRequest:
    """Facts of one mechanism that is about to run on the cohort, as it will be executed.

    Attributes:
        request_digest: Identity of the request: run, round, kind, plan and input arrays.
        run: Name of the run.
        server_round: Round, from 1.
        kind: What is computed, such as ``dp-sgd``.
        unit: Unit of privacy; only ``patient``.
        adjacency: Neighbouring relation; only ``add_remove``.
        sampler: ``poisson``, or ``none`` if everyone takes part (sample rate 1).
        sample_rate: Probability in (0, 1] that a patient joins a step.
        steps: Number of noised steps, >= 1.
        max_grad_norm: Clipping bound C > 0 of one contribution.
        sensitivity: L2 change of the un-noised sum when a patient comes or goes, >= C.
        noise_std: Standard deviation of the noise added to that sum, > 0, in the units of ``sensitivity``.
        insecure_seed: Whether the noise came from a fixed seed, so that it protects nobody.
        code_version: Version of the code that runs.
        input_digest: Digest of the arrays that came in.

    Raises:
        ValueError: A fact is out of its range, or the accountant has no proof for such a mechanism.
    """

    request_digest: str
    run: str
    server_round: int
    kind: str
    unit: str
    adjacency: str
    sampler: str
    sample_rate: float
    steps: int
    max_grad_norm: float
    sensitivity: float
    noise_std: float
    insecure_seed: bool
    code_version: str
    input_digest: str

    def __post_init__(self) -> None:
        for name in ("request_digest", "run", "kind", "code_version", "input_digest"):
            if not getattr(self, name):
                raise ValueError(f"expected {name} not to be empty")
        if self.server_round < 1:
            raise ValueError(f"expected server_round={self.server_round} >= 1")
        if self.unit != "patient":
            raise ValueError(
                f"expected unit={self.unit!r} to be 'patient': units cannot be composed together"
            )
        if self.adjacency != "add_remove":
            raise ValueError(f"expected adjacency={self.adjacency!r} to be 'add_remove'")
        if self.sampler != "poisson" and not (self.sampler == "none" and self.sample_rate == 1):
            raise ValueError(
                f"expected sampler={self.sampler!r} at sample_rate={self.sample_rate} to be 'poisson': "
                "no other sampler amplifies privacy here; take part with sample_rate=1 and sampler='none'"
            )
        if not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"expected max_grad_norm={self.max_grad_norm} > 0 and finite")
        if not self.max_grad_norm <= self.sensitivity < math.inf:
            raise ValueError(
                f"expected sensitivity={self.sensitivity} >= max_grad_norm={self.max_grad_norm} and finite: "
                "one patient can move the sum by the whole clipping bound"
            )
        if not 0 < self.noise_std < math.inf:
            raise ValueError(f"expected noise_std={self.noise_std} > 0 and finite")
        if not isinstance(self.insecure_seed, bool):
            raise ValueError(f"expected insecure_seed={self.insecure_seed!r} to be true or false")
        self.event()  # the accountant's own ranges

    def event(self) -> PoissonGaussian:
        """The mechanism as the accountant sees it, from the noise actually added."""
        return PoissonGaussian(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_std / self.sensitivity,
            steps=self.steps,
        )


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A charge on the ledger that entitles to one release.

    Attributes:
        seq: Number of its row.
        hash: Hash of its row, which ties it to this very ledger.
        request: What was reserved.
    """

    seq: int
    hash: str
    request: ReservationRequest


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as stored: ``hash = SHA-256(previous || body)``, the body being canonical JSON with ``seq``.

    Canonical: keys sorted, no spaces, ASCII, no NaN. Row 0 follows 64 zeros and names the cohort.
    """

    seq: int
    previous: str
    body: Mapping[str, Any]
    hash: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The budget (epsilon_max, delta) of a cohort and everything that was charged to it.

    Guarantees:
        When `reserve` returns, the charge is on disk and the composition of *all* charges of this cohort,
        released or not, is within ``epsilon_max`` at ``delta``, also with several processes at work. Every
        read checks the whole chain first: nothing is computed from rows that were tampered with.

    Epsilon is computed from the recorded facts each time and stored nowhere. No file stays open between
    calls, so a ledger may be shared by threads and survives a fork.

    Attributes:
        path: The file; it must lie on a local disk, since SQLite's locks fail on some network file systems.
        cohort: Identity digest of the cohort.
        epsilon_max: The site's bound as of now; lowering it stops further charges, past ones stay.
        delta: The site's failure probability as of now.

    Raises:
        ValueError: ``cohort`` is empty, or the budget is out of its range.
    """

    path: Path
    cohort: str
    epsilon_max: float
    delta: float

    def __post_init__(self) -> None:
        if not self.cohort:
            raise ValueError("expected cohort not to be empty")
        if not 0 < self.epsilon_max < math.inf:
            raise ValueError(f"expected epsilon_max={self.epsilon_max} > 0 and finite")
        if not 0 < self.delta < 1:
            raise ValueError(f"expected delta={self.delta} in (0, 1)")

    @classmethod
    def open(cls, path: str | Path, *, cohort: str, epsilon_max: float, delta: float) -> Self:
        """Open the ledger of a cohort, or start one in a file that only its owner may read.

        Raises:
            ValueError: ``cohort`` is empty, or the budget is out of its range.
            WrongLedger: the file is another cohort's, of a newer version, or no ledger.
            LedgerTampered: a row is not the one that was written.
        """
        ledger = cls(path=Path(path), cohort=cohort, epsilon_max=epsilon_max, delta=delta)
        os.close(os.open(ledger.path, os.O_RDWR | os.O_CREAT, 0o600))
        with ledger._transaction() as connection:
            if _is_empty(connection):
                _create(connection, cohort)
        ledger.verify()
        return ledger

    def reserve(self, request: ReservationRequest) -> Reservation:
        """Charge a mechanism to the cohort before it runs.

        A request whose reservation is still open (a process died before its release) gets that reservation
        again at no cost, if all its facts are the same; with other facts, or after its failure was reported
        outward, it is charged anew. The module's docstring says why this never under-counts.

        Returns:
            The reservation, durable on disk.

        Raises:
            BudgetExceeded: the cohort would pass ``epsilon_max``; nothing was charged.
            AlreadyReleased: the request has a stored release, to be sent again instead.
            LedgerTampered: a row is not the one that was written.
        """
        with self._transaction() as connection:
            book = self._book(connection)
            held = book.held(request)
            total = epsilon(book.events() if held else [*book.events(), request.event()], delta=self.delta)
            if not total <= self.epsilon_max:
                raise BudgetExceeded(
                    f"round {request.server_round} of run {request.run!r} would bring the cohort to "
                    f"epsilon={total:.4g} at delta={self.delta}, above epsilon_max={self.epsilon_max}: "
                    "ask for fewer steps or more noise, or stop using this cohort"
                )
            if held:
                return held
            row = _append(connection, book.rows[-1], {"event": "reserved", "request": asdict(request)})
            return Reservation(seq=row.seq, hash=row.hash, request=request)

    def released(self, reservation: Reservation, *, output_digest: str) -> None:
        """Record the release, after it was stored and before it leaves; at most one per reservation.

        Saying it again with the same digest changes nothing.

        Raises:
            AlreadyReleased: another result was released for it; this one must be thrown away.
            ReservationClosed: the reservation is not this ledger's, or was abandoned.
            LedgerTampered: a row is not the one that was written.
        """
        if not output_digest:
            raise ValueError("expected output_digest not to be empty")
        with self._transaction() as connection:
            book = self._book(connection)
            try:
                book.require_open(reservation)
            except AlreadyReleased as released:
                if released.output_digest == output_digest:
                    return
                raise
            outcome = {"event": "released", "reservation": reservation.seq, "output_digest": output_digest}
            _append(connection, book.rows[-1], outcome)

    def abandoned(self, reservation: Reservation, *, code: str) -> None:
        """Record that the attempt failed, before the failure is reported outward. The charge stays.

        Args:
            reservation: What `reserve` returned.
            code: The public code that the coordinator will see.

        Raises:
            AlreadyReleased: it was released; send that instead of the failure.
            ReservationClosed: the reservation is not this ledger's, or was abandoned before.
            LedgerTampered: a row is not the one that was written.
        """
        if not code:
            raise ValueError("expected code not to be empty")
        with self._transaction() as connection:
            book = self._book(connection)
            book.require_open(reservation)
            outcome = {"event": "abandoned", "reservation": reservation.seq, "code": code}
            _append(connection, book.rows[-1], outcome)

    def events(self, run: str | None = None) -> list[PoissonGaussian]:
        """Mechanisms charged by ``run``, or by all runs: one per reservation, released or not."""
        return self._read().events(run)

    def spent(self, run: str | None = None) -> float:
        """Epsilon at the ledger's delta of what ``run``, or all runs together, were charged."""
        return epsilon(self.events(run), delta=self.delta)

    def would_spend(self, request: ReservationRequest) -> float:
        """Epsilon of the cohort after `reserve` of this request; nothing is charged."""
        book = self._read()
        try:
            free = book.held(request) is not None
        except AlreadyReleased:
            free = True
        return epsilon(book.events() if free else [*book.events(), request.event()], delta=self.delta)

    def open_reservations(self, request_digest: str) -> list[Reservation]:
        """Reservations of this request that were neither released nor abandoned, oldest first."""
        book = self._read()
        closed = {*book.released, *book.abandoned}
        mine = (r for r in book.reservations.values() if r.request.request_digest == request_digest)
        return [reservation for reservation in mine if reservation.seq not in closed]

    def rows(self) -> tuple[Row, ...]:
        """All rows from the first, verified."""
        return tuple(self._read().rows)

    @property
    def head(self) -> str:
        """Hash of the last row: kept elsewhere, it shows a history that was cut short or rewritten."""
        return self._read().rows[-1].hash

    def verify(self) -> None:
        """Check every row against the chain, and that the rows tell a possible story.

        Raises:
            LedgerTampered: naming the first row that was edited, deleted, moved or copied.
            WrongLedger: the file is another cohort's, of a newer version, or no ledger.
        """
        self._read()

    def _read(self) -> "_Book":
        with self._transaction() as connection:
            return self._book(connection)

    def _book(self, connection: sqlite3.Connection) -> "_Book":
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise WrongLedger(
                f"{self.path.name} has version {version}, this code reads {_VERSION}: "
                "install the version that wrote it, or name the right file"
            )
        try:
            stored = connection.execute("SELECT seq, previous, body, hash FROM rows ORDER BY seq").fetchall()
        except sqlite3.DatabaseError as error:
            raise LedgerTampered(f"the rows cannot be read: {error}") from error
        book = _Book(rows=_verified(stored))
        if (cohort := book.rows[0].body.get("cohort")) != self.cohort:
            raise WrongLedger(
                f"{self.path.name} is the ledger of cohort {cohort}, not of {self.cohort}: "
                "each cohort has its own budget and its own ledger"
            )
        book.replay()
        return book

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One process at a time from here to the commit, which is durable; an exception leaves no trace.

        A rollback journal, not a write-ahead log: at rest the ledger is one file, so a back-up that copies
        this file has the newest charges. The commit is the deletion of the journal, which survives a power
        failure only if the directory is synced as well: EXTRA is FULL plus that.
        Source: sqlite.org/pragma.html#pragma_synchronous.
        """
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_LOCK_TIMEOUT_SECONDS,
            isolation_level=None,
        )
        try:
            try:
                connection.execute("PRAGMA journal_mode=DELETE")
                connection.execute("PRAGMA synchronous=EXTRA")
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                raise WrongLedger(f"{self.path.name} is not a ledger: {error}") from error
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()


@dataclass(kw_only=True)
class _Book:
    """The rows read as a story: which reservations there are, and what became of each."""

    rows: list[Row]
    reservations: dict[int, Reservation] = field(default_factory=dict)
    released: dict[int, str] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)

    def replay(self) -> None:
        for row in self.rows[1:]:
            try:
                self._take(row)
            except (KeyError, TypeError, ValueError, ReservationClosed, AlreadyReleased) as error:
                raise LedgerTampered(f"row {row.seq} cannot follow the rows before it: {error}") from error

    def _take(self, row: Row) -> None:
        match row.body["event"]:
            case "reserved":
                request = ReservationRequest(**row.body["request"])
                self.reservations[row.seq] = Reservation(seq=row.seq, hash=row.hash, request=request)
            case "released":
                self.require_open(self.reservations[row.body["reservation"]])
                self.released[row.body["reservation"]] = row.body["output_digest"]
            case "abandoned":
                self.require_open(self.reservations[row.body["reservation"]])
                self.abandoned.add(row.body["reservation"])
            case event:
                raise ValueError(f"unknown {event=}")

    def held(self, request: ReservationRequest) -> Reservation | None:
        same = [r for r in self.reservations.values() if r.request.request_digest == request.request_digest]
        for reservation in same:
            if reservation.seq in self.released:
                self.require_open(reservation)
        return next((r for r in same if r.request == request and r.seq not in self.abandoned), None)

    def require_open(self, reservation: Reservation) -> None:
        if self.reservations.get(reservation.seq) != reservation:
            raise ReservationClosed(f"reservation {reservation.seq} is not in this ledger: reserve first")
        if reservation.seq in self.abandoned:
            raise ReservationClosed(f"reservation {reservation.seq} was abandoned: reserve anew")
        if reservation.seq in self.released:
            raise AlreadyReleased(
                f"reservation {reservation.seq} was released: send the stored release",
                output_digest=self.released[reservation.seq],
            )

    def events(self, run: str | None = None) -> list[PoissonGaussian]:
        return [r.request.event() for r in self.reservations.values() if run is None or r.request.run == run]


def _verified(stored: list[tuple[int, str, str, str]]) -> list[Row]:
    rows: list[Row] = []
    previous = _BEFORE_THE_FIRST
    for expected, (seq, recorded, text, digest) in enumerate(stored):
        if seq != expected:
            raise LedgerTampered(f"row {expected} is missing or repeated: found row {seq} in its place")
        try:
            intact, body = digest == _hash(recorded, text), json.loads(text)
            number = body["seq"]
        except (ValueError, TypeError, KeyError) as error:
            raise LedgerTampered(f"row {seq} was edited: it is no row of a ledger any more") from error
        if not intact:
            raise LedgerTampered(f"row {seq} was edited: its hash does not match what it says")
        if number != seq:
            raise LedgerTampered(f"row {seq} holds row {number}: it was moved or copied")
        if recorded != previous:
            raise LedgerTampered(f"row {seq} does not follow row {seq - 1}: the chain is broken there")
        rows.append(Row(seq=seq, previous=previous, body=body, hash=digest))
        previous = digest
    if not rows:
        raise LedgerTampered("row 0 is missing: the ledger is empty")
    return rows


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    return bool(tables == 0 and connection.execute("PRAGMA user_version").fetchone()[0] == 0)


def _create(connection: sqlite3.Connection, cohort: str) -> None:
    for statement in _SCHEMA:
        connection.execute(statement)
    _append(connection, None, {"event": "opened", "cohort": cohort})
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _append(connection: sqlite3.Connection, last: Row | None, facts: Mapping[str, Any]) -> Row:
    seq, previous = (0, _BEFORE_THE_FIRST) if last is None else (last.seq + 1, last.hash)
    body = {"seq": seq, **facts}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    row = Row(seq=seq, previous=previous, body=body, hash=_hash(previous, text))
    connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (seq, previous, text, row.hash))
    return row


def _hash(previous: str, text: str) -> str:
    return hashlib.sha256((previous + text).encode()).hexdigest()
