"""A whole federation on one machine: the same ServerApp and ClientApp as in hospitals, another engine."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from client.app import app as client_app
from client.app import site_folders
from client.cohort import Cohort
from client.cohort.salt import SALT_FILE
from client.cohort.tables import read_table
from client.site import PINS_FILE, SITE_FILE, Site
from clipward.backends import run_in_process, run_on_ray
from clipward.heterogeneity import SITE, cut_table, pool, require_known, site_names
from clipward.own_models import measured
from clipward.public_start import Progress, evaluation_set, prepare_start
from clipward.refusals import CertainRefusal, certain_refusals, warn_of
from clipward.report import write_report
from clipward.summary import summarise, write_summary
from encoders.parts import TrainablePart
from encoders.preprocessing import Preprocessing, alike
from server import checkpoints
from server.app import coordinate
from server.evaluation import EvaluationSet, evaluator
from server.federation import Federation, Missing, Privacy, Simulation, SitePolicy
from server.metrics import Event, read_events
from server.start import STARTS, Prepared, part_of, start_of
from strategies.files import write_text
from strategies.settings import SettingsError

Backend = Literal["in-process", "ray"]

logger = logging.getLogger(f"clipward.{__name__}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a simulation leaves: the summary, and where everything is."""

    summary: dict[str, Any]
    run_dir: Path

    @property
    def report(self) -> Path:
        """The self-contained page about the run."""
        return self.run_dir / "report.html"


def simulate(
    federation: Federation,
    *,
    runs: Path,
    backend: Backend = "in-process",
    resume: bool = False,
    compare: Mapping[str, Any] | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    on_progress: Progress | None = None,
) -> Result:
    """Run the federation over the sites its file names, and measure it on their held-out patients.

    Held-out patients of all sites are pooled here because this is one machine: they take no part in
    training, and figures measured on them are covered by no epsilon.

    Args:
        federation: Read from its file; it has a ``simulation`` table.
        runs: Folder of all runs.
        backend: In this process, or on Ray.
        resume: Go on with a run that was interrupted.
        compare: Evaluations of other models on the same data, by name, for summary and report.
        listeners: Told every event.
        on_progress: Told of the work before the first round.

    Raises:
        SettingsError: no ``simulation`` table, or no site where it points.
        CohortError: a site's or the public data cannot be used.
        RunError: the run cannot start or go on.
    """
    run_dir = runs / federation.name
    prepared = prepare_start(federation, cache=runs / STARTS, on_progress=on_progress)
    folders = prepare_sites(federation, run_dir)
    federation = with_keys(federation, folders)
    held_out = _held_out(folders, on_progress, resized=federation.share.part == "prototypes")
    run_sites(
        federation,
        prepared,
        folders,
        run_dir=run_dir,
        held_out=held_out,
        backend=backend,
        resume=resume,
        listeners=listeners,
    )
    return finish(federation, run_dir, prepared, folders=folders, held_out=held_out, compare=compare)


def run_sites(
    federation: Federation,
    prepared: Prepared,
    folders: Sequence[Path],
    *,
    run_dir: Path,
    held_out: EvaluationSet | None,
    resume: bool,
    backend: Backend = "in-process",
    listeners: Sequence[Callable[[Event], None]] = (),
    warn: Callable[[CertainRefusal], None] = warn_of,
) -> None:
    """Run all rounds over the sites in ``folders``; what is left of it is in ``run_dir``.

    Args:
        federation: The run's settings.
        prepared: Its start.
        folders: Of the sites, each with a ``site.toml``.
        run_dir: Folder of the run.
        held_out: What the model is measured on; null: it is not.
        resume: Go on from the last checkpoint, if there is one.
        backend: In this process, or on Ray.
        listeners: Told every event.
        warn: Told before the first round what sites will refuse.

    Raises:
        RunError: the run cannot start or go on.
    """
    start = start_of(federation, prepared)
    for refusal in certain_refusals(federation, map(Site.open, folders), start):
        warn(refusal)
    common = federation.share.part != "prototypes"
    measure = evaluator(part_of(federation, prepared.bundle), held_out) if held_out and common else None
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinate(
            grid,
            federation,
            start=start,
            evaluate=measure,
            run_dir=run_dir,
            resume=resume,
            listeners=listeners,
        )

    engine = run_on_ray if backend == "ray" else run_in_process
    engine(server_app, client_app, node_configs=[{"site": str(folder)} for folder in folders], run_config={})


