import html
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clipward.report import DASH, REFUSALS, write_report
from clipward.summary import summarise
from server.metrics import Event
from strategies.messages import RefusalCode

DP = {"mode": "dp", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "formal_guarantee": True}
NONE = {"mode": "none", "unit": "patient", "epsilon": None, "delta": None, "formal_guarantee": False}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def evaluation(level: float, *, zero_shot: bool = True) -> dict[str, Any]:
    recalls = {"r1": level / 4, "r5": level / 2, "r10": level}
    chances = {"chance_r1": 0.005, "chance_r5": 0.025, "chance_r10": 0.05, "n": 200}
    per_class = {"edema": 0.5 + level / 4, "nodule": 0.55, "fracture": None}
    return {
        "retrieval": {"image_to_text": recalls | chances, "text_to_image": recalls | chances},
        "zero_shot": {"macro_auroc": 0.5 + level / 3, "chance": 0.5, "per_class": per_class}
        if zero_shot
        else None,
    }


def events_of(
    *,
    sites: tuple[str, ...] = ("st-anna", "riverside"),
    rounds: int = 2,
    privacy: dict[str, Any] = DP,
    zero_shot: bool = True,
    insecure: bool = False,
    refusing: str | None = None,
    run: str = "thorax",
) -> list[Event]:
    """A plausible run, one second an event."""
    events: list[Event] = []

    def say(kind: str, **fields: Any) -> None:
        time = f"2025-03-04T09:{len(events) // 60:02d}:{len(events) % 60:02d}.000+00:00"
        events.append({"version": 1, "time": time, "kind": kind, **fields})

    private = privacy["mode"] == "dp"
    say(
        "run_started",
        run=run,
        rounds=2,
        sites=list(sites),
        privacy=privacy,
        part="heads",
        parameters={"total": 1_234_567, "trainable": 8_192},
        objective="anchored",
        versions={"flwr": "1.41.0"},
        config={"model": {"encoder": "tiny"}, "privacy": {"epsilon": privacy["epsilon"]}},
    )
    say("evaluated", round=0, seconds=1.0, public_start=True, evaluation=evaluation(0.2, zero_shot=zero_shot))
    for server_round in range(1, rounds + 1):
        say("round_started", round=server_round, sites=list(sites))
        for site in sites:
            if site == refusing:
                say(
                    "site_refused",
                    round=server_round,
                    site=site,
                    code="budget",
                    incident=f"1234567{server_round}",
                )
                continue
            say(
                "site_replied",
                round=server_round,
                site=site,
                bytes_up=2_000_000,
                bytes_down=2_000_000,
                seconds=10,
                steps=25,
                epsilon=1.001 * server_round if private else None,
                epsilon_max=3.0 if private else None,
                delta=1e-5 if private else None,
                noise_multiplier=0.83 if private else None,
                sample_rate=0.02,
                max_grad_norm=1.0,
                replayed=False,
                insecure_seed=insecure,
            )
        result = evaluation(0.2 + 0.1 * server_round, zero_shot=zero_shot)
        say("evaluated", round=server_round, seconds=2.0, evaluation=result)
        seconds = {"train": 90.0, "communicate": 5.0, "aggregate": 0.5, "checkpoint": 0.5}
        say("round_finished", round=server_round, replied=len(sites), refused=0, seconds=seconds)
    if rounds == 2:
        say("run_finished", rounds=rounds, seconds=200.0)
    return events


class Page(HTMLParser):
    """The parsed page; checks that every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(tmp_path: Path, events: list[Event], **options: Any) -> str:
    compare = options.pop("compare", None)
    path = tmp_path / "report.html"
    write_report(path, events=events, summary=summarise(events, compare=compare), **options)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a plain, finished, private run."""
    return render(tmp_path_factory.mktemp("whole"), events_of())


