"""An ordered map over processes that a crashing item cannot stop."""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from client.cohort.outcomes import Code, Rejected, State
from client.cohort.sources import R, T

CHUNK = 32  # results of one chunk wait in memory: 1.6 MB of packed images at 224 pixels
MIN_ITEMS = 256  # below this, starting processes costs more than they save
logger = logging.getLogger(f"clipward.{__name__}")

CRASHED = Rejected(State.QUARANTINED, Code.E_CRASHED)


class Workers:
    """Processes that live as long as the ``with`` block; a count of 1 means this process.

    Processes are spawned, never forked: the caller may hold threads (gRPC, torch) that a fork would break.
    """

    def __init__(self, count: int | None, *, items: int) -> None:
        """Use ``count`` processes, or one per core where there are enough ``items`` to pay for them."""
        automatic = len(os.sched_getaffinity(0)) if items >= MIN_ITEMS else 1
        self._count = automatic if count is None else count
        self._pool = _started(self._count) if self._count > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R | Rejected]:
        """Yield ``function(item)`` in order; ``CRASHED`` for an item that takes its process down.

        At most a few chunks are in flight, so memory does not grow with the number of items.
        """
        pool = self._pool
        if pool is None:
            yield from map(function, items)
            return
        waiting = deque(items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
        flying: deque[tuple[Sequence[T], Future[list[R]]]] = deque()
        while waiting or flying:
            while waiting and len(flying) < 2 * self._count:
                flying.append((waiting[0], _submit(pool, function, waiting.popleft())))
            chunk, future = flying.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = self._pool = _pool(self._count)
                # Every chunk in flight failed with the pool; only one item in them is to blame.
                suspects = [*chunk, *(item for other, _ in flying for item in other)]
                flying.clear()
                yield from _one_by_one(function, suspects)


def _one_by_one(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R | Rejected]:
    waiting = deque(items)
    while waiting:
        with _pool(1) as pool:
            try:
                while waiting:
                    yield pool.submit(function, waiting[0]).result()
                    waiting.popleft()
            except BrokenProcessPool:
                waiting.popleft()
                yield CRASHED


def _started(count: int) -> ProcessPoolExecutor | None:
    """Return a pool that works, or None: a caller's script without a main guard starts no processes."""
    pool = _pool(count)
    try:
        pool.submit(_apply, str, ()).result()
    except BrokenProcessPool:
        logger.warning("worker processes do not start from this program; reading in one process")
        pool.shutdown()
        return None
    return pool


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _apply(function: Callable[[T], R], chunk: Sequence[T]) -> list[R]:
    return [function(item) for item in chunk]


def _submit(pool: ProcessPoolExecutor, function: Callable[[T], R], chunk: Sequence[T]) -> Future[list[R]]:
    try:
        return pool.submit(_apply, function, chunk)
    except BrokenProcessPool as broken:  # told when its turn comes, like the chunks before it
        future: Future[list[R]] = Future()
        future.set_exception(broken)
        return future
