"""One fetch: ask for studies, bring what is not there, drop what the PACS no longer has."""

import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from client.cohort.outcomes import Code, Rejected, State
from client.pacs.errors import FetchError, ItemFailed, PacsUnreachable
from client.pacs.journal import Harvest, Journal
from client.pacs.query import queries
from client.pacs.settings import PacsTable
from client.pacs.source import PacsSource, Series
from client.pacs.spool import Spool

FAILURES = "not_fetched.csv"
ROUNDS = 2  # a study some of which may come later is asked for once more, at the end
WAITS = (1.0, 4.0, 16.0, 30.0)  # seconds between attempts to reach a PACS that is gone
MAX_FAILURES_IN_A_ROW = 100  # of the kind that passes: the PACS is ill, not the instances

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a fetch has done; patient data like every count, it stays at the site.

    Attributes:
        instances: Files that are there now, of those the PACS lists.
        new: Files brought by this run.
        removed: Files dropped because the PACS lists them no longer, or the queries name them no longer.
        codes: What did not come, by reason; ``failures`` names it.
        failures: A CSV file beside the spool.
    """

    instances: int
    new: int
    removed: int
    codes: Counter[Code]
    failures: Path


def fetch(
    source: PacsSource,
    table: PacsTable,
    spool: Spool,
    *,
    today: date | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    waits: Sequence[float] = WAITS,
) -> Fetched:
    """Bring every instance that ``table`` asks for from ``source`` into ``spool``.

    Guarantees:
        Afterwards the spool holds what the PACS lists for the queries, but for what is counted in ``codes``,
        and nothing else: a study withdrawn from the PACS leaves the spool. Only where every study said what
        it holds is anything removed. An instance that is there is never asked for again. A fetch that was
        killed goes on where it was. Nothing a PACS answers is logged.

    Args:
        source: The PACS.
        table: What to ask it for.
        spool: Where the files go; ``source`` writes into the same.
        today: The last day asked for where ``table`` does not say; for tests.
        on_progress: Called with instances done and instances in all, as far as is known.
        waits: Seconds between attempts to reach a PACS that is gone.

    Raises:
        FetchError: The PACS cannot be reached or refuses, or the spool cannot be used. What is fetched stays.
    """
    patience = _Patience(waits)
    with _silence(), spool.locked():
        query = table.model_dump(include={"modalities", "since", "until", "studies", "keys"}, mode="json")
        with Journal.opened(spool.desk / "journal.sqlite", query=query) as journal, source:
            source.check()
            unknown = _list_studies(source, table, journal, patience, today or date.today())
            journal.record(Harvest(study="", failures=unknown), done=True)
            if not any(journal.pending()) and not journal.progress()[1]:
                raise FetchError(
                    "the PACS has no study that matches; see modalities, since, until, studies and keys in "
                    "the cohort's settings. What was fetched before is left as it is"
                )
            new = _bring(source, table, spool, journal, patience, on_progress)
            removed = spool.keep_only(journal.is_listed) if journal.is_complete() else 0
            journal.finish()
            journal.write_failures(spool.desk / FAILURES)
            codes = journal.codes()
            missing = sum(count for code, count in codes.items() if code not in _NO_INSTANCE)
            return Fetched(
                instances=journal.progress()[1] - missing,
                new=new,
                removed=removed,
                codes=codes,
                failures=spool.desk / FAILURES,
            )


_NO_INSTANCE = frozenset({Code.E_FETCH_LIST, Code.E_FETCH_UNKNOWN})
_UNKNOWN = Rejected(State.QUARANTINED, Code.E_FETCH_UNKNOWN)


def _list_studies(
    source: PacsSource, table: PacsTable, journal: Journal, patience: "_Patience", today: date
) -> list[tuple[str, Rejected]]:
    """Note every study that a query names; return the listed ones the PACS does not have."""
    unknown: list[tuple[str, Rejected]] = []
    for criteria in queries(table, today=today):
        ask = partial(_note_studies, source, criteria.filters, journal)
        found = patience.until_reached(ask) if criteria.usable else 0
        if criteria.name and not found:
            unknown.append((criteria.name, _UNKNOWN))
    journal.count()
    return unknown


def _note_studies(source: PacsSource, filters: Mapping[str, str], journal: Journal) -> int:
    return journal.add(source.studies(filters))


def _bring(
    source: PacsSource,
    table: PacsTable,
    spool: Spool,
    journal: Journal,
    patience: "_Patience",
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Fetch the studies that are pending, several at a time; return how many files came."""
    new = 0

    def harvest(study: str) -> Harvest:
        return _harvest(source, study, table.modalities, spool, patience)

    for attempt in range(1, ROUNDS + 1):
        for result in _side_by_side(harvest, journal.pending(), table.connections):
            new += result.new
            journal.record(result, done=not result.passing or attempt == ROUNDS)
            if on_progress is not None:
                on_progress(*journal.progress())
    return new