VARIANTS: dict[str, dict[str, Any]] = {
    "a whole run": {},
    "no zero-shot": {"zero_shot": False},
    "mode none": {"privacy": NONE},
    "zero finished rounds": {"rounds": 0},
    "an unfinished run": {"rounds": 1},
    "one site": {"sites": ("only",)},
    "no site": {"sites": ()},
    "a site that never replied": {"refusing": "riverside"},
    "many sites": {"sites": tuple(f"hospital-{number}" for number in range(30))},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_run_makes_one_well_formed_page_that_fetches_nothing(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    text = render(tmp_path, events_of(**options))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    addresses = [
        attrs[name] for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs
    ]
    assert all(address and address.startswith("#") for address in addresses)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert "None" not in page.text
    assert "nan" not in page.text.split()
    policies = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_every_reference_has_its_target(whole: str) -> None:
    ids = Counter(attrs["id"] for _, attrs in Page(whole).tags if "id" in attrs)
    assert whole.count("<svg") == 5
    assert [name for name, count in ids.items() if count > 1] == []
    used = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^)"]+)', whole)
    assert used
    assert set(used) <= set(ids)


def test_every_chart_says_in_words_what_it_shows_and_follows_the_theme(whole: str) -> None:
    charts = [attrs for tag, attrs in Page(whole).tags if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert "#0a0b0" not in whole
    assert "var(--first)" in whole


def test_no_events_at_all_still_make_a_page(tmp_path: Path) -> None:
    page = Page(render(tmp_path, []))
    assert "Unnamed run" in page.text
    assert "No formal guarantee" in page.text


def test_equal_events_make_equal_bytes(tmp_path: Path, whole: str) -> None:
    assert render(tmp_path, events_of()) == whole


def test_the_guarantee_is_told_in_plain_words(whole: str) -> None:
    text = Page(whole).text
    assert "Patient-level differential privacy: ε = 2.01, δ = 10 \N{MINUS SIGN}5" in text  # 2.002, rounded up
    assert "more than 7.5 times as likely" in text  # e^2.002 = 7.404, rounded up
    assert "maximum over the sites" in text
    assert "not been there, or had been there in addition" in text
    assert "No formal guarantee" not in text


def test_a_run_without_dp_says_so_in_a_box_and_shows_no_epsilon(tmp_path: Path) -> None:
    text = Page(render(tmp_path, events_of(privacy=NONE))).text
    assert "No formal guarantee This run was trained without differential privacy" in text
    assert "ε spent" not in text
    assert "After federation" in text
    assert "After private federation" not in text


def test_a_fixed_noise_seed_raises_an_alarm_and_voids_the_guarantee(tmp_path: Path) -> None:
    page = Page(render(tmp_path, events_of(insecure=True)))
    assert [attrs["class"] for _, attrs in page.tags if attrs.get("role") == "alert"] == ["box alarm"]
    assert "The noise of riverside, st-anna came from a fixed seed" in page.text
    assert "No formal guarantee" in page.text
    assert "Patient-level differential privacy" not in page.text


def test_results_stand_beside_chance_the_public_start_and_the_run_without_dp(
    tmp_path: Path, whole: str
) -> None:
    with_compare = Page(render(tmp_path, events_of(), compare={"without_dp": evaluation(0.8)})).text
    assert "Chance Public start After private federation Without DP" in with_compare
    assert "Image to text, R@10 5.0 % 20.0 % 40.0 % 80.0 %" in with_compare
    assert "Zero-shot, macro AUROC 0.500 0.567 0.633 0.767" in with_compare
    without = Page(whole).text
    assert "Without DP" not in without
    assert "Image to text, R@10 5.0 % 20.0 % 40.0 % Text to image" in without


def test_what_is_unknown_is_a_dash(tmp_path: Path) -> None:
    text = Page(render(tmp_path, events_of(refusing="riverside"))).text
    assert f"riverside {6 * f'{DASH} '}0 0 2" in text
    assert f"fracture {DASH} {DASH}" in text


def test_refusals_are_explained(tmp_path: Path) -> None:
    text = Page(render(tmp_path, events_of(refusing="riverside"))).text
    assert f"riverside budget {REFUSALS['budget']} 1{DASH}2 12345672" in text


@pytest.mark.parametrize("code", RefusalCode)
def test_every_code_a_site_can_send_has_an_explanation(code: RefusalCode) -> None:
    assert REFUSALS[code].endswith(".")


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>$a$b&'
    events = events_of(sites=(evil,), run=evil)
    events[0]["config"] = {evil: evil}
    events[0]["versions"] = {evil: evil}
    text = render(tmp_path, events)
    page = Page(text)
    assert "<script" not in text
    assert evil in page.text
    axis_labels = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert html.escape(evil, quote=False) in axis_labels


def test_a_letter_matplotlib_has_no_shape_for_is_still_written(tmp_path: Path) -> None:
    assert "医院" in render(tmp_path, events_of(sites=("医院",)))


def test_the_title_replaces_the_name_of_the_run(tmp_path: Path) -> None:
    assert "<h1>For the board</h1>" in render(tmp_path, events_of(), title="For the board")


def test_limits_settings_versions_and_cost_are_on_the_page(whole: str) -> None:
    text = Page(whole).text
    for words in (
        "What this does not promise",
        "Nothing against people or code inside the hospital",
        "are not covered by ε",
        "8 192 of 1 234 567 parameters",
        "model.encoder tiny",
        "flwr 1.41.0",
        "Train 3 min 00 s 91 %",
        "The sites sent 8.0 MB and received 8.0 MB in all",
    ):
        assert words in text


def test_before_any_reply_no_epsilon_is_claimed(tmp_path: Path) -> None:
    text = Page(render(tmp_path, events_of(rounds=0))).text
    assert "Patient-level differential privacy: ε not known yet" in text
    assert "not finished" in text


def test_what_a_site_spent_stays_spent_when_it_falls_silent_or_repeats_an_old_release(tmp_path: Path) -> None:
    events = events_of()
    first, _, again, _ = (past for past in events if past["kind"] == "site_replied")
    assert (first["site"], again["site"], again["round"]) == ("st-anna", "st-anna", 2)
    first["epsilon"], again["epsilon"] = 2.5, 0.1
    row_of_round_2 = "2 {} 0 40.0 % 40.0 % 0.633 2.50"
    assert row_of_round_2.format(2) in Page(render(tmp_path, events)).text
    events.remove(again)
    assert row_of_round_2.format(1) in Page(render(tmp_path, events)).text
