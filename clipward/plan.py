"""`clipward plan`: what a run would promise and cost, in one table, before any hospital is asked."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from privacy.planning import Plan
    from server.federation import Federation

VERSION = 1
STUDIES = (2, 3, 5, 10)
NOTES = (
    "Settings chosen by looking at private results cost budget like any release: tune on public or synthetic "
    "data, or charge every trial.",
    "A patient known at several hospitals composes their ledgers; this plan is one hospital's.",
)


class Mechanism(StrEnum):
    """Gradient mechanisms with a guarantee."""

    anchored = "anchored"
    microbatch = "microbatch"


def plan(
    patients: Annotated[int, typer.Option(help="Declared (public) patients of one hospital, such as 2000.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Take what is not given here from a federation file, such as configs/demo.toml."),
    ] = None,
    batch: Annotated[float | None, typer.Option(help="Expected patients per step, such as 64.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the whole run, such as 600.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Or passes over the patients, such as 20; steps follow.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Promise to every patient, such as 8; the noise follows.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Or noise over sensitivity, such as 1.1; epsilon follows.")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="Failure probability, such as 1e-5; by default 1/(10 patients) rounded down."),
    ] = None,
    mechanism: Annotated[
        Mechanism | None, typer.Option(help="What is clipped: a patient (C), or a small group (2C).")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(help="Groups per step with microbatch, such as 16; for the signal.")
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clipping bound C, such as 1.")] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Trained weights, such as 65536; for the signal.")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(help="Hospitals of this size that average their updates, such as 4.")
    ] = None,
    studies: Annotated[
        list[int] | None,
        typer.Option(help="Show a patient with so many studies, had studies been drawn; repeat for more."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the plan's surroundings into a .png or .svg; takes seconds.")
    ] = None,
) -> None:
    """Price a private run from public constants: noise, epsilon, signal, and what to reconsider.

    Touches no data and spends nothing. Every patient is promised the same, whatever number of studies is
    theirs.

    Example: clipward plan --patients 2000 --batch 64 --epochs 20 --epsilon 8

    Example: clipward plan --patients 2000 --batch 64 --steps 600 --noise-multiplier 1.1 --parameters 65536

    Example: clipward plan --config configs/demo.toml --patients 1000 --sites 4 --picture plan.svg
    """
    from clipward.console import errors_in_one_line, progress_bars
    from encoders.errors import EncoderError
    from privacy.errors import AccountantDisagreement, PrivacyError
    from privacy.planning import make_plan
    from strategies.settings import SettingsError

    expected = (AccountantDisagreement, EncoderError, PrivacyError, SettingsError, OSError)
    with errors_in_one_line(expected), progress_bars() as show:
        if picture is not None:
            _check_picture(picture)
        given = {
            "batch": batch,
            "steps": steps,
            "epochs": epochs,
            "epsilon": epsilon,
            "noise_multiplier": noise_multiplier,
            "delta": delta,
            "mechanism": mechanism and mechanism.value,
            "groups": groups,
            "max_grad_norm": max_grad_norm,
            "parameters": parameters,
            "sites": sites,
        }
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if config is not None:
            settings = _completed(settings, config, patients=patients)
        if "batch" not in settings:
            raise _missing("--batch: expected patients per step")
        made = make_plan(patients_declared=patients, **settings)
        priced = document(made, studies=studies or STUDIES)
        if picture is not None:
            from clipward.plan_picture import draw

            draw(made, picture, on_progress=lambda done, total: show("draw the plan", done, total))
    if as_json:
        typer.echo(json.dumps(priced, indent=2, allow_nan=False))
        return
    _print(made, priced)
    if picture is not None:
        typer.echo(f"picture: {picture}")


def document(plan: "Plan", *, studies: Sequence[int]) -> dict[str, Any]:
    """The plan and all that follows from it, ready for JSON; what is not known, or has no bound, is None."""
    return {
        "version": VERSION,
        "plan": asdict(plan),
        "sample_rate": plan.sample_rate,
        "epochs": plan.epochs,
        "sensitivity": plan.sensitivity,
        "noise_std": plan.noise_std,
        "noise_to_signal": plan.noise_to_signal,
        "share_of_lift": plan.share_of_lift,
        "unit": "patient",
        "adjacency": "add_remove",
        "epsilon": _finite(plan.epsilon),
        "epsilon_by_accountant": _all_finite({"PLD": plan.epsilon, **plan.renyi_epsilons}),
        "epsilon_by_mechanism_at_this_noise": _all_finite(plan.epsilon_by_mechanism),
        "epsilon_replace_one": _finite(plan.epsilon_replace_one),
        "epsilon_if_studies_were_drawn": _all_finite(
            {str(count): plan.epsilon_if_studies_were_drawn(count) for count in studies}
        ),
        "concerns": [asdict(concern) for concern in plan.concerns],
        "notes": list(NOTES),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _all_finite(values: Mapping[Any, float]) -> dict[str, float | None]:
    return {str(name): _finite(value) for name, value in values.items()}


def _missing(what: str) -> Exception:
    from privacy.errors import ImpossiblePlan

    return ImpossiblePlan(f"missing {what}; or name a federation file with --config")


def _check_picture(path: Path) -> None:
    from privacy.errors import ImpossiblePlan

    if path.suffix not in (".png", ".svg"):
        raise ImpossiblePlan(f"expected --picture {path} to end in .png or .svg")
    if not path.parent.is_dir():
        raise ImpossiblePlan(f"no folder {path.parent} for --picture {path.name}: make it first")


def _completed(given: dict[str, Any], config: Path, *, patients: int) -> dict[str, Any]:
    """What was given, and the federation's own values for the rest."""
    from privacy.errors import ImpossiblePlan
    from server.federation import Federation

    federation = Federation.load(config)
    if federation.privacy.mode != "dp":
        raise ImpossiblePlan(
            f"{config} has privacy.mode = 'none': it promises nothing, so nothing is planned"
        )
    settings: dict[str, Any] = {
        "batch": federation.plan().batch_of(patients),
        "mechanism": federation.objective.name,
        "max_grad_norm": federation.privacy.max_grad_norm,
        "sites": federation.strategy.min_sites,
        **given,
    }
    if settings["mechanism"] == "microbatch":
        settings.setdefault("groups", federation.objective.groups)
    if not given.keys() & {"steps", "epochs"}:
        settings["steps"] = federation.training.rounds * federation.training.steps
    if not given.keys() & {"epsilon", "noise_multiplier"}:
        settings["epsilon"] = federation.privacy.epsilon
    if "parameters" not in given:
        settings["parameters"] = trained_weights(federation)
    return settings


