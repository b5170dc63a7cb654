"""Lower bounds on epsilon from one run: what guessing which canaries were in it proves about the mechanism.

Every canary is a record put into the cohort, or left out, by its own fair coin. Whoever sees the run scores
each canary (high: "in"). A good guesser contradicts a small epsilon. The bounds come in three forms; the
weaker the assumption, the weaker the bound:

- `Form.EPSILON_DELTA` assumes nothing beyond (epsilon, delta)-DP. It can miss noise that is half of what it
  should be even with thousands of canaries.
- `Form.F_DP` assumes that the mechanism's trade-off curve is that of some Gaussian mechanism.
- `Form.GAUSSIAN` assumes further that canaries are independent trials.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, log_ndtr, ndtr, ndtri
from scipy.stats import binom

# Shares of the canaries that are guessed, half as "in" (the highest scores) and half as "out" (the lowest).
# Fixed before any score is seen; the significance is shared among them.
GUESSED_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
# Shares of the canaries left out that a threshold of the Gaussian form takes for "in", likewise.
ALARMED_SHARES = (0.0, 0.02, 0.1, 0.3, 0.6, 0.85)
_LARGEST_EPSILON, _LARGEST_MU = 1e3, 64.0
_PRECISION = 1e-6


class Form(StrEnum):
    """Which statement about a mechanism a bound tests."""

    EPSILON_DELTA = "epsilon-delta"
    F_DP = "f-dp"
    GAUSSIAN = "gaussian"

    @property
    def assumption(self) -> str:
        """What must hold for the bound to hold, to be printed beside it."""
        return _ASSUMPTIONS[self]


_ASSUMPTIONS = {
    Form.EPSILON_DELTA: "none beyond fair, independent coins",
    Form.F_DP: "the trade-off curve of the whole run is that of a Gaussian mechanism",
    Form.GAUSSIAN: (
        "as f-dp, and canaries are independent trials: exact for orthogonal gradient canaries under "
        "independent noise, a heuristic otherwise"
    ),
}


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """What one run says about epsilon.

    Attributes:
        canaries: Number m of canaries, in and out.
        delta: Delta that the bounds are stated at.
        confidence: Probability with which each bound holds by itself, given its assumption.
        bounds: Lower bound on epsilon in each form.
    """

    canaries: int
    delta: float
    confidence: float
    bounds: Mapping[Form, float]

    def contradicts(self, epsilon: float) -> tuple[Form, ...]:
        """Forms whose bound lies above a claimed epsilon. None means "no contradiction", never "proved"."""
        return tuple(form for form, bound in self.bounds.items() if bound > epsilon)


def audit_one_run(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
    guessed_shares: Sequence[float] = GUESSED_SHARES,
) -> OneRunAudit:
    """Bound epsilon from below in all three forms.

    Guarantees:
        Each bound is at most the true epsilon with probability ``confidence`` if its form's assumption holds,
        whatever the scores are. Nothing is chosen by a look at them: how many canaries are guessed, and where
        thresholds lie, is fixed in advance, and all choices share the significance (Bonferroni).

    Args:
        scores: One per canary, shape (m,); higher means more likely to have been in.
        included: The coins, shape (m,): independent, heads with probability one half.
        delta: In (0, 1) and at most 1 / (2 m).
        confidence: In (0, 1).
        guessed_shares: Each in (0, 1], chosen without a look at the scores.

    Raises:
        ValueError: An argument is out of its range, or a score is not a number.
    """
    _check(scores, included, delta=delta, confidence=confidence, guessed_shares=guessed_shares)
    order = np.argsort(_ranks(scores))
    each = 1 - (1 - confidence) / len(guessed_shares)
    epsilon, mu = 0.0, 0.0
    for share in guessed_shares:
        half = min(max(1, round(share * len(scores) / 2)), len(scores) // 2)
        correct = int(included[order[-half:]].sum()) + int((~included[order[:half]]).sum())
        guess = {"canaries": len(scores), "guesses": 2 * half, "correct": correct}
        epsilon = max(epsilon, epsilon_from_guesses(**guess, delta=delta, confidence=each))
        mu = max(mu, mu_from_guesses(**guess, confidence=each))
    return OneRunAudit(
        canaries=len(scores),
        delta=delta,
        confidence=confidence,
        bounds={
            Form.EPSILON_DELTA: epsilon,
            Form.F_DP: gaussian_epsilon(mu, delta=delta),
            Form.GAUSSIAN: gaussian_epsilon(
                mu_from_errors(scores, included, confidence=confidence), delta=delta
            ),
        },
    )


def audit_by_layer(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    layers: Sequence[str],
    *,
    delta: float,
    confidence: float = 0.95,
) -> dict[str, OneRunAudit]:
    """Audit the canaries of every layer by themselves, so that one layer without noise cannot hide.

    Guarantees:
        All bounds of one form hold together with probability ``confidence``: the layers share what is left.

    Args:
        scores: As in `audit_one_run`.
        included: As in `audit_one_run`.
        layers: The layer of each canary, m of them.
        delta: As in `audit_one_run`.
        confidence: As in `audit_one_run`.

    Raises:
        ValueError: As in `audit_one_run`, or not one layer per canary.
    """
    if len(layers) != len(scores):
        raise ValueError(f"expected one layer for each of {len(scores)} canaries, got {len(layers)}")
    members: dict[str, list[int]] = {}
    for canary, layer in enumerate(layers):
        members.setdefault(layer, []).append(canary)
    each = 1 - (1 - confidence) / max(1, len(members))
    return {
        layer: audit_one_run(scores[own], included[own], delta=delta, confidence=each)
        for layer, own in members.items()
    }


def epsilon_from_guesses(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """Lower bound on epsilon from the number of correct guesses; it assumes nothing.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r <= m, fixed in advance; the other canaries are passed over.
        correct: v <= r of them right.
        delta: In (0, 1) and at most 1 / (2 m), where the test is monotone in epsilon.
        confidence: In (0, 1).

    Raises:
        ValueError: not 0 <= v <= r <= m.

    Source:
        Steinke, Nasr, Jagielski (2023), arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    _check_guesses(canaries, guesses, correct)
    significance = 1 - confidence

    def rejected(epsilon: float) -> bool:
        return guess_p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) <= significance

    return _largest(rejected, limit=_LARGEST_EPSILON)


