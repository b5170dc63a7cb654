import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipward.summary import active_seconds, epsilon_text, summarise, write_summary
from server.metrics import Event

DIRECTION = {
    "r1": 0.1,
    "r5": 0.3,
    "r10": 0.5,
    "chance_r1": 0.01,
    "chance_r5": 0.05,
    "chance_r10": 0.1,
    "n": 100,
}
PRIVACY = {"mode": "dp", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "formal_guarantee": True}


def event(kind: str, *, at: int = 0, **fields: Any) -> Event:
    return {
        "version": 1,
        "time": f"2025-03-04T09:{at // 60:02d}:{at % 60:02d}.000+00:00",
        "kind": kind,
        **fields,
    }


def started(*, at: int = 0, **fields: Any) -> Event:
    facts = {
        "run": "demo",
        "rounds": 2,
        "sites": ["a", "b", "c"],
        "privacy": PRIVACY,
        "versions": {"flwr": "1.41"},
    }
    return event("run_started", at=at, **{**facts, **fields})


def reply(server_round: int, site: str, **fields: Any) -> Event:
    facts = {
        "bytes_up": 100,
        "steps": 5,
        "epsilon": 0.5 * server_round,
        "delta": 1e-5,
        "insecure_seed": False,
    }
    return event("site_replied", round=server_round, site=site, **{**facts, **fields})


def refusal(server_round: int, site: str) -> Event:
    return event("site_refused", round=server_round, site=site, code="failed", incident="12345678")


def finished(server_round: int) -> Event:
    return event("round_finished", round=server_round, seconds={"train": 9.0, "communicate": 1.0})


def evaluation(recall: float) -> dict[str, Any]:
    return {
        "retrieval": {"image_to_text": DIRECTION | {"r10": recall}, "text_to_image": DIRECTION},
        "zero_shot": {"macro_auroc": 0.7, "chance": 0.5, "per_class": {"edema": 0.7, "fracture": None}},
    }


def evaluated(server_round: int, recall: float, **fields: Any) -> Event:
    return event("evaluated", round=server_round, seconds=4.0, evaluation=evaluation(recall), **fields)


RUN = [
    started(),
    evaluated(0, 0.2, public_start=True),
    reply(1, "a"),
    reply(1, "b", bytes_up=201),
    refusal(1, "c"),
    evaluated(1, 0.3),
    finished(1),
    reply(2, "a", epsilon=1.25),
    refusal(2, "b"),
    refusal(2, "c"),
    evaluated(2, 0.4),
    finished(2),
    event("run_finished", at=65, rounds=2, seconds=65.0),
]


def test_a_whole_run_is_summed_up_as_the_contract_says() -> None:
    assert summarise(RUN) == {
        "version": 1,
        "run": "demo",
        "rounds": 2,
        "seconds": {"total": 65.0, "train": 18.0, "communicate": 2.0, "evaluate": 12.0},
        "bytes_up_per_site_round": 134,
        "privacy": {
            "mode": "dp",
            "unit": "patient",
            "epsilon": 1.25,
            "delta": 1e-5,
            "formal_guarantee": True,
        },
        "sites": [
            {"name": "a", "epsilon": 1.25, "delta": 1e-5, "steps": 10, "rounds": 2, "refusals": 0},
            {"name": "b", "epsilon": 0.5, "delta": 1e-5, "steps": 5, "rounds": 1, "refusals": 1},
            {"name": "c", "epsilon": None, "delta": None, "steps": 0, "rounds": 0, "refusals": 2},
        ],
        "evaluation": evaluation(0.4),
        "public_start": evaluation(0.2),
        "versions": {"flwr": "1.41"},
    }


def test_no_events_make_a_summary_of_unknowns() -> None:
    assert summarise([]) == {
        "version": 1,
        "run": None,
        "rounds": 0,
        "seconds": {"total": None, "train": None, "communicate": None, "evaluate": None},
        "bytes_up_per_site_round": None,
        "privacy": {"mode": None, "unit": None, "epsilon": None, "delta": None, "formal_guarantee": False},
        "sites": [],
        "evaluation": None,
        "public_start": None,
        "versions": {},
    }


def test_without_a_finished_round_there_is_a_start_but_no_result() -> None:
    summary = summarise(RUN[:3])
    assert (summary["rounds"], summary["evaluation"]) == (0, None)
    assert summary["public_start"] == evaluation(0.2)
    assert summary["bytes_up_per_site_round"] is None
    assert summary["privacy"]["epsilon"] == 0.5  # spent, though the round never finished


