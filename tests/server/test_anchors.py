"""What the coordinator remembers of the sites' ledgers, and which sites it finds out."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.signing import Anchor, SiteKey
from server.anchors import AnchorBook, AnchorRefused, parse
from server.errors import RunError
from server.metrics import RunLog, read_events
from server.rounds import run_rounds
from strategies.in_process import InProcessGrid
from strategies.messages import Refusal, Release, TrainRequest
from strategies.strategy import Strategy
from tests.fake_site import FakeSites, federation, start

PRIVATE = {"privacy": {"mode": "dp", "epsilon": 8.0}, "objective": {"name": "anchored"}}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SiteKey:
    return SiteKey.open_or_make(tmp_path_factory.mktemp("north"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> SiteKey:
    return SiteKey.open_or_make(tmp_path_factory.mktemp("foreign"))


def anchor(key: SiteKey, seq: int, head: str = "ab" * 32) -> Anchor:
    return Anchor(seq=seq, head=head, signature=key.sign(seq, head), key=key.public)


def book(tmp_path: Path) -> AnchorBook:
    return AnchorBook(tmp_path / "anchors.jsonl")


def take(kept: AnchorBook, site: str, one: Anchor) -> None:
    kept.take(site, one, run="small", server_round=1)


def test_a_site_that_showed_nothing_has_no_anchor_and_no_file_is_made(tmp_path: Path) -> None:
    assert book(tmp_path).last("north") is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_taken_is_on_disk_and_read_again(
    tmp_path: Path, key: SiteKey, foreign: SiteKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "anchors.jsonl").read_bytes()))
    kept = book(tmp_path)
    take(kept, "north", anchor(key, 2))
    take(kept, "south", anchor(foreign, 7))
    take(kept, "north", anchor(key, 4))
    take(kept, "north", anchor(key, 4))  # a replay
    assert synced[-1] == (tmp_path / "anchors.jsonl").read_bytes()
    for one in (kept, book(tmp_path)):
        assert one.last("north") == anchor(key, 4)
        assert one.last("south") == anchor(foreign, 7)
    lines = [json.loads(line) for line in (tmp_path / "anchors.jsonl").read_text().splitlines()]
    assert [(line["site"], line["seq"]) for line in lines] == [
        ("north", 2), ("south", 7), ("north", 4), ("north", 4),
    ]  # fmt: skip
    assert {(line["run"], line["round"]) for line in lines} == {("small", 1)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda key, _: anchor(key, 3), r"went back: it showed row 4 and now ends at row 3; .*newest copy"),
        (lambda key, _: anchor(key, 4, "cd" * 32), "was rewritten: it showed row 4 and now ends at row 4"),
        (
            lambda _, foreign: anchor(foreign, 9),
            r"signs its ledger with key .*ask the hospital by another way",
        ),
        (lambda key, _: replace(anchor(key, 9), seq=10), "is not signed with the key it names"),
        (
            lambda key, foreign: replace(anchor(foreign, 9), key=key.public),
            "is not signed with the key it names",
        ),
    ],
)
def test_a_ledger_that_is_not_the_one_seen_before_is_refused_and_not_kept(
    changed: Callable[[SiteKey, SiteKey], Anchor],
    message: str,
    tmp_path: Path,
    key: SiteKey,
    foreign: SiteKey,
) -> None:
    take(book(tmp_path), "north", anchor(key, 4))
    before = (tmp_path / "anchors.jsonl").read_bytes()
    kept = book(tmp_path)
    with pytest.raises(AnchorRefused, match=message):
        take(kept, "north", changed(key, foreign))
    assert kept.last("north") == anchor(key, 4)
    assert (tmp_path / "anchors.jsonl").read_bytes() == before


@given(data=st.binary(max_size=300))
def test_a_torn_last_line_counts_for_nothing_and_is_cut_off(
    data: bytes, key: SiteKey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    take(book(folder), "north", anchor(key, 4))
    whole = (folder / "anchors.jsonl").read_bytes()
    (folder / "anchors.jsonl").write_bytes(whole + data.replace(b"\n", b""))
    kept = book(folder)
    assert kept.last("north") == anchor(key, 4)
    take(kept, "north", anchor(key, 5))
    assert book(folder).last("north") == anchor(key, 5)


@pytest.mark.parametrize("line", ["{", "[]", '{"version": 1}', '{"version": 1, "site": "n", "seq": 0}'])
def test_a_whole_line_that_is_no_anchor_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "anchors.jsonl").write_text(f"{line}\n")
    with pytest.raises(RunError, match=r"anchors.jsonl, line 1 is no anchor: restore the file"):
        book(tmp_path)


def test_another_version_is_refused(tmp_path: Path, key: SiteKey) -> None:
    take(book(tmp_path), "north", anchor(key, 4))
    text = (tmp_path / "anchors.jsonl").read_text().replace('"version": 1', '"version": 2')
    with pytest.raises(RunError, match="version=2, this program reads 1"):
        list(parse(text, name="anchors.jsonl"))


class Hospitals(FakeSites):
    """Sites whose releases carry the heads that a test says."""

    def __init__(self, folder: Path, heads: dict[str, list[Anchor | None]]) -> None:
        super().__init__(folder, dict.fromkeys(heads, self.anchored))
        self.heads, self.sent = heads, dict[str, list[Anchor | None]]()

    def anchored(self, request: TrainRequest, release: Release) -> Release | Refusal:
        site = release.facts.site
        self.sent.setdefault(site, []).append(request.anchor)
        facts = release.facts.model_copy(update={"anchor": self.heads[site].pop(0)})
        return Release(facts=facts, update=release.update)


def run(tmp_path: Path, heads: dict[str, list[Anchor | None]], *, resume: bool = False) -> Hospitals:
    (tmp_path / "sites").mkdir(exist_ok=True)
    sites = Hospitals(tmp_path / "sites", heads)
    settings: dict[str, Any] = {**PRIVATE, "strategy": {"min-sites": 1}}
    run_rounds(
        InProcessGrid(sites.app, FakeSites.configs(*heads)),
        federation(**settings),
        run_dir=tmp_path / "run",
        start=start(),
        evaluate=lambda arrays: None,
        log=RunLog(tmp_path / "run" / "metrics.jsonl"),
        resume=resume,
    )
    return sites


def refused(tmp_path: Path) -> list[tuple[int, str, str]]:
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    return [(e["round"], e["site"], e["code"]) for e in events if e["kind"] == "site_refused"]


def test_each_site_is_sent_its_own_last_head(tmp_path: Path, key: SiteKey, foreign: SiteKey) -> None:
    north, south = ([anchor(k, 2 * r) for r in (1, 2, 3)] for k in (key, foreign))
    sites = run(tmp_path, {"north": [*north], "south": [*south]})
    assert sites.sent == {"north": [None, *north[:2]], "south": [None, *south[:2]]}
    assert refused(tmp_path) == []
    assert book(tmp_path / "run").last("south") == south[2]


def test_a_site_whose_ledger_went_back_is_found_out_at_once_and_the_round_goes_on(
    tmp_path: Path, key: SiteKey, foreign: SiteKey, caplog: pytest.LogCaptureFixture
) -> None:
    south = [anchor(foreign, 2), anchor(foreign, 1), anchor(foreign, 4)]
    run(tmp_path, {"north": [anchor(key, 2 * r) for r in (1, 2, 3)], "south": [*south]})
    assert refused(tmp_path) == [(2, "south", "ledger")]
    assert "the ledger of south went back: it showed row 2 and now ends at row 1" in caplog.text


def test_a_site_that_changes_its_key_is_not_used_any_more(
    tmp_path: Path, key: SiteKey, foreign: SiteKey
) -> None:
    south = [anchor(key, 2), anchor(foreign, 4), anchor(foreign, 6)]
    run(tmp_path, {"north": [anchor(key, 2 * r) for r in (1, 2, 3)], "south": [*south]})
    assert refused(tmp_path) == [(2, "south", "ledger"), (3, "south", "ledger")]


def test_a_private_release_without_a_head_is_not_used(tmp_path: Path, key: SiteKey) -> None:
    run(tmp_path, {"north": [anchor(key, 2 * r) for r in (1, 2, 3)], "south": [None] * 3})
    assert {code for _, _, code in refused(tmp_path)} == {"message"}


def test_what_is_known_of_a_ledger_outlives_the_coordinator(tmp_path: Path, key: SiteKey) -> None:
    run(tmp_path, {"north": [anchor(key, 2 * r) for r in (1, 2, 3)]})
    again = AnchorBook(tmp_path / "run" / "anchors.jsonl")
    with pytest.raises(AnchorRefused, match="went back"):
        take(again, "north", anchor(key, 4))


def test_the_head_is_on_disk_before_the_release_is_folded_in(
    tmp_path: Path, key: SiteKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold, seen = Strategy.fold, list[int]()

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.append(len((tmp_path / "run" / "anchors.jsonl").read_text().splitlines()))
        return fold(*args, **kwargs)

    monkeypatch.setattr(Strategy, "fold", looking)
    run(tmp_path, {"north": [anchor(key, 2 * r) for r in (1, 2, 3)]})
    assert seen == [1, 2, 3]