def finish(
    federation: Federation,
    run_dir: Path,
    prepared: Prepared,
    *,
    folders: Sequence[Path],
    held_out: EvaluationSet | None,
    compare: Mapping[str, Any] | None = None,
) -> Result:
    """Write what a finished run leaves: ``model/``, ``summary.json``, ``report.html``.

    Where prototypes alone were shared there is no ``model/``: each site's own is measured where it lies.

    Args:
        federation: The run's settings.
        run_dir: Its folder.
        prepared: Its start.
        folders: Of its sites.
        held_out: What models are measured on; null: they are not.
        compare: Evaluations of other models on the same data, by name.
    """
    alone = federation.share.part == "prototypes"
    models = measured(folders, run=federation.name, held_out=held_out) if alone else None
    stops = federation.evaluation.stop_after > 0  # then the last rounds were no better than the best
    checkpoint = (checkpoints.load_best(run_dir) if stops else None) or checkpoints.load_latest(run_dir)
    if checkpoint is not None and not alone:
        part = part_of(federation, prepared.bundle)
        part.load({**part.arrays(), **checkpoint.arrays})
        _export(part, run_dir / "model")
    events = read_events(run_dir / "metrics.jsonl")
    result = Result(summary=summarise(events, compare=compare, models=models), run_dir=run_dir)
    write_summary(run_dir / "summary.json", result.summary)
    write_report(result.report, events=events, summary=result.summary)
    return result


def prepare_sites(federation: Federation, run_dir: Path) -> list[Path]:
    """The folders of the simulated sites; those of a table are made in the run's folder.

    Raises:
        SettingsError: there is no site where the file points.
    """
    simulation = federation.simulation
    if simulation is None:
        raise SettingsError("the federation file has no [simulation] table: name its sites there")
    if simulation.table is not None:
        return _cut(simulation.table, simulation, run_dir / "sites")
    folders = site_folders(simulation.sites) if simulation.sites else []
    if not folders:
        raise SettingsError(f"no site in {simulation.sites}: expected sub-folders with a {SITE_FILE}")
    if not simulation.changed:
        return folders
    pooled = simulation.model_copy(update={"by": "site"})
    return _cut(pool(folders, run_dir / "pool"), pooled, run_dir / "sites")


def with_keys(federation: Federation, folders: Sequence[Path]) -> Federation:
    """The federation with its sites' public keys, which every site is given too; made where there is none.

    Nothing is done without secure aggregation, or where the file names the keys: the sites then hold pins of
    their own.

    Raises:
        SettingsError: the threshold is none for so many sites.
    """
    secure = federation.secure_aggregation
    if secure is None or secure.sites:
        return federation
    sites = [Site.open(folder) for folder in folders]
    keys = {site.name: site.key().public for site in sites}
    for site in sites:
        pins = tomli_w.dumps({"pins": keys})
        write_text(site.folder / PINS_FILE, f"# Made for a simulation.\n{pins}")
    secure = secure.model_copy(update={"sites": keys})
    try:
        secure.require_fit(federation.strategy, federation.share)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return federation.model_copy(update={"secure_aggregation": secure})


def _cut(table: Path, simulation: Simulation, root: Path) -> list[Path]:
    """The sites of one table: one per value of its column, or those made for a study."""
    by = simulation.by
    if simulation.changed:
        table, by = cut_table(table, simulation, root), SITE
    rows = read_table(table)
    column, patient = rows.need(by), rows.need("patient_id")
    patients: dict[str, set[str]] = {}
    for row in rows.rows:
        patients.setdefault(row[column], set()).add(row[patient])
    names = site_names(patients, of=f"{table}, column {column!r}")
    require_known(simulation.policies, names.values(), key="policies")
    require_known(simulation.models, names.values(), key="models")
    common = simulation.policy.model_dump(mode="json", by_alias=True)
    for value, name in names.items():
        own, model = simulation.policies.get(name, SitePolicy()), simulation.models.get(name)
        table_of_model = {} if model is None else {"model": model.model_dump(mode="json", by_alias=True)}
        _write_site(
            root / name,
            {
                "version": 1,
                "name": name,
                "cohort": {
                    "table": str(table.resolve()),
                    "where": {column: value},
                    "patients-declared": len(patients[value]),
                    "image-size": simulation.image_size,
                    "modality": simulation.missing.get(name, Missing()).modality,
                    "salt": f"clipward/{name}",
                },
                "policy": common | own.model_dump(mode="json", by_alias=True, exclude_none=True),
                **table_of_model,
            },
        )
    return [root / name for name in names.values()]


