"""What a run looks like while it runs: a live display in a terminal, plain lines anywhere else."""

import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clipward.summary import epsilon_text
from server.metrics import RELEASED, Event


class ProgressDisplay:
    """Shows a run on a console; a listener of ``server.metrics.RunLog``.

    Guarantees:
        Without a terminal each event is one line without control characters, whatever the event holds.
        Leaving the ``with`` block gives the terminal back, also after an error.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = _State()
        self._began = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)

    def __call__(self, event: Event) -> None:
        """Take one event in and show it."""
        self._state.update(event)
        if self._live is None:
            line = _printable(describe(event, rounds=self._state.rounds))
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif event["kind"] == "run_finished":
            self.close()
        elif not self._live.is_started:
            self._live.start()

    def replay(self, events: Iterable[Event]) -> None:
        """Take in the past of a resumed run without showing it again."""
        for event in events:
            self._state.update(event)

    def close(self) -> None:
        """Leave the last state standing and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self) -> RenderableType:
        state = self._state
        elapsed = str(timedelta(seconds=int(time.monotonic() - self._began)))
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(_printable(state.run), style="bold"),
            ProgressBar(total=state.rounds or 1, completed=state.finished, width=32),
            Text(f"round {state.finished} of {state.rounds or '?'}"),
            Text(elapsed, style="dim"),
        )
        facts = Table.grid(padding=(0, 2))
        facts.add_row(Text("sites", style="dim"), Text(state.sites_line()))
        facts.add_row(Text("traffic", style="dim"), Text(state.traffic_line()))
        facts.add_row(Text("privacy", style="dim"), Text(state.privacy_line()))
        facts.add_row(Text("evaluation", style="dim"), Text(state.evaluation))
        return Group(bar, facts)


class _State:
    """The little of a run that the live display shows."""

    def __init__(self) -> None:
        self.run = ""
        self.rounds: int | None = None
        self.finished = 0
        self.evaluation = "none yet"
        self._private = False
        self._asked = 0
        self._replied: set[str] = set()
        self._refused: set[str] = set()
        self._up = self._down = 0
        self._spent: dict[str, float] = {}
        self._budgets: dict[str, float] = {}

    def update(self, event: Event) -> None:
        match event:
            case {"kind": "run_started", "run": run, "rounds": rounds}:
                self.run, self.rounds = run, rounds
                self._private = bool((event.get("privacy") or {}).get("formal_guarantee"))
            case {"kind": "run_resumed", "round": done} | {"kind": "round_finished", "round": done}:
                self.finished = done
            case {"kind": "round_started", "sites": sites}:
                self._asked, self._replied, self._refused = len(sites), set(), set()
                self._up = self._down = 0
            case {"kind": kind, "site": site} if kind in RELEASED:
                self._up += event.get("bytes_up") or 0
                self._down += event.get("bytes_down") or 0
                if kind == "site_replied":
                    self._replied.add(site)
                if event.get("epsilon") is not None:
                    self._spent[site] = max(event["epsilon"], self._spent.get(site, 0.0))
                if event.get("epsilon_max") is not None:
                    self._budgets[site] = event["epsilon_max"]
            case {"kind": "site_refused", "site": site}:
                self._refused.add(site)
            case {"kind": "evaluated"}:
                self.evaluation = _evaluation(event)

    def sites_line(self) -> str:
        refused = f", {len(self._refused)} refused" if self._refused else ""
        return f"{len(self._replied)} of {self._asked} replied{refused}"

    def traffic_line(self) -> str:
        return f"{decimal(self._up)} up, {decimal(self._down)} down in this round"

    def privacy_line(self) -> str:
        if not self._private:
            return "no formal guarantee"
        if not self._spent:
            return "nothing spent yet"
        site = max(self._spent, key=lambda name: self._spent[name])
        return f"{_epsilon(self._spent[site], self._budgets.get(site))} (highest of all sites)"


