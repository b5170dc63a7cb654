"""The run as one page for a hospital's board: ``report.html`` as a function of events and summary."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.filesize import decimal

from clipward.charts import DIRECTION_NAMES, draw_charts
from clipward.summary import epsilon_text
from server.metrics import PHASES, RELEASED, Event, effective, epsilon_spent, finished_rounds
from strategies.files import write_text
from strategies.messages import RefusalCode

DASH = "\N{EN DASH}"
REFUSALS: Mapping[str, str] = {
    RefusalCode.BUDGET: "The round would have passed the site's privacy budget; nothing was computed.",
    RefusalCode.POLICY: "The request broke a rule of the hospital's own policy.",
    RefusalCode.COHORT: "The site's data were missing or not usable.",
    RefusalCode.MODEL: "The model could not be built or clipped safely at the site.",
    RefusalCode.LEDGER: "The site's budget ledger is not whole, or not the one that was seen before.",
    RefusalCode.MESSAGE: "The request could not be understood: probably different versions.",
    RefusalCode.DEADLINE: "The site could not have answered, or did not answer, in time.",
    RefusalCode.FAILED: "An error at the site; its log holds the cause under the incident number.",
}


def write_report(
    path: Path, *, events: Sequence[Event], summary: Mapping[str, Any], title: str | None = None
) -> None:
    """Write the report, one HTML file that fetches nothing.

    Guarantees:
        The file needs no network, runs no script and forbids both to the browser. Everything from events and
        summary is escaped. Equal input gives equal bytes. What is unknown is shown as a dash.

    Args:
        path: The file; it is replaced atomically.
        events: All events of the run, oldest first.
        summary: What ``clipward.summary.summarise`` made of them.
        title: Heading; the run's name when not given.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clipward"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "percent": _known(lambda value: f"{100 * value:.1f} %"),
        "auroc": _known(lambda value: f"{value:.3f}"),
        "epsilon": _known(epsilon_text),
        "factor": _factor,
        "delta": _known(_scientific),
        "plain": _known(lambda value: f"{value:g}"),
        "count": _known(lambda value: f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")),
        "bytes": _known(lambda value: decimal(int(value))),
        "duration": _known(_duration),
        "share": _known(lambda value: f"{100 * value:.0f} %"),
    }
    page = templates.get_template("report.html").render(_content(events, summary, title))
    write_text(path, page)


def _content(events: Sequence[Event], summary: Mapping[str, Any], title: str | None) -> dict[str, Any]:
    counted = effective(events)
    started: Event = next((event for event in counted if event["kind"] == "run_started"), {})
    replies = [event for event in counted if event["kind"] == "site_replied"]
    rounds, sites, findings = _rounds(counted), _sites(summary, replies), _findings(summary)
    return {
        "title": title or summary["run"] or "Unnamed run",
        "began": _minute(events[0]) if events else None,
        "ended": _minute(events[-1]) if events else None,
        "state": _state(counted),
        "rounds_planned": started.get("rounds"),
        "epsilon_asked": (started.get("privacy") or {}).get("epsilon"),
        "part": started.get("part"),
        "objective": started.get("objective"),
        "parameters": started.get("parameters"),
        "summary": summary,
        "insecure": sorted({event["site"] for event in replies if event.get("insecure_seed")}),
        "headline": _headline(summary),
        "measures": _measures(summary),
        "pairs": _dig(summary["evaluation"] or summary["public_start"], "retrieval", "image_to_text", "n"),
        "findings": findings,
        "rounds": rounds,
        "sites": sites,
        "models": _models(summary),
        "refusals": _refusals(counted),
        "phases": _phases(counted),
        "traffic": {
            direction: sum(
                event.get(f"bytes_{direction}") or 0 for event in counted if event["kind"] in RELEASED
            )
            for direction in ("up", "down")
        },
        "config": list(_flat(started.get("config") or {})),
        "charts": draw_charts(rounds=rounds, sites=sites, findings=findings),
    }


def _state(events: Sequence[Event]) -> str:
    if not any(event["kind"] == "run_started" for event in events):
        return "not started"
    return "finished" if events[-1]["kind"] == "run_finished" else "not finished"


def _headline(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two numbers a board asks for first."""
    final, start = summary["evaluation"], summary["public_start"]
    return [
        {
            "name": "Right report among the ten best",
            "style": "percent",
            "value": _dig(final, "retrieval", "image_to_text", "r10"),
            "chance": _dig(final, "retrieval", "image_to_text", "chance_r10"),
            "start": _dig(start, "retrieval", "image_to_text", "r10"),
        },
        {
            "name": "Zero-shot findings, macro AUROC",
            "style": "auroc",
            "value": _dig(final, "zero_shot", "macro_auroc"),
            "chance": _dig(final, "zero_shot", "chance"),
            "start": _dig(start, "zero_shot", "macro_auroc"),
        },
    ]


def _measures(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table chance | public start | after private federation | without DP."""
    models = {
        "start": summary["public_start"],
        "final": summary["evaluation"],
        "compare": (summary.get("compare") or {}).get("without_dp"),
    }
    wanted: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
        (f"{direction}, R@{k}", "percent", ("retrieval", task, f"r{k}"), ("retrieval", task, f"chance_r{k}"))
        for task, direction in DIRECTION_NAMES.items()
        for k in (1, 5, 10)
    ]
    wanted.append(("Zero-shot, macro AUROC", "auroc", ("zero_shot", "macro_auroc"), ("zero_shot", "chance")))
    rows: list[dict[str, Any]] = []
    for name, style, field, chance in wanted:
        row = {model: _dig(evaluation, *field) for model, evaluation in models.items()}
        if any(value is not None for value in row.values()):
            chances = (_dig(evaluation, *chance) for evaluation in models.values())
            row["chance"] = next((value for value in chances if value is not None), None)
            rows.append({"name": name, "style": style, **row})
    return rows


