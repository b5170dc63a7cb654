from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import checkpoints
from server.errors import QuorumError
from server.federation import Federation
from server.late import LATE_FOLDER, staleness_factor
from server.metrics import epsilon_spent, read_events
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, RefusalCode, Release, TrainRequest
from strategies.settings import SettingsError
from tests.fake_site import FakeSites, Reaction, federation, refuse, send_nan
from tests.server.cases import Case, Killed, Tardy, averaged, close, learnt, moved, same


def patient(*, rounds: int = 2, exponent: float = 0.5, **strategy: Any) -> Federation:
    settings = {"deadline-seconds": 0.3, "late": "stale", "staleness-exponent": exponent, **strategy}
    return federation(training={"rounds": rounds}, strategy=settings)


def with_stale(case: Case, factor: float) -> Arrays:
    """The weights of round 2 when alpha's update of round 1 joins it, by the textbook."""
    start = case.start.arrays
    first = moved(start, [(learnt(case, start, 1, "beta"), 20), (learnt(case, start, 1, "gamma"), 30)])
    fresh = [(learnt(case, first, 2, "beta"), 20.0), (learnt(case, first, 2, "gamma"), 30.0)]
    return moved(first, [*fresh, (learnt(case, start, 1, "alpha"), 10 * factor)])


def left(case: Case) -> list[Path]:
    return list((case.run_dir / LATE_FOLDER).glob("*"))


@given(staleness=st.integers(0, 1000), exponent=st.floats(0, 10))
def test_an_older_update_never_weighs_more(staleness: int, exponent: float) -> None:
    assert 0 < staleness_factor(staleness + 1, exponent) <= staleness_factor(staleness, exponent) <= 1


def test_the_factor_is_that_of_the_paper() -> None:
    assert staleness_factor(0, 0.5) == 1
    assert staleness_factor(3, 0.5) == 0.5
    assert staleness_factor(9, 0) == 1


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 0.5), (0.0, 1.0)])
def test_a_late_release_joins_the_next_round_with_less_weight(
    tmp_path: Path, exponent: float, factor: float
) -> None:
    case = Case(tmp_path, settings=patient(exponent=exponent))
    arrays = case.run(grid=Tardy(case))
    assert close(arrays, with_stale(case, factor))
    [late], [arrived], [used] = (case.events(kind) for kind in ("site_late", "late_arrived", "stale_used"))
    assert (late["round"], late["site"]) == (1, "alpha")
    assert "used in a later round with less weight" in late["reason"]
    assert (arrived["round"], arrived["asked_in_round"], arrived["bytes_up"]) == (2, 1, 44)
    assert (used["round"], used["staleness"], used["factor"]) == (2, 1, factor)
    assert used["reason"] == "it was asked for in round 1 and came late"
    assert left(case) == []


def test_a_late_site_is_not_asked_anew_until_its_release_has_been_used(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient(rounds=3))
    case.run(grid=Tardy(case))
    asked = [event["sites"] for event in case.events("round_started")]
    assert asked == [["alpha", "beta", "gamma"], ["beta", "gamma"], ["alpha", "beta", "gamma"]]
    assert [event["late"] for event in case.events("sites_selected")] == [["alpha"]]
    assert case.sites.trainings("alpha") == 2


def test_the_registry_tells_that_it_was_waited_for_and_came(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient())
    case.run(grid=Tardy(case))
    assert [(one.server_round, one.site, one.outcome) for one in case.asks()] == [
        (1, "alpha", "late"), (1, "beta", "released"), (1, "gamma", "released"),
        (2, "beta", "released"), (2, "gamma", "released"),
    ]  # fmt: skip


def test_an_older_release_is_used_with_its_own_staleness(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient(rounds=3, exponent=1.0))
    case.run(grid=Tardy(case, tardiness=2))
    [used] = case.events("stale_used")
    assert (used["round"], used["staleness"], used["factor"]) == (3, 2, pytest.approx(1 / 3))


def test_a_late_release_is_dropped_when_the_federation_says_so(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient(late="drop"))
    case.run(grid=Tardy(case))
    assert case.events("late_arrived") == case.events("stale_used") == []
    [late] = case.events("site_late")
    assert "one that comes later is dropped (strategy.late)" in late["reason"]
    assert [event["sites"] for event in case.events("round_started")][1] == ["alpha", "beta", "gamma"]
    assert next((one.site, one.outcome) for one in case.asks()) == ("alpha", "deadline")


def test_one_that_never_comes_is_dropped_by_name_when_the_run_is_over(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient())
    case.run(grid=Tardy(case, tardiness=9))
    [dropped] = case.events("late_dropped")
    assert (dropped["site"], dropped["asked_in_round"]) == ("alpha", 1)
    assert dropped["reason"] == "the run is over"
    assert next(one.outcome for one in case.asks() if one.site == "alpha") == "dropped"


def test_one_that_flower_threw_away_is_dropped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, settings=patient(rounds=3))
    grid = Tardy(case, tardiness=9)
    monkeypatch.setattr("server.exchange.max", lambda *_: -9.0, raising=False)  # it lives no moment
    case.run(grid=grid)
    [dropped] = case.events("late_dropped")
    assert dropped["reason"] == "it never came"
    assert [event["sites"] for event in case.events("round_started")][1] == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize(
    ("reaction", "reason"),
    [
        (refuse(RefusalCode.POLICY), "it was a refusal: policy"),
        (send_nan, "it does not fit what this round trains"),
    ],
)
def test_what_comes_late_and_cannot_be_used_is_dropped_by_name(
    tmp_path: Path, reaction: Reaction, reason: str
) -> None:
    case = Case(tmp_path, settings=patient()).react(alpha=reaction)
    arrays = case.run(grid=Tardy(case))
    assert [event["reason"] for event in case.events("late_dropped")] == [reason]
    assert close(arrays, averaged(case, rounds=2, weights={"beta": 20, "gamma": 30}))
    assert left(case) == []


