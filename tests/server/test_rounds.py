import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from server.checkpoints import load_best, load_latest
from server.errors import CheckpointError, QuorumError, RunError
from server.federation import Federation
from server.metrics import RunLog, effective, finished_rounds, read_events
from server.registry import Entry
from server.rounds import Start
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, Refusal, RefusalCode, Release, TrainRequest, encode
from strategies.strategy import Strategy
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
)
from tests.server.cases import (
    SITES,
    Case,
    Deployed,
    Killed,
    Steps,
    averaged,
    close,
    same,
)

PROMPT_SECONDS = 20  # beyond a deadline of a few seconds, even on a busy machine; a hang is longer


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
    [retired] = case.events("site_retired")
    assert (retired["round"], retired["site"], retired["reason"]) == (1, "beta", "its budget is spent")


def failing_once() -> Reaction:
    left = [True]
    return lambda request, release: crash(request, release) if left and left.pop() else release


@pytest.mark.parametrize(("retries", "replied"), [(0, [2, 3, 3]), (1, [3, 3, 3])])
def test_a_site_that_failed_is_asked_again(tmp_path: Path, retries: int, replied: list[int]) -> None:
    case = Case(tmp_path, settings=federation(strategy={"retries": retries})).react(beta=failing_once())
    case.run()
    assert [event["replied"] for event in case.events("round_finished")] == replied


def test_every_ask_is_in_the_registry_with_what_came_of_it(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 1}, strategy={"min-sites": 1})
    case = Case(tmp_path, settings=settings).react(alpha=refuse(RefusalCode.POLICY), beta=failing_once())
    case.run()
    asks = case.asks()
    assert [(one.site, one.attempt, one.outcome, one.bytes_up) for one in asks] == [
        ("alpha", 1, "policy", 0),
        ("beta", 1, "failed", 0),
        ("beta", 2, "released", 44),
        ("gamma", 1, "released", 44),
    ]
    assert len({one.request for one in asks}) == 1
    assert {(one.run, one.server_round, one.bytes_down) for one in asks} == {("test", 1, 44)}


