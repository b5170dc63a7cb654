"""An ordered map over processes that a crashing item cannot stop."""

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
CRASHED = Rejected(State.QUARANTINED, Code.E_CRASHED)


class Workers:
    """Processes that live as long as the ``with`` block; a count of 1 means this process.

    Processes are spawned, never forked: the caller may hold threads (gRPC, torch) that a fork would break.
    """

    def __init__(self, count: int | None, *, items: int) -> None:
        """Use ``count`` processes, or one per core where there are enough ``items`` to pay for them."""
        automatic = len(os.sched_getaffinity(0)) if items >= MIN_ITEMS else 1
        self._count = automatic if count is None else count
        self._pool = self._start(self._count) if self._count > 1 else None

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
                pool = self._pool = self._start(self._count)
                # Every chunk in flight failed with the pool; only one of them is to blame.
                suspects = [chunk, *(other for other, _ in flying)]
                flying.clear()
                for suspect in suspects:
                    yield from self._alone(function, suspect)

    def _alone(self, function: Callable[[T], R], chunk: Sequence[T]) -> list[R | Rejected]:
        """Run a suspect chunk in a process of its own, halving it until the culprit is left."""
        with self._start(1) as pool:
            try:
                return list(pool.submit(_apply, function, chunk).result())
            except BrokenProcessPool:
                if len(chunk) == 1:
                    return [CRASHED]
        half = len(chunk) // 2
        return [*self._alone(function, chunk[:half]), *self._alone(function, chunk[half:])]

    @staticmethod
    def _start(count: int) -> ProcessPoolExecutor:
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
