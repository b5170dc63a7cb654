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

Each row is hashed with the hash before it, and that hash is signed with the site's key, so nobody without
the key can change a row, write one, or move one. A history cut short at its end is itself a signed chain:
that shows only against an `Anchor` kept elsewhere, which is why every release carries one, the coordinator
sends its last one back, and `Ledger.require` looks for it.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from privacy.accounting import PoissonGaussian, epsilon
from privacy.errors import (
    AlreadyReleased,
    BudgetExceeded,
    HistoryLost,
    LedgerTampered,
    ReservationClosed,
    WrongLedger,
)
from privacy.signing import Anchor, SiteKey, is_signed

logger = logging.getLogger(f"clipward.{__name__}")

_VERSION, _UNSIGNED_VERSION = 2, 1
_BEFORE_THE_FIRST = "0" * 64
_Stored = tuple[int, str, str, str, str]  # seq, previous, body, hash, signature
_LOCK_TIMEOUT_SECONDS = 60.0
# The triggers stop slips of our own code; against others stands the chain.
_SCHEMA = (
    """CREATE TABLE rows (
        seq INTEGER PRIMARY KEY, previous TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL,
        signature TEXT NOT NULL
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
        kind: What is computed, such as ``anchored``: the mechanism's own name for itself.
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
class Charge:
    """Something charged to the cohort, and what became of it; it counts whatever that is.

    Attributes:
        request: What was reserved.
        outcome: ``released``, ``abandoned``, or ``open`` while neither is recorded.
    """

    request: ReservationRequest
    outcome: Literal["released", "abandoned", "open"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as stored: ``hash = SHA-256(previous || body)``, the body being canonical JSON with ``seq``.

    Canonical: keys sorted, no spaces, ASCII, no NaN. Row 0 follows 64 zeros and names the cohort and the key.
    The signature is Ed25519 over ``clipward ledger row <seq> <hash>``. The body's ``time`` is UTC to the
    second and never earlier than the row before: where the site's clock was behind that, it is the time of
    the row before and ``clock`` holds what the clock said. The order of charges is the chain's, whatever the
    clock does, so a clock that a time server corrects stops nobody and is not hidden either. The random
    ``salt`` keeps a head, which others see, from confirming guesses about times or other runs.
    """

    seq: int
    previous: str
    body: Mapping[str, Any]
    hash: str
    signature: str

    @property
    def key(self) -> str | None:
        """The public key that signs from this row on, if this row names one."""
        return self.body.get("key") if self.body.get("event") in ("opened", "signed-over") else None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The budget (epsilon_max, delta) of a cohort and everything that was charged to it.

    Guarantees:
        When `reserve` returns, the charge is on disk and the composition of *all* charges of this cohort,
        released or not, is within ``epsilon_max`` at ``delta``, also with several processes at work. Every
        read checks the whole chain and the signature of its last row first: nothing is computed from rows
        that were tampered with.

    The last row's signature is enough to read by: it is over that row's hash, which no other rows lead to.
    `problems` checks every signature, so as to name the row.

    Epsilon is computed from the recorded facts each time and stored nowhere. No file stays open between
    calls, so a ledger may be shared by threads and survives a fork.

    Attributes:
        path: The file; it must lie on a local disk, since SQLite's locks fail on some network file systems.
        cohort: Identity digest of the cohort.
        epsilon_max: The site's bound as of now; lowering it stops further charges, past ones stay.
        delta: The site's failure probability as of now.
        key: What rows are signed with; its public half alone can read but not charge.

    Raises:
        ValueError: ``cohort`` is empty, or the budget is out of its range.
    """

    path: Path
    cohort: str
    epsilon_max: float
    delta: float
    key: SiteKey

    def __post_init__(self) -> None:
        if not self.cohort:
            raise ValueError("expected cohort not to be empty")
        if not 0 < self.epsilon_max < math.inf:
            raise ValueError(f"expected epsilon_max={self.epsilon_max} > 0 and finite")
        if not 0 < self.delta < 1:
            raise ValueError(f"expected delta={self.delta} in (0, 1)")

    @classmethod
    def open(cls, path: str | Path, *, cohort: str, epsilon_max: float, delta: float, key: SiteKey) -> Self:
        """Open the ledger of a cohort, or start one in a file that only its owner may read.

        Raises:
            ValueError: ``cohort`` is empty, or the budget is out of its range.
            WrongLedger: the file is another cohort's, of another version, or no ledger.
            LedgerTampered: a row is not the one that was written.
        """
        ledger = cls(path=Path(path), cohort=cohort, epsilon_max=epsilon_max, delta=delta, key=key)
        os.close(os.open(ledger.path, os.O_RDWR | os.O_CREAT, 0o600))
        with ledger._transaction() as connection:
            if _is_empty(connection):
                ledger._create(connection)
            ledger._book(connection)
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
            row = self._append(connection, book.rows[-1], {"event": "reserved", "request": asdict(request)})
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
            self._append(connection, book.rows[-1], outcome)

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
            self._append(connection, book.rows[-1], outcome)

    def events(self, run: str | None = None) -> list[PoissonGaussian]:
        """Mechanisms charged by ``run``, or by all runs: one per reservation, released or not."""
        return self._read().events(run)

    def charges(self) -> list[Charge]:
        """All charges in their order."""
        book = self._read()
        outcomes: dict[int, Literal["released", "abandoned"]] = {
            **dict.fromkeys(book.released, "released"),
            **dict.fromkeys(book.abandoned, "abandoned"),
        }
        return [
            Charge(request=one.request, outcome=outcomes.get(one.seq, "open"))
            for one in book.reservations.values()
        ]

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
        """Hash of the last row, which stands for the whole history."""
        return self._read().rows[-1].hash

    @property
    def anchor(self) -> Anchor:
        """How far the ledger has got, signed: to be kept by others."""
        book = self._read()
        last = book.rows[-1]
        return Anchor(seq=last.seq, head=last.hash, signature=last.signature, key=book.keys[-1])

    def require(self, *anchors: Anchor) -> None:
        """Refuse to go on with a history that lacks a row which others remember.

        Raises:
            HistoryLost: naming the first such row and the remedy.
            LedgerTampered: a row is not the one that was written.
        """
        for problem in self.missing(*anchors):
            raise HistoryLost(
                f"{problem}: put the newest copy of {self.path.name} back; if there is none, what it lacked "
                "cannot be known, so this cohort can release no more"
            )

    def missing(self, *anchors: Anchor) -> list[str]:
        """What each anchor remembers that is not in this ledger."""
        book = self._read()
        problems = []
        for anchor in anchors:
            if anchor.key not in book.keys or not anchor.is_genuine:
                problems.append(
                    f"the anchor of row {anchor.seq} was not made with a key of this ledger: "
                    f"it names key {anchor.key[:16]}"
                )
            elif anchor.seq >= len(book.rows):
                problems.append(
                    f"row {anchor.seq} was anchored and is gone, the last is row {len(book.rows) - 1}: "
                    "the ledger was cut short, or restored from a back-up"
                )
            elif book.rows[anchor.seq].hash != anchor.head:
                problems.append(f"row {anchor.seq} is another than was anchored: the history was rewritten")
        return problems

    def verify(self) -> None:
        """Check every row and every signature, and that the rows tell a possible story.

        Raises:
            LedgerTampered: naming the first row that was edited, deleted, moved, copied, forged, dated back.
            WrongLedger: the file is another cohort's, of another version, or no ledger.
        """
        for problem in self.problems():
            raise LedgerTampered(problem)

    def problems(self) -> list[str]:
        """All that `verify` would find, one text a row, in the order of the rows.

        Raises:
            WrongLedger: the file is another cohort's, of another version, or no ledger.
        """
        with self._transaction() as connection:
            self._require_version(connection)
            try:
                book = _Book.of(_stored(connection))
            except LedgerTampered as error:
                return [str(error)]
        if 0 not in book.faults:
            self._require_cohort(book)
        faults = book.story() | book.forgeries(self.key.public) | book.faults  # the more telling one stays
        return [faults[position] for position in sorted(faults)]

    def sign_over(self) -> None:
        """Vouch with this key for a history that another key signed (it was lost), or none (version 1).

        Every charge stays. Whoever keeps anchors sees the new key, and has to ask the hospital about it. With
        a ledger that this key has signed nothing is done.

        Raises:
            LedgerTampered: the history is not whole; it is left as it is.
            WrongLedger: the file is another cohort's, of another version, or no ledger.
        """
        with self._transaction() as connection:
            if _version(connection) == _UNSIGNED_VERSION:
                connection.execute("ALTER TABLE rows ADD COLUMN signature TEXT NOT NULL DEFAULT ''")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            self._require_version(connection)
            book = _Book.of(_stored(connection))
            self._require_cohort(book)
            _refuse(book.faults or book.forgeries(None) or book.story())
            if not book.keys or book.keys[-1] != self.key.public:
                self._append(connection, book.rows[-1], {"event": "signed-over", "key": self.key.public})

    def _read(self) -> "_Book":
        with self._transaction() as connection:
            return self._book(connection)

    def _book(self, connection: sqlite3.Connection) -> "_Book":
        self._require_version(connection)
        book = _Book.of(_stored(connection))
        _refuse(book.faults)
        self._require_cohort(book)
        if not book.head_is_signed_by(self.key.public):
            _refuse(book.forgeries(self.key.public))
        _refuse(book.story())
        return book

    def _require_version(self, connection: sqlite3.Connection) -> None:
        version = _version(connection)
        if version == _UNSIGNED_VERSION:
            raise WrongLedger(
                f"{self.path.name} has version {version}, whose rows are not signed: 'clipward budget sign "
                "SITE' signs it as it is, every charge stays"
            )
        if version != _VERSION:
            raise WrongLedger(
                f"{self.path.name} has version {version}, this code reads {_VERSION}: "
                "install the version that wrote it, or name the right file"
            )

    def _require_cohort(self, book: "_Book") -> None:
        cohort = book.rows[0].body.get("cohort")
        if cohort != self.cohort:
            raise WrongLedger(
                f"{self.path.name} is the ledger of cohort {cohort}, not of {self.cohort}: "
                "each cohort has its own budget and its own ledger"
            )

    def _create(self, connection: sqlite3.Connection) -> None:
        for statement in _SCHEMA:
            connection.execute(statement)
        self._append(connection, None, {"event": "opened", "cohort": self.cohort, "key": self.key.public})
        connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _append(self, connection: sqlite3.Connection, last: Row | None, facts: Mapping[str, Any]) -> Row:
        seq, previous = (0, _BEFORE_THE_FIRST) if last is None else (last.seq + 1, last.hash)
        body = {"seq": seq, "salt": secrets.token_hex(16), **_dated(last), **facts}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = _hash(previous, text)
        row = Row(seq=seq, previous=previous, body=body, hash=digest, signature=self.key.sign(seq, digest))
        connection.execute(
            "INSERT INTO rows (seq, previous, body, hash, signature) VALUES (?, ?, ?, ?, ?)",
            (seq, previous, text, digest, row.signature),
        )
        return row

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
    """The rows read: how they hang together, who signed them, and the story they tell.

    Faults are kept by the position of their row, at most one each, so that the first can be named.
    """

    rows: list[Row]
    faults: dict[int, str]
    reservations: dict[int, Reservation] = field(default_factory=dict)
    released: dict[int, str] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, stored: list[_Stored]) -> Self:
        """The rows as stored, each held against the one before.

        Raises:
            LedgerTampered: there is none.
        """
        rows: list[Row] = []
        faults: dict[int, str] = {}
        for position, (seq, previous, text, digest, signature) in enumerate(stored):
            before = rows[-1] if rows else None
            try:
                body = dict(json.loads(text))
                fault = _fault(seq, previous, digest == _hash(previous, text), body, before)
            except (ValueError, TypeError, KeyError):
                body, fault = {}, f"row {seq} was edited: it is no row of a ledger any more"
            if fault:
                faults[position] = fault
            rows.append(Row(seq=seq, previous=previous, body=body, hash=digest, signature=signature))
        if not rows:
            raise LedgerTampered("row 0 is missing: the ledger is empty")
        return cls(rows=rows, faults=faults)

    @property
    def keys(self) -> list[str]:
        """The public keys the rows name, in their order; the last one is in force."""
        return [key for row in self.rows if (key := row.key) is not None]

    def head_is_signed_by(self, key: str) -> bool:
        last = self.rows[-1]
        return self.keys[-1:] == [key] and is_signed(last.seq, last.hash, last.signature, key=key)

    def forgeries(self, own: str | None) -> dict[int, str]:
        """Rows that the key in force did not sign; rows of version 1 have neither key nor signature.

        Args:
            own: The key that has to be in force at the end; None accepts any.
        """
        faults: dict[int, str] = {}
        named, key = 0, None
        for position, row in enumerate(self.rows):
            if row.key is not None:
                named, key = position, row.key
            signed = is_signed(row.seq, row.hash, row.signature, key=key) if key else not row.signature
            if not signed:
                faults[position] = (
                    f"row {row.seq} is not signed with the key in force, {(key or 'none')[:16]}: it was "
                    "forged with another key, or rewritten"
                )
        if own is not None and key != own:
            faults[named] = (
                f"row {self.rows[named].seq} names key {(key or 'none')[:16]}, this site's is {own[:16]}: "
                "put the site's own key back, or find out who wrote this ledger"
            )
        return faults

    def story(self) -> dict[int, str]:
        """Go through the rows; what cannot follow the rows before it is a fault."""
        faults: dict[int, str] = {}
        for position, row in enumerate(self.rows[1:], start=1):
            try:
                self._take(row)
            except (KeyError, TypeError, ValueError, ReservationClosed, AlreadyReleased) as error:
                faults[position] = f"row {row.seq} cannot follow the rows before it: {error}"
        return faults

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
            case "signed-over":
                _ = row.body["key"]
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


def _refuse(faults: Mapping[int, str]) -> None:
    if faults:
        raise LedgerTampered(faults[min(faults)])


def _fault(seq: int, previous: str, intact: bool, body: Mapping[str, Any], before: Row | None) -> str | None:
    """What is wrong with a row that stands after ``before``."""
    expected, link = (0, _BEFORE_THE_FIRST) if before is None else (before.seq + 1, before.hash)
    if seq != expected:
        return f"row {expected} is missing or repeated: found row {seq} in its place"
    if not intact:
        return f"row {seq} was edited: its hash does not match what it says"
    if body["seq"] != seq:
        return f"row {seq} holds row {body['seq']}: it was moved or copied"
    if previous != link:
        return f"row {seq} does not follow row {seq - 1}: the chain is broken there"
    if before is not None and body.get("time", "") < before.body.get("time", ""):
        return f"row {seq} is dated {body.get('time')}, before row {seq - 1}: the clock was set back"
    return None


def _dated(last: Row | None) -> dict[str, str]:
    """The time of a new row: the clock's, unless that is behind the last row."""
    clock = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    before = "" if last is None else last.body.get("time", "")
    if clock >= before:
        return {"time": clock}
    logger.warning("the clock says %s, the ledger's last row is of %s: set the clock right", clock, before)
    return {"time": before, "clock": clock}


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _stored(connection: sqlite3.Connection) -> list[_Stored]:
    try:
        return connection.execute(
            "SELECT seq, previous, body, hash, signature FROM rows ORDER BY seq"
        ).fetchall()
    except sqlite3.DatabaseError as error:
        raise LedgerTampered(f"the rows cannot be read: {error}") from error


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    return bool(tables == 0 and _version(connection) == 0)


def _hash(previous: str, text: str) -> str:
    return hashlib.sha256((previous + text).encode()).hexdigest()
