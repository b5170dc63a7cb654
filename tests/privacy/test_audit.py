"""A lower bound on epsilon never exceeds the truth more often than it says, and is worth having."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logit, ndtri
from scipy.stats import beta, binom, norm

from privacy.accounting import PoissonGaussian, epsilon
from privacy.audit import (
    Form,
    OneRunAudit,
    audit_by_layer,
    audit_one_run,
    epsilon_from_guesses,
    gaussian_epsilon,
    guess_p_value,
    mu_from_errors,
    mu_from_guesses,
)

DELTA = 1e-5


def gaussian_game(
    canaries: int, mu: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Orthogonal canaries under independent noise: the mechanism is mu-Gaussian DP, and no better."""
    included = rng.random(canaries) < 0.5
    return mu * included + rng.standard_normal(canaries), included


# --- published loops ----------------------------------------------------------------------------------------


def loop_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Steinke, Nasr, Jagielski (2023), appendix D, line by line."""
    right = 1 / (1 + math.exp(-epsilon))
    total = alpha = 0.0
    for i in range(1, correct + 1):
        total += float(binom.pmf(correct - i, guesses, right))
        if total > i * alpha:
            alpha = total / i
    return min(1.0, float(binom.sf(correct - 1, guesses, right)) + alpha * delta * 2 * canaries)


def loop_rejects(
    canaries: int, guesses: int, correct: int, significance: float, inverse: Callable[[float], float]
) -> bool:
    """Mahloujifar et al. (2024), algorithm 3 with two symbols, line by line."""
    h, r = [0.0] * (correct + 1), [0.0] * (correct + 1)
    r[correct] = significance * correct / canaries
    h[correct] = significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        h[i] = max(h[i + 1], inverse(r[i + 1]))
        r[i] = min(1.0, r[i + 1] + i / (guesses - i) * (h[i] - h[i + 1]))
    return r[0] + h[0] > guesses / canaries


@settings(max_examples=60, deadline=None)
@given(
    canaries=st.integers(1, 400),
    share=st.floats(0, 1),
    rate=st.floats(0, 1),
    of=st.floats(0, 8),
    delta=st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3]),
)
def test_the_p_value_is_that_of_the_published_loop(
    canaries: int, share: float, rate: float, of: float, delta: float
) -> None:
    guesses = round(share * canaries)
    correct = round(rate * guesses)
    expected = loop_p_value(canaries, guesses, correct, of, delta)
    found = guess_p_value(canaries, guesses, correct, epsilon=of, delta=delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)


@settings(max_examples=40, deadline=None)
@given(canaries=st.integers(1, 300), share=st.floats(0, 1), rate=st.floats(0.3, 1))
def test_mu_is_where_the_published_recursion_stops_rejecting(
    canaries: int, share: float, rate: float
) -> None:
    guesses = round(share * canaries)
    correct = round(rate * guesses)
    found = mu_from_guesses(canaries=canaries, guesses=guesses, correct=correct, confidence=0.95)

    def rejects(mu: float) -> bool:
        return loop_rejects(canaries, guesses, correct, 1 - 0.95, lambda x: float(norm.cdf(norm.ppf(x) - mu)))

    assert not rejects(found * (1 + 1e-4) + 1e-9)
    assert found == 0 or rejects(found * (1 - 1e-4))


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("significance", [0.6, 0.9, 0.99])
def test_one_canary_and_one_right_guess_prove_what_the_best_guesser_could_have_done(
    significance: float,
) -> None:
    one: dict[str, Any] = {"canaries": 1, "guesses": 1, "correct": 1, "confidence": 1 - significance}
    assert mu_from_guesses(**one) == pytest.approx(2 * ndtri(significance), rel=1e-5)  # it wins ndtr(mu / 2)
    assert epsilon_from_guesses(**one, delta=1e-12) == pytest.approx(logit(significance), rel=1e-5)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 100), (100, 80), (1_000, 700), (50, 20)])
def test_without_delta_the_bound_is_the_clopper_pearson_bound_of_the_hit_rate(
    guesses: int, correct: int
) -> None:
    rate = beta.ppf(0.05, correct, guesses - correct + 1)
    found = epsilon_from_guesses(
        canaries=2 * guesses, guesses=guesses, correct=correct, delta=1e-15, confidence=0.95
    )
    assert found == pytest.approx(max(0.0, float(logit(rate))), abs=1e-5)


def test_delta_costs_what_theorem_5_2_says() -> None:
    bounds = [
        epsilon_from_guesses(canaries=1_000, guesses=1_000, correct=1_000, delta=delta, confidence=0.95)
        for delta in (1e-15, 1e-6, 1e-5)
    ]
    # By hand: misses are Poisson with mean 3 at the first, so alpha = P(1 to 3 misses) / 3 = 0.199, and
    # e^-mean = 0.05 - 2 m delta alpha gives means 2.996, 3.004, 3.079: epsilon is log(1000 / mean).
    assert bounds == pytest.approx([5.809, 5.806, 5.782], abs=2e-3)
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize(
    ("mu", "expected"), [(0.5, 1.993), (1.0, 4.377), (2.0, 9.997), (4.0, 24.38), (0.0, 0.0), (1e-9, 0.0)]
)
def test_the_epsilon_of_a_gaussian_is_the_closed_form(mu: float, expected: float) -> None:
    assert gaussian_epsilon(mu, delta=DELTA) == pytest.approx(expected, rel=1e-3)


@settings(max_examples=6, deadline=None)
@given(mu=st.floats(0.05, 8), delta=st.sampled_from([1e-4, 1e-6]))
def test_and_what_the_accountant_says(mu: float, delta: float) -> None:
    event = PoissonGaussian(sample_rate=1.0, noise_multiplier=1 / mu, steps=1)
    accounted = epsilon([event], delta=delta)
    assert gaussian_epsilon(mu, delta=delta) <= accounted <= gaussian_epsilon(mu, delta=delta) * 1.001 + 1e-4


def test_mu_from_errors_is_the_best_of_exact_bounds_that_share_the_significance() -> None:
    included = np.arange(4_000) % 2 == 0
    found = mu_from_errors(included.astype(float), included, confidence=0.95)
    none = 1 - (0.05 / 12) ** (
        1 / 2_000
    )  # bound on the rate of no error in 2000, of 6 thresholds with two rates
    assert found == pytest.approx(-2 * ndtri(none), rel=1e-9)
    scores = np.where(included, 1.0, 0.0)
    scores[:20:2] = -1.0  # ten of those that were in look as if they were out
    ten = beta.ppf(1 - 0.05 / 12, 11, 1_990)
    assert mu_from_errors(scores, included, confidence=0.95) == pytest.approx(
        -ndtri(none) - ndtri(ten), rel=1e-9
    )


# --- validity and power -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "confidence"), [(0.3, 0.5), (1.0, 0.5), (3.0, 0.5), (1.0, 0.95)])
def test_an_ideal_gaussian_mechanism_is_contradicted_no_more_often_than_stated(
    mu: float, confidence: float
) -> None:
    rng, repeats = np.random.default_rng(1), 30
    truth = gaussian_epsilon(mu, delta=DELTA)
    wrong = dict.fromkeys(Form, 0)
    for _ in range(repeats):
        audit = audit_one_run(*gaussian_game(120, mu, rng), delta=DELTA, confidence=confidence)
        for form in audit.contradicts(truth):
            wrong[form] += 1
    # A valid bound is wrong more often than this once in a million tests.
    assert max(wrong.values()) <= binom.isf(1e-6, repeats, 1 - confidence)


@pytest.mark.parametrize(
    ("mu", "canaries", "least"),
    [
        (0.5, 5_000, (0.75, 0.95, 1.33)),
        (1.0, 1_000, (1.35, 1.85, 2.8)),
        (2.0, 200, (2.1, 3.6, 4.87)),
        (2.0, 1_000, (2.8, 4.2, 7.5)),
        (2.0, 5_000, (3.6, 5.3, 8.89)),
    ],
)
def test_an_ideal_gaussian_mechanism_is_bounded_from_as_near_as_published(
    mu: float, canaries: int, least: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(3)
    found = [audit_one_run(*gaussian_game(canaries, mu, rng), delta=DELTA).bounds for _ in range(8)]
    means = [np.mean([bounds[form] for bounds in found]) for form in Form]
    assert all(mean > bound for mean, bound in zip(means, least, strict=True)), means


def test_the_shares_that_are_guessed_share_the_significance() -> None:
    included = np.arange(1_000) % 2 == 0
    scores = np.where(included, 1.0, 0.0)
    for shares in ((0.5,), (0.5, 0.1)):
        each: dict[str, Any] = {"canaries": 1_000, "guesses": 500, "correct": 500}
        each["confidence"] = 1 - 0.05 / len(shares)
        bounds = audit_one_run(scores, included, delta=DELTA, guessed_shares=shares).bounds
        assert bounds[Form.EPSILON_DELTA] == pytest.approx(epsilon_from_guesses(**each, delta=DELTA))
        assert bounds[Form.F_DP] == pytest.approx(gaussian_epsilon(mu_from_guesses(**each), delta=DELTA))


def test_half_the_noise_escapes_the_form_without_assumptions_and_no_other() -> None:
    scores, included = gaussian_game(5_000, 2.0, np.random.default_rng(4))
    claimed = gaussian_epsilon(1.0, delta=DELTA)
    assert audit_one_run(scores, included, delta=DELTA).contradicts(claimed) == (Form.F_DP, Form.GAUSSIAN)


@settings(max_examples=30, deadline=None)
@given(guesses=st.integers(2, 200), data=st.data())
def test_more_right_guesses_never_prove_less(guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(1, guesses))

    def proved(number: int) -> tuple[float, float]:
        guess: dict[str, Any] = {"canaries": 200, "guesses": guesses, "correct": number, "confidence": 0.9}
        return epsilon_from_guesses(**guess, delta=DELTA), mu_from_guesses(**guess)

    for less, more in zip(proved(correct - 1), proved(correct), strict=True):
        assert less <= more + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    guesses=st.integers(1, 200), data=st.data(), pair=st.tuples(st.floats(0, 6), st.floats(0, 6)).map(sorted)
)
def test_the_test_is_monotone_in_epsilon_up_to_the_largest_delta(
    guesses: int, data: st.DataObject, pair: list[float]
) -> None:
    correct = data.draw(st.integers(0, guesses))
    low, high = (guess_p_value(200, guesses, correct, epsilon=each, delta=1 / 400) for each in pair)
    assert low <= high + 1e-12


# --- layers -------------------------------------------------------------------------------------------------


def test_a_layer_without_noise_is_named() -> None:
    scores, included = gaussian_game(2_000, 1.0, np.random.default_rng(5))
    layers = ["first", "bare"] * 1_000
    scores[1::2] = included[1::2]
    audits = audit_by_layer(scores, included, layers, delta=DELTA)
    claimed = gaussian_epsilon(1.0, delta=DELTA)
    assert audits["first"].contradicts(claimed) == ()
    assert audits["bare"].contradicts(claimed) == tuple(Form)
    assert audit_one_run(scores, included, delta=DELTA).contradicts(claimed) == (Form.GAUSSIAN,)


def test_layers_share_the_confidence_and_keep_their_own_canaries() -> None:
    scores, included = gaussian_game(30, 1.0, np.random.default_rng(6))
    audits = audit_by_layer(scores, included, ["a"] * 10 + ["b"] * 20, delta=DELTA, confidence=0.9)
    assert {layer: audit.canaries for layer, audit in audits.items()} == {"a": 10, "b": 20}
    assert all(audit.confidence == pytest.approx(0.95) for audit in audits.values())


def test_every_canary_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="one layer for each of 4 canaries, got 3"):
        audit_by_layer(np.zeros(4), np.zeros(4, dtype=bool), ["a"] * 3, delta=DELTA)


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("included", [[True] * 50, [False] * 50, [True, False] * 25])
def test_scores_that_say_nothing_prove_nothing(included: list[bool]) -> None:
    audit = audit_one_run(np.zeros(50), np.array(included)[::-1].copy(), delta=DELTA)
    assert audit.bounds == dict.fromkeys(Form, 0.0)
    assert audit.contradicts(0.0) == ()


def test_scores_upside_down_prove_nothing() -> None:
    scores, included = gaussian_game(500, 5.0, np.random.default_rng(7))
    assert audit_one_run(-scores, included, delta=DELTA).bounds == dict.fromkeys(Form, 0.0)


def test_infinite_scores_are_scores() -> None:
    included = np.random.default_rng(8).random(300) < 0.5
    bounds = audit_one_run(np.where(included, np.inf, -np.inf), included, delta=DELTA).bounds
    assert all(bound > 3 for bound in bounds.values())


def test_two_canaries_are_enough_to_prove_nothing() -> None:
    audit = audit_one_run(np.array([0.0, 1.0]), np.array([False, True]), delta=DELTA)
    assert audit.bounds == dict.fromkeys(Form, 0.0)


def test_the_weights_of_a_claim_are_told_with_their_assumption() -> None:
    assert "heuristic" in Form.GAUSSIAN.assumption
    assert "Gaussian mechanism" in Form.F_DP.assumption
    assert "none" in Form.EPSILON_DELTA.assumption
    audit = OneRunAudit(
        canaries=9, delta=DELTA, confidence=0.9, bounds={Form.EPSILON_DELTA: 1.0, Form.F_DP: 2.0}
    )
    assert audit.contradicts(1.0) == (Form.F_DP,)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scores": np.zeros(3)}, r"got shapes \(3,\) and \(4,\)"),
        ({"scores": np.zeros(1), "included": np.zeros(1, dtype=bool)}, "two canaries or more"),
        ({"scores": np.array([0, 1, np.nan, 2])}, "expected scores to be numbers, got NaN"),
        ({"included": np.zeros(4)}, "expected included to be boolean, got float64"),
        ({"delta": 0.0}, "expected delta=0.0 in"),
        ({"delta": 0.2}, r"expected delta=0\.2 in \(0, 0\.125\]: take it smaller"),
        ({"delta": math.nan}, "expected delta=nan"),
        ({"confidence": 1.0}, "expected confidence=1.0 in"),
        ({"guessed_shares": ()}, "expected guessed_shares"),
        ({"guessed_shares": (0.5, 1.5)}, "expected guessed_shares"),
    ],
)
def test_what_no_audit_can_be_made_of_is_refused(changes: dict[str, Any], text: str) -> None:
    given_: dict[str, Any] = {"scores": np.arange(4.0), "included": np.arange(4) > 1, "delta": DELTA}
    with pytest.raises(ValueError, match=text):
        audit_one_run(**{**given_, **changes})


@pytest.mark.parametrize(("guesses", "correct"), [(5, 6), (11, 3), (5, -1)])
def test_more_right_guesses_than_guesses_or_canaries_are_refused(guesses: int, correct: int) -> None:
    guess: dict[str, Any] = {"canaries": 10, "guesses": guesses, "correct": correct, "confidence": 0.9}
    with pytest.raises(ValueError, match="expected 0 <= correct="):
        mu_from_guesses(**guess)
    with pytest.raises(ValueError, match=f"guesses={guesses} <= canaries=10"):
        epsilon_from_guesses(**guess, delta=DELTA)
