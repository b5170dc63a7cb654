"""The ordered map, also when an item takes its process down."""

import operator
import os
from functools import partial

import pytest

from client.cohort.workers import CHUNK, CRASHED, Workers

_LETHAL = 3


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("items", [0, 1, 5 * CHUNK + 1])
def test_results_come_in_order(count: int, items: int) -> None:
    with Workers(count, items=items) as pool:
        assert list(pool.map(partial(operator.mul, 2), range(items))) == [2 * item for item in range(items)]


def test_few_items_need_no_process() -> None:
    with Workers(None, items=3) as pool:
        assert list(pool.map(lambda item: item, [1, 2])) == [1, 2]  # a lambda would not travel


def test_an_item_that_kills_its_process_is_alone_in_its_loss() -> None:
    items = list(range(2 * CHUNK))
    with Workers(2, items=len(items)) as pool:
        results = list(pool.map(exit_on_three, items))
    assert results == [CRASHED if item == _LETHAL else item for item in items]


def test_an_error_in_the_function_is_raised() -> None:
    with Workers(2, items=1) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(partial(operator.truediv, 1), [1, 0]))


def exit_on_three(item: int) -> int:
    if item == _LETHAL:
        os._exit(1)
    return item