def _harvest(
    source: PacsSource, study: str, modalities: Sequence[str], spool: Spool, patience: "_Patience"
) -> Harvest:
    """Bring one study; nothing about it makes this raise unless the PACS is gone."""
    try:
        listing = patience.until_reached(partial(source.series, study, modalities))
    except ItemFailed as failed:
        patience.failed(failed)
        unlisted = replace(failed.rejected, code=Code.E_FETCH_LIST)
        return Harvest(study=study, failures=[(study, unlisted)], passing=failed.passing)
    new, passing = 0, False
    failures: list[tuple[str, Rejected]] = []
    for series in listing:
        absent = [uid for uid in series.instances if not spool.has(uid)]
        if len(absent) == len(series.instances) > 1:
            _whole(source, series, patience)
        for uid in absent:
            if not spool.has(uid):
                try:
                    patience.until_reached(partial(source.fetch, series, uid))
                except ItemFailed as failed:
                    patience.failed(failed)
                    passing |= failed.passing
                    failures.append((f"{study}/{series.uid}/{uid}", failed.rejected))
                    continue
            new += 1
            patience.succeeded()
    instances = [uid for series in listing for uid in series.instances]
    return Harvest(study=study, instances=instances, new=new, failures=failures, passing=passing)


def _whole(source: PacsSource, series: Series, patience: "_Patience") -> None:
    try:
        patience.until_reached(partial(source.fetch, series, None))
    except ItemFailed:
        return  # one broken instance spoils the answer: the rest is asked for one by one


class _Patience:
    """How long a PACS that fails is asked on; shared by all threads."""

    def __init__(self, waits: Sequence[float]) -> None:
        self._waits = waits
        self._in_a_row = 0
        self._lock = Lock()

    def until_reached(self, ask: Callable[[], T]) -> T:
        """Return ``ask()``, called again with growing pauses while the PACS is out of reach."""
        for wait in self._waits:
            try:
                return ask()
            except PacsUnreachable:
                time.sleep(wait)
        return ask()

    def succeeded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self, failure: ItemFailed) -> None:
        """Pause after several failures in a row that may pass.

        Raises:
            FetchError: There were too many.
        """
        if not failure.passing:
            return
        with self._lock:
            self._in_a_row += 1
            many = self._in_a_row
        if many >= MAX_FAILURES_IN_A_ROW:
            rejected = failure.rejected
            raise FetchError(
                f"{many} instances in a row did not come, the last because {rejected.code.meaning}"
                f"{f' ({rejected.detail})' if rejected.detail else ''}; see to the PACS and run this again: "
                "it goes on where it stopped"
            )
        if many > 1 and self._waits:
            time.sleep(self._waits[min(many - 2, len(self._waits) - 1)])


def _side_by_side(function: Callable[[str], T], items: Iterable[str], count: int) -> Iterator[T]:
    """Yield ``function(item)`` in order, ``count`` at a time; the first error stops the rest."""
    with ThreadPoolExecutor(count) as pool:
        flying: deque[Future[T]] = deque()
        try:
            for item in items:
                flying.append(pool.submit(function, item))
                if len(flying) >= 2 * count:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back what libraries log or warn about: URLs with UIDs, whole answers, values that break rules."""
    loggers = [logging.getLogger(name) for name in ("dicomweb_client", "pydicom", "pynetdicom", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
