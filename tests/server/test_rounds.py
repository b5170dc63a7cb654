import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from server import checkpoints
from server.checkpoints import load_latest
from server.errors import CheckpointError, QuorumError, RunError
from server.federation import Federation
from server.metrics import Event, RunLog, effective, finished_rounds, read_events
from server.roster import Roster
from server.rounds import Start, run_rounds
from strategies.fedavg import FedAvg
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, Refusal, RefusalCode, Release, TrainRequest, encode
from tests.fake_site import (
    MARKER,
    FakeSites,
    Reaction,
    crash,
    federation,
    refuse,
    send_for_another_site,
    send_garbage,
    send_nan,
    send_nothing,
    send_old_round,
    send_wrong_names,
    send_wrong_shape,
    start,
    trained,
)

SITES = ("alpha", "beta", "gamma")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Case:
    """A federation in a folder, to be run once or again."""

    def __init__(self, folder: Path, *names: str, settings: Federation | None = None) -> None:
        (folder / "sites").mkdir(parents=True)
        self.run_dir = folder / "run"
        self.sites = FakeSites(folder / "sites")
        self.names = names or SITES
        self.settings = settings or federation()
        self.start = start()
        self.evaluate: Callable[[Arrays], Mapping[str, Any] | None] = lambda arrays: {"size": len(arrays)}

    def react(self, **reactions: Reaction) -> "Case":
        self.sites.reactions |= reactions
        return self

    def grid(self) -> InProcessGrid:
        return InProcessGrid(self.sites.app, FakeSites.configs(*self.names))

    def run(self, *, resume: bool = False, grid: Any = None) -> Arrays:
        return run_rounds(
            grid or self.grid(),
            self.settings,
            run_dir=self.run_dir,
            start=self.start,
            evaluate=self.evaluate,
            log=RunLog(self.run_dir / "metrics.jsonl"),
            resume=resume,
        )

    def events(self, kind: str) -> list[Event]:
        events = read_events(self.run_dir / "metrics.jsonl")
        return [event for event in events if event["kind"] == kind]


def averaged(case: Case, *, rounds: int, weights: Mapping[str, float]) -> Arrays:
    """The weights by the textbook, in float64."""
    arrays = case.start.arrays
    for server_round in range(1, rounds + 1):
        request = TrainRequest(
            run="test", server_round=server_round, bundle="", plan=case.settings.plan(), arrays=arrays
        )
        updates = {site: trained(request, site) for site in weights}
        arrays = {
            name: (
                value
                + np.average(
                    [updates[site][name].astype(np.float64) for site in weights],
                    axis=0,
                    weights=list(weights.values()),
                )
            ).astype(np.float32)
            for name, value in arrays.items()
        }
    return arrays


def close(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.allclose(left[name], right[name]) for name in left)


