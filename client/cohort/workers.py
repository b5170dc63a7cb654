"""An ordered map over processes that neither a crashing nor a hanging item can stop."""

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

from client.cohort.errors import WorkersError
from client.cohort.outcomes import Code, Rejected, State
from client.cohort.sources import R, T

CHUNK = 32  # results of one chunk wait in memory: 1.6 MB of packed images at 224 pixels
CHUNKS_PER_PROCESS = 4  # in flight: what the others may do while one item takes its time
MIN_ITEMS = 256  # below this, starting processes costs more than they save
SECONDS_PER_FILE = 60.0  # the largest JPEG 2000 mammogram takes two
MOST_FAILED_STARTS = 3
logger = logging.getLogger(f"clipward.{__name__}")

CRASHED = Rejected(State.QUARANTINED, Code.E_CRASHED)
TIMED_OUT = Rejected(State.QUARANTINED, Code.E_TIMEOUT)

_BEGUN = "begun"


class Workers:
    """Processes that live as long as the ``with`` block; a count of 1 means this process.

    Processes are spawned, never forked: the caller may hold threads (gRPC, torch) that a fork would break.
    Only a process beside this one can be killed, so only there an item's crash or time limit is survived.
    """

    def __init__(
        self,
        count: int | None,
        *,
        items: int,
        apart: bool = False,
        seconds_per_file: float = SECONDS_PER_FILE,
    ) -> None:
        """Use ``count`` processes, or one per core, two at least, where there are ``items`` to pay for them.

        Args:
            count: Processes; None chooses.
            items: How many calls there will be, about.
            apart: Whether few items are worth one process beside this one too: they may take theirs down.
            seconds_per_file: Wall time after which a call is given up.
        """
        beside = 0 if count == 1 else count
        if beside is None:
            beside = max(2, len(os.sched_getaffinity(0))) if items >= MIN_ITEMS else int(apart)
        self._limit = seconds_per_file
        self._processes = _started(beside)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._processes:
            self._processes.pop().stop()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R | Rejected]:
        """Yield ``function(item)`` in order; ``CRASHED`` or ``TIMED_OUT`` for an item that costs its process.

        At most a few chunks are in flight, so memory does not grow with the number of items, and ``items`` is
        read only as far ahead.

        Raises:
            WorkersError: Processes die before they are given anything to do.
        """
        if not self._processes:
            yield from map(function, items)
            return
        flying: deque[_Chunk] = deque()
        waiting: deque[_Chunk] = deque()
        chunks = chunked(items, CHUNK)
        try:
            while True:
                room = CHUNKS_PER_PROCESS * len(self._processes) - len(flying)
                fresh = [_Chunk(function, items) for items in islice(chunks, room)]
                flying.extend(fresh)
                waiting.extend(fresh)
                for process in self._processes:
                    if process.chunk is None and waiting:
                        process.give(waiting.popleft())
                while flying and flying[0].is_done:
                    yield from flying.popleft().results
                if flying:
                    self._listen()
                elif room and not fresh:  # without room nobody has asked whether there is more
                    return
        finally:  # the caller may not want the rest, or a call has raised
            for process in self._processes:
                process.forget()

    def _listen(self) -> None:
        """Wait for the next result, or for the moment the slowest call is given up."""
        busy = {process.connection: process for process in self._processes if process.chunk is not None}
        ends = [process.since + self._limit for process in busy.values() if process.has_begun]
        timeout = max(0.0, min(ends) - time.monotonic()) if ends else None
        heard = wait(list(busy), timeout)
        for connection, process in busy.items():
            if connection in heard:
                process.receive()
            elif process.has_begun and not heard and time.monotonic() >= process.since + self._limit:
                process.give_up(TIMED_OUT)


@dataclass(eq=False)
class _Chunk:
    """A few calls and the results there are so far."""

    function: Callable[[Any], Any]
    items: list[Any]
    results: list[Any] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.results) == len(self.items)


class _Process:
    """One process, and what it is busy with. It starts anew when it is killed."""

    connection: Connection
    since: float

    def __init__(self) -> None:
        self.chunk: _Chunk | None = None
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        if self.chunk is not None:
            self.give(self.chunk)

    def give(self, chunk: _Chunk) -> None:
        """Send what is left of ``chunk``; the clock starts once the process has imported what that needs."""
        self.chunk, self.has_begun = chunk, False
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which ``receive`` finds out
            self.connection.send((chunk.function, chunk.items[len(chunk.results) :]))

    def receive(self) -> None:
        """Take one result in, or find the process dead.

        Raises:
            Exception: What the call has raised.
            WorkersError: The process dies whenever it is started.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            if self.has_begun:
                self.give_up(CRASHED)
            else:
                self._start_again()
            return
        self.since = time.monotonic()
        if message == _BEGUN:
            self.has_begun, self._failed_starts = True, 0
        elif isinstance(message, _Raised):
            raise message.error
        else:
            self._take(message.value)

    def _take(self, result: Any) -> None:
        if self.chunk is not None:
            self.chunk.results.append(result)
            if self.chunk.is_done:
                self.chunk = None

    def give_up(self, rejected: Rejected) -> None:
        """Kill the process, put ``rejected`` in the place of its result, and go on with the next item."""
        self._take(rejected)
        self.stop()
        self._start()

    def forget(self) -> None:
        """Kill the process if it is busy with what nobody wants any more."""
        if self.chunk is not None:
            self.chunk = None
            self.stop()
            self._start()

    def _start_again(self) -> None:
        self._failed_starts += 1
        if self._failed_starts == MOST_FAILED_STARTS:
            raise WorkersError(
                f"a reading process died {MOST_FAILED_STARTS} times before it had begun on a file; "
                "is there memory for it?"
            )
        self.stop()
        self._start()

    def stop(self) -> None:
        """Kill the process; what it holds is in memory only."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Raised:
    error: Exception


def _serve(connection: Connection) -> None:
    """Answer one chunk after another, result by result, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side hears it too, and kills this process
    try:
        while True:
            function, items = connection.recv()
            connection.send(_BEGUN)
            for item in items:
                connection.send(_call(function, item))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _call(function: Callable[[Any], Any], item: Any) -> _Returned | _Raised:
    try:
        return _Returned(function(item))
    except Exception as error:
        return _Raised(error)


def _started(count: int) -> list[_Process]:
    """Return processes that work, or none: a caller's script without a main guard starts no processes."""
    if count == 0:
        return []
    first = _Process()
    first.give(_Chunk(str, []))
    try:
        first.connection.recv()
    except (EOFError, ConnectionResetError):
        logger.warning("worker processes do not start from this program; reading in one process")
        first.stop()
        return []
    first.chunk = None
    return [first, *(_Process() for _ in range(count - 1))]


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield ``items`` in lists of ``size``, the last one perhaps shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