def _findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    final = _dig(summary["evaluation"], "zero_shot", "per_class") or {}
    start = _dig(summary["public_start"], "zero_shot", "per_class") or {}
    names = sorted(final | start, key=lambda name: (-(final.get(name) or 0), name))
    return [{"name": name, "start": start.get(name), "final": final.get(name)} for name in names]


def _models(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a site, where each has a model of its own."""
    return [
        {
            "site": site,
            "r10": _dig(found, "retrieval", "image_to_text", "r10"),
            "chance_r10": _dig(found, "retrieval", "image_to_text", "chance_r10"),
            "auroc": _dig(found, "zero_shot", "macro_auroc"),
            "chance_auroc": _dig(found, "zero_shot", "chance"),
        }
        for site, found in summary.get("models", {}).items()
    ]


def _rounds(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One row a finished round, and row 0 when the start was evaluated."""
    evaluations = {
        event["round"]: event.get("evaluation") for event in events if event["kind"] == "evaluated"
    }
    rows = []
    spent: dict[str, float] = {}
    for number in sorted(finished_rounds(events) | ({0} & evaluations.keys())):
        mine = [event for event in events if event.get("round") == number]
        replies = [event for event in mine if event["kind"] == "site_replied"]
        evaluation = evaluations.get(number)
        for site, epsilon in epsilon_spent(mine).items():  # what was spent stays spent in later rounds
            spent[site] = max(epsilon, spent.get(site, 0.0))
        rows.append(
            {
                "round": number,
                "replied": len(replies),
                "refused": sum(event["kind"] == "site_refused" for event in mine),
                "epsilons": spent.copy(),
                "recall": {task: _dig(evaluation, "retrieval", task, "r10") for task in DIRECTION_NAMES},
                "chance_r10": _dig(evaluation, "retrieval", "image_to_text", "chance_r10"),
                "auroc": _dig(evaluation, "zero_shot", "macro_auroc"),
                "chance_auroc": _dig(evaluation, "zero_shot", "chance"),
            }
        )
    return rows


def _sites(summary: Mapping[str, Any], replies: Sequence[Event]) -> list[dict[str, Any]]:
    latest = {event["site"]: event for event in replies}
    mechanism = ("epsilon_max", "noise_multiplier", "sample_rate", "max_grad_norm")
    return [
        {**site, **{field: latest.get(site["name"], {}).get(field) for field in mechanism}}
        for site in summary["sites"]
    ]


def _refusals(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Refusals of one site for one reason as one row."""
    grouped: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if event["kind"] == "site_refused":
            grouped.setdefault((event["site"], str(event.get("code"))), []).append(event)
    return [
        {
            "site": site,
            "code": code,
            "meaning": REFUSALS.get(code, "A code this version does not know."),
            "rounds": _ranges([event["round"] for event in group]),
            "incident": group[-1].get("incident"),
        }
        for (site, code), group in grouped.items()
    ]


def _phases(events: Sequence[Event]) -> list[dict[str, Any]]:
    seconds: dict[str, float] = {}
    for event in events:
        if event["kind"] == "round_finished":
            spent = event.get("seconds") or {}
        elif event["kind"] == "evaluated":
            spent = {"evaluate": event.get("seconds")}
        else:
            continue
        for phase in PHASES:
            seconds[phase] = seconds.get(phase, 0.0) + (spent.get(phase) or 0.0)
    total = sum(seconds.values())
    return [
        {"name": phase, "seconds": value, "share": value / total if total else None}
        for phase, value in seconds.items()
    ]


def _known(style: Any) -> Any:
    """A filter that shows what is unknown as a dash."""
    return lambda value: DASH if value is None else style(value)


def _scientific(value: float) -> Markup:
    mantissa, exponent = f"{value:.1e}".split("e")
    power = _power_of_ten(int(exponent))
    return power if mantissa == "1.0" else Markup("{} · {}").format(mantissa, power)


def _power_of_ten(exponent: int) -> Markup:
    return Markup("10<sup>{}</sup>").format(str(exponent).replace("-", "\N{MINUS SIGN}"))


def _factor(epsilon: float) -> str:
    """How many times as likely, e to the epsilon, rounded up."""
    if epsilon > 12:
        return _power_of_ten(math.ceil(epsilon / math.log(10)))
    factor = math.exp(epsilon)
    return f"{math.ceil(factor):,}" if factor >= 10 else f"{math.ceil(10 * factor) / 10:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _minute(event: Event) -> str:
    return f"{datetime.fromisoformat(event['time']):%Y-%m-%d %H:%M} UTC"


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{DASH}{run[-1]}" for run in runs)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", DASH if value is None else str(value)


def _dig(tree: Any, *keys: str) -> Any:
    for key in keys:
        if tree is None:
            return None
        tree = tree.get(key)
    return tree
