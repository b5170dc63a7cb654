"""What a site refuses a coordinator, or another site, that does not keep to the protocol."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.secure_sum import attempts
from strategies.secure_sum.errors import OutOfRange, PeerRefused, StepRefused, TermsRefused
from strategies.secure_sum.messages import Consent, consent_statement, offer_statement
from tests.strategies.secure_sum.hospitals import (
    KEYS,
    NAMES,
    PINS,
    Attempt,
    Remembered,
    assert_close,
    attempt,
    exact_mean,
    remembered,
    session,
    terms,
    updates,
)

# --- terms --------------------------------------------------------------------------------------------------


def test_a_participant_with_another_key_than_the_pinned_one_is_refused() -> None:
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(TermsRefused, match="key of 'site-3' is not the one pinned here"):
        session(terms(), "site-1", pins=PINS | {"site-3": other})


def test_a_participant_without_a_pin_is_refused() -> None:
    pins = {name: pin for name, pin in PINS.items() if name != "site-4"}
    with pytest.raises(TermsRefused, match="no key is pinned here for 'site-4'"):
        session(terms(), "site-1", pins=pins)


def test_a_site_that_is_not_asked_for_takes_no_part() -> None:
    with pytest.raises(TermsRefused, match="'site-9' is not among the participants"):
        session(terms(), "site-9", weight=1)


def test_a_weight_that_is_not_the_site_s_own_is_refused() -> None:
    with pytest.raises(TermsRefused, match="expected weight 300 for 'site-1', asked was 1"):
        session(terms(), "site-1", weight=300)


def test_a_threshold_below_the_site_s_own_policy_is_refused() -> None:
    with pytest.raises(TermsRefused, match="threshold is 3, and 'site-1' takes part from 4 on"):
        session(terms(), "site-1", at_least=4)


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["mask_key", "seal_key", "seed_digest"])
def test_a_coordinator_that_swaps_a_key_is_caught(field: str) -> None:
    made = attempt().until("offer")
    own = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    offers = [replace(o, **{field: own}) if o.site == "site-2" else o for o in made.offers]
    with pytest.raises(PeerRefused, match="keys offered for 'site-2' are not signed by its pinned key"):
        made.sites["site-1"].deal(offers)


def test_keys_signed_by_another_than_the_pinned_key_are_refused() -> None:
    made = attempt().until("offer")
    victim = next(offer for offer in made.offers if offer.site == "site-2")
    keys = (victim.mask_key, victim.seal_key, victim.seed_digest)
    forged = KEYS[8].sign(offer_statement(made.terms, site="site-2", keys=keys)).hex()
    offers = [replace(o, signature=forged) if o is victim else o for o in made.offers]
    with pytest.raises(PeerRefused, match="'site-2'"):
        made.sites["site-1"].deal(offers)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "other"},
        {"server_round": 2},
        {"request": "cd" * 32},
        {"attempt": 2},
        {"threshold": 4},
        {"value_range": 8.0},
        {"participants": terms((2, 1, 1, 1, 1)).participants},
    ],
)
def test_keys_of_another_round_attempt_or_other_terms_are_refused(change: dict[str, Any]) -> None:
    made = attempt().until("offer")
    old = session(terms(**change), "site-2").offer()
    offers = [old if offer.site == "site-2" else offer for offer in made.offers]
    with pytest.raises(PeerRefused, match=r"'site-2' .* belong to another round or attempt"):
        made.sites["site-1"].deal(offers)


def test_a_site_that_copies_another_s_key_is_caught() -> None:
    made = attempt().until("offer")
    first, second, *rest = made.offers
    keys = (first.mask_key, second.seal_key, second.seed_digest)
    signature = KEYS[1].sign(offer_statement(made.terms, site="site-2", keys=keys)).hex()
    copied = replace(second, mask_key=first.mask_key, signature=signature)
    with pytest.raises(PeerRefused, match="'site-2' offers the same key as 'site-1'"):
        made.sites["site-3"].deal((first, copied, *rest))


def test_its_own_keys_of_an_earlier_start_are_refused() -> None:
    made = attempt().until("offer")
    restarted = session(made.terms, "site-1")
    with pytest.raises(StepRefused, match="keys offered for 'site-1' are not those it made"):
        restarted.deal(made.offers)


@pytest.mark.parametrize("which", ["mask_key", "seal_key"])
def test_a_key_that_everybody_can_agree_with_is_refused(which: str) -> None:
    made = attempt().until("offer")
    weak = replace(made.offers[1], **{which: "00" * 32})
    keys = (weak.mask_key, weak.seal_key, weak.seed_digest)
    weak = replace(weak, signature=KEYS[1].sign(offer_statement(made.terms, site="site-2", keys=keys)).hex())
    offers = (made.offers[0], weak, *made.offers[2:])
    with pytest.raises(PeerRefused, match="'site-2' offers a key of low order"):
        made.sites["site-1"].deal(offers)


# --- groups -------------------------------------------------------------------------------------------------


def test_groups_below_the_threshold_are_refused_in_every_step() -> None:
    made = attempt().until("consent")
    fresh = attempt().until("deal")
    late = attempt().until("mask")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("offer keys", lambda: attempt().sites["site-1"].deal(fresh.offers[:2])),
        ("deal shares", lambda: fresh.sites["site-1"].mask(fresh.shares["site-1"][:2], {})),
        ("are summed", lambda: late.sites["site-1"].consent(["site-1", "site-2"])),
        ("consent", lambda: made.sites["site-1"].reveal(made.consents[:2])),
    ]
    for did, call in calls:
        with pytest.raises(StepRefused, match=f"2 sites {did}, below the threshold of 3: 'site-1' goes no"):
            call()


def test_a_site_named_twice_does_not_count_as_two() -> None:
    made = attempt().until("mask")
    with pytest.raises(StepRefused, match="'site-2' is named twice, or was not there"):
        made.sites["site-1"].consent(["site-1", "site-2", "site-2"])


def test_a_stranger_does_not_count() -> None:
    made = attempt(silent={"site-5": "deal"}).until("mask")
    with pytest.raises(StepRefused, match="'site-5' is named twice, or was not there"):
        made.sites["site-1"].consent(["site-1", "site-2", "site-3", "site-5"])


def test_a_sum_without_the_site_itself_is_none_of_its_business() -> None:
    made = attempt().until("mask")
    with pytest.raises(StepRefused, match="'site-1' is not among the sites that are summed"):
        made.sites["site-1"].consent(["site-2", "site-3", "site-4"])


# --- shares -------------------------------------------------------------------------------------------------


def test_a_changed_ciphertext_is_caught_by_the_dealer_s_name() -> None:
    made = attempt().until("deal")
    share = made.shares["site-1"][1]
    flipped = replace(share, sealed=f"{int(share.sealed[0], 16) ^ 1:x}{share.sealed[1:]}")
    shares = [flipped if other is share else other for other in made.shares["site-1"]]
    with pytest.raises(PeerRefused, match="what 'site-2' dealt to 'site-1' was changed on the way"):
        made.sites["site-1"].mask(shares, made.updates["site-1"])
    made.mask()  # nothing was masked, so the right shares are still welcome


def test_a_ciphertext_of_another_holder_dealer_or_attempt_is_caught() -> None:
    made = attempt().until("deal")
    own, _, of_three, *rest = made.shares["site-1"]
    for_other = next(share for share in made.dealt["site-2"] if share.holder == "site-3")
    from_other = replace(of_three, dealer="site-2")
    old = next(share for share in attempt().until("deal").shares["site-1"] if share.dealer == "site-2")
    for wrong in (replace(for_other, holder="site-1"), from_other, old):
        with pytest.raises(
            PeerRefused, match="'site-2' dealt to 'site-1' was changed on the way, or belongs"
        ):
            made.sites["site-1"].mask([own, wrong, of_three, *rest], made.updates["site-1"])


@pytest.mark.parametrize(("field", "which"), [("seed_digest", "seed"), ("key_digest", "key")])
def test_a_share_other_than_committed_to_is_caught(field: str, which: str) -> None:
    made = attempt().until("deal")
    shares = [replace(share, **{field: "0" * 64}) for share in made.shares["site-1"]]
    with pytest.raises(PeerRefused, match=f"'site-1' dealt 'site-1' another {which} than it committed to"):
        made.sites["site-1"].mask(shares, made.updates["site-1"])


# --- masking ------------------------------------------------------------------------------------------------


def test_an_update_out_of_range_leaves_nothing_behind_and_may_not_be_masked() -> None:
    made = attempt().until("deal")
    bad = {"weight": np.zeros((50, 2), dtype=np.float32), "scale": np.asarray(4.001, dtype=np.float32)}
    with pytest.raises(OutOfRange, match="array 'scale' holds values"):
        made.sites["site-1"].mask(made.shares["site-1"], bad)
    made.mask()


def test_refusals_under_one_range_after_another_tell_no_value() -> None:
    """The attack: lower the range until the site refuses, which tells its largest value."""
    book = Remembered()
    for number, value_range in enumerate((2.0, 8.0), start=1):
        agreed = terms(attempt=number, value_range=value_range)
        made = attempt(agreed, agreements={"site-1": book}).until("deal")
        large = {"weight": made.updates["site-1"]["weight"], "scale": np.asarray(3.0, dtype=np.float32)}
        first = value_range == 2.0
        with pytest.raises(OutOfRange if first else StepRefused, match="range" if first else "other terms"):
            made.sites["site-1"].mask(made.shares["site-1"], large)


def test_an_update_is_masked_once_in_an_attempt() -> None:
    made = attempt().until("deal")
    made.sites["site-1"].mask(made.shares["site-1"], made.updates["site-1"])
    with pytest.raises(StepRefused, match="'site-1' masks its update once in an attempt"):
        made.sites["site-1"].mask(made.shares["site-1"], made.updates["site-2"])


def test_steps_out_of_order_are_refused() -> None:
    site = attempt().sites["site-1"]
    with pytest.raises(StepRefused, match="after it dealt its shares"):
        site.mask([], {})
    with pytest.raises(StepRefused, match="'site-1' is named twice, or was not there in the step before"):
        site.consent(["site-1", "site-2", "site-3"])
    made = attempt().until("consent")
    with pytest.raises(StepRefused, match="was not there in the step before"):
        site.reveal(made.consents)


# --- repeats ------------------------------------------------------------------------------------------------


def test_asked_the_same_again_a_site_says_the_same_again() -> None:
    made = attempt(silent={"site-5": "mask"}).until("reveal")
    site = made.sites["site-1"]
    assert site.offer() == made.offers[0]
    assert site.deal(made.offers) == made.dealt["site-1"]
    assert site.consent(made.survivors) == made.consents[0]
    assert site.reveal(made.consents) == made.reveals["site-1"]


def test_asked_with_other_keys_after_dealing_it_refuses() -> None:
    made = attempt().until("deal")
    with pytest.raises(StepRefused, match="coordinator changed the keys it had passed on"):
        made.sites["site-1"].deal(made.offers[:4])


def test_it_agrees_to_one_sum_in_an_attempt() -> None:
    made = attempt().until("consent")
    with pytest.raises(StepRefused, match=r"'site-1' agreed before to sum .* with other sites"):
        made.sites["site-1"].consent(made.survivors[:4])


def test_of_each_peer_it_reveals_the_seed_or_the_key_never_both() -> None:
    made = attempt(silent={"site-4": "deal", "site-5": "mask"}).until("reveal")
    for reveal in made.reveals.values():
        assert set(reveal.seeds) == {"site-1", "site-2", "site-3"}
        assert set(reveal.keys) == {"site-5"}


def test_a_coordinator_that_shows_sites_different_survivors_unmasks_nothing() -> None:
    """It wants the seed of site-5 from some, and its mask key from the others, to open its masked update."""
    made = attempt().until("mask")
    all_five, without = made.survivors, made.survivors[:4]
    consents = [
        made.sites[name].consent(all_five if index < 2 else without) for index, name in enumerate(NAMES[:4])
    ]
    for name in NAMES[:4]:
        with pytest.raises(PeerRefused, match=f"'{name}' was shown: the coordinator told the two different"):
            made.sites[name].reveal(consents)
        with pytest.raises(StepRefused, match="below the threshold of 3"):
            made.sites[name].reveal([c for c in consents if c.site in (name, "site-1")])


def test_a_coordinator_that_shows_sites_different_keys_unmasks_nothing() -> None:
    made = attempt().until("offer")
    twin = session(made.terms, "site-5")  # site-5 colludes: it signs two sets of keys
    other = (*made.offers[:4], twin.offer())
    dealt = {name: made.sites[name].deal(made.offers if name == "site-1" else other) for name in NAMES[:4]}
    for name in NAMES[:4]:
        shares = [share for all_of in dealt.values() for share in all_of if share.holder == name]
        made.sites[name].mask(shares, made.updates[name])
    consents = [made.sites[name].consent(NAMES[:4]) for name in NAMES[:4]]
    with pytest.raises(PeerRefused, match=r"the consent of 'site-2' .* told the two different things"):
        made.sites["site-1"].reveal(consents)


def test_a_consent_of_another_attempt_is_refused() -> None:
    made = attempt().until("consent")
    old = attempt().until("consent").consents[1]
    with pytest.raises(PeerRefused, match="consent of 'site-2' is not signed"):
        made.sites["site-1"].reveal((made.consents[0], old, *made.consents[2:]))


def test_nothing_of_one_phase_is_taken_in_the_other() -> None:
    """Phases of a round differ in the request that their terms name: a message belongs to its own."""
    other = terms(request="cd" * 32)
    old = attempt(other, silent={"site-5": "mask"}).until("reveal")
    made = attempt()
    with pytest.raises(PeerRefused, match="belong to another round or attempt"):
        made.server.take_offer(old.offers[1])
    made.offer()
    with pytest.raises(PeerRefused, match="belong to another round or attempt"):
        made.sites["site-1"].deal(old.offers)
    made.deal()
    with pytest.raises(PeerRefused, match="was changed on the way, or belongs to another"):
        made.sites["site-1"].mask(old.shares["site-1"], made.updates["site-1"])
    made.mask()
    with pytest.raises(PeerRefused, match="is not signed by its key for this sum"):
        made.server.take_consent(old.consents[0])
    made.consent()
    with pytest.raises(PeerRefused, match="is not signed by its pinned key for the sum"):
        made.sites["site-1"].reveal(old.consents)
    with pytest.raises(PeerRefused, match=r"did not reveal|revealed another share"):
        made.server.take_reveal(old.reveals["site-1"])


def opened_by(
    choices: Mapping[str, Sequence[str]], *, colluders: Collection[str], threshold: int
) -> set[str]:
    """The honest sites both of whose secrets a coordinator knows after showing each honest site its choice.

    ``colluders`` sign all that helps, and hand over both shares of every site.
    """
    agreed = terms(threshold=threshold)
    made = Attempt(agreed, updates(agreed, size=1)).until("mask")
    given = {name: made.sites[name].consent(survivors) for name, survivors in choices.items()}
    known = {(which, name): set(colluders) for which in ("seed", "key") for name in agreed.names}
    for name, survivors in choices.items():
        statement = consent_statement(agreed, offers=made.offers, dealers=agreed.names, survivors=survivors)
        helpful = [given[peer] for peer in choices if sorted(choices[peer]) == sorted(survivors)]
        helpful += [
            Consent(site=peer, signature=KEYS[NAMES.index(peer)].sign(statement).hex())
            for peer in colluders
            if peer in survivors
        ]
        with suppress(StepRefused):  # fewer than the threshold
            said = made.sites[name].reveal(helpful)
            for dealer in said.seeds:
                known["seed", dealer].add(name)
            for dealer in said.keys:
                known["key", dealer].add(name)
    return {name for name in choices if min(len(known["seed", name]), len(known["key", name])) >= threshold}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_lying_coordinator_shows_to_whom_it_never_gets_both_secrets_of_a_site(
    data: st.DataObject,
) -> None:
    threshold = data.draw(st.integers(3, 5))
    colluders = NAMES[: data.draw(st.integers(0, 2 * threshold - 5 - 1))]
    honest = [name for name in NAMES[:5] if name not in colluders]
    choices = {}
    for name in honest:
        others = data.draw(st.permutations([other for other in NAMES[:5] if other != name]))
        choices[name] = [name, *others[: data.draw(st.integers(threshold - 1, 4))]]
    assert opened_by(choices, colluders=colluders, threshold=threshold) == set()


def test_with_one_colluder_more_than_promised_a_lying_coordinator_opens_an_update() -> None:
    """The stated bound is tight: 3 colluders are 2 * 4 - 5, so no longer fewer."""
    colluders = NAMES[2:5]
    choices = {"site-1": NAMES[:5], "site-2": ["site-2", *colluders]}
    assert opened_by(choices, colluders=colluders, threshold=4) == {"site-1"}


# --- the same request again ---------------------------------------------------------------------------------


def test_a_new_attempt_sums_the_same_sites_under_new_masks() -> None:
    agreed = terms([2, 3, 4, 5, 6])
    kept = remembered(agreed)
    first = attempt(agreed, agreements=kept, silent={"site-5": "mask"}).until("reveal")
    again = replace(agreed, attempt=2)
    second = attempt(again, agreements=kept, silent={"site-5": "offer"}).until("reveal")
    exact = exact_mean(agreed, first.updates, first.survivors)
    assert_close(agreed, first.server.mean(), exact, first.survivors)
    assert_close(agreed, second.server.mean(), exact, first.survivors)
    for name in first.survivors:
        assert not np.array_equal(first.masked[name]["weight"], second.masked[name]["weight"])


def test_a_new_attempt_with_other_sites_is_refused_after_a_restart_too() -> None:
    """The difference of the two sums would be the update of site-5."""
    agreed = terms()
    kept = remembered(agreed)
    attempt(agreed, agreements=kept).until("consent")
    again = replace(agreed, attempt=2)
    second = attempt(again, agreements=kept, silent={"site-5": "offer"}).until("mask")
    for name in NAMES[:4]:
        with pytest.raises(StepRefused, match="two different sums would tell single updates apart"):
            second.sites[name].consent(second.survivors)


def test_a_new_attempt_under_other_terms_is_refused_before_anything_is_masked() -> None:
    """Groups of different federations need not have a site in common, so their sums could be subtracted."""
    agreed = terms()
    kept = remembered(agreed)
    attempt(agreed, agreements=kept).until("mask")
    fewer = terms([1, 1, 1], attempt=2)
    second = attempt(fewer, agreements=kept).until("deal")
    with pytest.raises(StepRefused, match=r"'site-1' agreed before to sum its answer .* with other terms"):
        second.mask()


def test_another_request_is_free_of_what_was_agreed_before() -> None:
    agreed = terms()
    kept = remembered(agreed)
    attempt(agreed, agreements=kept).until("reveal")
    other = terms([1, 1, 1], request="cd" * 32, server_round=2)
    attempt(other, agreements=kept).until("reveal")


def test_the_seed_is_256_bits_of_the_system_s_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def token_bytes(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr(attempts, "token_bytes", token_bytes)
    attempt()
    assert asked == [32] * 5
