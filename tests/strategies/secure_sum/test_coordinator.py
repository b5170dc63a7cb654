import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.secure_sum.coordinator import SecureSum, Step
from strategies.secure_sum.errors import PeerRefused, StepRefused, TooFewSites
from strategies.secure_sum.messages import Terms
from tests.strategies.secure_sum.hospitals import (
    NAMES,
    STEPS,
    Arrays,
    Attempt,
    assert_close,
    exact_mean,
    terms,
    updates,
)


@st.composite
def federations(draw: Any) -> tuple[Terms, dict[str, Arrays], dict[str, str]]:
    """Terms, updates up to the very range, and no more drop-outs than are allowed."""
    weights = draw(st.lists(st.integers(1, 10**6), min_size=2, max_size=6))
    threshold = draw(st.integers(max(2, len(weights) // 2 + 1), len(weights)))
    value_range = draw(st.sampled_from([2.0**-20, 0.01, 1.0, 3.7, 1e6]))
    agreed = terms(weights, threshold=threshold, value_range=value_range)
    shapes = draw(st.lists(st.sampled_from([(), (0,), (3,), (2, 2), (1, 5, 2)]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = np.nextafter(np.float32(value_range), np.float32(0))
    made = {
        name: {
            str(index): np.asarray(
                rng.choice([-largest, largest])
                if draw(st.booleans())
                else rng.uniform(-1, 1, shape) * largest,
                dtype=np.float32,
            )
            * np.ones(shape, dtype=np.float32)
            for index, shape in enumerate(shapes)
        }
        for name in agreed.names
    }
    gone = draw(st.permutations(agreed.names))[: draw(st.integers(0, len(weights) - threshold))]
    return agreed, made, {name: draw(st.sampled_from(STEPS)) for name in gone}


@settings(max_examples=40, deadline=None)
@given(federations())
def test_the_result_is_the_weighted_mean_of_the_summed_sites_whoever_drops_out_when(
    case: tuple[Terms, dict[str, Arrays], dict[str, str]],
) -> None:
    agreed, made, silent = case
    attempt = Attempt(agreed, made, silent=silent).until("reveal")
    summed = [name for name in agreed.names if silent.get(name) not in ("offer", "deal", "mask")]
    assert attempt.survivors == tuple(sorted(summed))
    assert attempt.server.weight == sum(agreed.by_name[name].weight for name in summed)
    assert_close(agreed, attempt.server.mean(), exact_mean(agreed, made, summed), summed)


@pytest.mark.parametrize("step", STEPS)
def test_up_to_all_sites_beyond_the_threshold_may_drop_out_at_any_step(step: str) -> None:
    agreed = terms([3, 1, 4, 1, 5])
    made = updates(agreed)
    attempt = Attempt(agreed, made, silent={"site-2": step, "site-5": step}).until("reveal")
    exact = exact_mean(agreed, made, attempt.survivors)
    assert_close(agreed, attempt.server.mean(), exact, attempt.survivors)


@pytest.mark.parametrize("step", STEPS)
def test_one_more_drop_out_ends_the_attempt_with_nothing_unmasked(step: str) -> None:
    agreed = terms()
    gone = dict.fromkeys(["site-1", "site-2", "site-3"], step)
    attempt = Attempt(agreed, updates(agreed), silent=gone)
    with pytest.raises(TooFewSites, match=r"2 of 5 sites .* below the threshold of 3: nothing was unmasked"):
        attempt.until("reveal").server.mean()
    assert len(attempt.reveals) < agreed.threshold
    assert len(attempt.reveals) == (2 if step == "reveal" else 0)


def test_a_step_short_of_sites_can_still_be_completed() -> None:
    agreed = terms([1, 1])
    attempt = Attempt(agreed, updates(agreed))
    attempt.server.take_offer(attempt.sites["site-1"].offer())
    with pytest.raises(TooFewSites, match="1 of 2 sites offered keys"):
        attempt.server.offers()
    attempt.server.take_offer(attempt.sites["site-2"].offer())
    assert len(attempt.server.offers()) == 2


def test_the_sum_does_not_overflow_where_all_sites_are_at_the_end_of_the_range() -> None:
    for value in (-4.0, 4.0):
        agreed = terms([10**9, 1, 7])
        made = {name: {"a": np.full(3, value, dtype=np.float32)} for name in agreed.names}
        attempt = Attempt(agreed, made).until("reveal")
        assert_close(agreed, attempt.server.mean(), {"a": np.full(3, value)}, agreed.names)


def test_a_message_out_of_turn_is_refused() -> None:
    agreed = terms()
    attempt = Attempt(agreed, updates(agreed)).until("offer")
    with pytest.raises(StepRefused, match="'site-1' sent its part of step OFFER, due is step DEAL"):
        attempt.server.take_offer(attempt.sites["site-1"].offer())
    with pytest.raises(StepRefused, match="step REVEAL cannot be closed, due is step DEAL"):
        attempt.server.mean()
    with pytest.raises(StepRefused, match="due is step DEAL"):
        attempt.server.fold("site-1", {})
    attempt = Attempt(agreed, updates(agreed)).until("reveal")
    attempt.server.mean()
    with pytest.raises(StepRefused, match="due is step DONE"):
        attempt.server.mean()


def test_a_second_message_of_a_site_in_a_step_is_refused() -> None:
    agreed = terms()
    server = SecureSum(agreed, {})
    attempt = Attempt(agreed, updates(agreed))
    server.take_offer(attempt.sites["site-1"].offer())
    with pytest.raises(StepRefused, match="'site-1' sent its part of step OFFER twice"):
        server.take_offer(attempt.sites["site-1"].offer())


def test_an_update_is_added_whole_or_not_at_all() -> None:
    agreed = terms()
    made = updates(agreed)
    attempt = Attempt(agreed, made).until("deal")
    masked = dict(attempt.sites["site-1"].mask(attempt.shares["site-1"], made["site-1"]))
    for wrong, reason in (
        ({"weight": masked["weight"]}, "differ in 1 names, first 'scale'"),
        (masked | {"more": masked["scale"]}, "differ in 1 names, first 'more'"),
        (masked | {"scale": masked["scale"].astype(np.float32)}, r"expected uint32\(\), got float32\(\)"),
        (masked | {"scale": masked["weight"]}, r"array 'scale' of 'site-1': expected uint32\(\)"),
    ):
        with pytest.raises(PeerRefused, match=reason):
            attempt.server.fold("site-1", wrong)
    attempt.server.fold("site-1", masked)
    with pytest.raises(StepRefused, match="twice"):
        attempt.server.fold("site-1", masked)
    for name in NAMES[1:5]:
        attempt.server.fold(name, dict(attempt.sites[name].mask(attempt.shares[name], made[name])))
    attempt.survivors = attempt.server.survivors()
    attempt.consent()
    attempt.reveal()
    assert_close(agreed, attempt.server.mean(), exact_mean(agreed, made, agreed.names), agreed.names)


def test_a_site_that_was_silent_once_is_heard_no_more() -> None:
    agreed = terms()
    made = updates(agreed)
    attempt = Attempt(agreed, made, silent={"site-5": "deal"}).until("deal")
    with pytest.raises(PeerRefused, match="'site-5' was not there in the step before MASK"):
        attempt.server.fold("site-5", made["site-5"])


def test_shares_for_other_sites_than_asked_or_of_another_dealer_are_refused() -> None:
    agreed = terms()
    attempt = Attempt(agreed, updates(agreed)).until("offer")
    dealt = attempt.sites["site-1"].deal(attempt.offers)
    foreign = replace(dealt[0], dealer="site-2")
    for wrong in (dealt[1:], (*dealt, dealt[0]), (foreign, *dealt[1:])):
        with pytest.raises(PeerRefused, match="'site-1' did not deal one share of its own"):
            attempt.server.take_shares("site-1", wrong)
    attempt.server.take_shares("site-1", dealt)


def test_a_share_changed_by_its_holder_is_named_and_the_sum_is_made_without_it() -> None:
    agreed = terms()
    made = updates(agreed)
    attempt = Attempt(agreed, made, silent={"site-5": "mask"}).until("consent")
    honest = attempt.sites["site-1"].reveal(attempt.consents)
    other = "0" + "1" * 131
    for wrong, which in (
        (replace(honest, seeds=honest.seeds | {"site-2": other}), "seed of 'site-2'"),
        (replace(honest, keys={"site-5": other}), "key of 'site-5'"),
    ):
        with pytest.raises(PeerRefused, match=f"'site-1' revealed another share of the {which}"):
            attempt.server.take_reveal(wrong)
    with pytest.raises(PeerRefused, match="did not reveal one share for each"):
        attempt.server.take_reveal(replace(honest, keys={}))
    for name in ("site-2", "site-3", "site-4"):
        attempt.server.take_reveal(attempt.sites[name].reveal(attempt.consents))
    exact = exact_mean(agreed, made, attempt.survivors)
    assert_close(agreed, attempt.server.mean(), exact, attempt.survivors)


@pytest.mark.parametrize(("attribute", "which"), [("_seed", "seed"), ("_mask_key", "key")])
def test_a_dealer_of_shares_of_something_else_is_named(attribute: str, which: str) -> None:
    agreed = terms()
    silent = {"site-5": "mask"} if which == "key" else {}
    attempt = Attempt(agreed, updates(agreed), silent=silent).until("offer")
    liar = attempt.sites["site-5"]
    offer = liar.offer()
    setattr(liar, attribute, getattr(Attempt(agreed, updates(agreed)).sites["site-5"], attribute))
    liar.offer = lambda: offer  # type: ignore[method-assign]
    for step in ("deal", "mask", "consent", "reveal"):
        getattr(attempt, step)()
    with pytest.raises(PeerRefused, match=f"'site-5' dealt shares of another {which} than it offered"):
        attempt.server.mean()


def test_keys_of_another_site_are_refused() -> None:
    agreed = terms()
    attempt = Attempt(agreed, updates(agreed))
    offer = attempt.sites["site-1"].offer()
    with pytest.raises(PeerRefused, match="keys offered for 'site-2' are not signed by its pinned key"):
        attempt.server.take_offer(replace(offer, site="site-2"))
    with pytest.raises(PeerRefused, match="'stranger' was not there"):
        attempt.server.take_offer(replace(offer, site="stranger"))


def test_a_consent_for_another_sum_is_refused() -> None:
    agreed = terms()
    attempt = Attempt(agreed, updates(agreed)).until("mask")
    partial = attempt.sites["site-1"].consent(attempt.survivors[:4])
    with pytest.raises(PeerRefused, match="consent of 'site-1' is not signed by its key for this sum"):
        attempt.server.take_consent(partial)


def test_memory_is_one_model_of_integers_whatever_the_number_of_sites() -> None:
    agreed = terms([1] * 8)
    model = {"a": np.zeros(2**18, dtype=np.float32), "b": np.zeros(2**18, dtype=np.float32)}
    bytes_model = 2 * 2**20
    attempt = Attempt(agreed, dict.fromkeys(agreed.names, model)).until("deal")
    tracemalloc.start()
    try:
        for name in agreed.names:
            masked = dict(attempt.sites[name].mask(attempt.shares[name], model))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            attempt.server.fold(name, masked)
            assert tracemalloc.get_traced_memory()[1] - before < bytes_model / 20
            del masked
        attempt.survivors = attempt.server.survivors()
        attempt.consent()
        attempt.reveal()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        means = attempt.server.mean()
        # The sum itself was allocated before tracing began, so only the means, a tensor and blocks show.
        assert tracemalloc.get_traced_memory()[1] - before < 1.2 * bytes_model + 2**21
    finally:
        tracemalloc.stop()
    assert attempt.server.step is Step.DONE
    assert all(not value.any() for value in means.values())
