"""The budget of a cohort: what is charged stays charged, and what was changed is named."""

import hashlib
import json
import math
import os
import random
import signal
import sqlite3
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import privacy.ledger
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.errors import (
    AlreadyReleased,
    BudgetExceeded,
    HistoryLost,
    KeyUnusable,
    LedgerTampered,
    ReservationClosed,
    WrongLedger,
)
from privacy.ledger import Ledger, Reservation, ReservationRequest
from privacy.signing import SiteKey

DELTA = 1e-5
COHORT = "sha256:cohort"


def new_key() -> SiteKey:
    private = Ed25519PrivateKey.generate()
    return SiteKey(public=private.public_key().public_bytes_raw().hex(), _private=private)


KEY, FOREIGN = new_key(), new_key()


def request(number: int = 1, **facts: Any) -> ReservationRequest:
    return replace(
        ReservationRequest(
            request_digest=f"request-{number}",
            run="demo",
            server_round=number,
            kind="dp-sgd",
            unit="patient",
            adjacency="add_remove",
            sampler="poisson",
            sample_rate=0.02,
            steps=100,
            max_grad_norm=0.5,
            sensitivity=0.5,
            noise_std=0.45,
            insecure_seed=False,
            code_version="0.1.0",
            input_digest="sha256:in",
        ),
        **facts,
    )


