"""The number a hospital is told: golden rows, exact oracles from both sides, and a check that can fail."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

import privacy.accounting as accounting
from privacy.accounting import (
    PoissonGaussian,
    default_delta,
    epsilon,
    noise_multiplier_for,
    renyi_epsilons,
)
from privacy.errors import AccountantDisagreement, NoiseOutOfRange

# sample rate, steps, noise multiplier, delta, epsilon: privacy-loss distribution at grid 1e-3, which a PRV
# accountant (Opacus) confirmed within its own error of 0.01.
GOLDEN = [
    (0.01, 1_000, 0.6, 1e-5, 7.434),
    (0.01, 1_000, 0.8, 1e-5, 3.141),
    (0.01, 1_000, 0.8, 1e-6, 3.707),
    (0.01, 1_000, 1.0, 1e-5, 1.829),
    (0.01, 1_000, 1.2, 1e-5, 1.300),
    (0.01, 10_000, 0.6, 1e-5, 23.02),
    (0.01, 10_000, 1.0, 1e-5, 6.191),
    (0.01, 10_000, 1.2, 1e-6, 5.022),
    (0.05, 1_000, 0.8, 1e-5, 17.58),
    (0.05, 1_000, 1.2, 1e-5, 7.891),
    (0.1, 1_000, 1.0, 1e-5, 25.21),
    (0.1, 10_000, 0.6, 1e-5, 461.3),
    (0.1, 10_000, 1.2, 1e-5, 87.66),
    (0.01, 2_000, 1.0, 1e-5, 2.585),
]


def mechanism(sample_rate: float = 0.02, noise_multiplier: float = 1.0, steps: int = 100) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


def exact_gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Closed form for the composed Gaussian mechanism: Balle and Wang (2018), arXiv:1805.06530, theorem 8."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(value: float) -> float:
        return float(ndtr(mu / 2 - value / mu) - math.exp(value + log_ndtr(-mu / 2 - value / mu))) - delta

    return float(brentq(excess, 0.0, 1e4)) if excess(0.0) > 0 else 0.0


def exact_single_step_epsilon(sample_rate: float, noise_multiplier: float, delta: float) -> float:
    """Hockey-stick divergence of N(0, s^2) and (1 - q) N(0, s^2) + q N(1, s^2), the larger of both ways."""
    q, s = sample_rate, noise_multiplier

    def crossing(log_ratio: float) -> float:
        return s * s * (log_ratio - math.log(q)) + 0.5 if log_ratio > -math.inf else -math.inf

    def removed(value: float) -> float:  # the mixture exceeds e^value N(0) above x
        x = crossing(math.log(max(math.exp(value) - (1 - q), 1e-300)))
        return float((1 - q) * ndtr(-x / s) + q * ndtr((1 - x) / s) - math.exp(value) * ndtr(-x / s))

    def added(value: float) -> float:  # N(0) exceeds e^value times the mixture below x
        if math.exp(-value) <= 1 - q:
            return 0.0
        x = crossing(math.log(math.exp(-value) - (1 - q)))
        return float(ndtr(x / s) - math.exp(value) * ((1 - q) * ndtr(x / s) + q * ndtr((x - 1) / s)))

    def excess(value: float) -> float:
        return max(removed(value), added(value)) - delta

    return float(brentq(excess, 0.0, 50.0)) if excess(0.0) > 0 else 0.0


@pytest.mark.parametrize(("sample_rate", "steps", "noise_multiplier", "delta", "expected"), GOLDEN)
def test_published_rows_are_met_to_half_a_percent(
    sample_rate: float, steps: int, noise_multiplier: float, delta: float, expected: float
) -> None:
    event = mechanism(sample_rate, noise_multiplier, steps)
    assert epsilon([event], delta=delta) == pytest.approx(expected, rel=5e-3)


# sample rate, steps, noise multiplier, delta, epsilon by Google's RDP accountant and by Opacus', at the
# orders that either takes by itself.
@pytest.mark.parametrize(
    ("sample_rate", "steps", "noise_multiplier", "delta", "google", "opacus"),
    [
        (0.01, 1_000, 0.6, 1e-5, 8.68, 8.67),
        (0.01, 1_000, 0.8, 1e-6, 4.29, 4.29),
        (0.01, 10_000, 1.0, 1e-5, 6.71, 6.71),
        (0.05, 1_000, 1.2, 1e-5, 8.60, 8.59),
        (0.1, 1_000, 1.0, 1e-5, 27.2, 27.2),
    ],
)
def test_renyi_accountants_meet_their_golden_rows_above_the_promise(
    sample_rate: float, steps: int, noise_multiplier: float, delta: float, google: float, opacus: float
) -> None:
    event = mechanism(sample_rate, noise_multiplier, steps)
    found = renyi_epsilons([event], delta=delta)
    assert 0.998 * google <= found["Google RDP"] <= 1.05 * google  # integer orders: a little looser
    assert found["Opacus RDP"] == pytest.approx(opacus, rel=5e-3)
    assert epsilon([event], delta=delta) < min(found.values())


def test_no_events_cost_nothing_by_renyi_either() -> None:
    assert set(renyi_epsilons([], delta=1e-5).values()) == {0.0}
    with pytest.raises(ValueError, match="delta"):
        renyi_epsilons([], delta=0.0)


@pytest.mark.parametrize(
    ("noise_multiplier", "steps"), [(0.5, 1), (1.0, 1), (5.0, 100), (30.0, 1_000), (0.3, 4)]
)
@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-8])
def test_plain_gaussian_is_never_below_the_closed_form_and_within_a_thousandth_of_it(
    noise_multiplier: float, steps: int, delta: float
) -> None:
    exact = exact_gaussian_epsilon(noise_multiplier, steps, delta)
    ours = epsilon([mechanism(1.0, noise_multiplier, steps)], delta=delta)
    assert exact <= ours <= exact * 1.001


@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-10])
def test_rounding_in_the_fourier_transform_never_pushes_epsilon_below_the_closed_form(delta: float) -> None:
    almost_everyone = mechanism(1 - 1e-15, 30.0, 1_000)  # sampled as far as the code is concerned
    assert exact_gaussian_epsilon(30.0, 1_000, delta) <= epsilon([almost_everyone], delta=delta)


@pytest.mark.parametrize("sample_rate", [0.001, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("noise_multiplier", [0.4, 0.7, 1.0, 3.0])
def test_one_sampled_step_is_never_below_its_hockey_stick_divergence(
    sample_rate: float, noise_multiplier: float
) -> None:
    exact = exact_single_step_epsilon(sample_rate, noise_multiplier, 1e-5)
    ours = epsilon([mechanism(sample_rate, noise_multiplier, 1)], delta=1e-5)
    assert exact <= ours <= exact * 1.002 + 1e-3


def test_no_events_cost_nothing() -> None:
    assert epsilon([], delta=1e-5) == 0.0


def test_noise_without_end_costs_next_to_nothing() -> None:
    assert epsilon([mechanism(0.01, 1e6, 1)], delta=1e-5) <= 2e-4


def test_a_renyi_accountant_that_rounds_to_zero_does_not_drag_epsilon_below_the_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounting, "_google_rdp_epsilon", lambda *_: 0.0)
    exact = exact_gaussian_epsilon(1e5, 1, 1e-7)
    assert 0 < exact <= epsilon([mechanism(1.0, 1e5, 1)], delta=1e-7)


def test_a_group_of_equal_events_costs_what_one_merged_event_costs() -> None:
    rounds = [mechanism(steps=100) for _ in range(20)]
    assert epsilon(rounds, delta=1e-5) == epsilon([mechanism(steps=2_000)], delta=1e-5)


def test_the_order_of_events_is_immaterial() -> None:
    events = [mechanism(steps=100), mechanism(1.0, 20.0, 1), mechanism(steps=50)]
    assert epsilon(events, delta=1e-5) == epsilon(reversed(events), delta=1e-5)


def test_different_mechanisms_compose_to_less_than_the_sum_of_their_costs() -> None:
    training, prototypes = mechanism(0.02, 0.9, 2_000), mechanism(1.0, 20.1, 1)
    together = epsilon([training, prototypes], delta=1e-5)
    assert together == pytest.approx(6.982, rel=5e-3)
    assert together < epsilon([training], delta=1e-5) + epsilon([prototypes], delta=1e-5)


@settings(max_examples=5, deadline=None)
@given(
    sample_rate=st.sampled_from([1e-4, 1e-3, 0.02, 0.3, 1.0]),
    noise_multiplier=st.sampled_from([0.8, 1.0, 3.0, 30.0]),
    steps=st.sampled_from([1, 10, 1_000]),
)
def test_more_steps_or_a_smaller_delta_cost_more_and_more_noise_costs_less(
    sample_rate: float, noise_multiplier: float, steps: int
) -> None:
    base = epsilon([mechanism(sample_rate, noise_multiplier, steps)], delta=1e-6)
    slack = 1e-6 * base + 1e-9
    assert epsilon([mechanism(sample_rate, noise_multiplier, 2 * steps)], delta=1e-6) >= base - slack
    assert epsilon([mechanism(sample_rate, noise_multiplier, steps)], delta=1e-7) >= base - slack
    assert epsilon([mechanism(sample_rate, 1.1 * noise_multiplier, steps)], delta=1e-6) <= base + slack
    extra = mechanism(0.01, 1.0, 1)
    assert epsilon([mechanism(sample_rate, noise_multiplier, steps), extra], delta=1e-6) >= base - slack


@pytest.mark.parametrize("noise_multiplier", [1e-3, 0.1, 0.2])
def test_a_ruinous_mechanism_is_answered_with_a_large_number_in_little_time(noise_multiplier: float) -> None:
    started = time.process_time()
    assert epsilon([mechanism(0.5, noise_multiplier, 100_000)], delta=1e-5) > 1_000
    assert time.process_time() - started < 50


@pytest.fixture
def one_finer_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finest grids only take time where the answer is no."""
    monkeypatch.setattr(accounting, "_FINER_GRIDS", (1e-4,))


