"""What plans read of the study: shares that never rise with noise and end where measuring ended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.regime import MEASURED, share_of_lift

WEIGHTS = sorted({one.parameters for one in MEASURED})
NOISES = {
    weights: [one.noise_to_signal for one in MEASURED if one.parameters == weights] for weights in WEIGHTS
}
noises = st.floats(min_value=0, max_value=1e6)


@given(weights=st.integers(1, 10**10), less=noises, more=noises)
def test_no_more_is_kept_with_more_noise(weights: int, less: float, more: float) -> None:
    less, more = sorted((less, more))
    kept = [share_of_lift(parameters=weights, noise_to_signal=noise) for noise in (less, more)]
    assert 0 <= kept[1] <= kept[0] <= 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_mean_of_what_was_measured_is_kept(weights: int) -> None:
    arms = [one for one in MEASURED if one.parameters == weights]
    read = [share_of_lift(parameters=weights, noise_to_signal=one.noise_to_signal) for one in arms]
    assert sum(read) == pytest.approx(sum(one.share for one in arms))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_beyond_the_study_the_last_measurement_stays(weights: int) -> None:
    for edge, beyond in ((min(NOISES[weights]), 0.0), (max(NOISES[weights]), 1e9)):
        assert share_of_lift(parameters=weights, noise_to_signal=beyond) == share_of_lift(
            parameters=weights, noise_to_signal=edge
        )


def test_arms_of_about_as_many_weights_are_read() -> None:
    for weights in WEIGHTS:
        assert share_of_lift(parameters=round(1.1 * weights), noise_to_signal=5.0) == share_of_lift(
            parameters=weights, noise_to_signal=5.0
        )
