from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy.accounting import PoissonGaussian, epsilon
from privacy.noise import GaussianNoise, os_generator
from strategies.hospital_dp import HospitalDp, HospitalMean
from strategies.messages import Arrays, MessageError
from strategies.rules.rule import CannotCombine
from strategies.rules.spill import norm
from tests.strategies.updates import drawn, one, room, zeros


class NoNoise(GaussianNoise):
    """What is left is the sum."""

    def __init__(self) -> None:
        super().__init__(insecure_seed=0)

    def draw(self, shape, *, stddev):  # type: ignore[no-untyped-def]
        return super().draw(shape, stddev=0.0)


def mechanism(**changes: float) -> HospitalDp:
    values = {"max_update_norm": 1.0, "noise_multiplier": 2.0, "hospitals": 5, "rounds": 10, **changes}
    return HospitalDp(**values)  # type: ignore[arg-type]


def summed(updates: list[Arrays], folder: Path, bound: float) -> Arrays:
    """The sum without noise: the divisor is one."""
    rule = HospitalMean(
        zeros(drawn(0, 1)[0]),
        folder=folder,
        mechanism=mechanism(max_update_norm=bound, hospitals=1),
        noise=NoNoise(),
    )
    for number, update in enumerate(updates):
        rule.fold(f"site-{number}", update, 10.0**number)
    return rule.result()


@given(
    st.integers(0, 2**32),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.5, 0.99, 1.0, 1.001, 1.05, 4.0, 1e30]),
    st.floats(1e-3, 1e3),
)
def test_one_hospital_moves_the_sum_by_at_most_the_sensitivity(
    seed: int, others: int, ratio: float, bound: float
) -> None:
    update, *rest = drawn(seed, others + 1)
    scale = np.float32(ratio * bound / norm(update))
    added = {name: scale * value for name, value in update.items()}
    with room() as folder:
        without, with_it = summed(rest, folder, bound), summed([*rest, added], folder, bound)
    moved = {name: with_it[name].astype(np.float64) - without[name] for name in with_it}
    # What float32 rounds off the two sums, which the noise hides, comes on top.
    slack = 1e-6 * bound * (others + 1)
    assert norm(moved) <= mechanism(max_update_norm=bound).sensitivity + slack
    assert norm(moved) == pytest.approx(bound * min(1.0, ratio), rel=1e-4, abs=slack)


@pytest.mark.parametrize(("times", "accepted"), [(1.0, True), (2 / 3, False), (1.5, False)])
def test_the_noise_has_the_stated_scale_on_every_array(times: float, accepted: bool, tmp_path: Path) -> None:
    plan = mechanism(max_update_norm=0.5, noise_multiplier=3.0, hospitals=4)
    like = {"a": np.zeros(3000, np.float32), "b": np.zeros((50, 40), np.float32)}
    rule = HospitalMean(like, folder=tmp_path, mechanism=plan, noise=GaussianNoise(insecure_seed=7))
    for value in rule.result().values():
        standard = value.ravel() * plan.divisor / (times * plan.noise_std)
        assert (stats.kstest(standard, "norm").pvalue > 1e-3) == accepted


def test_successive_rounds_have_independent_noise(tmp_path: Path) -> None:
    noise, like = GaussianNoise(insecure_seed=1), {"a": np.zeros(20000, np.float32)}
    first, second = (
        HospitalMean(like, folder=tmp_path, mechanism=mechanism(), noise=noise).result()["a"]
        for _ in range(2)
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_a_round_that_nobody_answered_still_releases_noise(tmp_path: Path) -> None:
    rule = HospitalMean(one(0.0), folder=tmp_path, mechanism=mechanism(), noise=GaussianNoise())
    assert rule.result()["a"] != 0.0


def test_the_divisor_does_not_depend_on_who_answered(tmp_path: Path) -> None:
    for answered in (1, 3):
        rule = HospitalMean(one(0.0), folder=tmp_path, mechanism=mechanism(hospitals=8), noise=NoNoise())
        for number in range(answered):
            rule.fold(f"site-{number}", one(0.8), 1.0)
        assert rule.result()["a"] == pytest.approx(0.8 * answered / 8)


def test_a_second_update_of_a_hospital_is_refused_without_a_trace(tmp_path: Path) -> None:
    rule = HospitalMean(one(0.0), folder=tmp_path, mechanism=mechanism(hospitals=1), noise=NoNoise())
    rule.fold("x", one(0.5), 1.0)
    with pytest.raises(CannotCombine, match="two updates of site 'x'"):
        rule.fold("x", one(0.5), 1.0)
    with pytest.raises(MessageError, match="not finite"):
        rule.fold("y", one(np.nan), 1.0)
    assert rule.result()["a"] == 0.5


def test_the_sum_is_released_once(tmp_path: Path) -> None:
    rule = HospitalMean(one(0.0), folder=tmp_path, mechanism=mechanism(), noise=GaussianNoise())
    rule.result()
    with pytest.raises(CannotCombine, match="was released"):
        rule.result()
    with pytest.raises(CannotCombine, match="was released"):
        rule.fold("x", one(0.5), 1.0)


def test_it_says_what_it_protects_and_what_it_costs() -> None:
    plan = mechanism(noise_multiplier=4.0, rounds=30, sample_rate=0.5)
    event = PoissonGaussian(sample_rate=0.5, noise_multiplier=4.0, steps=30)
    assert (plan.unit, plan.adjacency, plan.sampler, plan.sensitivity) == (
        "hospital",
        "add_remove",
        "poisson",
        1.0,
    )
    assert plan.event == event
    assert plan.noise_std == 4.0
    assert plan.divisor == 2.5
    assert plan.epsilon(delta=1e-2) == epsilon([event], delta=1e-2)


def test_hospitals_join_independently_at_the_stated_rate() -> None:
    plan, sampling = mechanism(sample_rate=0.3), np.random.default_rng(0)
    sites = [f"site-{number}" for number in range(10)]
    joined = np.array(
        [[site in drawn_now for site in sites] for drawn_now in _draws(plan, sites, sampling, 4000)]
    )
    assert np.abs(joined.mean(axis=0) - 0.3).max() < 0.03
    assert np.abs(np.corrcoef(joined.T) - np.eye(10)).max() < 0.07
    assert mechanism().drawn(sites, os_generator()) == sites
    assert mechanism(sample_rate=0.5).drawn([], os_generator()) == []


def _draws(plan: HospitalDp, sites: list[str], sampling: np.random.Generator, count: int) -> list[list[str]]:
    return [plan.drawn(sites, sampling) for _ in range(count)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_update_norm": 0.0}, "max_update_norm"),
        ({"max_update_norm": np.nan}, "max_update_norm"),
        ({"hospitals": 0}, "hospitals"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"sample_rate": 1.1}, "sample_rate"),
        ({"rounds": 0}, "steps"),
    ],
)
def test_constants_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mechanism(**changes)
