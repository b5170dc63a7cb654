"""The command line. Each command reads its arguments, calls one function, prints what a person needs."""

import shutil
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from clipward.environment import stay_at_home

stay_at_home()  # before anything imports Flower, Hugging Face or matplotlib

from clipward import budget, cohort_check, cohort_inspect, deidentify, plan  # noqa: E402 - light: what they need is imported when they run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Hospitals train one CLIP model together; images and reports stay where they are.\n\n"
    "Start with **clipward demo**, then read configs/demo.toml.",
)
cohort_app = typer.Typer(no_args_is_help=True, help="A site's packed image-text pairs.")
app.add_typer(cohort_app, name="cohort")
app.add_typer(budget.app, name="budget")

Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
FederationFile = Annotated[Path, typer.Argument(help="The consortium's file, such as configs/demo.toml.")]


class Backend(StrEnum):
    """Engines of a simulation."""

    in_process = "in-process"
    ray = "ray"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"clipward {version('clipward')}")
        raise typer.Exit


@app.callback()
def setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set up logging for every command."""
    from clipward.console import set_up_logging

    set_up_logging(verbose=verbose)


@app.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="Folder to write the hospitals into.")],
    sites: Annotated[int, typer.Option(help="Number of hospitals.")] = 4,
    patients: Annotated[int, typer.Option(help="Patients per hospital.")] = 300,
    public_patients: Annotated[int, typer.Option(help="Patients of a public collection beside them.")] = 0,
    seed: Annotated[int, typer.Option(help="Everything drawn follows from it.")] = 7,
) -> None:
    """Write synthetic hospitals: DICOM radiographs with drawn findings, reports, ground truth, site files.

    Example: clipward synthesize demo/hospitals --sites 4 --patients 300 --seed 7
    """
    from clipward.console import errors_in_one_line, progress_bars
    from clipward.synthetic import SyntheticError
    from clipward.synthetic import synthesize as write

    with errors_in_one_line((SyntheticError, OSError)), progress_bars() as show:
        folders = write(
            out,
            sites=sites,
            patients=patients,
            public_patients=public_patients,
            seed=seed,
            on_progress=lambda done, total: show("draw patients", done, total),
        )
    for folder in folders:
        typer.echo(folder)


@cohort_app.command("build")
def cohort_build(
    site: Annotated[Path, typer.Argument(help="The site's folder, with its site.toml.")],
) -> None:
    """Fetch what a PACS holds (if one is named), then scan, pair and pack a site's images and reports.

    Says what became of every file. Killed and started again, it goes on where it was.

    Example: clipward cohort build demo/hospitals/site-1
    """
    from client.cohort import CohortError
    from client.site import Site
    from clipward.console import errors_in_one_line, progress_bars
    from strategies.settings import SettingsError

    with errors_in_one_line((CohortError, SettingsError, OSError)), progress_bars() as show:
        opened = Site.open(site)
        fetched = opened.fetch(on_progress=lambda done, total: show("fetch from the PACS", done, total))
        cohort = opened.cohort(on_progress=lambda done, total: show("read files", done // 2, total // 2))
    if fetched is not None:
        typer.echo(f"{'in the PACS':12} {fetched.instances:8}, {fetched.new} of them new")
        for code, count in fetched.codes.items():
            typer.echo(f"  {count:8} x {code}: {code.meaning}")
        if fetched.codes:
            typer.echo(f"{fetched.failures} names each instance that did not come")
    for state, count in cohort.counts.items():
        typer.echo(f"{state:12} {count:8}")
    typer.echo(f"{'inputs':12} {sum(cohort.counts.values()):8}")
    for code, count in cohort.codes.items():
        typer.echo(f"  {count:8} x {code}: {code.meaning}")
    for kind, hits in cohort.masked.items():
        typer.echo(f"  {hits:8} x {kind} masked in the reports")
    typer.echo(f"packed in {site / 'cohort'}; its quarantine.csv names every file that was not used")


cohort_app.command()(cohort_inspect.inspect)
cohort_app.command()(cohort_check.check)
cohort_app.command()(deidentify.deidentify)


@app.command()
def start(
    federation: FederationFile,
    runs: Runs = Path("runs"),
) -> None:
    """Prepare what a run starts from: train the public start, choose anchors, pack public evaluation data.

    A simulation does this by itself; a deployed coordinator runs it once, beforehand.

    Example: clipward start configs/demo.toml
    """
    from clipward.console import errors_in_one_line, progress_bars
    from clipward.public_start import prepare_start
    from server.federation import Federation
    from server.start import STARTS, start_folder

    with errors_in_one_line(_expected()), progress_bars() as show:
        settings = Federation.load(federation)
        prepare_start(settings, cache=runs / STARTS, on_progress=show)
        typer.echo(start_folder(settings, runs / STARTS))


@app.command()
def simulate(
    federation: FederationFile,
    runs: Runs = Path("runs"),
    backend: Annotated[Backend, typer.Option(help="Engine: this process, or Ray.")] = Backend.in_process,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was interrupted.")] = False,
    compare: Annotated[bool, typer.Option(help="Also run it without differential privacy.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port while it runs; 0 takes any.")
    ] = None,
) -> None:
    """Run a whole federation on this machine and measure its model.

    Leaves runs/NAME/ with metrics.jsonl, checkpoints/, model/ (Hugging Face), summary.json and report.html.
    Warns beforehand of sites whose policy will refuse every round.

    Example: clipward simulate configs/demo.toml --metrics-port 9464

    Example: clipward simulate configs/demo.toml --resume
    """
    from clipward.console import errors_in_one_line
    from server.federation import Federation

    with errors_in_one_line(_expected()):
        settings = Federation.load(federation)
        _run(settings, runs=runs, backend=backend, resume=resume, compare=compare, metrics_port=metrics_port)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the synthetic hospitals are kept.")] = Path("demo"),
    runs: Runs = Path("runs"),
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port while it runs; 0 takes any.")
    ] = None,
) -> None:
    """Four synthetic hospitals train one model privately: a table, and a report to open.

    Run again, it replays the releases the hospitals have stored: same result, no further privacy cost.

    Example: clipward demo
    """
    from clipward.console import console, errors_in_one_line, progress_bars
    from clipward.demonstration import HOSPITALS, settings
    from clipward.synthetic import SyntheticError
    from clipward.synthetic import synthesize as write

    with errors_in_one_line((*_expected(), SyntheticError)):
        federation = settings(folder)
        console.print(f"Four synthetic hospitals in {folder}", markup=False, highlight=False)
        with progress_bars() as show:
            write(folder, **HOSPITALS, on_progress=lambda done, total: show("draw patients", done, total))
        for name in (federation.name, f"{federation.name}-without-dp"):
            shutil.rmtree(runs / name, ignore_errors=True)
        _run(
            federation,
            runs=runs,
            backend=Backend.in_process,
            resume=False,
            compare=True,
            metrics_port=metrics_port,
        )


@app.command()
def compare(
    federation: FederationFile,
    runs: Runs = Path("runs"),
    privacy: Annotated[
        str | None, typer.Option(help="dp, none, or both as dp,none; by default as the file has it.")
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="Parts, such as heads,lora,full,prompts; by default the file's.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="With privacy: anchored, microbatch, or both; by default the file's.")
    ] = None,
    prototypes: Annotated[
        str | None, typer.Option(help="on, off, or on,off, where the file has a [prototypes] table.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Such as 1,2,3; by default the file's one, which gives no interval.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Of the arms with privacy; by default the file's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Instead of the file's.")] = None,
) -> None:
    """Is joining worth it? Train the federation, one model on all data, and every site alone.

    Measures all of them alike, counts bytes, seconds and epsilon, and leaves runs/NAME-compare/ with
    compare.md, .csv, .json and .png. Interrupted and started again it goes on where it was; a finished arm is
    not run again. For public or synthetic data: of patients, all arms together would cost the sum.

    Example: clipward compare configs/cxr-multisite.toml --seeds 1,2

    Example: clipward compare configs/demo.toml --privacy dp,none --share heads,lora --seeds 1,2,3
    """
    from rich import print as show_result

    from clipward.compare import compare as run
    from clipward.compare import table_of
    from clipward.compare_arms import Asked
    from clipward.compare_results import PICTURE
    from clipward.compare_rows import by_setting
    from clipward.console import errors_in_one_line, progress_bars
    from server.federation import Federation

    with errors_in_one_line(_expected()), progress_bars() as show:
        asked = Asked.parse(
            privacy=privacy,
            share=share,
            objective=objective,
            prototypes=prototypes,
            seeds=seeds,
            epsilon=epsilon,
            rounds=rounds,
        )
        comparison, folder = run(Federation.load(federation), asked, runs=runs, on_progress=show)
    for setting, rows in by_setting(comparison.rows):
        show_result(table_of(f"{comparison.name}: {setting}", rows))
    for sentence in comparison.reading:
        typer.echo(sentence)
    typer.echo(f"table:   {folder / 'compare.md'}, .csv, .json")
    typer.echo(f"picture: {folder / PICTURE}")


app.command()(plan.plan)


def _run(
    federation: Any, *, runs: Path, backend: Backend, resume: bool, compare: bool, metrics_port: int | None
) -> None:
    from clipward.console import console, guarantee, progress_bars, result_table
    from clipward.progress import ProgressDisplay
    from clipward.simulate import simulate as run
    from clipward.simulate import without_privacy
    from server.metrics import PrometheusExporter, read_events

    with ExitStack() as stack:
        exporter = stack.enter_context(PrometheusExporter())
        if metrics_port is not None:
            port = exporter.serve(metrics_port)
            console.print(f"metrics: http://127.0.0.1:{port}/metrics", markup=False, highlight=False)

        def go(settings: Any, *listeners: Any, compared: dict[str, Any] | None = None) -> Any:
            display = ProgressDisplay(console)
            past = runs / settings.name / "metrics.jsonl"
            if resume and past.is_file():
                for listener in (display, *listeners):
                    listener.replay(read_events(past))
            with progress_bars() as show, display:
                return run(
                    settings,
                    runs=runs,
                    backend=backend.value,
                    resume=resume,
                    compare=compared,
                    listeners=[display, *listeners],
                    on_progress=show,
                )

        compared = None
        if compare and federation.privacy.mode == "dp":
            console.print("First without differential privacy, for comparison.", highlight=False)
            with progress_bars() as show:
                plain = without_privacy(federation, runs=runs, on_progress=show)
            compared = {"without_dp": go(plain).summary["evaluation"]}
            console.print("Now with differential privacy.", highlight=False)
        result = go(federation, exporter, compared=compared)
    console.print()
    typer.echo()
    from rich import print as show_result

    show_result(result_table(result.summary))
    typer.echo(guarantee(result.summary))
    typer.echo(f"model:  {result.run_dir / 'model'}")
    typer.echo(f"report: {result.report}")


@app.command("own-model")
def own_model(
    site: Annotated[Path, typer.Argument(help="The site's folder, with its site.toml.")],
    run: Annotated[str, typer.Argument(help="Name of a run that shared prototypes alone.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the model, in Hugging Face's layout.")
    ] = None,
) -> None:
    """Measure, and export, the model that a site trained for itself in a run that shared prototypes alone.

    The figures are of the site's held-out patients: they are for the hospital, and no epsilon covers them.

    Example: clipward own-model sites/north prototypes --out model
    """
    import json

    from client.site import Site
    from clipward.console import errors_in_one_line
    from clipward.own_models import measured_at_home
    from clipward.own_models import own_model as model_of
    from strategies.settings import SettingsError

    with errors_in_one_line(_expected()):
        opened = Site.open(site)
        part = model_of(opened, run=run)
        if part is None:
            raise SettingsError(
                f"{opened.name} has no model of its own in run {run!r}: it has not trained in it"
            )
        if out is not None:
            part.merged().export(out)
        typer.echo(json.dumps(measured_at_home(opened, part), indent=2))


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose text tells the person at the keyboard what to do."""
    from client.cohort import CohortError
    from clipward.backends import BackendError
    from encoders.errors import EncoderError
    from privacy.errors import LedgerError
    from server.errors import RunError
    from server.metrics import ExporterError, RunLogError
    from strategies.bundles import BundleMissing
    from strategies.settings import SettingsError
    from tasks.embeddings import EvaluationError

    return (
        BackendError,
        BundleMissing,
        CohortError,
        EncoderError,
        EvaluationError,
        ExporterError,
        LedgerError,
        RunError,
        RunLogError,
        SettingsError,
        OSError,
    )


def main() -> None:
    """Entry point of the ``clipward`` command."""
    app()