def without_privacy(federation: Federation, *, runs: Path, on_progress: Progress | None = None) -> Federation:
    """The same federation without differential privacy, over sites that allow it, for comparison.

    The sites are new folders in the run's own folder that share the packed cohorts of the given ones, which
    are packed if they are not yet; the given sites' policies and ledgers are not touched.

    Raises:
        SettingsError: no site where the file points.
        CohortError: a site's data cannot be used.
    """
    if federation.share.part == "prototypes":
        raise SettingsError(
            "share.part 'prototypes' is not run without privacy: its models would be released"
        )
    name = f"{federation.name}-without-dp"
    root = runs / name / "sites"
    for folder in prepare_sites(federation, runs / federation.name):
        site = Site.open(folder)
        _packed(site, on_progress)
        settings = site.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
        settings["policy"]["require-dp"] = False
        cohort = site.settings.cohort.relative_to(folder.resolve())
        settings["cohort"] = cohort.model_dump(mode="json", by_alias=True, exclude_none=True)
        _write_site(root / folder.name, settings)
        for shared in (site.cohort_folder, folder / SALT_FILE):
            link = root / folder.name / shared.name
            if shared.exists() and not link.exists():
                link.symlink_to(shared.resolve(), target_is_directory=shared.is_dir())
    return federation.model_copy(
        update={
            "name": name,
            "privacy": Privacy(mode="none"),
            "objective": federation.objective.model_copy(update={"name": "infonce"}),
            "simulation": Simulation(sites=root),
        }
    )


def _write_site(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SITE_FILE, "# Made for a simulation.\n" + tomli_w.dumps(settings))


def _held_out(
    folders: Sequence[Path], tell: Progress | None, *, resized: bool = False
) -> EvaluationSet | None:
    """The held-out pairs of all sites; None when there are none.

    Args:
        folders: Of the sites.
        tell: Told of the packing.
        resized: Whether sites may pack images at different sizes, of which the smallest is then used.
    """
    sets = []
    for folder in folders:
        site = Site.open(folder)
        cohort = _packed(site, tell)
        least = site.settings.policy.min_patients
        if len(np.unique(cohort.patients[cohort.train()])) < least:
            logger.warning(
                "site %s has fewer training patients than policy.min-patients = %d: without privacy it "
                "refuses every round; with it, it trains all the same, and only its own site.log says so",
                site.name,
                least,
            )
        if site.settings.cohort.modality == "pairs":
            sets.append(evaluation_set(cohort, cohort.test()))
    return together(sets, resized=resized) if any(len(one.texts) for one in sets) else None


def together(sets: Sequence[EvaluationSet], *, resized: bool = False) -> EvaluationSet:
    """Several sets as one; a finding is unknown in the rows of a set that does not have it.

    Args:
        sets: At least one.
        resized: Whether their images may be of different sizes, of which the smallest is then used.

    Raises:
        SettingsError: they hold images of different sizes.
    """
    findings = sorted({finding for one in sets for finding in one.labels})
    unknown = [np.full(len(one.texts), np.nan, dtype=np.float32) for one in sets]
    return EvaluationSet(
        images=_same_size([one.images for one in sets], resized=resized),
        texts=tuple(text for one in sets for text in one.texts),
        labels={
            finding: np.concatenate(
                [one.labels.get(finding, nan) for one, nan in zip(sets, unknown, strict=True)]
            )
            for finding in findings
        },
    )


def _packed(site: Site, tell: Progress | None) -> Cohort:
    return site.cohort(on_progress=partial(tell, f"read {site.name}") if tell else None)


def _same_size(images: Sequence[NDArray[np.uint8]], *, resized: bool) -> NDArray[np.uint8]:
    sizes = {packed.shape[1] for packed in images}
    if len(sizes) > 1 and resized:
        smallest = Preprocessing(image_size=min(sizes))
        images = [smallest.resize(packed) for packed in images]
    elif len(sizes) > 1:
        raise SettingsError(f"the sites pack images at different sizes {sorted(sizes)}: use one image-size")
    return np.concatenate(alike(images))


def _export(part: TrainablePart, folder: Path) -> None:
    """Write the model beside its place, then put it there: a reader never sees half a model."""
    partial_folder = folder.with_name(".model.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    part.merged().export(partial_folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
