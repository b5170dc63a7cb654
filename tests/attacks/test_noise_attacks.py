"""The noise of the training path itself: of the claimed scale, and nobody can subtract it.

Every test that accepts the right noise is run on planted mistakes, which it must reject. Right noise is
rejected with probability below 1e-6 per test, for a seed drawn anew; the seeds are fixed besides.
"""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest

from tests.attacks.probe import (
    BOUND,
    HalvedNoise,
    NoiseOfAMean,
    NoiseOnHalfTheLayers,
    NoNoiseWhenNobodyWasDrawn,
    ProbePart,
    SameNoiseEveryStep,
    SameNoiseInEveryLayer,
    ShiftedNoise,
    Watched,
    mechanism,
    releases,
)

LAYERS, ROWS, STEPS, MULTIPLIER = 3, 4_000, 3, 1.3
# Each of LAYERS * STEPS tests errs with this probability: together below 1e-6.
ACCEPTED = 1e-7
# Two-sided normal tail 6e-14, times fewer than 1e6 shifts and pairs of arrays.
SIGMAS = 7.5


def run(noise: Watched, *, seed: int = 0, multiplier: float = MULTIPLIER) -> NDArray[np.float64]:
    """What is released on the coordinates that are nobody's, shape (STEPS, LAYERS, ROWS - 1)."""
    part = ProbePart(layers=LAYERS, rows=ROWS)
    of = mechanism(noise_multiplier=multiplier, steps=STEPS)
    found = releases([0, ROWS, 2 * ROWS], of=of, part=part, noise=noise, seed=seed)
    assert found.shape == (STEPS, LAYERS, ROWS)
    return found[:, :, 1:]


def wrong_arrays(found: NDArray[np.float64], *, scale: float = MULTIPLIER) -> int:
    """How many arrays do not look normal with this deviation."""
    return sum(
        kstest(values, "norm", args=(0, scale)).pvalue < ACCEPTED for values in found.reshape(-1, ROWS - 1)
    )


def alike(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Largest correlation of two arrays over all shifts against one another, in standard errors."""
    length = 2 * len(first)
    product = np.fft.rfft(first, length) * np.conj(np.fft.rfft(second, length))
    shifted = np.fft.irfft(product, length)
    return float(np.abs(shifted).max() / (first.std() * second.std() * math.sqrt(len(first))))


def most_alike(arrays: NDArray[np.float64]) -> float:
    """Over all pairs of rows."""
    return max(alike(*pair) for pair in itertools.combinations(arrays.reshape(-1, arrays.shape[-1]), 2))


# --- scale --------------------------------------------------------------------------------------------------


def test_every_array_of_every_step_has_the_claimed_scale_and_no_other() -> None:
    found = run(Watched(layers=LAYERS))
    assert wrong_arrays(found) == 0
    assert wrong_arrays(found, scale=MULTIPLIER * 2 / 3) == STEPS * LAYERS
    assert wrong_arrays(found, scale=MULTIPLIER * 3 / 2) == STEPS * LAYERS


@pytest.mark.parametrize(
    ("mistake", "wrong"),
    [
        (HalvedNoise, STEPS * LAYERS),
        (NoiseOfAMean, STEPS * LAYERS),
        (NoiseOnHalfTheLayers, STEPS),
    ],
)
def test_noise_of_another_scale_or_on_fewer_arrays_is_found(mistake: type[Watched], wrong: int) -> None:
    assert wrong_arrays(run(mistake(layers=LAYERS))) == wrong


def test_the_noise_has_the_scale_of_the_claim_whatever_the_bound() -> None:
    part = ProbePart(layers=1, rows=ROWS)
    noise = Watched(layers=1)
    of = mechanism(max_grad_norm=3 * BOUND, noise_multiplier=MULTIPLIER, steps=1)
    assert wrong_arrays(releases([0], of=of, part=part, noise=noise)[:, :, 1:]) == 0
    assert (
        kstest(noise.released[0].numpy()[1:, 0], "norm", args=(0, MULTIPLIER * 3 * BOUND)).pvalue > ACCEPTED
    )


# --- independence -------------------------------------------------------------------------------------------


def test_arrays_and_steps_are_independent_at_every_shift() -> None:
    assert most_alike(run(Watched(layers=LAYERS))) < SIGMAS


@pytest.mark.parametrize("mistake", [SameNoiseEveryStep, SameNoiseInEveryLayer, ShiftedNoise])
def test_noise_that_is_used_twice_is_found(mistake: type[Watched]) -> None:
    found = run(mistake(layers=LAYERS))
    assert wrong_arrays(found) == 0  # each array by itself looks right
    assert most_alike(found) > 3 * SIGMAS


def test_sites_and_releases_are_independent_though_their_training_seeds_are_equal() -> None:
    sites = [run(Watched(layers=LAYERS, seed=None), seed=5) for _ in range(3)]
    assert most_alike(np.concatenate(sites)) < SIGMAS


def test_equal_generators_at_two_sites_cancel_and_are_found() -> None:
    first, second = (run(Watched(layers=LAYERS, seed=5)) for _ in range(2))
    assert np.array_equal(first, second)
    assert most_alike(np.concatenate([first, second])) > 3 * SIGMAS


def test_what_cancels_is_a_patient_in_the_open() -> None:
    part = ProbePart(layers=1, rows=10)
    of = mechanism(sample_rate=1.0, steps=1)
    one, other = (
        releases(cohort, of=of, part=part, noise=Watched(layers=1, seed=5)) for cohort in ([3, 4], [4])
    )
    assert (one - other)[0, 0] == pytest.approx(np.eye(10)[3] * -1, abs=1e-5)


# --- nobody drawn -------------------------------------------------------------------------------------------


def test_a_step_that_nobody_joined_is_released_with_its_noise() -> None:
    part = ProbePart(layers=LAYERS, rows=ROWS)
    of = mechanism(noise_multiplier=MULTIPLIER, sample_rate=1e-12, steps=STEPS)
    found = releases([0, 1], of=of, part=part, noise=Watched(layers=LAYERS))
    assert len(found) == STEPS
    assert wrong_arrays(found[:, :, 1:]) == 0


def test_noise_saved_when_nobody_was_drawn_is_found() -> None:
    part = ProbePart(layers=LAYERS, rows=ROWS)
    of = mechanism(noise_multiplier=MULTIPLIER, sample_rate=1e-12, steps=STEPS)
    found = releases([0, 1], of=of, part=part, noise=NoNoiseWhenNobodyWasDrawn(layers=LAYERS))
    assert wrong_arrays(found[:, :, 1:]) == STEPS * LAYERS
