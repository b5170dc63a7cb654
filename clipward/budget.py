"""`clipward budget`: what a site's patients have spent, what a run would cost, if the books are whole."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from click import Context
    from rich.table import Table

    from client.site import Site
    from privacy.ledger import Charge, Ledger, Row

VERSION = 1
_OUTCOMES = ("released", "abandoned", "open")
_PLAIN_COLUMNS = 200  # where there is no terminal, nothing is folded
_MOST_LINES = 20  # of problems; one forged row makes every later one a problem


class _ShowByDefault(TyperGroup):
    """``budget SITE`` means ``budget show SITE``."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """Put the command's name in front where it was left out."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ShowByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="A site's privacy budget: **clipward budget SITE** shows what is spent and left.",
)

SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder, with its site.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def show(
    site: SiteFolder,
    plan: Annotated[
        Path | None, typer.Option(help="Price a run of this federation file, such as configs/demo.toml.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Or of this promise, such as 2.")] = None,
    steps: Annotated[int | None, typer.Option(help="With --epsilon: steps of the whole run.")] = None,
    batch: Annotated[int | None, typer.Option(help="With --epsilon: expected patients per step.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a site's patients have spent, by run and mechanism, and what is left.

    Example: clipward budget demo/site-1

    Example: clipward budget demo/site-1 --plan configs/demo.toml

    Example: clipward budget demo/site-1 --epsilon 2 --steps 400 --batch 32
    """
    from clipward.console import errors_in_one_line

    with errors_in_one_line(_expected()):
        opened = _opened(site)
        ledger = opened.ledger()
        spent = spending(opened, ledger)
        if plan is not None:
            spent["planned"] = price_of_federation(opened, ledger, plan)
        elif (epsilon, steps, batch) != (None, None, None):
            if epsilon is None or steps is None or batch is None:
                raise typer.BadParameter("a run is priced by --epsilon, --steps and --batch together")
            spent["planned"] = price_of_steps(opened, ledger, epsilon=epsilon, steps=steps, batch=batch)
    if as_json:
        typer.echo(json.dumps(spent, indent=2, allow_nan=False))
    else:
        _print_spending(spent)


@app.command()
def verify(
    site: SiteFolder,
    anchors: Annotated[
        Path | None, typer.Option(help="A coordinator's anchors.jsonl, to see whether history was cut short.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every row, signature and anchor of a site's ledger; exit 1 naming each problem.

    Example: clipward budget verify demo/site-1 --anchors runs/demo/anchors.jsonl
    """
    from clipward.console import errors_in_one_line

    with errors_in_one_line(_expected()):
        opened = _opened(site)
        text = None if anchors is None else anchors.read_text("utf-8")
        found = examination(opened, anchors=text)
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_examination(found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def sign(site: SiteFolder) -> None:
    """Vouch for a ledger that this site's key has not signed: its key was lost, or version 1 wrote it.

    Every charge stays. Coordinators that know another key stop using the site until their people accept the
    new one: tell them by another way what site.pub says.

    Example: clipward budget sign demo/site-1
    """
    from clipward.console import errors_in_one_line

    with errors_in_one_line(_expected()):
        ledger = _opened(site).sign_ledger()
    typer.echo(f"signed with key {ledger.key.public}")


@app.command()
def key(site: SiteFolder) -> None:
    """Print the public key of a site, to be given to others by another way than the coordinator.

    Where there is neither key nor ledger, the key is made.

    Example: clipward budget key demo/site-1
    """
    from client.site import Site
    from clipward.console import errors_in_one_line

    with errors_in_one_line(_expected()):
        public = Site.open(site).key().public
    typer.echo(public)


def spending(site: "Site", ledger: "Ledger") -> dict[str, Any]:
    """What was charged and what is left, ready for JSON; an epsilon without bound is None."""
    from privacy.accounting import epsilon

    spent = ledger.spent()
    groups: dict[tuple[str, str], list[Charge]] = {}
    for charge in ledger.charges():
        groups.setdefault((charge.request.run, charge.request.kind), []).append(charge)
    return {
        "version": VERSION,
        "site": site.name,
        "unit": "patient",
        "adjacency": "add_remove",
        "epsilon_spent": _finite(spent),
        "epsilon_max": ledger.epsilon_max,
        "epsilon_left": max(0.0, ledger.epsilon_max - spent),
        "delta": ledger.delta,
        "formal_guarantee": not any(c.request.insecure_seed for group in groups.values() for c in group),
        "charges": [
            {
                "run": run,
                "mechanism": kind,
                "charges": len(group),
                **{outcome: sum(c.outcome == outcome for c in group) for outcome in _OUTCOMES},
                "steps": sum(c.request.steps for c in group),
                "sample_rates": sorted({c.request.sample_rate for c in group}),
                "noise_multipliers": sorted({c.request.event().noise_multiplier for c in group}),
                "epsilon_alone": _finite(epsilon([c.request.event() for c in group], delta=ledger.delta)),
            }
            for (run, kind), group in groups.items()
        ],
    }


def price_of_federation(site: "Site", ledger: "Ledger", path: Path) -> dict[str, Any]:
    """What all rounds of a federation file, as a new run, would bring the cohort to.

    Raises:
        Refused: the site's policy refuses such a run; the text names the rule.
        SettingsError: the file cannot be used, or asks for no privacy.
    """
    from client.policy import besides, mechanism_for
    from server.federation import Federation
    from strategies.settings import SettingsError

    plan = Federation.load(path).plan()
    if plan.privacy != "dp":
        raise SettingsError(f"{path} has privacy.mode = 'none': it promises nothing, so it has no price")
    return _price(ledger, mechanism_for(site, plan).event, rounds=plan.rounds, beside=besides(plan))


def price_of_steps(
    site: "Site", ledger: "Ledger", *, epsilon: float, steps: int, batch: int
) -> dict[str, Any]:
    """What a run with just the noise for ``epsilon`` would bring the cohort to.

    Raises:
        BadParameter: a value is out of its range, or no noise is enough.
    """
    from privacy.accounting import PoissonGaussian, noise_multiplier_for

    rate = batch / site.settings.cohort.patients_declared
    try:
        noise = noise_multiplier_for(epsilon=epsilon, delta=ledger.delta, sample_rate=rate, steps=steps)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return _price(ledger, PoissonGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps), rounds=1)


def _price(ledger: "Ledger", event: Any, *, rounds: int, beside: Sequence[Any] = ()) -> dict[str, Any]:
    """So many rounds of ``event``, and what else the whole run releases, however many of them fit."""
    from privacy.accounting import epsilon

    charged = ledger.events()

    def after(count: int) -> float:
        return epsilon([*charged, *beside, *[event] * count], delta=ledger.delta)

    total = after(rounds)
    fit, too_many = (rounds, rounds + 1) if total <= ledger.epsilon_max else (0, rounds)
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        fit, too_many = (middle, too_many) if after(middle) <= ledger.epsilon_max else (fit, middle)
    return {
        "rounds": rounds,
        "steps": rounds * event.steps,
        "sample_rate": event.sample_rate,
        "noise_multiplier": event.noise_multiplier,
        "epsilon_alone": _finite(epsilon([*beside, *[event] * rounds], delta=ledger.delta)),
        "epsilon_after": _finite(total),
        "fits": fit == rounds,
        "rounds_that_fit": fit,
    }


def examination(site: "Site", *, anchors: str | None) -> dict[str, Any]:
    """All that can be checked of a site's ledger, ready for JSON.

    Epsilon is None by every accountant where the rows are not whole: nothing is computed from those.

    Args:
        site: Whose ledger.
        anchors: Content of a coordinator's ``anchors.jsonl``; only this site's lines are looked at.

    Raises:
        LedgerError: the ledger or its key cannot be used at all.
        RunError: a line of ``anchors`` is none.
    """
    from client.releases import RELEASES, ReleaseStore
    from server.anchors import ANCHORS_FILE, parse

    ledger = site.unread_ledger()
    problems = ledger.problems()
    stored = ReleaseStore(folder=site.folder / RELEASES).anchors()
    kept = (
        [] if anchors is None else [a for name, a in parse(anchors, name=ANCHORS_FILE) if name == site.name]
    )
    found: dict[str, Any] = {
        "version": VERSION,
        "site": site.name,
        "key": ledger.key.public,
        "rows": None,
        "notices": [],
        "anchors": None if anchors is None else len(kept),
        "releases": len(stored),
        "epsilon": {},
        "epsilon_max": ledger.epsilon_max,
        "delta": ledger.delta,
    }
    if not problems:
        rows = ledger.rows()
        found |= {"rows": len(rows), "notices": [*_notices(rows)]}
        found["epsilon"], disagreement = _by_accountants(ledger)
        problems += disagreement
        problems += [f"anchor of the coordinator: {problem}" for problem in ledger.missing(*kept)]
        for name, anchor in stored.items():
            problems += [f"release {name[:12]}: {problem}" for problem in ledger.missing(anchor)]
    return found | {"problems": problems}


def _notices(rows: Sequence["Row"]) -> Iterator[str]:
    """What is allowed and still worth knowing."""
    for row in rows[1:]:
        if row.key is not None:
            yield f"row {row.seq} brought a new key: for the rows before it, it vouches alone"
        if "clock" in row.body:
            yield (
                f"row {row.seq} was written when the site's clock said {row.body['clock']}, behind the row "
                f"before it: it is dated {row.body['time']}"
            )


def _by_accountants(ledger: "Ledger") -> tuple[dict[str, float | None], list[str]]:
    from privacy.accounting import renyi_epsilons
    from privacy.errors import AccountantDisagreement

    renyi = {
        name: _finite(value) for name, value in renyi_epsilons(ledger.events(), delta=ledger.delta).items()
    }
    try:
        return {"PLD": _finite(ledger.spent()), **renyi}, []
    except AccountantDisagreement as error:
        return {"PLD": None, **renyi}, [str(error)]


def _opened(folder: Path) -> "Site":
    from client.site import LEDGER_FILE, Site
    from privacy.errors import WrongLedger

    site = Site.open(folder)
    if not (folder / LEDGER_FILE).is_file():
        raise WrongLedger(
            f"no {LEDGER_FILE} in {folder}: nothing was charged here, the first private round makes it; "
            "'clipward plan' prices a first run. If there was one, first of all put its newest copy back"
        )
    return site


def _print_spending(spent: Mapping[str, Any]) -> None:
    from rich.console import Console

    typer.echo(
        f"{spent['site']}: epsilon = {_shown(spent['epsilon_spent'])} of {spent['epsilon_max']:g} spent at "
        f"delta = {spent['delta']:g}, {_left(spent['epsilon_left'])} left "
        "(every patient, all runs; add or remove one patient with all their studies)."
    )
    if not spent["formal_guarantee"]:
        typer.secho("No formal guarantee: some noise came from a fixed seed, which is for tests.", fg="red")
    typer.echo()
    if spent["charges"]:
        terminal = Console()
        wide = terminal if terminal.is_terminal else Console(width=_PLAIN_COLUMNS)
        wide.print(_charges_table(spent["charges"]))
        typer.echo("Runs compose: together they cost less than the sum of what each would cost alone.")
    else:
        typer.echo("Nothing was charged yet.")
    if "planned" in spent:
        typer.echo()
        typer.echo(_price_told(spent["planned"], epsilon_max=spent["epsilon_max"]))


def _charges_table(charges: Sequence[Mapping[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("run", "mechanism"):
        table.add_column(name, no_wrap=True)
    for name in (*_OUTCOMES, "steps", "sample rate", "noise", "epsilon alone"):
        table.add_column(name, justify="right")
    for one in charges:
        counts = (*(one[outcome] for outcome in _OUTCOMES), one["steps"])
        table.add_row(
            one["run"],
            one["mechanism"],
            *map(str, counts),
            _span(one["sample_rates"]),
            _span(one["noise_multipliers"]),
            _shown(one["epsilon_alone"]),
        )
    return table


def _price_told(planned: Mapping[str, Any], *, epsilon_max: float) -> str:
    told = (
        f"Planned, as a new run: {planned['rounds']} x {planned['steps'] // planned['rounds']} steps at "
        f"sample rate {planned['sample_rate']:.4g} with noise {planned['noise_multiplier']:.4g}, "
        f"epsilon = {_shown(planned['epsilon_alone'])} alone. It would bring the patients to epsilon = "
        f"{_shown(planned['epsilon_after'])} of {epsilon_max:g}"
    )
    if planned["fits"]:
        return f"{told}: it fits."
    return (
        f"{told}: it does not fit, and would be refused after {planned['rounds_that_fit']} of "
        f"{planned['rounds']} rounds. Ask for a smaller epsilon or fewer steps."
    )


def _print_examination(found: Mapping[str, Any]) -> None:
    for problem in found["problems"][:_MOST_LINES]:
        typer.secho(f"problem: {problem}", fg="red")
    if (more := len(found["problems"]) - _MOST_LINES) > 0:
        typer.secho(f"and {more} more problems; --json names them all", fg="red")
    for notice in found["notices"]:
        typer.secho(f"note: {notice}", fg="yellow")
    typer.echo(f"site:       {found['site']}, key {found['key']}")
    if found["rows"] is None:
        typer.echo("chain:      not whole, so anchors were not compared and no epsilon is computed")
        return
    typer.echo(f"chain:      {found['rows']} rows, each follows the one before and carries its signature")
    typer.echo(f"releases:   {found['releases']} stored ones compared")
    compared = "none given: a history cut short at its end may not show; add --anchors RUN/anchors.jsonl"
    if found["anchors"] is not None:
        compared = f"{found['anchors']} of the coordinator compared"
    typer.echo(f"anchors:    {compared}")
    for name, value in found["epsilon"].items():
        typer.echo(
            f"epsilon:    {_shown(value)} by {name}, of {found['epsilon_max']:g} at {found['delta']:g}"
        )
    if not found["problems"]:
        typer.secho("The books are whole.", fg="green")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(epsilon: float | None) -> str:
    from clipward.summary import epsilon_text

    return "without bound" if epsilon is None else epsilon_text(epsilon)


def _left(epsilon: float) -> str:
    """Two decimals, rounded down: what is left is never shown larger than it is."""
    return f"{math.floor(epsilon * 100) / 100:.2f}"


def _span(values: Sequence[float]) -> str:
    first, last = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return first if first == last else f"{first} to {last}"


def _expected() -> tuple[type[Exception], ...]:
    from client.errors import Refused
    from privacy.errors import AccountantDisagreement, LedgerError, PrivacyError
    from server.errors import RunError
    from strategies.settings import SettingsError

    return (AccountantDisagreement, LedgerError, PrivacyError, Refused, RunError, SettingsError, OSError)
