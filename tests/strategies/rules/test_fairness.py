import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.rules.fairness import Fairness, LossPower, WorstFirst
from strategies.rules.rule import CannotCombine

losses = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.floats(-2.0, 50.0), min_size=1)


@given(losses, st.floats(0, 5), st.floats(0.1, 100), st.floats(0.1, 100))
def test_weights_are_in_the_ratio_of_the_powers_of_the_losses(
    heard: dict[str, float], power: float, first: float, second: float
) -> None:
    fair = LossPower(power)
    heard = {**heard, "x": 1.0, "y": 3.0}
    fair.hear(heard)
    assert fair.weight("y", second) / fair.weight("x", first) == pytest.approx(3**power * second / first)


def test_power_zero_is_the_plain_mean() -> None:
    fair = LossPower(0.0)
    fair.hear({"a": 1.0, "b": 100.0, "c": -1.0})
    assert [fair.weight(site, 7.0) for site in "abc"] == [7.0, 7.0, 7.0]


def test_a_loss_that_noise_made_negative_counts_next_to_nothing_but_is_no_error() -> None:
    fair = LossPower(1.0)
    fair.hear({"a": 1.0, "b": -0.5})
    assert 0 < fair.weight("b", 1.0) <= 1e-12


def test_a_site_without_a_loss_counts_with_the_mean_of_the_others() -> None:
    fair = LossPower(2.0)
    fair.hear({"a": 1.0, "b": 3.0})
    assert fair.weight("new", 1.0) / fair.weight("a", 1.0) == pytest.approx(4.0)


@pytest.mark.parametrize("heard", [{}, {"a": 0.0, "b": -1.0}])
def test_without_a_positive_loss_weights_stay_as_they_are(heard: dict[str, float]) -> None:
    fair = LossPower(1.0)
    fair.hear(heard)
    assert [fair.weight(site, 2.0) for site in "ab"] == [2.0, 2.0]


def test_a_huge_power_leaves_weights_that_a_rule_accepts() -> None:
    fair = LossPower(500.0)
    fair.hear({"a": 1e-3, "b": 50.0})
    assert fair.weight("a", 1.0) > 0
    assert fair.weight("b", 1.0) == 1.0


@given(st.lists(losses, min_size=1, max_size=4), st.floats(1e-3, 20), st.floats(0, 1))
def test_shares_sum_to_one_and_none_is_below_the_floor(
    rounds: list[dict[str, float]], rate: float, floor: float
) -> None:
    fair = WorstFirst(rate=rate, floor=floor)
    for heard in rounds:
        fair.hear(heard)
    sites = {site for heard in rounds for site in heard}
    last = [fair.weight(site, 1.0) for site in sites]
    assert all(share >= floor / len(sites) * (1 - 1e-9) for share in last)
    if set(rounds[0]) == sites:
        assert sum(last) == pytest.approx(1.0, abs=1e-6)


def test_weight_moves_to_the_site_with_the_largest_loss() -> None:
    fair = WorstFirst(rate=0.5, floor=0.1)
    for _ in range(3):
        fair.hear({"good": 0.2, "bad": 3.0})
    good, bad = fair.weight("good", 1000.0), fair.weight("bad", 1.0)
    assert bad > 0.9
    assert good >= 0.05


def test_the_exponentiated_gradient_is_as_written() -> None:
    fair = WorstFirst(rate=2.0, floor=0.2)
    fair.hear({"a": 1.0, "b": 0.5})
    grown = np.exp([2.0, 1.0])
    expected = 0.8 * grown / grown.sum() + 0.1
    assert [fair.weight(site, 1.0) for site in "ab"] == pytest.approx(expected)


@pytest.mark.parametrize("make", [lambda: LossPower(2.0), lambda: WorstFirst(rate=1.0, floor=0.1)])
def test_restored_it_weighs_as_before(make: "type[Fairness]") -> None:
    fair, later = make(), make()
    fair.hear({"a": 1.0, "b/c": 2.0})
    later.restore(fair.state())
    for each in (fair, later):
        each.hear({"a": 3.0})
    for site in ("a", "b/c", "new"):
        assert fair.weight(site, 3.0) == later.weight(site, 3.0)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_named(loss: float) -> None:
    for fair in (LossPower(1.0), WorstFirst(rate=1.0, floor=0.1)):
        with pytest.raises(CannotCombine, match="released by site 'a' is not finite"):
            fair.hear({"a": loss})


@pytest.mark.parametrize("make", [lambda: LossPower(-1.0), lambda: WorstFirst(rate=0.0, floor=0.1)])
def test_settings_out_of_range_are_refused(make: "type[Fairness]") -> None:
    with pytest.raises(CannotCombine, match="expected"):
        make()


def test_a_floor_above_one_is_refused() -> None:
    with pytest.raises(CannotCombine, match=r"floor=1\.1"):
        WorstFirst(rate=1.0, floor=1.1)