def test_an_ask_is_in_the_registry_before_it_is_on_its_way(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=federation(training={"rounds": 1}))
    known: list[int] = []

    class Looking(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            if messages[0].metadata.message_type == "train":
                known.append(len(case.asks()))
            return super().push_messages(messages)

    case.run(grid=Looking(case.sites.app, FakeSites.configs(*SITES)))
    assert known == [1, 2, 3]


def test_in_one_process_a_site_is_asked_when_its_turn_comes(tmp_path: Path) -> None:
    """Else what is sent to each, which may be as large as the model, would lie in memory for all."""
    case = Case(tmp_path, settings=federation(training={"rounds": 1}))
    waiting: list[int] = []

    class Looking(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            accepted = super().push_messages(messages)
            if self._sent[accepted[0]].metadata.message_type == "train":
                waiting.append(len(self._sent))
            return accepted

    case.run(grid=Looking(case.sites.app, FakeSites.configs(*SITES)))
    assert waiting == [1, 1, 1]


def test_a_retry_says_why_and_stays_within_the_deadline(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 1}, strategy={"retries": 9, "deadline-seconds": 2.0})
    case = Case(tmp_path, settings=settings).react(beta=crash)
    began = time.monotonic()
    case.run(grid=Deployed(case))
    assert time.monotonic() - began < PROMPT_SECONDS
    retried = case.events("site_retried")
    at_most = [2, 3, 4]  # at once, after half a second and after one more; a busy machine gets to fewer
    assert retried
    assert [event["attempt"] for event in retried] == at_most[: len(retried)]
    assert {(event["site"], event["round"]) for event in retried} == {("beta", 1)}
    assert "costs no budget" in retried[0]["reason"]
    assert [event["code"] for event in case.events("site_refused")] == ["failed"]


def test_a_site_that_flower_cannot_reach_is_tried_again(tmp_path: Path) -> None:
    class Unreachable(InProcessGrid):
        refused = 0

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            training = messages[0].metadata.message_type == "train"
            self.refused += training
            return [] if training and self.refused == 1 else super().push_messages(messages)

    case = Case(tmp_path, settings=federation(training={"rounds": 1}))
    case.run(grid=Unreachable(case.sites.app, FakeSites.configs(*SITES)))
    assert [event["replied"] for event in case.events("round_finished")] == [3]
    assert [(one.site, one.outcome) for one in case.asks() if one.site == "alpha"] == [
        ("alpha", "unreachable"), ("alpha", "released"),
    ]  # fmt: skip


@pytest.mark.parametrize(("private", "asked"), [(False, 2), (True, 1)])
def test_a_failure_that_a_private_site_itself_reports_is_not_charged_twice(
    tmp_path: Path, private: bool, asked: int
) -> None:
    settings = federation(training={"rounds": 1}, strategy={"min-sites": 1})
    if private:
        privacy = {"mode": "dp", "epsilon": 1.0}
        settings = federation(
            training={"rounds": 1},
            strategy={"min-sites": 1},
            privacy=privacy,
            objective={"name": "anchored"},
        )
    case = Case(tmp_path, "alpha", settings=settings).react(alpha=refuse(RefusalCode.FAILED))
    with pytest.raises(QuorumError):
        case.run()
    assert len(case.asks()) == asked


def test_a_round_with_too_few_releases_is_repeated_with_the_same_requests(tmp_path: Path) -> None:
    undisturbed = Case(tmp_path / "a").run()
    settings = federation(strategy={"min-sites": 3, "retries": 0, "round-retries": 1})
    case = Case(tmp_path / "b", settings=settings).react(alpha=failing_once())
    assert same(case.run(), undisturbed)
    [repeated] = case.events("round_repeated")
    assert (repeated["round"], repeated["attempt"]) == (1, 2)
    assert repeated["reason"] == "2 sites replied, 3 are needed"
    assert [case.sites.trainings(site) for site in SITES] == [3, 3, 3]
    assert len({one.request for one in case.asks() if one.server_round == 1}) == 1


def test_a_round_is_repeated_so_often_and_then_the_run_stops(tmp_path: Path) -> None:
    settings = federation(strategy={"min-sites": 3, "retries": 0, "round-retries": 2})
    case = Case(tmp_path, settings=settings).react(alpha=crash)
    with pytest.raises(QuorumError, match=r"round 1: 2 sites replied in each of 3 attempts, 3 are needed"):
        case.run()
    assert [event["attempt"] for event in case.events("round_repeated")] == [2, 3]


def test_so_many_sites_as_wanted_are_asked_and_the_others_are_named(tmp_path: Path) -> None:
    settings = federation(strategy={"target-sites": 2}, training={"rounds": 6})
    case = Case(tmp_path, settings=settings)
    case.run()
    selected = case.events("sites_selected")
    assert len(selected) == 6
    for event, started in zip(selected, case.events("round_started"), strict=True):
        assert started["sites"] == event["selected"]
        assert sorted([*event["selected"], *event["not_selected"]]) == list(SITES)
        assert "2 of 3 were drawn" in event["reason"]
    assert len({tuple(event["selected"]) for event in selected}) > 1


def test_a_resumed_run_draws_the_same_sites(tmp_path: Path) -> None:
    settings = federation(strategy={"fraction": 0.5, "min-sites": 1}, training={"rounds": 5})
    undisturbed = Case(tmp_path / "a", settings=settings)
    arrays = undisturbed.run()
    case = Case(tmp_path / "b", settings=settings)
    with pytest.MonkeyPatch.context() as patched:
        Steps(patched, die_at=60)
        with pytest.raises(Killed):
            case.run()
    assert same(case.run(resume=True), arrays)
    drawn = [{e["round"]: e["sites"] for e in one.events("round_started")} for one in (undisturbed, case)]
    assert drawn[0] == drawn[1]


class Changing(InProcessGrid):
    """Nodes come and go."""

    online: tuple[int, ...] = (1, 2)

    def get_node_ids(self) -> list[int]:
        return list(self.online)


def test_sites_may_join_and_leave_while_the_run_goes_on(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=federation(strategy={"min-sites": 1}))
    grid = Changing(case.sites.app, FakeSites.configs(*SITES))

    def change(request: TrainRequest, release: Release) -> Release:
        grid.online = {1: (1, 2, 3), 2: (1, 3), 3: (1, 3)}[request.server_round]
        return release

    case.react(alpha=change).run(grid=grid)
    assert [event["sites"] for event in case.events("round_started")] == [
        ["alpha", "beta"], list(SITES), ["alpha", "gamma"],
    ]  # fmt: skip
    assert [(e["round"], e["site"], e["reason"]) for e in case.events("site_joined")] == [
        (2, "gamma", "it is ready to train")
    ]
    assert [(e["round"], e["site"], e["reason"]) for e in case.events("site_left")] == [
        (3, "beta", "its node is gone")
    ]


def measured(*values: float) -> Callable[[Arrays], Mapping[str, Any]]:
    """An evaluation that finds these values, one after the other."""
    left = list(values)
    return lambda _: {"zero_shot": {"macro_auroc": left.pop(0)}}


PLATEAU = {"metric": "zero_shot.macro_auroc", "stop-after": 2, "data": {"table": "public.csv"}}


def test_a_run_that_gets_no_better_stops_and_names_its_best_checkpoint(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 9}, evaluation=PLATEAU, checkpoints={"keep": 1})
    case = Case(tmp_path, settings=settings)
    case.evaluate = measured(0.5, 0.6, 0.7, 0.7, 0.6)
    arrays = case.run()
    [stopped] = case.events("stopped_early")
    assert (stopped["round"], stopped["best_round"], stopped["value"]) == (4, 2, 0.7)
    assert stopped["reason"] == "2 evaluations were no better (evaluation.stop-after)"
    assert case.events("run_finished")[0]["rounds"] == 4
    best, last = load_best(case.run_dir), load_latest(case.run_dir)
    assert best is not None
    assert last is not None
    assert (best.server_round, last.server_round) == (2, 4)
    assert same(last.arrays, arrays)
    assert sorted(path.name for path in case.run_dir.glob("checkpoints/round-*")) == [
        "round-0002", "round-0004",
    ]  # fmt: skip
    case.evaluate = measured(0.6)
    assert same(case.run(resume=True), arrays)
    assert len(case.events("round_started")) == 4


