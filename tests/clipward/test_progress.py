import contextlib
import io
from typing import Any

import pytest
from rich.console import Console

from clipward.progress import ProgressDisplay, describe
from server.metrics import Event

PRIVACY = {"mode": "dp", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "formal_guarantee": True}
EVALUATION = {
    "retrieval": {"image_to_text": {"r10": 0.5123, "chance_r10": 0.05}},
    "zero_shot": {"macro_auroc": 0.7071, "chance": 0.5},
}


def event(kind: str, **fields: Any) -> Event:
    return {"version": 1, "time": "2025-03-04T09:00:00.000+00:00", "kind": kind, **fields}


RUN = [
    event("run_started", run="demo", rounds=2, sites=["a", "b"], privacy=PRIVACY),
    event("evaluated", round=0, seconds=1.0, evaluation={"retrieval": None, "zero_shot": None}),
    event("round_started", round=1, sites=["a", "b"]),
    event("site_replied", round=1, site="a", bytes_up=2_500_000, steps=25, epsilon=0.501, epsilon_max=3.0),
    event("site_refused", round=1, site="b", code="budget", incident="12345678"),
    event("evaluated", round=1, seconds=1.0, evaluation=EVALUATION),
    event("round_finished", round=1, seconds={"train": 9.0, "communicate": 1.5, "aggregate": None}),
    event("run_resumed", round=1),
    event("run_finished", rounds=2, seconds=3661.2),
]


def lines(events: list[Event]) -> list[str]:
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, width=40)) as display:
        for past in events:
            display(past)
    return output.getvalue().splitlines()


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_event_is_one_plain_line() -> None:
    assert lines(RUN) == [
        "run demo: 2 rounds, 2 sites, patient-level privacy, epsilon 3.0 asked for",
        "round 0 of 2: nothing to evaluate",
        "round 1 of 2: asking 2 sites",
        "round 1 of 2: a replied, 2.5 MB up, 25 steps, epsilon 0.51 of 3",
        "round 1 of 2: b refused: budget (incident 12345678)",
        "round 1 of 2: R@10 image to text 51.2% (chance 5.0%), macro AUROC 0.707 (chance 0.500)",
        "round 1 of 2: finished in 10.5 s",
        "resumed after round 1 of 2",
        "finished 2 rounds in 1:01:01",
    ]


def test_no_event_can_smuggle_markup_or_control_characters_into_a_line() -> None:
    (line,) = lines([event("site_refused", round=1, site="[red]x\x1b[2J\n\r\x07", code="[/]", incident="1")])
    assert line == "round 1: [red]x?[2J??? refused: [/] (incident 1)"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"replayed": True}, "an earlier release sent again"),
        ({"insecure_seed": True}, "INSECURE SEED: no guarantee"),
        ({"epsilon": 1.0}, "epsilon 1.00"),
    ],
)
def test_what_is_special_about_a_reply_is_said(fields: dict[str, Any], words: str) -> None:
    assert describe(event("site_replied", round=1, site="a", **fields)) == f"round 1: a replied, {words}"


def test_a_run_without_dp_says_so() -> None:
    privacy = {"mode": "none", "formal_guarantee": False}
    assert "no formal guarantee" in describe(
        event("run_started", run="x", rounds=1, sites=[], privacy=privacy)
    )


def test_an_event_of_another_kind_is_its_name() -> None:
    assert describe(event("later_invention", round=1)) == "later_invention"


def test_a_terminal_shows_the_state_of_the_run() -> None:
    console = terminal()
    with ProgressDisplay(console) as display:
        for past in RUN[:-1]:
            display(past)
    text = shown(console)
    assert "round 1 of 2" in text
    assert "1 of 2 replied, 1 refused" in text
    assert "epsilon 0.51 of 3 (highest of all sites)" in text
    assert "R@10 image to text 51.2% (chance 5.0%)" in text


def test_the_terminal_is_given_back_after_an_error() -> None:
    console = terminal()
    with contextlib.suppress(KeyboardInterrupt), ProgressDisplay(console) as display:
        display(RUN[0])
        raise KeyboardInterrupt
    assert shown(console).endswith("\x1b[?25h")  # show the cursor


def test_a_terminal_shows_no_control_characters_of_an_event() -> None:
    console = terminal()
    with ProgressDisplay(console) as display:
        display(RUN[0] | {"run": "evil\x1b[2J", "privacy": None})
    assert "\x1b[2J" not in shown(console)
    assert "no formal guarantee" in shown(console)


def test_a_replayed_past_is_known_but_not_shown_again() -> None:
    output = io.StringIO()
    with ProgressDisplay(Console(file=output)) as display:
        display.replay(RUN[:7])
        assert output.getvalue() == ""
        display(event("round_started", round=2, sites=["a"]))
    assert output.getvalue() == "round 2 of 2: asking 1 site\n"


def test_an_event_with_a_reason_says_it() -> None:
    retried = event("site_retried", round=2, site="north", attempt=2, reason="its answer was lost")
    assert describe(retried, rounds=5) == "round 2 of 5: north retried: its answer was lost"
    stopped = event("stopped_early", round=4, reason="3 evaluations were no better")
    assert describe(stopped) == "round 4: stopped early: 3 evaluations were no better"


def test_prototypes_say_how_many_concepts_have_a_direction_of_their_own() -> None:
    made = event(
        "prototypes_made", round=1, sites=3, concepts=14, used={"image": 5, "text": 2}, least_count=9.0
    )
    assert describe(made) == "round 1: prototypes of 3 sites, 5 of 14 by image, 2 of 14 by text"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("prototypes_replied", "prototypes"),
        ("losses_replied", "its mean loss"),
        ("centre_replied", "the sum of its features"),
    ],
)
def test_what_is_released_beside_updates_is_told(kind: str, what: str) -> None:
    replied = event(kind, round=1, site="a", bytes_up=500, steps=1, epsilon=0.501, epsilon_max=3.0)
    assert describe(replied) == f"round 1: a released {what}, 500 bytes up, epsilon 0.51 of 3"


def test_a_terminal_counts_the_bytes_of_a_round() -> None:
    console = terminal()
    with ProgressDisplay(console) as display:
        for number in (1, 2):
            display(event("round_started", round=number, sites=["a", "b"]))
            display(event("prototypes_replied", round=number, site="a", bytes_up=500, bytes_down=1_000))
            display(event("site_replied", round=number, site="a", bytes_up=1_500, bytes_down=1_000))
    assert "2.0 kB up, 2.0 kB down in this round" in shown(console)
    assert "1 of 2 replied" in shown(console)
