"""A mean loss is a bounded sum with the noise it says, whatever a patient's loss is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privacy.errors import PrivacyError
from privacy.losses import LossRelease
from privacy.noise import GaussianNoise

ANY = st.floats(width=64)
LOSSES = hnp.arrays(np.float64, st.integers(0, 30), elements=ANY)


def mechanism(max_loss: float = 3.0, noise_multiplier: float = 2.0) -> LossRelease:
    return LossRelease(max_loss=max_loss, noise_multiplier=noise_multiplier)


@settings(max_examples=200, deadline=None)
@given(losses=LOSSES, one=ANY, max_loss=st.floats(1e-6, 1e6))
def test_a_patient_moves_the_sum_by_the_bound_at_most(
    losses: np.ndarray, one: float, max_loss: float
) -> None:
    release = mechanism(max_loss)
    with_one = release.clipped_sum(np.append(losses, one))
    moved = with_one - release.clipped_sum(losses)
    assert 0 <= moved <= release.sensitivity * (1 + 1e-9)  # whole numbers of the grid, written as floats


def test_the_bound_is_reached() -> None:
    assert mechanism().clipped_sum(np.array([1e9])) == mechanism().sensitivity


def test_losses_in_range_are_summed_and_others_cut() -> None:
    assert mechanism().clipped_sum(np.array([1.0, -5.0, 7.0, math.nan, math.inf])) == pytest.approx(10.0)


def test_nobody_is_a_sum_of_zero() -> None:
    assert mechanism().clipped_sum(np.zeros(0)) == 0.0


def test_the_noise_is_as_large_as_it_says() -> None:
    noise, release = GaussianNoise(insecure_seed=1), mechanism()
    drawn = np.array([release.release(5.0, noise) for _ in range(4_000)])
    assert drawn.mean() == pytest.approx(5.0, abs=5 * release.noise_std / math.sqrt(4_000))
    assert drawn.std() == pytest.approx(6.0, rel=0.05)


def test_the_accountant_is_told_of_one_gaussian_without_sampling() -> None:
    event = mechanism().event
    assert (event.sample_rate, event.noise_multiplier, event.steps) == (1.0, 2.0, 1)
    assert mechanism().noise_std == 2.0 * mechanism().sensitivity


@pytest.mark.parametrize("max_loss", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(max_loss: float) -> None:
    with pytest.raises(PrivacyError, match="max_loss"):
        mechanism(max_loss)