def test_killed_at_any_step_it_stops_at_the_same_round_and_names_the_same_best(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 5}, evaluation=PLATEAU, checkpoints={"keep": 1})

    def plateau(folder: Path) -> Case:
        case = Case(folder, "alpha", "beta", settings=settings)
        # It is best after round 1, whatever the weights are then: those of round 1 and of no other.
        case.evaluate = lambda now: {"zero_shot": {"macro_auroc": float(same(now, first))}}
        return case

    first = after_one_round(tmp_path / "first", settings)
    undisturbed = plateau(tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patched:
        steps = Steps(patched, die_at=0)
        plateau(tmp_path / "counted").run()
    for die_at in range(1, steps.done + 1, 5):
        case = plateau(tmp_path / str(die_at))
        with pytest.MonkeyPatch.context() as patched:
            Steps(patched, die_at=die_at)
            with pytest.raises(Killed):
                case.run()
        assert same(case.run(resume=True), undisturbed), die_at
        best = load_best(case.run_dir)
        assert best is not None
        assert best.server_round == 1, die_at
        assert case.events("stopped_early")[-1]["round"] == 3, die_at


def after_one_round(folder: Path, settings: Federation) -> Arrays:
    """The bits of round 1."""
    case = Case(folder, "alpha", "beta", settings=settings)
    seen: list[Arrays] = []
    case.evaluate = seen.append
    case.run()
    return seen[1]


@pytest.mark.parametrize(
    ("policy", "left"), [({"keep": 2}, [4, 5]), ({"keep": 1, "keep-every": 2}, [0, 2, 4, 5])]
)
def test_old_checkpoints_are_pruned_as_the_federation_says(
    tmp_path: Path, policy: dict[str, int], left: list[int]
) -> None:
    case = Case(tmp_path, settings=federation(training={"rounds": 5}, checkpoints=policy))
    case.run()
    found = sorted(int(path.name[6:]) for path in case.run_dir.glob("checkpoints/round-*"))
    assert found == left


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


def test_silence_ends_at_the_deadline_and_what_came_in_time_is_used(tmp_path: Path) -> None:
    settings = federation(training={"rounds": 1}, strategy={"deadline-seconds": 2.0})
    case = Case(tmp_path, settings=settings)
    began = time.monotonic()
    arrays = case.run(grid=Deployed(case, silent=[1]))
    assert time.monotonic() - began < PROMPT_SECONDS
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
    began = time.time()

    def look(request: TrainRequest, release: Release) -> Release:
        seen.append(request.deadline_unix_seconds)
        return release

    Case(tmp_path, settings=federation(training={"rounds": 1})).react(alpha=look).run()
    assert seen[0] is not None
    assert began + 30 <= seen[0] <= time.time() + 30


def test_a_missing_site_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    case = Case(tmp_path, "alpha", settings=federation(strategy={"deadline-seconds": 0.7}))
    grid = Deployed(case)
    began = time.monotonic()
    with pytest.raises(QuorumError, match="1 of the 2 sites needed are ready"):
        case.run(grid=grid)
    assert 0.6 < time.monotonic() - began < PROMPT_SECONDS
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


STATEFUL = ("fedavg", "fedadam", "fedavgm", "scaffold", "feddyn", "median", "norm-bound")


def small(folder: Path, name: str = "fedavg") -> Case:
    names = SITES if name == "median" else SITES[:2]
    settings = federation(
        training={"rounds": 3 if name in STATEFUL[1:] else 2, "optimizer": "sgd"},
        strategy={"name": name, "min-sites": len(names)},
    )
    return Case(folder, *names, settings=settings)


@pytest.mark.parametrize("name", STATEFUL)
def test_killed_at_any_step_a_run_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    """For a strategy with a state that would show, it is the state of the last checkpoint, or none."""
    undisturbed = small(tmp_path / "whole", name).run()
    with pytest.MonkeyPatch.context() as patched:
        steps = Steps(patched, die_at=0)
        small(tmp_path / "counted", name).run()
    assert steps.done > 60
    for die_at in range(1, steps.done + 1, 2 if name == "fedavg" else 9):
        case = small(tmp_path / str(die_at), name)
        with pytest.MonkeyPatch.context() as patched:
            Steps(patched, die_at=die_at)
            with pytest.raises(Killed):
                case.run()
        assert same(case.run(resume=True), undisturbed), die_at
        rounds = case.settings.training.rounds
        assert {case.sites.trainings(site) for site in case.names} == {rounds}, die_at
        events = effective(read_events(case.run_dir / "metrics.jsonl"))
        assert finished_rounds(events) == set(range(1, rounds + 1)), die_at
        assert {e["round"] for e in events if e["kind"] == "evaluated"} == set(range(rounds + 1)), die_at
        require_told(case.asks(), sites=case.names, rounds=rounds)


def require_told(asks: list[Entry], *, sites: Sequence[str], rounds: int) -> None:
    """Of each site and round one release was taken, by the one request that it was ever asked."""
    for site in sites:
        for server_round in range(1, rounds + 1):
            mine = [one for one in asks if (one.site, one.server_round) == (site, server_round)]
            assert [one.attempt for one in mine] == list(range(1, len(mine) + 1))
            assert len({one.request for one in mine}) == 1
            assert {one.outcome for one in mine} <= {"released", None}
            assert mine[-1].outcome == "released"


def test_the_state_of_a_strategy_is_its_own_and_shows(tmp_path: Path) -> None:
    """Else the test above would hold for a coordinator that forgets it."""
    ends = {name: small(tmp_path / name, name).run() for name in ("fedadam", "fedavgm", "feddyn")}
    for name, arrays in ends.items():
        case = small(tmp_path / f"{name}-forgetting", name)
        with pytest.MonkeyPatch.context() as patched:
            dying_after(2, patched)
            with pytest.raises(Killed):
                case.run()
            patched.setattr(Strategy, "restore", lambda *_: None)
            assert not same(case.run(resume=True), arrays), name


def dying_after(server_round: int, patched: pytest.MonkeyPatch) -> None:
    record = RunLog.record

    def dying(log: RunLog, kind: str, **fields: Any) -> None:
        record(log, kind, **fields)
        if kind == "round_finished" and fields["round"] == server_round:
            patched.setattr(RunLog, "record", record)
            raise Killed

    patched.setattr(RunLog, "record", dying)


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
        ({"strategy": {"fraction": 0.5}}, "strategy.fraction was 1.0, is 0.5"),
        ({"strategy": {"name": "fedadam"}}, "strategy.name was 'fedavg', is 'fedadam'"),
        (
            {"evaluation": {"metric": "zero_shot.macro_auroc"}},
            "evaluation.metric was 'retrieval.image_to_text.r10', is 'zero_shot.macro_auroc'",
        ),
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
