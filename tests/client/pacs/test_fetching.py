"""What a fetch promises, against a PACS that does as it is told."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cohort.outcomes import Code
from client.pacs import DicomWebTable, Fetched, FetchError, PacsRefused, PacsUnreachable, Spool, fetch
from client.pacs.errors import ItemFailed
from client.pacs.source import Series, Study

Archive = dict[str, dict[str, list[str]]]
ARCHIVE: Archive = {
    "1.1": {"1.1.1": ["1.1.1.1", "1.1.1.2"]},
    "1.2": {"1.2.1": ["1.2.1.1"], "1.2.2": ["1.2.2.1"]},
    "1.3": {},
}
INSTANCES = {uid for study in ARCHIVE.values() for series in study.values() for uid in series}


class Told:
    """A PACS in memory; ``fails`` says how often an item fails, and with what."""

    def __init__(
        self, spool: Spool, archive: Archive, fails: dict[str, list[Exception]] | None = None
    ) -> None:
        self.spool, self.archive, self.fails = spool, archive, fails or {}
        self.asked: list[str] = []
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.asked.append("closed")

    def check(self) -> None:
        self._answer("check")

    def studies(self, filters: Mapping[str, str]) -> Iterator[Study]:
        self._answer("studies")
        wanted = filters.get("StudyInstanceUID")
        for study, series in self.archive.items():
            if wanted in (None, study):
                yield Study(uid=study, instances=sum(map(len, series.values())))

    def series(self, study: str, modalities: Sequence[str]) -> Sequence[Series]:
        self._answer(study)
        return [
            Series(study=study, uid=uid, instances=instances)
            for uid, instances in self.archive[study].items()
        ]

    def fetch(self, series: Series, instance: str | None) -> None:
        self._answer(instance or series.uid)
        for uid in [instance] if instance else series.instances:
            self._answer(f"store {uid}")
            with self.spool.draft() as draft:
                draft.write_text(uid)
                self.spool.keep(draft, uid)

    def _answer(self, what: str) -> None:
        with self._lock:
            self.asked.append(what)
            errors = self.fails.get(what)
            error = errors.pop(0) if errors else None
        if error is not None:
            raise error


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "incoming")


def run(source: Told, **changes: object) -> Fetched:
    table = DicomWebTable.model_validate({"url": "https://pacs", **changes})
    return fetch(source, table, source.spool, today=date(2024, 1, 1), waits=(0.0, 0.0))


def held(spool: Spool) -> set[str]:
    return {path.read_text() for path in spool.folder.rglob("*.dcm")}


def cut() -> ItemFailed:
    return ItemFailed(Code.E_FETCH_CUT, passing=True)


def broken() -> ItemFailed:
    return ItemFailed(Code.E_FETCH_STATUS, "HTTP 500")


def refused() -> PacsRefused:
    return PacsRefused("no")


def test_everything_comes_once(spool: Spool) -> None:
    first = run(Told(spool, ARCHIVE))
    assert held(spool) == INSTANCES
    assert (first.instances, first.new, first.removed, dict(first.codes)) == (4, 4, 0, {})
    again = Told(spool, ARCHIVE)
    second = run(again)
    assert (second.instances, second.new) == (4, 0)
    assert not [what for what in again.asked if what.startswith("store")]


def test_progress_counts_instances(spool: Spool) -> None:
    told: list[tuple[int, int]] = []
    table = DicomWebTable(url="https://pacs")
    fetch(Told(spool, ARCHIVE), table, spool, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 4), (4, 4), (4, 4)]


def test_what_the_pacs_holds_less_of_is_removed_and_more_of_is_fetched(spool: Spool) -> None:
    run(Told(spool, ARCHIVE))
    changed: Archive = {"1.2": {"1.2.1": ["1.2.1.1", "1.2.1.9"]}}
    result = run(Told(spool, changed))
    assert held(spool) == {"1.2.1.1", "1.2.1.9"}
    assert (result.instances, result.new, result.removed) == (2, 1, 3)


def test_nothing_is_removed_while_a_study_does_not_say_what_it_holds(spool: Spool) -> None:
    run(Told(spool, ARCHIVE))
    result = run(Told(spool, {"1.1": {}, "1.2": {}}, fails={"1.1": [broken()]}))
    assert held(spool) == INSTANCES
    assert (result.removed, dict(result.codes)) == (0, {Code.E_FETCH_LIST: 1})


def test_an_empty_answer_empties_nothing(spool: Spool) -> None:
    run(Told(spool, ARCHIVE))
    with pytest.raises(FetchError, match=r"no study that matches; see modalities, .*left as it is"):
        run(Told(spool, {}))
    assert held(spool) == INSTANCES


@pytest.mark.parametrize("item", ["1.1.1", "1.1.1.1", "store 1.1.1.1", "1.1", "1.2.2.1"])
def test_what_may_pass_is_asked_for_again(spool: Spool, item: str) -> None:
    result = run(Told(spool, ARCHIVE, fails={item: [cut()]}))
    assert held(spool) == INSTANCES
    assert (result.instances, result.new, dict(result.codes)) == (4, 4, {})


def test_what_never_comes_costs_itself_only(spool: Spool) -> None:
    fails: dict[str, list[Exception]] = {
        "store 1.1.1.2": [broken() for _ in range(9)],
        "store 1.2.1.1": [cut() for _ in range(9)],
    }
    result = run(Told(spool, ARCHIVE, fails=fails))
    assert held(spool) == INSTANCES - {"1.1.1.2", "1.2.1.1"}
    assert (result.instances, result.new) == (2, 2)
    assert dict(result.codes) == {Code.E_FETCH_CUT: 1, Code.E_FETCH_STATUS: 1}
    assert result.failures.stat().st_mode & 0o777 == 0o600
    assert result.failures.read_text().splitlines()[1:] == [
        f"1.1/1.1.1/1.1.1.2,E_FETCH_STATUS,HTTP 500,{Code.E_FETCH_STATUS.meaning}",
        f"1.2/1.2.1/1.2.1.1,E_FETCH_CUT,,{Code.E_FETCH_CUT.meaning}",
    ]


def test_what_did_not_come_comes_another_day(spool: Spool) -> None:
    run(Told(spool, ARCHIVE, fails={"1.2.2.1": [broken()]}))
    again = Told(spool, ARCHIVE)
    result = run(again)
    assert (result.instances, result.new, dict(result.codes)) == (4, 1, {})
    assert [what for what in again.asked if what.startswith("store")] == ["store 1.2.2.1"]


def test_listed_studies_that_are_unknown_are_told(spool: Spool, tmp_path: Path) -> None:
    studies = tmp_path / "studies.csv"
    studies.write_text("study_instance_uid\n1.1\n9.9\n1.2\n*\n")
    result = run(Told(spool, ARCHIVE), studies=studies)
    assert (result.instances, dict(result.codes)) == (4, {Code.E_FETCH_UNKNOWN: 2})
    assert [line.split(",")[0] for line in result.failures.read_text().splitlines()[1:]] == [
        "studies.csv row 2",
        "studies.csv row 4",
    ]


@pytest.mark.parametrize("item", ["studies", "1.2", "1.2.1.1"])
def test_a_pacs_that_is_gone_for_a_moment_is_waited_for(spool: Spool, item: str) -> None:
    result = run(Told(spool, ARCHIVE, fails={item: [PacsUnreachable("gone"), PacsUnreachable("gone")]}))
    assert (result.instances, dict(result.codes)) == (4, {})


@pytest.mark.parametrize("error", [PacsUnreachable, PacsRefused])
@pytest.mark.parametrize("item", ["check", "studies", "1.2", "1.2.1.1"])
def test_a_pacs_that_is_gone_stops_the_fetch_and_costs_nothing(
    spool: Spool, item: str, error: type[FetchError]
) -> None:
    gone = Told(spool, ARCHIVE, fails={item: [error("gone") for _ in range(9)]})
    with pytest.raises(error, match="gone"):
        run(gone, connections=1)
    assert gone.asked[-1] == "closed"
    back = Told(spool, ARCHIVE)
    assert (run(back).instances, held(spool)) == (4, INSTANCES)
    if item == "1.2.1.1":  # the first study was done: nothing about it is asked again
        assert not {"1.1", "1.1.1"} & set(back.asked)


def test_a_pacs_that_fails_again_and_again_is_left_alone(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.pacs.fetching.MAX_FAILURES_IN_A_ROW", 3)
    archive: Archive = {f"1.{n}": {f"1.{n}.1": [f"1.{n}.1.1"]} for n in range(1, 9)}
    fails: dict[str, list[Exception]] = {f"1.{n}.1.1": [cut(), cut()] for n in range(1, 9)}
    ill = Told(spool, archive, fails=fails)
    with pytest.raises(FetchError, match=r"3 instances in a row did not come.*it goes on where it stopped"):
        run(ill, connections=1)
    # One more may have begun before the first was heard to give up.
    assert len([what for what in ill.asked if what.endswith(".1.1")]) in (3, 4, 5)


def test_another_query_begins_anew(spool: Spool) -> None:
    with pytest.raises(PacsRefused):
        run(Told(spool, ARCHIVE, fails={"1.2": [PacsRefused("no")]}), connections=1)
    other = Told(spool, {"1.2": ARCHIVE["1.2"]})
    assert run(other, modalities=["DX"]).removed == 2
    assert held(spool) == {"1.2.1.1", "1.2.2.1"}


def test_a_damaged_journal_is_named(spool: Spool) -> None:
    run(Told(spool, ARCHIVE))
    (spool.desk / "journal.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(FetchError, match=r"journal.sqlite is damaged: remove it, the files .* stay"):
        run(Told(spool, ARCHIVE))


def test_libraries_are_silent_while_a_fetch_runs_and_heard_again(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    names = ("dicomweb_client.web", "pynetdicom.assoc", "pydicom", "urllib3.connectionpool")

    class Talkative(Told):
        def check(self) -> None:
            for name in names:
                logging.getLogger(name).error("patient-1")

    run(Talkative(spool, ARCHIVE))
    assert "patient-1" not in caplog.text
    logging.getLogger(names[0]).error("after")
    assert "after" in caplog.text


uids = st.lists(st.integers(1, 10**6).map(str), unique=True, max_size=12)


@settings(max_examples=15, deadline=None)
@given(first=uids, second=uids, data=st.data())
def test_whatever_fails_on_the_way_the_spool_ends_up_as_the_pacs(
    tmp_path_factory: pytest.TempPathFactory, first: list[str], second: list[str], data: st.DataObject
) -> None:
    spool = Spool(tmp_path_factory.mktemp("s") / "incoming")
    for uids_now in (first, second):
        archive: Archive = {"1": {"1.1": uids_now[::2], "1.2": uids_now[1::2]}, "2": {"2.1": ["2.1.1"]}}
        items = ["1", "2", "1.1", "1.2", *uids_now, *(f"store {uid}" for uid in uids_now)]
        failing = data.draw(st.lists(st.sampled_from(items), unique=True, max_size=8))
        errors = [data.draw(st.sampled_from([cut, broken, refused])) for _ in failing]
        source = Told(
            spool, archive, fails={item: [make()] for item, make in zip(failing, errors, strict=True)}
        )
        for _ in range(len(failing) + 1):
            try:
                result = run(source)
            except FetchError:
                continue
            if Code.E_FETCH_LIST not in result.codes:
                assert result.instances == len(held(spool))
                assert result.instances + sum(result.codes.values()) == len(uids_now) + 1
        assert run(source).codes == {}
        assert held(spool) == {*uids_now, "2.1.1"}