def guess_p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Largest probability that an (epsilon, delta)-DP mechanism lets so many guesses be right.

    Source:
        Steinke, Nasr, Jagielski (2023), theorem 5.2: beta + 2 m delta alpha.
    """
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    fewer = np.arange(1, correct + 1)
    below = binom.cdf(correct - 1, guesses, right) - binom.cdf(correct - 1 - fewer, guesses, right)
    alpha = float((below / fewer).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def mu_from_guesses(*, canaries: int, guesses: int, correct: int, confidence: float) -> float:
    """Lower bound on mu if the run is mu-Gaussian DP, from the number of correct guesses.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r <= m, fixed in advance.
        correct: v <= r of them right.
        confidence: In (0, 1).

    Raises:
        ValueError: not 0 <= v <= r <= m.

    Source:
        Mahloujifar, Melis, Chaudhuri (2024), arXiv:2410.22235, algorithm 3 with two symbols and the trade-off
        curve of N(0, 1) against N(mu, 1).
    """
    _check_guesses(canaries, guesses, correct)
    significance = 1 - confidence

    def rejected(mu: float) -> bool:
        most = guesses / canaries
        right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
        for fewer in range(correct - 1, -1, -1):
            grown = float(ndtr(ndtri(right) - mu))
            if grown <= wrong:  # neither number would move again
                break
            right, wrong = min(1.0, right + fewer / (guesses - fewer) * (grown - wrong)), grown
            if right + wrong > most:
                return True
        return right + wrong > most

    return _largest(rejected, limit=_LARGEST_MU)


def mu_from_errors(scores: NDArray[np.floating], included: NDArray[np.bool_], *, confidence: float) -> float:
    """Lower bound on mu from how often a threshold errs, canaries being independent trials.

    A threshold lies where a share of the canaries left out, fixed in advance, is above it. What it takes for
    "in" of all that are out is then a beta variable, whatever the scores are distributed like, and it knows
    nothing of the canaries that were in: the bounds on both error rates are exact.

    Source:
        Dong, Roth, Su (2019), arXiv:1905.02383, section 2, for mu from two error rates; Clopper and Pearson
        (1934) for their bounds.
    """
    ranks = _ranks(scores)
    inside, outside = ranks[included], np.sort(ranks[~included])
    if min(len(inside), len(outside)) == 0:
        return 0.0
    each = 1 - (1 - confidence) / (2 * len(ALARMED_SHARES))  # for each threshold, of each of two rates
    best = 0.0
    for share in ALARMED_SHARES:
        alarms = min(round(share * len(outside)), len(outside) - 1)
        misses = int((inside <= outside[-1 - alarms]).sum())
        alarmed = _largest_rate(alarms, len(outside), each)
        missed = _largest_rate(misses, len(inside), each)
        best = max(best, float(-ndtri(alarmed) - ndtri(missed)))
    return best


def gaussian_epsilon(mu: float, *, delta: float) -> float:
    """The epsilon that a mu-Gaussian-DP mechanism has at ``delta``.

    Source:
        Balle and Wang (2018), arXiv:1805.06530, theorem 8, with mu = sensitivity / standard deviation.
    """

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
        return float(ndtr(mu / 2 - epsilon / mu)) - tail - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * (mu / 2 + 40)))  # there the first term is below 1e-300


def _largest_rate(errors: int, trials: int, confidence: float) -> float:
    """Clopper and Pearson's upper bound on the rate of so many errors."""
    return 1.0 if errors == trials else float(betaincinv(errors + 1, trials - errors, confidence))


def _ranks(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Places in increasing order; ties in an order of their own, which knows neither coins nor layers."""
    ties = np.random.default_rng(0).permutation(len(scores))
    ranks = np.empty(len(scores), dtype=np.intp)
    ranks[np.lexsort((ties, scores))] = np.arange(len(scores))
    return ranks


def _largest(rejected: Callable[[float], bool], *, limit: float) -> float:
    """The largest rejected value of a test that rejects everything below what it rejects."""
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
        if high > limit:
            return low
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _check_guesses(canaries: int, guesses: int, correct: int) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"expected 0 <= {correct=} <= {guesses=} <= {canaries=}")


def _check(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float,
    guessed_shares: Sequence[float],
) -> None:
    if scores.ndim != 1 or scores.shape != included.shape or len(scores) < 2:
        raise ValueError(
            f"expected a score and a coin for each of two canaries or more, got shapes {scores.shape} "
            f"and {included.shape}"
        )
    if included.dtype != np.bool_:
        raise ValueError(f"expected included to be boolean, got {included.dtype}")
    if np.isnan(scores).any():
        raise ValueError("expected scores to be numbers, got NaN: give a canary without a score the same one")
    if not 0 < delta < 1 or 2 * len(scores) * delta > 1:
        raise ValueError(
            f"expected {delta=} in (0, {1 / (2 * len(scores)):g}]: take it smaller or fewer canaries"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"expected {confidence=} in (0, 1)")
    if not guessed_shares or not all(0 < share <= 1 for share in guessed_shares):
        raise ValueError(
            f"expected guessed_shares={tuple(guessed_shares)} to be shares in (0, 1], at least one"
        )