def trained_weights(federation: "Federation") -> int:
    """How many weights a federation's sites train and send."""
    from server.start import build_encoder, trained_part

    part = trained_part(federation, build_encoder(federation))
    return sum(value.numel() for value in part.parameters().values())


def _print(plan: "Plan", priced: Mapping[str, Any]) -> None:
    from rich import print as show

    typer.echo(
        f"Every patient: epsilon = {_printed(plan.epsilon)} at delta = {plan.delta:g} "
        "(add or remove one patient with all their studies)."
    )
    typer.echo()
    show(_table(_rows(plan, priced)))
    typer.echo()
    for concern in plan.concerns:
        typer.secho(f"warning: {concern.text}", fg="yellow")
    for note in NOTES:
        typer.echo(f"note: {note}")


def _table(rows: Iterator[tuple[str, str, str]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def _rows(plan: "Plan", priced: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "patients declared", f"{plan.patients_declared:,}", "public; never the true count"
    yield (
        "expected patients per step",
        f"{plan.batch:g}",
        f"each joins with probability {plan.sample_rate:.4g}",
    )
    yield "steps of the whole run", f"{plan.steps:,}", f"a patient joins {plan.epochs:.4g} on average"
    bound = {"anchored": "C", "microbatch": "2C"}[plan.mechanism]
    yield "mechanism", plan.mechanism, f"a patient moves a step by {bound} = {plan.sensitivity:g}"
    yield "noise multiplier", f"{plan.noise_multiplier:.4g}", f"standard deviation {plan.noise_std:.4g}"
    if plan.noise_to_signal is not None:
        over = "one site" if plan.sites == 1 else f"the average of {plan.sites} sites"
        yield "noise over largest signal", f"{plan.noise_to_signal:.3g}", f"per step, {over}"
    if plan.share_of_lift is not None:
        yield (
            "lift that is kept",
            f"{plan.share_of_lift:.0%}",
            "of the lift without privacy",
        )
    yield "", "", ""
    yield "epsilon of every patient", _printed(plan.epsilon), "the promise"
    for name, value in plan.renyi_epsilons.items():
        yield f"  by {name}", _printed(value), "a looser accountant, as a check"
    yield "For comparison", "", ""
    for kind, value in plan.epsilon_by_mechanism.items():
        if kind != plan.mechanism:
            yield f"  as {kind}", _printed(value), "if it added only this noise"
    yield "  replace one", _printed(plan.epsilon_replace_one), "if patients were exchanged, not added"
    for count, value in priced["epsilon_if_studies_were_drawn"].items():
        yield f"  a patient of {count} studies", _printed(value), "if steps drew studies, not patients"


def _printed(epsilon: float | None) -> str:
    from clipward.summary import epsilon_text

    return "no bound" if epsilon is None or not math.isfinite(epsilon) else epsilon_text(epsilon)
