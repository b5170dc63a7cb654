from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.messages import MessageError
from strategies.rules.mean import Mean
from strategies.rules.norm_bound import MedianNormBound, NormBound
from strategies.rules.rule import CannotCombine
from strategies.rules.spill import norm
from tests.strategies.updates import Round, drawn, one, room, rounds, zeros


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.99, 1.0, 1.001, 4.0, 1e30]), st.floats(1e-3, 1e3))
def test_one_site_moves_the_result_by_no_more_than_its_share_of_the_bound(
    seed: int, ratio: float, bound: float
) -> None:
    update, other = drawn(seed, 2)
    scale = np.float32(ratio * bound / norm(update))
    with room() as folder:
        rule = NormBound(zeros(update), folder=folder, bound=bound)
        rule.fold("x", {name: scale * value for name, value in update.items()}, 3.0)
        rule.fold("y", zeros(other), 1.0)
        length = norm(rule.result())
    assert length <= 0.75 * bound * (1 + 1e-6)
    assert length == pytest.approx(0.75 * bound * min(1.0, ratio), rel=1e-5)


@given(rounds())
def test_a_bound_that_nobody_reaches_is_the_mean(case: Round) -> None:
    like, updates = case
    with room() as folder:
        bounded, mean = NormBound(like, folder=folder, bound=1e9), Mean(like, folder=folder)
        for update, weight in updates:
            bounded.fold("x", update, weight)
            mean.fold("x", update, weight)
        for name, value in mean.result().items():
            np.testing.assert_array_equal(bounded.result()[name], value)


def test_without_a_bound_the_round_s_own_median_norm_is_taken(tmp_path: Path) -> None:
    rule = MedianNormBound(one(0.0), folder=tmp_path)
    for value in (1.0, -2.0, 1000.0):
        rule.fold("x", one(value), 1)
    assert rule.result()["a"] == pytest.approx((1 - 2 + 2) / 3)


def test_the_median_s_bound_weighs_updates_too(tmp_path: Path) -> None:
    rule = MedianNormBound(one(0.0), folder=tmp_path)
    for value, weight in ((1.0, 1.0), (2.0, 2.0), (1000.0, 5.0)):
        rule.fold("x", one(value), weight)
    assert rule.result()["a"] == pytest.approx((1 + 4 + 10) / 8)


def test_updates_of_zero_stay_zero(tmp_path: Path) -> None:
    for rule in (NormBound(one(0.0), folder=tmp_path, bound=1.0), MedianNormBound(one(0.0), folder=tmp_path)):
        rule.fold("x", one(0.0), 1)
        rule.fold("y", one(0.0), 1)
        assert rule.result()["a"] == 0.0


def test_what_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    for rule in (NormBound(one(0.0), folder=tmp_path, bound=9.0), MedianNormBound(one(0.0), folder=tmp_path)):
        rule.fold("x", one(1.0), 1)
        with pytest.raises(MessageError, match="not finite"):
            rule.fold("y", one(np.inf), 1)
        with pytest.raises(CannotCombine, match="positive and finite"):
            rule.fold("y", one(5.0), np.nan)
        assert rule.result()["a"] == 1.0


def test_a_mean_of_nothing_is_an_error(tmp_path: Path) -> None:
    for rule in (NormBound(one(0.0), folder=tmp_path, bound=1.0), MedianNormBound(one(0.0), folder=tmp_path)):
        with pytest.raises(CannotCombine, match="nothing to average"):
            rule.result()


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_that_is_none_is_refused(bound: float, tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="positive and finite"):
        NormBound(one(0.0), folder=tmp_path, bound=bound)