def test_a_repeated_round_takes_the_stored_release_and_none_is_stale(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient(rounds=1, **{"min-sites": 3, "round-retries": 2}))

    class OnceTardy(Tardy):
        def push_messages(self, messages: Any) -> list[str]:
            accepted = super().push_messages(messages)
            if len(case.events("round_started")) > 1:
                self.ready |= self.held
            return accepted

    arrays = case.run(grid=OnceTardy(case))
    assert close(arrays, averaged(case, rounds=1, weights={"alpha": 10, "beta": 20, "gamma": 30}))
    assert case.events("late_arrived") == case.events("stale_used") == []
    assert case.sites.trainings("alpha") == 1


def dying_before(server_round: int, patched: pytest.MonkeyPatch) -> None:
    """Kill before the checkpoint of a round is written."""
    save = checkpoints.save

    def dying(run_dir: Path, done: checkpoints.Checkpoint, **named: Any) -> Path:
        if done.server_round == server_round:
            raise Killed
        return save(run_dir, done, **named)

    patched.setattr(checkpoints, "save", dying)


def test_what_has_come_survives_a_kill(tmp_path: Path) -> None:
    whole = Case(tmp_path / "whole", settings=patient(rounds=3))
    undisturbed = whole.run(grid=Tardy(whole))
    case = Case(tmp_path / "killed", settings=patient(rounds=3))
    with pytest.MonkeyPatch.context() as patched:
        dying_before(2, patched)
        with pytest.raises(Killed):
            case.run(grid=Tardy(case))
    assert len(left(case)) == 1
    assert same(case.run(resume=True), undisturbed)
    assert left(case) == []
    assert case.sites.trainings("alpha") == 2


def test_a_kill_after_the_checkpoint_uses_no_late_release_twice(tmp_path: Path) -> None:
    whole = Case(tmp_path / "whole", settings=patient(rounds=3))
    undisturbed = whole.run(grid=Tardy(whole))
    case = Case(tmp_path / "killed", settings=patient(rounds=3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.late.LateReleases.remove", dying_once_it_removes)
        with pytest.raises(Killed):
            case.run(grid=Tardy(case))
    assert len(left(case)) == 1
    assert same(case.run(resume=True), undisturbed)
    assert [event["round"] for event in case.events("stale_used")] == [2]
    assert left(case) == []


def dying_once_it_removes(_: object, names: list[str]) -> None:
    if names:
        raise Killed


def test_what_has_not_come_before_a_kill_is_dropped_by_name(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient())
    with pytest.MonkeyPatch.context() as patched:
        dying_before(2, patched)
        with pytest.raises(Killed):
            case.run(grid=Tardy(case, tardiness=9))
    case.run(resume=True)
    [dropped] = case.events("late_dropped")
    assert (dropped["site"], dropped["asked_in_round"]) == ("alpha", 1)
    assert dropped["reason"] == "the coordinator was restarted before it came"
    assert next(one.outcome for one in case.asks() if one.server_round == 1) == "dropped"
    assert [event["sites"] for event in case.events("round_started")][-1] == ["alpha", "beta", "gamma"]


def test_in_one_process_a_release_written_after_the_deadline_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, settings=patient(exponent=1.0))

    class Slow(InProcessGrid):
        def _reply_to(self, message: Any) -> Any:
            reply = super()._reply_to(message)
            if (message.metadata.dst_node_id, message.metadata.group_id) == (1, "1"):
                reply.metadata.created_at += 1.0
                monkeypatch.setattr("server.exchange.time.time", lambda: now() + 1.0)
            else:
                monkeypatch.setattr("server.exchange.time.time", now)
            return reply

    import time

    now = time.time
    arrays = case.run(grid=Slow(case.sites.app, FakeSites.configs(*case.names)))
    assert close(arrays, with_stale(case, 0.5))


def test_epsilon_of_a_late_release_counts_whether_it_is_used_or_not(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient())

    def told(request: TrainRequest, release: Release) -> Release:
        facts = release.facts.model_copy(update={"epsilon": 0.1 * request.server_round})
        return Release(facts=facts, update={**release.update, "a": release.update["a"] * np.float32(np.nan)})

    case.react(alpha=told).run(grid=Tardy(case))
    assert epsilon_spent(read_events(case.run_dir / "metrics.jsonl"))["alpha"] == pytest.approx(0.1)


def test_a_damaged_file_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path, settings=patient())
    folder = case.run_dir / LATE_FOLDER
    folder.mkdir(parents=True)
    (folder / "round-0001-0123456789abcdef.safetensors").write_bytes(b"torn")
    (folder / "notes.txt").touch()
    case.run()
    assert "passed over round-0001-0123456789abcdef.safetensors" in caplog.text
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("name", ["scaffold", "median", "krum", "norm-bound"])
def test_a_strategy_that_looks_at_single_updates_has_no_stale_ones(name: str) -> None:
    with pytest.raises(SettingsError, match="looks at what each site released in this very round"):
        patient(name=name, **{"min-sites": 5})


def test_fresh_releases_alone_make_a_round_full(tmp_path: Path) -> None:
    case = Case(tmp_path, settings=patient(**{"min-sites": 3}))
    with pytest.raises(QuorumError, match="alpha deadline"):
        case.run(grid=Tardy(case))