def cost(*requests: ReservationRequest) -> float:
    return epsilon([r.event() for r in requests], delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def opened(path: Path, epsilon_max: float = 8.0, key: SiteKey = KEY) -> Ledger:
    return Ledger.open(path, cohort=COHORT, epsilon_max=epsilon_max, delta=DELTA, key=key)


@pytest.fixture
def cheap_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One charge costs one: for tests of durability and locking, where the accountant only takes time."""
    monkeypatch.setattr(privacy.ledger, "epsilon", lambda events, *, delta: float(len(list(events))))


# Life cycle


def test_a_new_ledger_has_spent_nothing_and_belongs_to_its_owner_alone(path: Path) -> None:
    ledger = opened(path)
    assert ledger.spent() == 0.0
    assert ledger.events() == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (row,) = ledger.rows()
    told = {name: value for name, value in row.body.items() if name not in ("time", "salt")}
    assert told == {"seq": 0, "event": "opened", "cohort": COHORT, "key": KEY.public}


def test_a_released_reservation_is_charged_once_and_at_rest_the_ledger_is_one_file(path: Path) -> None:
    ledger = opened(path)
    reservation = ledger.reserve(request())
    assert ledger.spent() == cost(request())
    ledger.released(reservation, output_digest="out")
    assert ledger.spent() == cost(request())
    assert [row.body["event"] for row in ledger.rows()] == ["opened", "reserved", "released"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_reservation_that_was_never_released_stays_charged_after_reopening(path: Path) -> None:
    opened(path).reserve(request())
    assert opened(path).spent() == cost(request())


def test_the_same_request_after_a_crash_gets_the_same_reservation_for_free(path: Path) -> None:
    first = opened(path).reserve(request())
    again = opened(path).reserve(request())
    assert again == first
    assert opened(path).events() == [request().event()]


def test_a_released_request_is_answered_with_the_digest_of_its_stored_release(path: Path) -> None:
    ledger = opened(path)
    ledger.released(ledger.reserve(request()), output_digest="out")
    with pytest.raises(AlreadyReleased, match="send the stored release") as refusal:
        ledger.reserve(request())
    assert refusal.value.output_digest == "out"
    assert ledger.spent() == cost(request())


def test_a_request_whose_failure_was_seen_is_charged_anew(path: Path) -> None:
    ledger = opened(path)
    first = ledger.reserve(request())
    ledger.abandoned(first, code="training-failed")
    second = ledger.reserve(request())
    assert second.seq != first.seq
    assert ledger.spent() == cost(request(), request())
    assert ledger.reserve(request()) == second
    ledger.released(second, output_digest="out")
    with pytest.raises(AlreadyReleased):
        ledger.reserve(request())


def test_the_same_digest_with_other_facts_is_charged_anew(path: Path) -> None:
    ledger = opened(path)
    ledger.reserve(request())
    ledger.reserve(request(steps=900))
    assert ledger.spent() == cost(request(), request(steps=900))
    assert ledger.reserve(request(steps=900)).request.steps == 900
    assert len(ledger.events()) == 2


def test_two_attempts_at_one_reservation_release_only_one_result(path: Path) -> None:
    ledger = opened(path)
    attempts = [ledger.reserve(request()), ledger.reserve(request())]
    ledger.released(attempts[0], output_digest="first")
    ledger.released(attempts[0], output_digest="first")
    with pytest.raises(AlreadyReleased, match="was released") as refusal:
        ledger.released(attempts[1], output_digest="second")
    assert refusal.value.output_digest == "first"
    assert len(ledger.rows()) == 3


def test_a_result_cannot_follow_a_failure_nor_a_failure_a_result(path: Path) -> None:
    ledger = opened(path)
    failed, done = ledger.reserve(request(1)), ledger.reserve(request(2))
    ledger.abandoned(failed, code="out-of-memory")
    ledger.released(done, output_digest="out")
    with pytest.raises(ReservationClosed, match="abandoned: reserve anew"):
        ledger.released(failed, output_digest="late")
    with pytest.raises(ReservationClosed, match="abandoned"):
        ledger.abandoned(failed, code="again")
    with pytest.raises(AlreadyReleased):
        ledger.abandoned(done, code="late")


def test_a_reservation_of_another_ledger_is_refused(path: Path, tmp_path: Path) -> None:
    elsewhere = Ledger.open(tmp_path / "other.sqlite", cohort="other", epsilon_max=8.0, delta=DELTA, key=KEY)
    foreign = elsewhere.reserve(request())
    ledger = opened(path)
    ledger.reserve(request())
    for reservation in (foreign, Reservation(seq=9, hash="h", request=request())):
        with pytest.raises(ReservationClosed, match="not in this ledger"):
            ledger.released(reservation, output_digest="out")
        with pytest.raises(ReservationClosed, match="not in this ledger"):
            ledger.abandoned(reservation, code="failed")


def test_outcomes_must_say_something(path: Path) -> None:
    ledger = opened(path)
    reservation = ledger.reserve(request())
    with pytest.raises(ValueError, match="output_digest"):
        ledger.released(reservation, output_digest="")
    with pytest.raises(ValueError, match="code"):
        ledger.abandoned(reservation, code="")


def test_facts_are_stored_as_they_were_stated(path: Path) -> None:
    ledger = opened(path)
    stated = request(insecure_seed=True, noise_std=1.1 + 2.2, sensitivity=1.0)
    ledger.reserve(stated)
    assert ReservationRequest(**ledger.rows()[1].body["request"]) == stated
    assert ledger.events() == [PoissonGaussian(sample_rate=0.02, noise_multiplier=1.1 + 2.2, steps=100)]
    assert "epsilon" not in json.dumps(ledger.rows()[1].body)


# Budget


def test_a_charge_is_refused_before_it_passes_the_bound_and_leaves_no_trace(path: Path) -> None:
    ledger = opened(path, epsilon_max=cost(request(1), request(2)) * 0.999)
    ledger.reserve(request(1))
    before = ledger.head
    with pytest.raises(BudgetExceeded, match=r"epsilon_max=.*fewer steps or more noise"):
        ledger.reserve(request(2))
    assert ledger.head == before
    assert ledger.spent() == cost(request(1))


def test_a_charge_that_meets_the_bound_exactly_is_granted_and_one_below_it_is_not(path: Path) -> None:
    bound = cost(request(1), request(2))
    ledger = opened(path, epsilon_max=bound)
    ledger.reserve(request(1))
    with pytest.raises(BudgetExceeded):
        opened(path, epsilon_max=math.nextafter(bound, 0)).reserve(request(2))
    ledger.reserve(request(2))
    assert ledger.spent() == bound
    with pytest.raises(BudgetExceeded):
        ledger.reserve(request(3, steps=1))


def test_noise_calibrated_for_a_whole_run_is_granted_in_every_round_of_it(path: Path) -> None:
    noise_multiplier = noise_multiplier_for(epsilon=8.0, delta=DELTA, sample_rate=0.02, steps=2_000)
    ledger = opened(path, epsilon_max=8.0)
    for number in range(1, 6):
        ledger.reserve(
            request(number, steps=400, max_grad_norm=0.3, sensitivity=0.3, noise_std=noise_multiplier * 0.3)
        )
    assert 7.9 < ledger.spent() <= 8.0


def test_runs_share_the_budget_by_composition_not_by_addition(path: Path) -> None:
    ledger = opened(path)
    first, second = request(1), request(2, run="other", noise_std=10.0, sample_rate=1.0, steps=1)
    ledger.reserve(first)
    assert ledger.would_spend(second) == cost(first, second)
    assert ledger.spent() == cost(first)
    ledger.reserve(second)
    assert ledger.spent() == cost(first, second) < cost(first) + cost(second)
    assert ledger.spent("demo") == cost(first)
    assert ledger.events("other") == [second.event()]
    assert ledger.spent("nobody") == 0.0


def test_what_is_free_to_reserve_would_spend_nothing(path: Path) -> None:
    ledger = opened(path)
    reservation = ledger.reserve(request())
    assert ledger.would_spend(request()) == cost(request())
    ledger.released(reservation, output_digest="out")
    assert ledger.would_spend(request()) == cost(request())


def test_a_bound_lowered_by_the_site_stops_even_a_reservation_made_before(path: Path) -> None:
    opened(path).reserve(request())
    with pytest.raises(BudgetExceeded):
        opened(path, epsilon_max=cost(request()) / 2).reserve(request())


def test_an_epsilon_that_is_not_a_number_grants_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(path)
    monkeypatch.setattr(privacy.ledger, "epsilon", lambda events, *, delta: math.nan)
    with pytest.raises(BudgetExceeded, match="nan"):
        ledger.reserve(request())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"unit": "study"}, "unit='study' to be 'patient'"),
        ({"adjacency": "replace_one"}, "adjacency='replace_one'"),
        ({"sampler": "shuffle"}, "no other sampler amplifies"),
        ({"sampler": "none"}, "no other sampler amplifies"),
        ({"sampler": "shuffle", "sample_rate": 1.0}, "no other sampler amplifies"),
        ({"sensitivity": 0.49}, "whole clipping bound"),
        ({"sensitivity": math.inf}, "sensitivity=inf"),
        ({"sensitivity": math.nan}, "sensitivity=nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 > 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan"),
        ({"noise_std": 0.0}, "noise_std=0.0 > 0"),
        ({"noise_std": math.inf}, "noise_std=inf"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"server_round": 0}, "server_round=0"),
        ({"insecure_seed": None}, "insecure_seed=None"),
        ({"request_digest": ""}, "request_digest"),
        ({"run": ""}, "run"),
    ],
)
def test_facts_without_a_proof_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**facts)


def test_everyone_may_take_part_without_a_sampler(path: Path) -> None:
    opened(path).reserve(request(sampler="none", sample_rate=1.0, noise_std=20.0, steps=1))


# The right file


def test_a_ledger_of_another_cohort_is_refused_by_name(path: Path) -> None:
    opened(path)
    with pytest.raises(WrongLedger, match=r"ledger of cohort sha256:cohort, not of sha256:other"):
        Ledger.open(path, cohort="sha256:other", epsilon_max=8.0, delta=DELTA, key=KEY)


def test_a_ledger_of_a_newer_version_is_refused(path: Path) -> None:
    opened(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(WrongLedger, match="version 3, this code reads 2"):
        opened(path)


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"patient,finding\n" * 100)
    with pytest.raises(WrongLedger, match="not a ledger"):
        opened(path)
    assert path.read_bytes().startswith(b"patient")


def test_a_database_of_something_else_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rows (x)")
    connection.close()
    with pytest.raises(WrongLedger, match="version 0"):
        opened(path)


def test_a_ledger_that_vanished_is_not_started_afresh_by_a_charge(path: Path) -> None:
    ledger = opened(path)
    path.unlink()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        ledger.reserve(request())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cohort": ""}, "cohort"),
        ({"epsilon_max": 0.0}, "epsilon_max=0.0"),
        ({"epsilon_max": math.inf}, "epsilon_max=inf"),
        ({"epsilon_max": math.nan}, "epsilon_max=nan"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_a_budget_out_of_range_is_refused(path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger.open(path, **{"cohort": COHORT, "epsilon_max": 8.0, "delta": DELTA, "key": KEY, **values})
    assert not path.exists()


# Tampering


def filled(path: Path) -> Ledger:
    """Rows: 0 opened, 1 reserved, 2 released, 3 reserved, 4 abandoned, 5 reserved."""
    ledger = opened(path)
    ledger.released(ledger.reserve(request(1)), output_digest="out")
    ledger.abandoned(ledger.reserve(request(2)), code="failed")
    ledger.reserve(request(3))
    return ledger


def tamper(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TRIGGER never_updated")
        connection.execute("DROP TRIGGER never_deleted")
        for statement in statements:
            connection.execute(statement)
    connection.close()


TAMPERINGS = {
    "less noise admitted": (
        ["UPDATE rows SET body = replace(body, '0.45', '45.0') WHERE seq = 3"],
        "row 3 was edited",
    ),
    "one space": (["UPDATE rows SET body = body || ' ' WHERE seq = 1"], "row 1 was edited"),
    "not JSON": (["UPDATE rows SET body = 'x' WHERE seq = 1"], "row 1 was edited"),
    "another cohort": (
        ["UPDATE rows SET body = replace(body, 'sha256:cohort', 'sha256:other') WHERE seq = 0"],
        "row 0 was edited",
    ),
    "hash": (["UPDATE rows SET hash = previous WHERE seq = 4"], "row 4 was edited"),
    "link": (["UPDATE rows SET previous = hash WHERE seq = 4"], "row 4 was edited"),
    "deleted": (["DELETE FROM rows WHERE seq = 3"], "row 3 is missing"),
    "first deleted": (["DELETE FROM rows WHERE seq = 0"], "row 0 is missing"),
    "all deleted": (["DELETE FROM rows"], "row 0 is missing"),
    "deleted and closed up": (
        ["DELETE FROM rows WHERE seq = 3", "UPDATE rows SET seq = seq - 1 WHERE seq > 3"],
        "row 3 holds row 4: it was moved or copied",
    ),
    "two swapped": (
        [
            "UPDATE rows SET seq = 99 WHERE seq = 1",
            "UPDATE rows SET seq = 1 WHERE seq = 3",
            "UPDATE rows SET seq = 3 WHERE seq = 99",
        ],
        "row 1 holds row 3: it was moved or copied",
    ),
    "copied to the end": (
        ["INSERT INTO rows SELECT 6, previous, body, hash, signature FROM rows WHERE seq = 2"],
        "row 6 holds row 2: it was moved or copied",
    ),
    "copied beyond a gap": (
        ["INSERT INTO rows SELECT 9, previous, body, hash, signature FROM rows WHERE seq = 2"],
        "row 6 is missing or repeated: found row 9",
    ),
    "repeated number": (
        ["CREATE TABLE loose AS SELECT * FROM rows", "INSERT INTO loose SELECT * FROM rows WHERE seq = 2",
         "DROP TABLE rows", "ALTER TABLE loose RENAME TO rows"],
        "row 3 is missing or repeated: found row 2",
    ),
    "not an object": (["UPDATE rows SET body = '[1]' WHERE seq = 1"], "row 1 was edited"),
    "edited, and its hash made right": (["UPDATE rows SET body = replace(body, '0.45', '45.0'), "
        "hash = '" + "ab" * 32 + "' WHERE seq = 3"], "row 3 was edited"),
    "last row signed by nobody": (
        ["UPDATE rows SET signature = '" + "00" * 64 + "' WHERE seq = 5"], "row 5 is not signed with the key"
    ),
    "last row's signature gone": (["UPDATE rows SET signature = '' WHERE seq = 5"], "row 5 is not signed"),
    "signature of another row": (
        ["UPDATE rows SET signature = (SELECT signature FROM rows WHERE seq = 1) WHERE seq = 5"],
        "row 5 is not signed",
    ),
    "table dropped": (["DROP TABLE rows"], "the rows cannot be read: no such table"),
}  # fmt: skip


@pytest.mark.parametrize(("statements", "message"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampering_is_named_and_nothing_more_is_charged(
    path: Path, statements: list[str], message: str
) -> None:
    ledger = filled(path)
    ledger.verify()
    tamper(path, *statements)
    for act in (ledger.verify, ledger.spent, lambda: ledger.reserve(request(4)), lambda: opened(path)):
        with pytest.raises(LedgerTampered, match=message):
            act()


Stored = tuple[int, str, str, str, str]


def chain(*bodies: dict[str, Any], key: SiteKey = KEY, by: dict[int, SiteKey] | None = None) -> list[Stored]:
    """The format as documented, written independently of the code; ``by`` says who signs other rows."""
    rows: list[Stored] = []
    previous = "0" * 64
    for seq, body in enumerate(bodies):
        text = json.dumps({"seq": seq, **body}, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256((previous + text).encode()).hexdigest()
        private = (by or {}).get(seq, key)._private
        assert private is not None
        signature = private.sign(f"clipward ledger row {seq} {digest}".encode()).hex()
        rows.append((seq, previous, text, digest, signature))
        previous = digest
    return rows


def put(path: Path, rows: list[Stored]) -> Ledger:
    opened(path)
    tamper(path, "DELETE FROM rows")
    connection = sqlite3.connect(path)
    with connection:
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", rows)
    connection.close()
    return Ledger(path=path, cohort=COHORT, epsilon_max=8.0, delta=DELTA, key=KEY)


def write(path: Path, rows: list[Stored]) -> Ledger:
    put(path, rows)
    return opened(path)


OPENED = {"event": "opened", "cohort": COHORT, "key": KEY.public}
RESERVED = {"event": "reserved", "request": asdict(request())}


def test_a_chain_written_from_the_documented_format_is_read(path: Path) -> None:
    rows = chain(OPENED, RESERVED, {"event": "released", "reservation": 1, "output_digest": "o"})
    ledger = write(path, rows)
    assert ledger.events() == [request().event()]
    assert ledger.head == rows[-1][3]


def test_a_row_whose_link_was_cut_is_named_even_if_its_own_hash_is_right(path: Path) -> None:
    whole = chain(OPENED, RESERVED, {**RESERVED, "note": "other"})
    with pytest.raises(LedgerTampered, match="row 2 does not follow row 1"):
        write(path, [*chain(OPENED, {**RESERVED, "note": "swapped"}), whole[2]])


@pytest.mark.parametrize(
    "story",
    [
        [{"event": "released", "reservation": 1, "output_digest": "o"}],
        [{"event": "forgiven"}],
        [{"no": "event"}],
        [{"event": "reserved", "request": {**asdict(request()), "unit": "study"}}],
        [{"event": "reserved", "request": {**asdict(request()), "discount": 1}}],
        [{"event": "opened", "cohort": COHORT}],
        [{"event": "signed-over"}],
    ],
)
def test_rows_that_tell_an_impossible_story_are_refused(path: Path, story: list[dict[str, Any]]) -> None:
    with pytest.raises(LedgerTampered, match="row 1 cannot follow"):
        write(path, chain(OPENED, *story))


def test_a_second_outcome_in_the_rows_is_refused(path: Path) -> None:
    outcome = {"event": "released", "reservation": 1, "output_digest": "o"}
    with pytest.raises(LedgerTampered, match="row 3 cannot follow"):
        write(path, chain(OPENED, RESERVED, outcome, outcome))


def test_our_own_code_cannot_update_or_delete(path: Path) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    for statement in ("UPDATE rows SET body = ''", "DELETE FROM rows"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_ten_thousand_rows_are_verified_and_accounted_in_seconds(path: Path) -> None:
    facts = asdict(request())
    bodies = [
        {"event": "reserved", "request": {**facts, "request_digest": f"r{i}", "noise_std": 5.0 + i % 5}}
        for i in range(10_000)
    ]
    ledger = write(path, chain(OPENED, *bodies))
    started = time.process_time()
    spent = ledger.spent()
    assert time.process_time() - started < 20
    expected = [
        PoissonGaussian(sample_rate=0.02, noise_multiplier=(5.0 + i) / 0.5, steps=200_000) for i in range(5)
    ]
    assert spent == epsilon(expected, delta=DELTA)
    started = time.process_time()
    assert ledger.problems() == []  # every single signature
    assert time.process_time() - started < 40


# Signatures


def test_every_row_is_signed_and_its_signature_is_checked_by_name(path: Path) -> None:
    ledger = filled(path)
    assert ledger.problems() == []
    tamper_again(path, "UPDATE rows SET signature = replace(hash, 'a', 'b') WHERE seq IN (0, 2, 4)")
    assert [problem[:19] for problem in ledger.problems()] == [
        f"row {seq} is not signed" for seq in (0, 2, 4)
    ]
    with pytest.raises(LedgerTampered, match="row 0 is not signed with the key in force"):
        ledger.verify()


def tamper_again(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TRIGGER IF EXISTS never_updated")
        connection.execute("DROP TRIGGER IF EXISTS never_deleted")
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_a_row_of_a_foreign_key_is_named_wherever_it_stands(path: Path) -> None:
    """Someone without the site's key goes on with its chain; whoever reads it names the first such row."""
    for seq in (1, 2):
        ledger = put(path.with_name(f"{seq}.sqlite"), chain(OPENED, RESERVED, RESERVED, by={seq: FOREIGN}))
        with pytest.raises(LedgerTampered, match=f"row {seq} is not signed with the key in force"):
            ledger.verify()
    with pytest.raises(LedgerTampered, match="row 2 is not signed"):
        ledger.reserve(request(4))


def test_a_history_rewritten_with_all_its_hashes_is_named_at_its_first_row(path: Path) -> None:
    cheaper = {"event": "reserved", "request": {**asdict(request()), "noise_std": 45.0}}
    honest = chain(OPENED, RESERVED, RESERVED)
    forged = chain(OPENED, cheaper, RESERVED)
    rows = [(*row[:4], signed[4]) for row, signed in zip(forged, honest, strict=True)]
    ledger = put(path, rows)
    for act in (ledger.spent, ledger.verify, lambda: ledger.reserve(request(4))):
        with pytest.raises(LedgerTampered, match="row 1 is not signed with the key in force"):
            act()


def test_a_whole_ledger_of_a_foreign_key_is_not_this_site_s(path: Path) -> None:
    opened(path, key=FOREIGN).reserve(request())
    with pytest.raises(LedgerTampered, match=r"row 0 names key .*put the site's own key back"):
        opened(path)


def test_the_public_half_reads_and_verifies_but_charges_nothing(path: Path) -> None:
    filled(path)
    reader = opened(path, key=SiteKey(public=KEY.public))
    assert reader.problems() == []
    assert len(reader.events()) == 3
    before = reader.head
    with pytest.raises(KeyUnusable, match=r"site\.key is missing, so nothing can be charged: restore"):
        reader.reserve(request(4))
    assert reader.head == before


def test_a_new_key_vouches_for_what_the_lost_one_signed_and_nothing_is_forgotten(path: Path) -> None:
    old = filled(path).anchor
    successor = Ledger(path=path, cohort=COHORT, epsilon_max=8.0, delta=DELTA, key=FOREIGN)
    with pytest.raises(LedgerTampered, match="row 0 names key"):
        successor.spent()
    successor.sign_over()
    successor.sign_over()
    assert [row.body["event"] for row in successor.rows()][5:] == ["reserved", "signed-over"]
    assert successor.problems() == []
    assert len(successor.events()) == 3
    successor.require(old)
    assert successor.anchor.key == FOREIGN.public != old.key
    successor.reserve(request(4))
    with pytest.raises(LedgerTampered, match="row 6 names key"):
        opened(path)


def test_a_history_that_is_not_whole_is_not_signed_over(path: Path) -> None:
    filled(path)
    tamper(path, "UPDATE rows SET body = replace(body, '0.45', '45.0') WHERE seq = 3")
    successor = Ledger(path=path, cohort=COHORT, epsilon_max=8.0, delta=DELTA, key=FOREIGN)
    with pytest.raises(LedgerTampered, match="row 3 was edited"):
        successor.sign_over()
    assert stored(path)[-1][0] == 5


def stored(path: Path) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT * FROM rows ORDER BY seq").fetchall()
    connection.close()
    return rows


def version_1(path: Path) -> Path:
    """As the first release wrote it: no signature, no key, no time."""
    rows = chain({"event": "opened", "cohort": COHORT}, RESERVED)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(
            "CREATE TABLE rows (seq INTEGER PRIMARY KEY, previous TEXT NOT NULL, body TEXT NOT NULL, "
            "hash TEXT NOT NULL) STRICT"
        )
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", [row[:4] for row in rows])
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    return path


def test_an_unsigned_ledger_is_refused_with_the_remedy_and_signed_over_it_keeps_every_charge(
    path: Path,
) -> None:
    with pytest.raises(
        WrongLedger, match=r"version 1, whose rows are not signed: 'clipward budget sign SITE'"
    ):
        opened(version_1(path))
    Ledger(path=path, cohort=COHORT, epsilon_max=8.0, delta=DELTA, key=KEY).sign_over()
    ledger = opened(path)
    assert ledger.problems() == []
    assert ledger.events() == [request().event()]
    ledger.reserve(request(2))


def test_a_row_put_before_the_first_signature_of_a_signed_over_ledger_is_named(path: Path) -> None:
    Ledger(path=version_1(path), cohort=COHORT, epsilon_max=8.0, delta=DELTA, key=KEY).sign_over()
    tamper_again(path, "UPDATE rows SET body = replace(body, '0.45', '45.0') WHERE seq = 1")
    with pytest.raises(LedgerTampered, match="row 1 was edited"):
        opened(path)


# Time


def test_a_row_dated_before_the_row_above_it_is_named(path: Path) -> None:
    dated = [{**RESERVED, "time": f"2026-01-0{day}T00:00:00Z"} for day in (2, 3, 1)]
    with pytest.raises(
        LedgerTampered, match=r"row 3 is dated 2026-01-01T00:00:00Z, before row 2: the clock was"
    ):
        write(path, chain({**OPENED, "time": "2026-01-01T00:00:00Z"}, *dated))


def test_a_clock_that_is_behind_is_told_and_stops_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Clock(datetime):
        moment = datetime(2026, 6, 1, 12, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.moment

    monkeypatch.setattr(privacy.ledger, "datetime", Clock)
    ledger = opened(path)
    ledger.reserve(request(1))
    Clock.moment -= timedelta(days=30)
    ledger.reserve(request(2))
    Clock.moment += timedelta(days=60)
    ledger.reserve(request(3))
    assert [(row.body["time"], row.body.get("clock")) for row in ledger.rows()] == [
        ("2026-06-01T12:00:00Z", None),
        ("2026-06-01T12:00:00Z", None),
        ("2026-06-01T12:00:00Z", "2026-05-02T12:00:00Z"),
        ("2026-07-01T12:00:00Z", None),
    ]
    assert ledger.problems() == []
    assert "set the clock right" in caplog.text


# Anchors


def test_an_anchor_is_the_signed_head(path: Path) -> None:
    ledger = filled(path)
    anchor = ledger.anchor
    assert (anchor.seq, anchor.head, anchor.key, anchor.is_genuine) == (5, ledger.head, KEY.public, True)
    ledger.require(anchor)
    ledger.reserve(request(4))
    ledger.require(anchor, ledger.anchor)
    ledger.require()


def test_a_history_cut_short_shows_only_against_an_anchor_kept_elsewhere(path: Path) -> None:
    ledger = filled(path)
    kept = ledger.anchor
    tamper(path, "DELETE FROM rows WHERE seq = 5")
    assert ledger.problems() == []
    with pytest.raises(
        HistoryLost, match=r"row 5 was anchored and is gone, the last is row 4: .*newest copy"
    ):
        ledger.require(kept)


def test_a_history_restored_and_continued_shows_against_an_anchor(path: Path) -> None:
    ledger = filled(path)
    back_up = path.read_bytes()
    ledger.reserve(request(4))
    kept = ledger.anchor
    path.write_bytes(back_up)
    ledger.reserve(request(5))
    with pytest.raises(HistoryLost, match="row 6 is another than was anchored: the history was rewritten"):
        ledger.require(kept)


def test_an_anchor_that_this_site_never_made_proves_nothing(path: Path, tmp_path: Path) -> None:
    ledger = filled(path)
    elsewhere = opened(tmp_path / "other.sqlite", key=FOREIGN).anchor
    forged = replace(ledger.anchor, seq=2, head="ab" * 32)
    assert [problem[:40] for problem in ledger.missing(elsewhere, forged)] == [
        "the anchor of row 0 was not made with a ", "the anchor of row 2 was not made with a ",
    ]  # fmt: skip


def test_two_ledgers_of_one_key_are_told_apart(path: Path, tmp_path: Path) -> None:
    """A ledger deleted and begun afresh."""
    kept = filled(path).anchor
    path.unlink()
    with pytest.raises(HistoryLost, match="row 5 was anchored and is gone"):
        opened(path).require(kept)


def test_a_head_confirms_no_guess(path: Path, tmp_path: Path) -> None:
    """Equal rows of the same second have different hashes, so nobody can try out what a row says."""
    assert opened(path).head != opened(tmp_path / "other.sqlite").head


# Crashes and races


def test_a_commit_is_synced_with_its_directory(path: Path) -> None:
    with opened(path)._transaction() as connection:  # a power failure cannot be tried here, the settings can
        assert connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.usefixtures("cheap_epsilon")
def test_a_kill_at_any_moment_leaves_a_sound_ledger_with_every_charge_that_was_granted(
    tmp_path: Path,
) -> None:
    randomness = random.Random(5)  # noqa: S311 - moments of kills, not noise
    path, log = tmp_path / "ledger.sqlite", tmp_path / "granted"
    log.touch()

    def charge_for_ever(start: int) -> None:
        ledger = opened(path, epsilon_max=1e9)
        with log.open("a") as granted:
            for number in range(start, start + 10**6):
                reservation = ledger.reserve(request(number))
                granted.write(f"{number}\n")
                granted.flush()
                os.fsync(granted.fileno())
                if number % 3 == 0:
                    ledger.released(reservation, output_digest=f"out-{number}")
                elif number % 3 == 1:
                    ledger.abandoned(reservation, code="failed")

    kills_in_a_transaction = 0
    for kill in range(
        1_000
    ):  # what the clock hits is luck: the first 40 that hit a transaction too are enough
        before = log.stat().st_size
        child = in_child(lambda start=1 + 10**6 * kill: charge_for_ever(start))  # type: ignore[misc]
        while log.stat().st_size == before:
            time.sleep(0.001)
        time.sleep(randomness.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills_in_a_transaction += path.with_name("ledger.sqlite-journal").exists()
        ledger = opened(path, epsilon_max=1e9)
        ledger.verify()
        granted = set(log.read_text().split("\n")[:-1])
        charged = {
            row.body["request"]["request_digest"].removeprefix("request-")
            for row in ledger.rows()
            if row.body["event"] == "reserved"
        }
        assert granted <= charged
        assert len(charged) <= len(granted) + kill + 1  # at most the one charge that the kill overtook
        if kill >= 39 and kills_in_a_transaction:
            return
    pytest.fail("no kill came in the middle of a transaction")


@pytest.mark.usefixtures("cheap_epsilon")
def test_of_processes_racing_for_the_last_of_the_budget_exactly_one_wins(tmp_path: Path) -> None:
    for race in range(10):
        path, start = tmp_path / f"{race}.sqlite", tmp_path / f"go-{race}"
        opened(path, epsilon_max=1.0)

        def grab(number: int, path: Path = path, start: Path = start) -> None:
            ledger = opened(path, epsilon_max=1.0)
            while not start.exists():
                pass
            ledger.reserve(request(number))

        children = [in_child(lambda n=n: _quiet(grab, n)) for n in (1, 2, 3)]  # type: ignore[misc]
        time.sleep(0.02)
        start.touch()
        outcomes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(outcomes) == [0, 7, 7]
        assert len(opened(path, epsilon_max=1.0).events()) == 1


@pytest.mark.usefixtures("cheap_epsilon")
def test_two_runs_racing_on_one_cohort_never_pass_its_budget_together(tmp_path: Path) -> None:
    """Each charges its rounds as fast as it can until it is refused; every grant counts against both."""
    for race in range(5):
        path, start = tmp_path / f"{race}.sqlite", tmp_path / f"go-{race}"
        opened(path, epsilon_max=15.0)

        def spend(run: int, path: Path = path, start: Path = start) -> None:
            ledger = opened(path, epsilon_max=15.0)
            while not start.exists():
                pass
            for number in range(1, 12):
                charge = request(number, run=f"run-{run}", request_digest=f"run-{run}/{number}")
                reservation = ledger.reserve(charge)
                ledger.released(reservation, output_digest=f"out-{run}-{number}")

        children = [in_child(lambda n=n: _quiet(spend, n)) for n in (1, 2)]  # type: ignore[misc]
        time.sleep(0.02)
        start.touch()
        outcomes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        ledger = opened(path, epsilon_max=15.0)
        assert 7 in outcomes  # 22 rounds were wanted
        assert len(ledger.events()) == len(ledger.events("run-1")) + len(ledger.events("run-2")) == 15
        assert ledger.problems() == []


def _quiet(work: Callable[[int], None], number: int) -> None:
    try:
        work(number)
    except BudgetExceeded:
        os._exit(7)


@pytest.mark.usefixtures("cheap_epsilon")
def test_processes_that_open_a_new_ledger_together_agree_on_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    children = [in_child(lambda n=n: (opened(path).reserve(request(n)), None)[1]) for n in (1, 2, 3, 4)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    assert len(opened(path).events()) == 4
