"""The ordered map, also when an item takes its process down or never ends."""

import logging
import operator
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import pytest

from client.cohort import workers
from client.cohort.errors import WorkersError
from client.cohort.workers import CHUNK, CHUNKS_PER_PROCESS, CRASHED, TIMED_OUT, Workers, chunked

_BAD = (3, CHUNK)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes: int) -> None:
    with Workers(processes, items=1) as pool:
        for items in (0, 1, CHUNK, 5 * CHUNK + 1):
            assert list(pool.map(partial(operator.mul, 2), range(items))) == [
                2 * item for item in range(items)
            ]


def test_few_items_need_no_process() -> None:
    with Workers(None, items=3) as pool:
        assert list(pool.map(lambda item: item, [1, 2])) == [1, 2]  # a lambda would not travel


def test_few_items_that_may_end_their_process_get_one_apart() -> None:
    with Workers(None, items=3, apart=True) as pool:
        assert list(pool.map(segfault_on_some, range(5))) == [0, 1, 2, CRASHED, 4]


def test_items_that_kill_their_process_are_alone_in_their_loss() -> None:
    items = list(range(2 * CHUNK))
    with Workers(2, items=len(items)) as pool:
        results = list(pool.map(segfault_on_some, items))
        assert list(pool.map(abs, [-1])) == [1]
    assert results == [CRASHED if item in _BAD else item for item in items]


@pytest.mark.slow
def test_items_that_never_end_cost_themselves_and_their_time_only() -> None:
    items = list(range(2 * CHUNK))
    with Workers(2, items=len(items), seconds_per_file=1.0) as pool:
        results = list(pool.map(sleep_on_some, items))
    assert results == [TIMED_OUT if item in _BAD else item for item in items]


def test_a_slow_reader_of_the_results_is_not_an_item_that_hangs() -> None:
    with Workers(2, items=1, seconds_per_file=0.2) as pool:
        results = []
        for number, result in enumerate(pool.map(abs, range(4 * CHUNK))):
            results.append(result)
            if number % CHUNK == 0:
                time.sleep(0.4)
    assert results == list(range(4 * CHUNK))


def test_no_item_is_lost_when_the_first_is_the_last_to_be_done() -> None:
    """All that is in flight is then done at once, with more to come."""
    items = range(2 * CHUNKS_PER_PROCESS * CHUNK + 3 * CHUNK)
    with Workers(2, items=len(items)) as pool:
        assert list(pool.map(slow_at_zero, items)) == list(items)


def test_items_are_read_only_a_few_chunks_ahead() -> None:
    taken = []

    def endless() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    with Workers(2, items=1) as pool:
        assert list(islice(pool.map(abs, endless()), 3 * CHUNK)) == list(range(3 * CHUNK))
    assert len(taken) <= (3 + 2 * CHUNKS_PER_PROCESS) * CHUNK


def test_an_error_in_the_function_is_raised_and_leaves_a_pool_that_works() -> None:
    with Workers(2, items=1) as pool:
        with pytest.raises(ZeroDivisionError):
            list(pool.map(partial(operator.truediv, 1), [1, 0]))
        assert list(pool.map(partial(operator.truediv, 1), [1, 2])) == [1, 0.5]


def test_processes_that_cannot_start_are_an_error_not_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers(2, items=1) as pool:
        monkeypatch.setattr(workers, "_serve", os.abort)  # what the next processes run
        with pytest.raises(WorkersError, match="died 3 times before it had begun"):
            list(pool.map(segfault_on_some, _BAD))


def test_a_program_that_starts_no_processes_reads_in_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "_serve", os.abort)
    with caplog.at_level(logging.WARNING), Workers(2, items=1) as pool:
        assert list(pool.map(lambda item: item, [1])) == [1]
    assert "do not start from this program" in caplog.text


def test_chunks_hold_every_item_once() -> None:
    assert list(chunked(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunked([], 2)) == []


def segfault_on_some(item: int) -> int:
    if item in _BAD:
        os.kill(os.getpid(), signal.SIGSEGV)
    return item


def slow_at_zero(item: int) -> int:
    if item == 0:
        time.sleep(1.5)
    return item


def sleep_on_some(item: int) -> int:
    while item in _BAD:
        time.sleep(60)
    return item
