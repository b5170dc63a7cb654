import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.improvement import Improvement

VALUES = st.lists(st.floats(0, 1), max_size=12)


def seen(values: list[float], *, stop_after: int = 0) -> Improvement:
    improvement = Improvement("zero_shot.macro_auroc", stop_after=stop_after)
    for server_round, value in enumerate(values):
        improvement.see(server_round, {"zero_shot": {"macro_auroc": value}})
    return improvement


@given(values=VALUES)
def test_the_best_is_the_earliest_of_the_largest(values: list[float]) -> None:
    best = (values.index(max(values)), max(values)) if values else None
    assert seen(values).best == best


@given(values=VALUES, stop_after=st.integers(1, 5))
def test_it_is_over_after_so_many_evaluations_without_a_better_one(
    values: list[float], stop_after: int
) -> None:
    since = len(values) - 1 - values.index(max(values)) if values else 0
    assert seen(values, stop_after=stop_after).is_over == (since >= stop_after)


@given(values=VALUES, stop_after=st.integers(0, 5))
def test_written_down_and_read_again_it_says_the_same(values: list[float], stop_after: int) -> None:
    before = seen(values, stop_after=stop_after)
    after = Improvement.parse(before.metric, stop_after=stop_after, values=before.as_json())
    assert (after.best, after.is_over, after.as_json()) == (before.best, before.is_over, before.as_json())


def test_nothing_is_ever_over_when_nobody_asked_for_it() -> None:
    assert not seen([0.9, 0.1, 0.1, 0.1]).is_over


def test_equal_is_not_better() -> None:
    assert seen([0.5, 0.5], stop_after=1).is_over


@pytest.mark.parametrize(
    "evaluation",
    [{}, {"zero_shot": None}, {"zero_shot": {"macro_auroc": None}}, {"zero_shot": {"macro_auroc": math.nan}}],
)
def test_an_evaluation_without_the_metric_counts_for_nothing(evaluation: dict[str, Any]) -> None:
    improvement = seen([0.5], stop_after=1)
    improvement.see(1, evaluation)
    assert improvement.best == (0, 0.5)
    assert not improvement.is_over


def test_an_evaluation_that_is_repeated_counts_once() -> None:
    improvement = seen([0.5, 0.4], stop_after=2)
    improvement.see(1, {"zero_shot": {"macro_auroc": 0.4}})
    assert not improvement.is_over
