import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from strategies.secure_sum.errors import Malformed, TermsRefused
from strategies.secure_sum.messages import (
    Consent,
    KeyOffer,
    Participant,
    Reveal,
    SealedShare,
    Terms,
    consent_statement,
    offer_statement,
    seed_digest,
    share_digest,
)
from tests.strategies.secure_sum.hospitals import NAMES, PINS, Attempt, terms, updates

PARTICIPANT = Participant(site="a", weight=1, public="ab" * 32)


@pytest.fixture(scope="module")
def said() -> list[Any]:
    """One message of each kind, as they are in an attempt."""
    agreed = terms()
    attempt = Attempt(agreed, updates(agreed), silent={"site-5": "mask"}).until("reveal")
    return [
        agreed,
        attempt.offers[0],
        attempt.dealt["site-1"][0],
        attempt.consents[0],
        attempt.reveals["site-1"],
    ]


def test_every_message_survives_json(said: list[Any]) -> None:
    for message in said:
        adapter = TypeAdapter(type(message))
        assert adapter.validate_python(json.loads(json.dumps(asdict(message)))) == message
        assert adapter.validate_json(adapter.dump_json(message)) == message


def test_an_unknown_field_is_refused(said: list[Any]) -> None:
    for message in said:
        with pytest.raises(ValidationError, match="raw_update"):
            TypeAdapter(type(message)).validate_python({**asdict(message), "raw_update": 1})


def test_a_field_of_another_form_is_refused_by_name(said: list[Any]) -> None:
    agreed, offer, share, consent, reveal = said
    wrong: list[tuple[Any, str, Any]] = [
        (agreed, "request", "AB" * 32),
        (offer, "mask_key", "ab"),
        (offer, "seal_key", "zz" * 32),
        (offer, "seed_digest", ""),
        (offer, "signature", "ab" * 63),
        (share, "sealed", "ab" * 147),
        (share, "key_digest", "ab" * 33),
        (consent, "signature", "ab" * 32 + "\n"),
        (PARTICIPANT, "public", "ab" * 31),
    ]
    for message, name, value in wrong:
        with pytest.raises(Malformed, match=f"expected {name} to be .* lowercase hexadecimal digits"):
            replace(message, **{name: value})
    with pytest.raises(Malformed, match="expected share of 'site-1' to be 132 lowercase hexadecimal"):
        replace(reveal, seeds={"site-1": "ab"})


def test_a_reveal_of_both_secrets_of_a_site_is_refused(said: list[Any]) -> None:
    reveal: Reveal = said[-1]
    with pytest.raises(Malformed, match="'site-1' reveals both secrets of 'site-5'"):
        replace(reveal, seeds=reveal.seeds | reveal.keys)


def test_a_participant_has_a_name_and_a_weight() -> None:
    with pytest.raises(Malformed, match="weight=0 >= 1"):
        replace(PARTICIPANT, weight=0)
    with pytest.raises(Malformed, match="expected a site with a name"):
        replace(PARTICIPANT, site="")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"server_round": 0}, "server_round=0"),
        ({"attempt": 0}, "attempt=0"),
        ({"threshold": 2}, "threshold=2 of at least 2, more than half of the 5 participants"),
        ({"threshold": 6}, "threshold=6"),
        ({"value_range": float("nan")}, "value_range=nan"),
        ({"participants": (PARTICIPANT, PARTICIPANT), "threshold": 2}, "named twice"),
        ({"participants": (PARTICIPANT,), "threshold": 1}, "threshold=1 of at least 2"),
        ({"participants": ()}, "0 participants"),
    ],
)
def test_impossible_terms_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TermsRefused, match=reason):
        terms(**changes)


@pytest.mark.parametrize("sites", range(2, 10))
def test_two_groups_of_the_threshold_always_have_a_site_in_common(sites: int) -> None:
    for threshold in range(1, sites + 1):
        try:
            terms([1] * sites, threshold=threshold)
        except TermsRefused:
            assert 2 * threshold <= sites or threshold < 2
        else:
            assert 2 * threshold > sites


def test_all_of_the_terms_decide_the_session_and_all_but_the_attempt_what_lasts() -> None:
    agreed = terms()
    changes: list[dict[str, Any]] = [
        {"run": "other"},
        {"server_round": 2},
        {"request": "cd" * 32},
        {"participants": tuple(reversed(agreed.participants))},
        {"threshold": 4},
        {"value_range": 1.0},
    ]
    others = [replace(agreed, **change) for change in changes]
    assert len({one.session for one in (agreed, *others)}) == len(changes) + 1
    assert len({one.lasting for one in (agreed, *others)}) == len(changes) + 1
    assert replace(agreed, value_range=4).session == agreed.session  # as it may come out of a settings file
    again = replace(agreed, attempt=2)
    assert again.lasting == agreed.lasting
    assert again.session != agreed.session


def test_nothing_in_a_message_is_secret_to_those_who_may_see_it(said: list[Any]) -> None:
    """The fields, so that a new one is thought about: keys are public halves, shares sealed or asked for."""
    assert [sorted(asdict(message)) for message in said[1:]] == [
        ["mask_key", "seal_key", "seed_digest", "signature", "site"],
        ["dealer", "holder", "key_digest", "sealed", "seed_digest"],
        ["signature", "site"],
        ["keys", "seeds", "site"],
    ]
    kinds = (Terms, KeyOffer, SealedShare, Consent, Reveal)
    assert [type(message) for message in said] == list(kinds)
    assert set(PINS) == set(NAMES)


def test_every_signature_and_commitment_is_bound_to_the_session() -> None:
    """Fresh keys alone would tell attempts apart; this holds where a broken site uses its keys again."""
    agreed = terms()
    again = replace(agreed, attempt=2)
    for made in (
        lambda one: offer_statement(one, site="site-1", keys=("a", "b", "c")),
        lambda one: consent_statement(one, offers=[], dealers=[], survivors=["site-1"]),
        lambda one: share_digest(one, b"share", dealer="site-1", holder="site-2", which="seed"),
        lambda one: seed_digest(one, b"seed", site="site-1"),
    ):
        assert made(agreed) != made(again)