def describe(event: Event, *, rounds: int | None = None) -> str:
    """One line of plain text about an event.

    Args:
        event: Any event of the stream.
        rounds: Rounds planned, when known.
    """
    of = f" of {rounds}" if rounds else ""
    match event:
        case {"kind": "run_started", "run": run, "rounds": planned, "sites": sites}:
            return f"run {run}: {planned} rounds, {_count(sites)}, {_promise(event)}"
        case {"kind": "run_resumed", "round": done}:
            return f"resumed after round {done}{of}"
        case {"kind": "evaluated", "round": number}:
            return f"round {number}{of}: {_evaluation(event)}"
        case {"kind": "round_started", "round": number, "sites": sites}:
            return f"round {number}{of}: asking {_count(sites)}"
        case {"kind": "site_replied", "round": number, "site": site}:
            return f"round {number}{of}: {site} replied, {', '.join(_reply(event))}"
        case {"kind": str(kind), "round": number, "site": site} if kind.endswith("_replied"):
            facts = _reply({**event, "steps": None})
            return f"round {number}{of}: {site} released {_released(kind)}, {', '.join(facts)}"
        case {"kind": "site_refused", "round": number, "site": site}:
            return (
                f"round {number}{of}: {site} refused: {event.get('code')} (incident {event.get('incident')})"
            )
        case {"kind": "round_finished", "round": number}:
            seconds = sum(value or 0 for value in event["seconds"].values())
            return f"round {number}{of}: finished in {seconds:.1f} s"
        case {"kind": "centre_found", "sites": sites, "used": used}:
            own = "" if used else ", and not used: noise drowns it"
            return f"centre of the images of {_count_of(sites)} found{own}"
        case {"kind": "prototypes_made", "round": number, "sites": sites, "used": used, "concepts": concepts}:
            own = ", ".join(f"{count} of {concepts} by {side}" for side, count in used.items())
            return f"round {number}{of}: prototypes of {_count_of(sites)}, {own}"
        case {"kind": kind, "round": number, "reason": reason}:
            who = f"{event['site']} " if "site" in event else ""
            return f"round {number}{of}: {who}{str(kind).removeprefix('site_').replace('_', ' ')}: {reason}"
        case {"kind": "run_finished", "rounds": number, "seconds": seconds}:
            return f"finished {number} rounds in {timedelta(seconds=round(seconds))}"
        case {"kind": kind}:
            return str(kind)
    return "unknown event"


def _released(kind: str) -> str:
    phase = kind.removesuffix("_replied")
    return {"centre": "the sum of its features", "losses": "its mean loss"}.get(phase, phase)


def _count(sites: Sequence[str]) -> str:
    return _count_of(len(sites))


def _count_of(sites: int) -> str:
    return "1 site" if sites == 1 else f"{sites} sites"


def _promise(event: Event) -> str:
    privacy = event.get("privacy") or {}
    if not privacy.get("formal_guarantee"):
        return "no formal guarantee"
    return f"{privacy.get('unit')}-level privacy, epsilon {privacy.get('epsilon')} asked for"


def _reply(event: Event) -> list[str]:
    facts = []
    if event.get("bytes_up") is not None:
        facts.append(f"{decimal(event['bytes_up'])} up")
    if event.get("steps") is not None:
        facts.append(f"{event['steps']} steps")
    if event.get("epsilon") is not None:
        facts.append(_epsilon(event["epsilon"], event.get("epsilon_max")))
    if event.get("replayed"):
        facts.append("an earlier release sent again")
    if event.get("insecure_seed"):
        facts.append("INSECURE SEED: no guarantee")
    return facts


def _epsilon(spent: float, budget: float | None) -> str:
    return f"epsilon {epsilon_text(spent)}" + (f" of {budget:g}" if budget is not None else "")


def _evaluation(event: Event) -> str:
    evaluation = event.get("evaluation") or {}
    found = (evaluation.get("retrieval") or {}).get("image_to_text") or {}
    zero_shot = evaluation.get("zero_shot") or {}
    parts = [
        _beside_chance("R@10 image to text", found.get("r10"), found.get("chance_r10"), ".1%"),
        _beside_chance("macro AUROC", zero_shot.get("macro_auroc"), zero_shot.get("chance"), ".3f"),
    ]
    return ", ".join(part for part in parts if part) or "nothing to evaluate"


def _beside_chance(name: str, value: Any, chance: Any, style: str) -> str:
    if value is None:
        return ""
    return f"{name} {value:{style}}" + (f" (chance {chance:{style}})" if chance is not None else "")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
