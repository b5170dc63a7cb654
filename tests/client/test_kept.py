"""What is kept for many sites is bounded in bytes."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.kept import Kept, held_bytes, kept

Calls = list[int]


def arrays(most_bytes: int, calls: Calls) -> Kept[[int], np.ndarray]:
    @kept(most_bytes=most_bytes)
    def make(size: int) -> np.ndarray:
        calls.append(size)
        return np.zeros(size, dtype=np.uint8)

    return make


@given(asked=st.lists(st.integers(0, 12), max_size=30), most=st.integers(0, 30))
def test_earlier_results_never_hold_more_than_allowed_and_the_newest_is_kept(
    asked: list[int], most: int
) -> None:
    calls: Calls = []
    make = arrays(most, calls)
    for size in asked:
        assert make(size).nbytes == size
        made = len(calls)
        assert make(size).nbytes == size
        assert len(calls) == made
        assert make.cache_info().held_bytes - size <= most


def test_the_one_used_longest_ago_goes_first() -> None:
    calls: Calls = []
    make = arrays(9, calls)
    for size in (4, 5, 4, 3, 2):
        make(size)
    assert calls == [4, 5, 3, 2]
    for size in (2, 3, 4):
        make(size)
    assert calls == [4, 5, 3, 2]
    make(5)
    assert calls == [4, 5, 3, 2, 5]
    assert make.cache_info()[:2] == (4, 5)


def test_what_grew_after_it_was_returned_is_counted() -> None:
    make: Kept[[int], dict[str, np.ndarray]] = Kept(lambda site: {}, most_bytes=10)
    for site in range(4):
        state = make(site)
        assert state == {}
        state["mean"] = np.zeros(6, dtype=np.uint8)
    assert make.cache_info()[2:] == (12, 2)
    assert make(3)["mean"].nbytes == 6
    assert make(0) == {}


def test_the_log_says_once_that_something_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    make: Kept[[int], np.ndarray] = Kept(np.zeros, most_bytes=10, told="a site begins anew")
    with caplog.at_level(logging.WARNING, logger="clipward"):
        for size in (5, 6, 7, 8):
            make(size)
    assert [record.message for record in caplog.records] == [
        "a site begins anew: those of all sites together pass 10 bytes"
    ]


def test_nothing_is_left_after_clearing() -> None:
    calls: Calls = []
    make = arrays(100, calls)
    make(3)
    make.cache_clear()
    assert make.cache_info().entries == 0
    make(3)
    assert calls == [3, 3]


def test_a_failure_is_not_remembered() -> None:
    failing = [True]

    def once(site: int) -> int:
        if failing.pop() if failing else False:
            raise ConnectionError
        return site

    make = Kept(once, most_bytes=1)
    with pytest.raises(ConnectionError):
        make(1)
    assert make(1) == 1


def test_bytes_are_found_wherever_they_lie() -> None:
    @dataclass(frozen=True)
    class Site:
        texts: list[str]
        state: dict[str, object]

    state = {"mean": torch.zeros(3), "step": 7, "of": (np.zeros(2), None)}
    assert held_bytes(Site(texts=["ab", "c"], state=state)) == 3 + 12 + 16
