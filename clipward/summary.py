"""What a run came to, in numbers: ``summary.json`` as a function of the run's events."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from server.metrics import (
    DIRECTIONS,
    RECALLS,
    RELEASED,
    Event,
    effective,
    epsilon_spent,
    finished_rounds,
)
from strategies.files import write_text

VERSION = 1


def summarise(
    events: Sequence[Event],
    *,
    compare: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Sum a run up.

    Guarantees:
        Unknown is None, never a made-up number. Rounds count when they finished; a repeated one counts once.
        Epsilon counts whatever became of the round. ``privacy.epsilon`` is the maximum over the sites that
        replied, None when one of them did not say. A run with a fixed noise seed has no formal guarantee.

    Args:
        events: All events of the run, oldest first.
        compare: Evaluations of other models on the same data, such as ``{"without_dp": evaluation}``.
        models: Evaluations of the sites' own models, by site, where a run has no common one.
    """
    counted = effective(events)
    finished = finished_rounds(counted)
    started: Event = next((event for event in counted if event["kind"] == "run_started"), {"sites": []})
    replies = [event for event in counted if event["kind"] == "site_replied"]
    evaluated = [event for event in counted if event["kind"] == "evaluated"]
    start = next((event for event in evaluated if event["round"] == 0 and event.get("public_start")), None)
    last = next((event for event in reversed(evaluated) if event["round"] in finished), None)
    phases = [event["seconds"] for event in counted if event["kind"] == "round_finished"]
    sites = _sites(counted, names=started["sites"], finished=finished)
    summary = {
        "version": VERSION,
        "run": started.get("run"),
        "rounds": len(finished),
        "seconds": {
            "total": active_seconds(events),
            "train": _sum(phase.get("train") for phase in phases),
            "communicate": _sum(phase.get("communicate") for phase in phases),
            "evaluate": _sum(event.get("seconds") for event in evaluated),
        },
        "bytes_up_per_site_round": _mean(_bytes_up(counted, finished=finished)),
        "privacy": _privacy(started.get("privacy") or {}, replies=replies, sites=sites),
        "sites": sites,
        "evaluation": _evaluation(last["evaluation"]) if last else None,
        "public_start": _evaluation(start["evaluation"]) if start else None,
        "versions": dict(started.get("versions") or {}),
    }
    if compare is not None:
        summary["compare"] = {name: _evaluation(evaluation) for name, evaluation in compare.items()}
    if models is not None:
        summary["models"] = {site: _evaluation(evaluation) for site, evaluation in models.items()}
    return summary


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary`` as JSON; a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def active_seconds(events: Sequence[Event]) -> float | None:
    """Time the run was alive: from each start or resume to the last event before the next one."""
    spans: list[tuple[datetime, datetime]] = []
    for event in events:
        now = datetime.fromisoformat(event["time"])
        if event["kind"] in ("run_started", "run_resumed") or not spans:
            spans.append((now, now))
        spans[-1] = (spans[-1][0], max(spans[-1][1], now))
    return round(sum((end - begin).total_seconds() for begin, end in spans), 3) if spans else None


def epsilon_text(epsilon: float) -> str:
    """Two decimals, rounded up: a printed guarantee may be weaker than the proven one, never stronger."""
    return str(Decimal(repr(epsilon)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def _bytes_up(events: Sequence[Event], *, finished: set[int]) -> list[float | None]:
    """What each site sent in each finished round that it replied in, releases beside its update included."""
    sent: dict[tuple[str, int], list[float | None]] = {}
    for event in events:
        if event["kind"] in RELEASED and event.get("round") in finished:
            sent.setdefault((event["site"], event["round"]), []).append(event.get("bytes_up"))
    replied = {(event["site"], event["round"]) for event in events if event["kind"] == "site_replied"}
    return [_sum(sizes) for answer, sizes in sent.items() if answer in replied]


def _sites(events: Sequence[Event], *, names: Iterable[str], finished: set[int]) -> list[dict[str, Any]]:
    """The sites the run named, and any that joined later."""
    answers = [event for event in events if event["kind"] in ("site_replied", "site_refused")]
    spent = epsilon_spent(events)
    return [
        _site(name, [event for event in answers if event["site"] == name], spent.get(name), finished)
        for name in dict.fromkeys([*names, *(event["site"] for event in answers)])
    ]


def _site(name: str, answers: Sequence[Event], epsilon: float | None, finished: set[int]) -> dict[str, Any]:
    replies = [event for event in answers if event["kind"] == "site_replied"]
    return {
        "name": name,
        "epsilon": epsilon,
        "delta": replies[-1].get("delta") if replies else None,
        "steps": _sum(event.get("steps") for event in replies) if replies else 0,
        "rounds": sum(event["round"] in finished for event in replies),
        "refusals": len(answers) - len(replies),
    }


def _privacy(
    asked: Mapping[str, Any], *, replies: Sequence[Event], sites: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    private = asked.get("mode") == "dp"
    replied = {event["site"] for event in replies}
    spent = [site["epsilon"] for site in sites if site["name"] in replied]
    deltas = [site["delta"] for site in sites if site["delta"] is not None]
    insecure = any(event.get("insecure_seed") for event in replies)
    return {
        "mode": asked.get("mode"),
        "unit": asked.get("unit"),
        "epsilon": max(spent) if private and spent and None not in spent else None,
        "delta": max(deltas, default=asked.get("delta")) if private else None,
        "formal_guarantee": private and bool(asked.get("formal_guarantee")) and not insecure,
    }


def _evaluation(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One shape for every evaluation; what was not measured is None."""
    if evaluation is None:
        return None
    retrieval, zero_shot = evaluation.get("retrieval"), evaluation.get("zero_shot")
    fields = (*RECALLS, *(f"chance_{recall}" for recall in RECALLS), "n")
    return {
        "retrieval": retrieval
        and {
            task: {field: (retrieval.get(task) or {}).get(field) for field in fields} for task in DIRECTIONS
        },
        "zero_shot": zero_shot
        and {
            "macro_auroc": zero_shot.get("macro_auroc"),
            "chance": zero_shot.get("chance"),
            "per_class": dict(zero_shot.get("per_class") or {}),
        },
    }


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Iterable[float | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known)) if known else None