def same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_sites_are_weighted_by_declared_patients(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert close(case.run(), averaged(case, rounds=3, weights={"alpha": 10, "beta": 20, "gamma": 30}))


def test_sites_weigh_alike_when_the_federation_says_so(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=federation(strategy={"weighting": "equal"}))
    assert close(case.run(), averaged(case, rounds=3, weights=dict.fromkeys(SITES, 1)))


def test_the_result_is_the_last_checkpoint(tmp_path: Path) -> None:
    case = Case(tmp_path)
    arrays = case.run()
    done = load_latest(case.run_dir)
    assert done is not None
    assert done.server_round == 3
    assert same(done.arrays, arrays)
    assert done.manifest["bundle"] == case.start.bundle.digest


def test_the_order_in_which_nodes_connected_does_not_change_a_bit(tmp_path: Path) -> None:
    first = Case(tmp_path / "a")
    second = Case(tmp_path / "b", *reversed(SITES))
    configs = FakeSites.configs(*SITES)
    grid = InProcessGrid(second.sites.app, list(reversed(configs)))
    assert same(first.run(), second.run(grid=grid))
    assert [event["site"] for event in second.events("site_replied")] == [*SITES] * 3


def test_a_run_tells_what_happened(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run()
    [started] = case.events("run_started")
    assert (started["run"], started["rounds"], started["sites"]) == ("test", 3, list(SITES))
    assert started["privacy"] == {
        "mode": "none",
        "unit": "patient",
        "epsilon": None,
        "formal_guarantee": False,
    }
    assert [event["round"] for event in case.events("evaluated")] == [0, 1, 2, 3]
    assert [event["public_start"] for event in case.events("evaluated")] == [True, False, False, False]
    assert [event["sites"] for event in case.events("round_started")] == [list(SITES)] * 3
    replies = case.events("site_replied")
    assert [(event["round"], event["site"]) for event in replies[:4]] == [
        (1, "alpha"), (1, "beta"), (1, "gamma"), (2, "alpha"),
    ]  # fmt: skip
    assert (replies[0]["bytes_up"], replies[0]["bytes_down"], replies[0]["epsilon"]) == (44, 44, None)
    finished = case.events("round_finished")
    assert [(event["round"], event["replied"], event["refused"]) for event in finished] == [
        (1, 3, 0), (2, 3, 0), (3, 3, 0),
    ]  # fmt: skip
    assert set(finished[0]["seconds"]) == {"train", "communicate", "aggregate", "checkpoint"}
    assert all(value >= 0 for value in finished[0]["seconds"].values())
    assert case.events("run_finished")[0]["rounds"] == 3


def test_the_bundle_is_installed_once_at_each_site(tmp_path: Path) -> None:
    case = Case(tmp_path)
    installs: list[int] = []

    def counting(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.install":
            installs.append(context.node_id)
        reply: Message = case.sites.app(message, context)
        return reply

    case.run(grid=InProcessGrid(counting, FakeSites.configs(*SITES)))
    assert installs == [1, 2, 3]


def test_evaluation_follows_its_interval_and_the_last_round(tmp_path: Path) -> None:
    settings = federation(evaluation={"every": 2}, training={"rounds": 5})
    case = Case(tmp_path, settings=settings)
    case.run()
    assert [event["round"] for event in case.events("evaluated")] == [0, 2, 4, 5]


def test_nothing_to_evaluate_is_not_an_event(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.evaluate = lambda _: None
    case.run()
    assert case.events("evaluated") == []


def test_the_settings_lie_beside_the_run(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run()
    document = json.loads((case.run_dir / "federation.json").read_text())
    assert Federation.parse(document, source="federation.json") == case.settings


@pytest.mark.parametrize(
    ("reaction", "code"),
    [
        *((refuse(code), code) for code in RefusalCode),
        (crash, "failed"),
        (send_nan, "message"),
        (send_wrong_shape, "message"),
        (send_wrong_names, "message"),
        (send_for_another_site, "message"),
        (send_old_round, "message"),
        (send_garbage, "message"),
        (send_nothing, "message"),
    ],
)
def test_a_round_goes_on_without_a_site_that_gives_nothing_usable(
    tmp_path: Path, reaction: Reaction, code: str
) -> None:
    case = Case(tmp_path).react(beta=reaction)
    arrays = case.run()
    assert close(arrays, averaged(case, rounds=3, weights={"alpha": 10, "gamma": 30}))
    refusals = case.events("site_refused")
    assert {(event["site"], event["code"]) for event in refusals} == {("beta", code)}
    assert case.events("round_finished")[0]["refused"] == 1


def test_the_site_s_incident_is_passed_on(tmp_path: Path) -> None:
    case = Case(tmp_path).react(beta=refuse(RefusalCode.POLICY))
    case.run()
    assert {event["incident"] for event in case.events("site_refused")} == {"0badcafe"}


def test_the_text_of_a_site_s_exception_reaches_nothing_the_coordinator_writes(tmp_path: Path) -> None:
    case = Case(tmp_path).react(beta=crash)
    case.run()
    files = [path for path in case.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if MARKER.encode() in path.read_bytes()]


def test_a_site_whose_budget_is_spent_is_not_asked_again(tmp_path: Path) -> None:
    case = Case(tmp_path).react(beta=refuse(RefusalCode.BUDGET))
    case.run()
    assert [event["sites"] for event in case.events("round_started")] == [
        list(SITES), ["alpha", "gamma"], ["alpha", "gamma"],
    ]  # fmt: skip


def test_a_site_that_failed_is_asked_again(tmp_path: Path) -> None:
    failing = [True]

    def once(request: TrainRequest, release: Release) -> Release:
        return crash(request, release) if failing and failing.pop() else release

    case = Case(tmp_path).react(beta=once)
    case.run()
    assert [event["replied"] for event in case.events("round_finished")] == [2, 3, 3]


def test_too_few_releases_stop_the_run_and_say_so(tmp_path: Path) -> None:
    case = Case(tmp_path).react(alpha=refuse(RefusalCode.POLICY), gamma=send_nan)
    with pytest.raises(
        QuorumError,
        match=r"round 1: 1 sites replied, 2 are needed .*alpha policy, gamma message.*--resume",
    ):
        case.run()
    assert case.events("round_finished") == []


def test_a_run_stopped_for_want_of_sites_resumes_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed = Case(tmp_path / "a").run()
    case = Case(tmp_path / "b").react(alpha=crash, gamma=crash)
    with pytest.raises(QuorumError):
        case.run()
    case.sites.reactions.clear()
    assert same(case.run(resume=True), undisturbed)
    assert [case.sites.trainings(site) for site in SITES] == [3, 3, 3]


def test_nobody_spends_budget_on_a_round_that_cannot_be_full(tmp_path: Path) -> None:
    case = Case(tmp_path, "alpha", "beta").react(beta=refuse(RefusalCode.BUDGET))
    with pytest.raises(QuorumError):
        case.run()
    trainings = case.sites.trainings("alpha")
    case = Case(tmp_path / "again", "alpha", settings=federation())
    with pytest.raises(QuorumError, match=r"round 1: 1 of the 2 sites needed are ready \(no other node"):
        case.run()
    assert trainings == 1
    assert not (case.sites.folder / "alpha.trained").exists()


def test_a_site_that_declines_to_take_part_is_named_by_code(tmp_path: Path) -> None:
    case = Case(tmp_path)

    def declining(message: Message, context: Context) -> Message:
        if context.node_id == 1:
            reply: Message = case.sites.app(message, context)
            return reply
        refused = Refusal(site="beta", code=RefusalCode.COHORT, incident="0badcafe")
        return Message(encode(refused), reply_to=message)

    grid = InProcessGrid(declining, FakeSites.configs("alpha", "beta"))
    with pytest.raises(QuorumError, match=r"node 2 declined: cohort \(incident 0badcafe\)"):
        case.run(grid=grid)


def test_two_nodes_with_one_site_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nodes 1 and 2 both call themselves site 'alpha'"):
        Case(tmp_path, "alpha", "alpha").run()


class Deployed:
    """A grid of its own kind: sites work when they are sent something, or ``late``, when looked at."""

    def __init__(self, case: Case, *, silent: Iterable[int] = (), late: float = 0.0) -> None:
        self.inner = case.grid()
        self.silent, self.late, self.pulls = set(silent), late, 0
        self.ready: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        accepted = self.inner.push_messages(messages)
        for message in messages:
            training = message.metadata.message_type == "train"
            if not training or not (self.late or message.metadata.dst_node_id in self.silent):
                self.ready |= self.pulled(message.metadata.message_id)
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        ids = list(message_ids)
        if self.late and not self.ready.keys() & ids:
            time.sleep(self.late)
            self.ready |= self.pulled(*ids)
        return [self.ready.pop(one) for one in ids if one in self.ready]

    def pulled(self, *ids: str) -> dict[str, Message]:
        return {reply.metadata.reply_to_message_id: reply for reply in self.inner.pull_messages(ids)}


def test_silence_ends_at_the_deadline_and_what_came_in_time_is_used(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 1}, strategy={"deadline-seconds": 0.6})
    case = Case(tmp_path, settings=settings)
    began = time.monotonic()
    arrays = case.run(grid=Deployed(case, silent=[1]))
    assert time.monotonic() - began < 3
    refusals = case.events("site_refused")
    assert [(event["site"], event["code"]) for event in refusals] == [("alpha", "deadline")]
    assert close(arrays, averaged(case, rounds=1, weights={"beta": 20, "gamma": 30}))


def test_an_answer_written_after_the_deadline_is_not_used(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 1}, strategy={"deadline-seconds": 0.2, "min-sites": 1})
    case = Case(tmp_path, "alpha", settings=settings)
    with pytest.raises(QuorumError, match="alpha deadline"):
        case.run(grid=Deployed(case, late=0.3))


def test_the_deadline_is_announced_to_the_sites(tmp_path: Path) -> None:
    seen: list[float | None] = []

    def look(request: TrainRequest, release: Release) -> Release:
        seen.append(request.deadline_unix_seconds)
        return release

    Case(tmp_path, settings=federation(training={"rounds": 1})).react(alpha=look).run()
    assert seen[0] == pytest.approx(time.time() + 30, abs=5)


def test_a_missing_site_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    case = Case(tmp_path, "alpha", settings=federation(strategy={"deadline-seconds": 0.7}))
    grid = Deployed(case)
    began = time.monotonic()
    with pytest.raises(QuorumError, match="1 of the 2 sites needed are ready"):
        case.run(grid=grid)
    assert 0.6 < time.monotonic() - began < 3
    assert grid.pulls < 5


def test_one_reply_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The peak does not grow with the number of sites."""

    def peak(names: Iterable[str]) -> int:
        settings = federation(training={"rounds": 1}, strategy={"min-sites": 1})
        case = Case(tmp_path / str(len(list(names))), *names, settings=settings)
        case.start = Start(
            bundle=case.start.bundle, arrays={"w": np.zeros(1_000_000, np.float32)}, public_start=False
        )
        tracemalloc.start()
        case.run()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    one, eight = peak("a"), peak("abcdefgh")
    assert eight < one + 2_500_000  # one update has 4 MB


class Killed(BaseException):
    """A kill -9: nothing catches it."""


class Steps:
    """Counts what a run does; dies at the given step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, die_at: int) -> None:
        self.done, self.die_at = 0, die_at
        for owner, name in (
            (RunLog, "record"),
            (FedAvg, "fold"),
            (FedAvg, "result"),
            (checkpoints, "save"),
            (InProcessGrid, "push_messages"),
            (InProcessGrid, "_reply_to"),
            (Roster, "gather"),
            (os, "rename"),
        ):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any, **named: Any) -> Any:
            self.step()
            result = function(*arguments, **named)
            self.step()
            return result

        return watching

    def step(self) -> None:
        self.done += 1
        if self.done == self.die_at:
            raise Killed


def small(folder: Path) -> Case:
    return Case(folder, "alpha", "beta", settings=federation(training={"rounds": 2}))


def test_killed_at_any_step_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed = small(tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patched:
        steps = Steps(patched, die_at=0)
        small(tmp_path / "counted").run()
    assert steps.done > 60
    for die_at in range(1, steps.done + 1):
        case = small(tmp_path / str(die_at))
        with pytest.MonkeyPatch.context() as patched:
            Steps(patched, die_at=die_at)
            with pytest.raises(Killed):
                case.run()
        assert same(case.run(resume=True), undisturbed), die_at
        assert [case.sites.trainings(site) for site in case.names] == [2, 2], die_at
        events = effective(read_events(case.run_dir / "metrics.jsonl"))
        assert finished_rounds(events) == {1, 2}, die_at
        assert {event["round"] for event in events if event["kind"] == "evaluated"} == {0, 1, 2}, die_at


def test_killed_again_and_again_a_run_still_ends_the_same(tmp_path: Path) -> None:
    undisturbed = small(tmp_path / "whole").run()
    case = small(tmp_path / "killed")
    for attempt in range(100):
        try:
            with pytest.MonkeyPatch.context() as patched:
                Steps(patched, die_at=20 + attempt)
                arrays = case.run(resume=True)
            break
        except Killed:
            continue
    assert attempt > 2
    assert same(arrays, undisturbed)


def test_a_finished_run_resumes_without_asking_anybody(tmp_path: Path) -> None:
    case = Case(tmp_path)
    arrays = case.run()
    nobody = InProcessGrid(case.sites.app, [])
    assert same(case.run(resume=True, grid=nobody), arrays)


def test_resuming_an_empty_folder_starts_the_run(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run(resume=True)
    assert len(case.events("run_started")) == 1
    assert case.events("run_resumed") == []


def test_a_run_is_never_started_over_another_one(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run()
    before = (case.run_dir / "federation.json").read_bytes()
    case.settings = federation(training={"rounds": 9})
    with pytest.raises(CheckpointError, match="holds a run that got to round 3: --resume continues it"):
        case.run()
    assert (case.run_dir / "federation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training": {"steps": 9}}, "plan.steps was 1, is 9"),
        ({"training": {"rounds": 9}}, "plan.rounds was 3, is 9"),
        ({"share": {"part": "full"}}, "plan.part was 'heads', is 'full'"),
        ({"strategy": {"weighting": "equal"}}, "strategy.weighting was 'declared', is 'equal'"),
        ({"name": "other"}, "name was 'test', is 'other'"),
    ],
)
def test_other_settings_are_refused_and_the_difference_is_named(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    case = Case(tmp_path)
    case.run()
    case.settings = federation(**changes)
    with pytest.raises(CheckpointError, match=f"holds another run: {text}"):
        case.run(resume=True)


def test_another_bundle_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run()
    bundle = case.start.bundle
    other = type(bundle)(
        model=bundle.model,
        weights=bundle.weights,
        anchor_texts=("other",),
        anchor_images=bundle.anchor_images,
    )
    case.start = Start(bundle=other, arrays=case.start.arrays, public_start=True)
    with pytest.raises(CheckpointError, match=f"bundle was '{bundle.digest}'"):
        case.run(resume=True)


def test_settings_that_decide_no_weight_may_change(tmp_path: Path) -> None:
    case = Case(tmp_path)
    undisturbed = case.run()
    case.settings = federation(strategy={"deadline-seconds": 9.0, "min-sites": 1}, evaluation={"every": 2})
    assert same(case.run(resume=True), undisturbed)


def test_a_lost_bundle_is_installed_again(tmp_path: Path) -> None:
    case = Case(tmp_path)

    def lose(request: TrainRequest, release: Release) -> Release:
        if request.server_round == 1:
            (case.sites.folder / f"beta-{request.bundle}").unlink()
        return release

    case.react(beta=lose).run()
    assert [event["replied"] for event in case.events("round_finished")] == [3, 2, 3]
    assert [event["code"] for event in case.events("site_refused")] == ["model"]


def test_a_site_that_comes_back_on_another_node_keeps_its_name(tmp_path: Path) -> None:
    """A node id belongs to an installation; the site is who it says it is."""
    case = Case(tmp_path)
    online = [1, 2]

    class Moving(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return online

    def move(request: TrainRequest, release: Release) -> Release:
        if request.server_round == 1:
            online[:] = [1, 3]
        return release

    case.react(beta=move)
    configs = FakeSites.configs("alpha", "beta")
    case.run(grid=Moving(case.sites.app, [*configs, configs[1]]))
    assert [event["replied"] for event in case.events("round_finished")] == [2, 2, 2]