def test_an_untrained_model_is_no_public_start() -> None:
    assert summarise([started(), evaluated(0, 0.1, public_start=False)])["public_start"] is None


def test_without_dp_there_is_neither_epsilon_nor_guarantee() -> None:
    none = {"mode": "none", "unit": "patient", "epsilon": None, "delta": None, "formal_guarantee": False}
    events = [started(privacy=none), reply(1, "a", epsilon=None, delta=None), finished(1)]
    assert summarise(events)["privacy"] == none


def test_a_fixed_noise_seed_voids_the_guarantee() -> None:
    events = [started(), reply(1, "a"), reply(1, "b", insecure_seed=True), finished(1)]
    assert summarise(events)["privacy"]["formal_guarantee"] is False


def test_the_maximum_is_unknown_when_one_site_that_replied_did_not_say() -> None:
    events = [started(), reply(1, "a"), reply(1, "b", epsilon=None), finished(1)]
    assert summarise(events)["privacy"]["epsilon"] is None


@given(cut=st.integers(1, len(RUN) - 2))
def test_a_crash_and_repetition_anywhere_changes_nothing_but_time(cut: int) -> None:
    done = max((past["round"] for past in RUN[:cut] if past["kind"] == "round_finished"), default=0)
    rest = [past for past in RUN if past.get("round", 0) > done] + RUN[-1:]
    repeated = [*RUN[:cut], event("run_resumed", round=done), *rest]
    expected = summarise(RUN)
    if cut == 1:
        expected["public_start"] = None
        expected["seconds"]["evaluate"] -= 4.0
    assert summarise(repeated) == expected


def test_a_lower_epsilon_of_a_repeated_release_does_not_lower_what_was_spent() -> None:
    events = [started(), reply(1, "a", epsilon=0.9), finished(1), reply(2, "a", epsilon=0.4, replayed=True)]
    assert summarise(events)["sites"][0]["epsilon"] == 0.9


def test_a_site_that_joined_later_is_listed_after_the_named_ones() -> None:
    events = [started(sites=["a"]), reply(1, "z"), reply(1, "a"), finished(1)]
    assert [site["name"] for site in summarise(events)["sites"]] == ["a", "z"]


def test_a_missing_part_of_an_evaluation_stays_unknown() -> None:
    partial = {"retrieval": {"image_to_text": {"r10": 0.5}}, "zero_shot": None}
    events = [started(), event("evaluated", round=1, seconds=1.0, evaluation=partial), finished(1)]
    found = summarise(events)["evaluation"]
    assert found["zero_shot"] is None
    assert found["retrieval"]["image_to_text"] == dict.fromkeys(DIRECTION) | {"r10": 0.5}
    assert found["retrieval"]["text_to_image"] == dict.fromkeys(DIRECTION)


def test_a_comparison_is_there_only_when_given() -> None:
    assert "compare" not in summarise(RUN)
    assert summarise(RUN, compare={"without_dp": evaluation(0.9)})["compare"] == {
        "without_dp": evaluation(0.9)
    }


def test_time_between_a_crash_and_the_resume_is_not_active() -> None:
    events = [
        started(at=0),
        event("round_started", at=10, round=1),
        event("run_resumed", at=1000, round=0),
        event("round_finished", at=1030, round=1),
    ]
    assert active_seconds(events) == 40.0
    assert active_seconds(events[:1]) == 0.0
    assert active_seconds([]) is None


def test_a_clock_set_back_takes_no_time_away() -> None:
    assert active_seconds([started(at=100), event("x", at=130), event("x", at=20)]) == 30.0


@given(epsilon=st.floats(0, 1e6) | st.sampled_from([0.0, 1.1, 0.29, 2.97, 3.0, 2.970000001]))
def test_a_printed_epsilon_is_never_below_the_true_one(epsilon: float) -> None:
    shown = float(epsilon_text(epsilon))
    assert epsilon <= shown < epsilon + 0.01 + 1e-9


def test_a_round_epsilon_is_printed_as_it_is() -> None:
    assert [epsilon_text(value) for value in (0.0, 1.1, 2.97, 2.9700001)] == ["0.00", "1.10", "2.97", "2.98"]


def test_a_written_summary_reads_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(path, summarise(RUN))
    assert json.loads(path.read_text()) == summarise(RUN)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(path, summarise(RUN))
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["summary.json"])


def test_a_summary_with_a_number_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(tmp_path / "summary.json", {"epsilon": math.inf})
    assert os.listdir(tmp_path) == []