@pytest.mark.usefixtures("one_finer_grid")
def test_a_distribution_above_renyi_on_every_grid_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = accounting._pld_epsilon
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *args, grid: 1.5 * honest(*args, grid=grid))
    with pytest.raises(AccountantDisagreement, match="no epsilon can be claimed"):
        epsilon([mechanism(0.001, 3.0, 10_001)], delta=1e-5)


@pytest.mark.usefixtures("one_finer_grid")
@pytest.mark.parametrize("accountant", ["_google_rdp_epsilon", "_opacus_rdp_epsilon"])
def test_either_renyi_accountant_below_the_distribution_is_a_disagreement(
    monkeypatch: pytest.MonkeyPatch, accountant: str
) -> None:
    monkeypatch.setattr(accounting, accountant, lambda *_: 0.05)
    with pytest.raises(AccountantDisagreement, match=r"0\.05"):
        epsilon([mechanism(0.001, 3.0, 10_002)], delta=1e-5)


def test_a_distribution_that_is_not_a_number_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *_, grid: math.nan)
    with pytest.raises(AccountantDisagreement, match="nan"):
        epsilon([mechanism(0.001, 3.0, 10_003)], delta=1e-5)


def test_thousands_of_tiny_steps_are_no_disagreement_though_the_grid_is_coarse_for_them() -> None:
    event = mechanism(0.001, 3.0, 10_000)
    ours = epsilon([event], delta=1e-5)
    finest = accounting._pld_epsilon((event,), 1e-5, grid=1e-5)
    assert finest <= ours < 1.4 * finest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_rate": 0.0}, r"expected sample_rate=0\.0 in \(0, 1\]"),
        ({"sample_rate": 1.001}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"noise_multiplier": 0.0}, r"expected noise_multiplier=0\.0 > 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"steps": 0}, "expected steps=0 to be an integer >= 1"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
    ],
)
def test_a_mechanism_out_of_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoissonGaussian(**{"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([], delta=delta)


def test_a_delta_that_double_precision_cannot_resolve_is_refused() -> None:
    with pytest.raises(ValueError, match="too small for steps=1000000"):
        epsilon([mechanism(steps=1_000_000)], delta=1e-10)


def test_calibration_meets_the_reference() -> None:
    found = noise_multiplier_for(epsilon=8.0, delta=1e-5, sample_rate=0.02, steps=2_000)
    assert found == pytest.approx(0.8465, rel=1e-3)


@settings(max_examples=2, deadline=None)
@given(
    target=st.floats(0.3, 10.0),
    sample_rate=st.sampled_from([0.005, 0.05]),
    steps=st.sampled_from([37, 900]),
)
def test_calibrated_noise_keeps_its_claim_and_a_little_less_breaks_it(
    target: float, sample_rate: float, steps: int
) -> None:
    found = noise_multiplier_for(epsilon=target, delta=1e-5, sample_rate=sample_rate, steps=steps)
    assert epsilon([mechanism(sample_rate, found, steps)], delta=1e-5) <= target
    if found > 0.1:
        assert epsilon([mechanism(sample_rate, found / 1.0011, steps)], delta=1e-5) > target


def test_the_least_noise_offered_is_a_tenth() -> None:
    assert noise_multiplier_for(epsilon=100.0, delta=1e-5, sample_rate=0.001, steps=1) == 0.1


def test_an_impossible_target_is_refused_with_the_remedy() -> None:
    with pytest.raises(NoiseOutOfRange, match="fewer steps"):
        noise_multiplier_for(epsilon=0.01, delta=1e-6, sample_rate=1.0, steps=10_000)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_target_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="expected epsilon="):
        noise_multiplier_for(epsilon=target, delta=1e-5, sample_rate=0.1, steps=1)


@pytest.mark.parametrize(
    ("patients", "delta"),
    [
        (1, 1e-1),
        (10, 1e-2),
        (11, 1e-3),
        (100, 1e-3),
        (300, 1e-4),
        (1_000, 1e-4),
        (1_001, 1e-5),
        (10**6, 1e-7),
    ],
)
def test_default_delta_is_a_power_of_ten_at_most_a_tenth_per_patient(patients: int, delta: float) -> None:
    assert default_delta(patients) == delta
    assert delta * 10 * patients <= 1 + 1e-12


def test_a_cohort_of_nobody_has_no_delta() -> None:
    with pytest.raises(ValueError, match="patients_declared=0"):
        default_delta(0)
