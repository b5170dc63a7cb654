"""Every patient joins by a coin of their own; the tests fail for a sampler that is only right on average."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chisquare, kstest

from privacy.noise import os_generator
from privacy.sampling import poisson_sample, uniform_groups

POPULATION, RATE, STEPS = 50, 0.1, 20_000
# One in a billion for a right sampler; the seeds are fixed besides.
SIX_SIGMA = 6.0


def presence(draw: Callable[[np.random.Generator], NDArray[np.intp]], seed: int = 1) -> NDArray[np.float64]:
    """Who was present, shape (STEPS, POPULATION)."""
    generator = np.random.default_rng(seed)
    present = np.zeros((STEPS, POPULATION))
    for step in range(STEPS):
        present[step, draw(generator)] = 1
    return present


def ours(generator: np.random.Generator) -> NDArray[np.intp]:
    return poisson_sample(generator, population=POPULATION, sample_rate=RATE)


def fixed_size(generator: np.random.Generator) -> NDArray[np.intp]:
    return generator.choice(POPULATION, int(POPULATION * RATE), replace=False)


def worst_deviations(present: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """In standard errors: frequency, pairs of patients, one patient's next step, variance of the size."""
    variance = RATE * (1 - RATE)
    centred = present - RATE
    frequency = np.abs(centred.mean(axis=0)) * math.sqrt(STEPS / variance)
    pairs = (centred.T @ centred) / (STEPS * variance) * math.sqrt(STEPS)
    np.fill_diagonal(pairs, 0)
    following = (centred[1:] * centred[:-1]).mean(axis=0) / variance * math.sqrt(STEPS - 1)
    sizes = present.sum(axis=1)
    size_variance = (sizes.var() / (POPULATION * variance) - 1) * math.sqrt(STEPS / 2)
    return frequency.max(), np.abs(pairs).max(), np.abs(following).max(), abs(size_variance)


def test_patients_join_at_the_rate_independently_of_one_another_and_of_the_last_step() -> None:
    assert max(worst_deviations(presence(ours))) < SIX_SIGMA


def test_the_same_checks_reject_batches_of_a_fixed_size() -> None:
    frequency, _, _, size_variance = worst_deviations(presence(fixed_size))
    assert frequency < SIX_SIGMA < size_variance


@pytest.mark.parametrize("wrong_rate", [RATE * 2 / 3, RATE * 3 / 2])
def test_the_same_checks_reject_another_rate(wrong_rate: float) -> None:
    present = presence(lambda g: poisson_sample(g, population=POPULATION, sample_rate=wrong_rate))
    assert worst_deviations(present)[0] > SIX_SIGMA


def test_sizes_follow_the_binomial_law_down_to_the_empty_draw() -> None:
    generator = np.random.default_rng(2)
    sizes = [len(poisson_sample(generator, population=10, sample_rate=0.1)) for _ in range(20_000)]
    empty = sizes.count(0) / len(sizes)
    expected = float(binom.pmf(0, 10, 0.1))
    assert empty == pytest.approx(expected, abs=6 * math.sqrt(expected * (1 - expected) / len(sizes)))


def test_the_position_of_a_patient_has_no_say() -> None:
    generator = np.random.default_rng(3)
    drawn = np.concatenate(
        [poisson_sample(generator, population=1_000, sample_rate=0.05) for _ in range(200)]
    )
    assert kstest((drawn + 0.5) / 1_000, "uniform").pvalue > 1e-3


def test_everyone_joins_at_rate_one() -> None:
    drawn = poisson_sample(np.random.default_rng(0), population=7, sample_rate=1.0)
    assert drawn.tolist() == list(range(7))


def test_nobody_is_drawn_from_an_empty_cohort() -> None:
    assert poisson_sample(np.random.default_rng(0), population=0, sample_rate=0.5).shape == (0,)


def test_generators_of_the_operating_system_draw_differently() -> None:
    first, second = (poisson_sample(os_generator(), population=500, sample_rate=0.5) for _ in range(2))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("sample_rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_out_of_range_is_refused(sample_rate: float) -> None:
    with pytest.raises(ValueError, match=r"expected sample_rate=.* in \(0, 1\]"):
        poisson_sample(np.random.default_rng(0), population=5, sample_rate=sample_rate)


def test_a_negative_population_is_refused() -> None:
    with pytest.raises(ValueError, match="expected population=-1 >= 0"):
        poisson_sample(np.random.default_rng(0), population=-1, sample_rate=0.5)


# --- groups -------------------------------------------------------------------------------------------------

MEMBERS, GROUPS = 4, 2
Grouping = Callable[[np.random.Generator], NDArray[np.intp]]


def independent(generator: np.random.Generator) -> NDArray[np.intp]:
    return uniform_groups(generator, members=MEMBERS, groups=GROUPS)


def chunks_of_a_permutation(generator: np.random.Generator) -> NDArray[np.intp]:
    groups = np.empty(MEMBERS, dtype=np.intp)
    groups[generator.permutation(MEMBERS)] = np.arange(MEMBERS) * GROUPS // MEMBERS
    return groups


def one_for_all(generator: np.random.Generator) -> NDArray[np.intp]:
    return np.full(MEMBERS, generator.integers(GROUPS), dtype=np.intp)


def by_turns(generator: np.random.Generator) -> NDArray[np.intp]:
    return (np.arange(MEMBERS) + generator.integers(GROUPS)) % GROUPS


def p_value(draw: Grouping) -> float:
    """Of the hypothesis that all assignments of all members are equally likely."""
    generator = np.random.default_rng(3)
    powers = GROUPS ** np.arange(MEMBERS)
    drawn = [int(draw(generator) @ powers) for _ in range(STEPS)]
    return float(chisquare(np.bincount(drawn, minlength=GROUPS**MEMBERS)).pvalue)


def test_every_assignment_of_groups_is_equally_likely() -> None:
    assert p_value(independent) > 1e-3


@pytest.mark.parametrize("wrong", [chunks_of_a_permutation, one_for_all, by_turns])
def test_the_same_check_rejects_groups_that_know_of_each_other(wrong: Grouping) -> None:
    assert p_value(wrong) < 1e-9


def test_groups_of_successive_steps_are_independent() -> None:
    generator = np.random.default_rng(4)
    drawn = np.array([independent(generator)[0] for _ in range(STEPS)])
    first, second = drawn[:-1], drawn[1:]
    agree = float((first == second).mean())
    assert abs(agree - 1 / GROUPS) < SIX_SIGMA * math.sqrt(0.25 / len(first))


def test_a_member_who_leaves_changes_nobody_elses_group() -> None:
    for gone in range(MEMBERS):
        others = uniform_groups(np.random.default_rng(5), members=gone, groups=GROUPS)
        everyone = uniform_groups(np.random.default_rng(5), members=MEMBERS, groups=GROUPS)
        assert np.array_equal(everyone[:gone], others)


@pytest.mark.parametrize(("members", "groups"), [(0, 1), (0, 5), (3, 1)])
def test_edges_of_groups(members: int, groups: int) -> None:
    drawn = uniform_groups(np.random.default_rng(0), members=members, groups=groups)
    assert drawn.shape == (members,)
    assert drawn.dtype == np.intp
    assert not drawn.any() or groups > 1


@pytest.mark.parametrize(("members", "groups", "text"), [(-1, 2, "members=-1"), (2, 0, "groups=0 >= 1")])
def test_groups_that_cannot_be_drawn_are_refused(members: int, groups: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        uniform_groups(np.random.default_rng(0), members=members, groups=groups)
