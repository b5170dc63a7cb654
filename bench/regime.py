"""Where privacy is affordable: what a federation adds to its public start, by patients, epsilon and share.

Every arm is the federation of configs/regime.toml over two synthetic hospitals of a number of patients each,
run as `clipward compare` runs its arms. All arms start from one public start and are measured on the same
patients, who train nowhere. A finished arm is a row of a JSON file under the digest of all that decides it:
it is not trained again until that digest changes.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tomli_w
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from client.site import SITE_FILE, Site
from clipward.charts import MUTED, STYLE
from clipward.compare_arms import Asked, arms_of
from clipward.compare_rows import MEASURES, value_of
from clipward.compare_runs import own_site
from clipward.plan import trained_weights
from clipward.plan_picture import COLOURS, DOTS_PER_INCH, SHADES
from clipward.public_start import evaluation_set, prepare_start
from clipward.simulate import run_sites, together
from clipward.summary import summarise
from clipward.synthetic import synthesize
from privacy.planning import Plan
from privacy.regime import Measured
from reporting import machine
from server.evaluation import EvaluationSet
from server.federation import Checkpoints, Evaluation, Federation
from server.metrics import read_events
from server.start import STARTS, Prepared
from strategies.files import write_text
from strategies.settings import PairSource

VERSION = 1  # raised with every change of the program that changes figures: all arms are then trained anew
ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "bench" / "regime.json"
SITES, SEED, IMAGE_SIZE = 2, 7, 64
HELD_OUT, PUBLIC = 300, 1200  # patients of each hospital to measure on, and of the public collection
PLAIN_BATCH, LEAST_LIFT = 128, 1.0
LIFTED = ("retrieval.image_to_text.r10", "retrieval.text_to_image.r10")
SIZES, EPSILONS = "300,1000,3000,10000", "1,3,8,none"
QUICK = ("heads", "120,240", "8,none", "off,on")  # as the options


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a part is trained, whatever the number of patients.

    Attributes:
        rounds: Of the run.
        steps: A round, under privacy.
        sample_rate: Share of a hospital's patients in a step, so that the noise of an epsilon hardly depends
            on their number and its share of a step falls as they become more.
        learning_rate: Of AdamW.
    """

    rounds: int
    steps: int
    sample_rate: float
    learning_rate: float


# Heads as in configs/demo.toml; towers cost a hundred times as much a step, so theirs are few and large.
RECIPES = {
    "heads": Recipe(rounds=5, steps=12, sample_rate=0.2, learning_rate=2e-3),
    "lora": Recipe(rounds=4, steps=2, sample_rate=0.4, learning_rate=2e-3),
    "full": Recipe(rounds=4, steps=2, sample_rate=0.4, learning_rate=3e-4),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One federation of the study.

    Attributes:
        part: What is trained and shared.
        patients: Of each hospital.
        epsilon: Of every patient; None: no privacy.
        prototypes: Whether prototypes of all hospitals join the anchors; only with privacy.
    """

    part: str
    patients: int
    epsilon: float | None
    prototypes: bool

    def federation(self, config: Federation) -> Federation:
        """The settings it runs with.

        Guarantees:
            As many patients are expected in all steps under privacy as pairs are drawn without: in few
            large steps where each adds noise, in batches of at most `PLAIN_BATCH` where none does.
        """
        recipe = RECIPES[self.part]
        batch, steps = max(2, round(recipe.sample_rate * self.patients)), recipe.steps
        if self.epsilon is None and batch > PLAIN_BATCH:
            steps, batch = math.ceil(steps * batch / PLAIN_BATCH), PLAIN_BATCH
        training = config.training.model_copy(
            update={
                "rounds": recipe.rounds,
                "steps": steps,
                "batch": batch,
                "learning_rate": recipe.learning_rate,
            }
        )
        changed = {
            "training": training,
            "evaluation": Evaluation(every=recipe.rounds),
            "checkpoints": Checkpoints(keep=1),
        }
        asked = Asked.parse(
            privacy="none" if self.epsilon is None else "dp",
            share=self.part,
            prototypes="on" if self.prototypes else "off",
            epsilon=self.epsilon,
        )
        sites = [f"site-{number + 1}" for number in range(SITES)]
        first, *_ = arms_of(config.model_copy(update=changed), asked, sites)
        return first.federation

    def digest(self, config: Federation, data: Mapping[str, Any]) -> str:
        """Names all that decides its figures: settings, synthetic data, and the program by `VERSION`.

        Settings left at their defaults are the program's, so that a new one changes no digest.
        """
        settings = self.federation(config).model_dump(
            mode="json", by_alias=True, exclude_defaults=True, exclude={"simulation", "checkpoints"}
        )
        for place in PairSource.path_keys():
            settings["public-start"].pop(place, None)
        facts = {"version": VERSION, "settings": settings, "data": {**data, "patients": self.patients}}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Study:
    """The hospitals of one study, their public start, and the arms run over them.

    Args:
        config: The settings of all arms.
        work: Folder of hospitals, starts and runs.
        held_out: Patients of each hospital to measure on.
        public: Patients of the public collection.
    """

    def __init__(
        self, config: Federation, work: Path, *, held_out: int = HELD_OUT, public: int = PUBLIC
    ) -> None:
        self._work = work
        self.data = {
            "sites": SITES,
            "seed": SEED,
            "held out": held_out,
            "public": public,
            "pixels": IMAGE_SIZE,
        }
        start = config.public_start
        if start is None:
            raise typer.BadParameter(f"{config.name} has no public-start, over which the lift is counted")
        folder = work / "held-out" / "public"
        own = {"dicom": folder / "dicom", "reports": (folder / "reports.csv",)}
        self.config = config.model_copy(update={"public_start": start.model_copy(update=own)})

    def digest(self, arm: Arm) -> str:
        """Names an arm over these hospitals."""
        return arm.digest(self.config, self.data)

    def run(self, arm: Arm) -> dict[str, Any]:
        """Train an arm, or go on with one that was interrupted; its row."""
        federation, folder = arm.federation(self.config), self._work / "runs" / self.digest(arm)
        private = arm.epsilon is not None
        sites = [own_site(site, folder / "sites", private=private) for site in self._sites(arm.patients)]
        run_sites(federation, self._start, sites, run_dir=folder, held_out=self._measured, resume=True)
        events = read_events(folder / "metrics.jsonl")
        row = {**asdict(arm), "digest": self.digest(arm), **figures(federation, arm, events)}
        shutil.rmtree(folder)
        return row

    @cached_property
    def _start(self) -> Prepared:
        self._elsewhere()
        return prepare_start(self.config, cache=self._work / STARTS)

    @cached_property
    def _measured(self) -> EvaluationSet:
        cohorts = [site.cohort() for site in self._elsewhere()]
        return together([evaluation_set(cohort, np.arange(len(cohort))) for cohort in cohorts])

    def _elsewhere(self) -> list[Site]:
        """Sites of patients who train nowhere; the public collection lies beside them."""
        return self._made(
            "held-out", patients=self.data["held out"], public_patients=self.data["public"], seed=SEED + 1
        )

    def _sites(self, patients: int) -> list[Site]:
        """The first so many patients of each hospital; all of them train."""
        return self._made(f"hospitals-{patients}", patients=patients, seed=SEED)

    def _made(self, name: str, **parameters: int) -> list[Site]:
        made = []
        for source in synthesize(self._work / name, sites=SITES, workers=1, **parameters):
            folder = self._work / "sites" / name / source.name
            site = Site.open(source)
            settings = site.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
            cohort = site.settings.cohort.relative_to(source.resolve())
            settings["cohort"] = cohort.model_dump(mode="json", by_alias=True, exclude_none=True) | {
                "image-size": IMAGE_SIZE,
                "test-fraction": 0.0,
            }
            settings["device"]["threads"] = 1
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SITE_FILE, tomli_w.dumps(settings))
            made.append(Site.open(folder))
            made[-1].cohort()
        return made


def figures(federation: Federation, arm: Arm, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a finished arm came to."""
    summary = summarise(events)
    weights, training = trained_weights(federation), federation.training
    found: dict[str, Any] = {
        "parameters": weights,
        "steps": training.rounds * training.steps,
        "batch": training.batch,
        "noise_multiplier": None,
        "noise_to_signal": None,
        "delta": summary["privacy"]["delta"],
        "epsilon_spent": summary["privacy"]["epsilon"],
        "seconds": summary["seconds"]["total"],
        "start": {measure: value_of(summary["public_start"], measure) for measure in MEASURES},
        "end": {measure: value_of(summary["evaluation"], measure) for measure in MEASURES},
        "pairs": summary["evaluation"]["retrieval"]["image_to_text"]["n"],
    }
    if arm.epsilon is None:
        return found
    noise = max(event["noise_multiplier"] for event in events if event["kind"] == "site_replied")
    plan = Plan(
        patients_declared=arm.patients,
        batch=training.batch,
        steps=found["steps"],
        noise_multiplier=noise,
        delta=found["delta"],
        parameters=weights,
        sites=SITES,
    )
    return {**found, "noise_multiplier": noise, "noise_to_signal": plan.noise_to_signal}


def lift(row: Mapping[str, Any]) -> float:
    """What it adds to R@10 over the public start, mean of both directions, in points."""
    return 100 * float(np.mean([row["end"][measure] - row["start"][measure] for measure in LIFTED]))


def measured(rows: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    """What plans read (`privacy.regime.MEASURED`): of each private arm without prototypes, the share kept.

    Arms whose training adds less than `LEAST_LIFT` without privacy are left out: their share is chance.
    """
    plain = {(row["part"], row["patients"]): lift(row) for row in rows if row["epsilon"] is None}
    found = [
        Measured(
            parameters=row["parameters"],
            noise_to_signal=float(f"{row['noise_to_signal']:.4g}"),
            share=round(min(1.0, max(0.0, lift(row) / whole)), 2),
        )
        for row in rows
        if row["epsilon"] is not None and not row["prototypes"]
        if (whole := plain.get((row["part"], row["patients"]), 0.0)) >= LEAST_LIFT
    ]
    return tuple(sorted(found, key=lambda one: (one.parameters, one.noise_to_signal)))


# --- the rows -----------------------------------------------------------------------------------------------


def kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by digest; none where there is no file."""
    if not path.is_file():
        return {}
    return {row["digest"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def complete(
    study: Study, arms: Sequence[Arm], path: Path, *, train: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of ``arms`` that there are, after training those that there are not.

    Guarantees:
        Every finished arm is in the file before the next one begins, so a run that was killed goes on where
        it was. Rows of other arms stay in the file, as do those of digests that nothing has any more.

    Args:
        study: The hospitals.
        arms: In the order in which they are trained.
        path: File of the rows.
        train: Whether to train what is missing.
        tell: Told what is being done.
    """
    for number, arm in enumerate(arms, 1):
        if train and study.digest(arm) not in kept_rows(path):
            tell(f"{number} of {len(arms)}: {arm}")
            row = study.run(arm)
            rows = {**kept_rows(path), row["digest"]: row}
            document = {"bench": "regime", "machine": machine("torch"), "rows": list(rows.values())}
            write_text(path, json.dumps(document, indent=1) + "\n")
            tell(f"  {lift(row):+.1f} points in {row['seconds']:.0f} s")
    found = kept_rows(path)
    return [found[digest] for arm in arms if (digest := study.digest(arm)) in found]


# --- the table and the picture ------------------------------------------------------------------------------


def lines_of(arms: Sequence[Arm]) -> list[tuple[str, bool, float | None]]:
    """Part, prototypes and epsilon of every line, in the order of the arms."""
    return list(dict.fromkeys((arm.part, arm.prototypes, arm.epsilon) for arm in arms))


def table(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]]) -> str:
    """Lifts as a Markdown table, a column a number of patients; what was not trained is a dash."""
    sizes = sorted({arm.patients for arm in arms})
    lifts = {(row["part"], row["prototypes"], row["epsilon"], row["patients"]): lift(row) for row in rows}
    header = ["part", "ε", *(f"{size:,} patients" for size in sizes)]
    lines = [header, ["---", "---:", *("---:" for _ in sizes)]]
    for part, prototypes, epsilon in lines_of(arms):
        found = [lifts.get((part, prototypes, epsilon, size)) for size in sizes]
        cells = ["-" if value is None else f"{value:+.1f}" for value in found]
        name = part + (", prototypes" if prototypes else "")
        lines.append([name, "none" if epsilon is None else f"{epsilon:g}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lifts into ``path`` (.png or .svg): a panel a part, a line an epsilon."""
    parts, sizes = list(dict.fromkeys(arm.part for arm in arms)), sorted({arm.patients for arm in arms})
    style = {
        key: COLOURS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()
    }
    private = sorted({arm.epsilon for arm in arms if arm.epsilon is not None})
    colours = {None: COLOURS[MUTED], **dict(zip(private, cycle(SHADES), strict=False))}
    with matplotlib.rc_context({**style, "figure.facecolor": "white", "svg.hashsalt": "clipward"}):
        figure = Figure(figsize=(4.3 * len(parts), 3.9), layout="constrained")
        for axes, part in zip(
            figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts, strict=True
        ):
            for _, prototypes, epsilon in (line for line in lines_of(arms) if line[0] == part):
                points = sorted(
                    (row["patients"], lift(row))
                    for row in rows
                    if (row["part"], row["prototypes"], row["epsilon"]) == (part, prototypes, epsilon)
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colours[epsilon],
                        linestyle="--" if prototypes else "-",
                        marker="o",
                        markersize=3,
                        label=_label(epsilon, prototypes),
                    )
            axes.axhline(0, color=COLOURS[MUTED], linewidth=0.8, zorder=0)
            axes.set(xscale="log", xlabel="patients of each hospital")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(part, fontsize=11, loc="left")
            if axes.lines[1:]:
                axes.legend(fontsize=8)
        figure.axes[0].set_ylabel("points of R@10 over the public start")
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def _label(epsilon: float | None, prototypes: bool) -> str:
    name = "no privacy" if epsilon is None else f"ε = {epsilon:g}"
    return name + (", prototypes" if prototypes else "")


# --- the command --------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Settings of all arms.")] = ROOT / "configs" / "regime.toml",
    parts: Annotated[str, typer.Option(help="Any of heads, lora, full.")] = ",".join(RECIPES),
    sizes: Annotated[str, typer.Option(help="Patients of each hospital.")] = SIZES,
    epsilons: Annotated[str, typer.Option(help="Of every patient; none: no privacy.")] = EPSILONS,
    prototypes: Annotated[str, typer.Option(help="on, off, or both.")] = "off,on",
    quick: Annotated[
        bool, typer.Option("--quick", help="Heads of 120 and 240 patients over a start of one epoch.")
    ] = False,
    train: Annotated[bool, typer.Option(help="Train what is missing; else show what there is.")] = True,
    work: Annotated[Path, typer.Option(help="Folder of hospitals and runs.")] = ROOT
    / "runs"
    / "regime-study",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File that keeps the rows; by default bench/regime.json.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the lifts into a .png or .svg.")] = None,
    for_plans: Annotated[
        bool, typer.Option("--measured", help="Print what privacy/regime.py holds for plans instead.")
    ] = False,
) -> None:
    """Measure the lift over the public start against patients, epsilon, share and prototypes.

    Progress goes to stderr, the table to stdout. What the file of rows has is not trained again; without
    privacy there are no prototypes.
    """
    if quick:
        parts, sizes, epsilons, prototypes = QUICK
    asked, arms = Federation.load(config), arms_asked(parts, sizes, epsilons, prototypes)
    study = quick_study(asked, work) if quick else Study(asked, work)
    kept = as_json or (work / "quick.json" if quick else ROWS)
    rows = complete(study, arms, kept, train=train, tell=lambda text: typer.echo(text, err=True))
    if picture is not None:
        draw(arms, rows, picture)
    typer.echo("\n".join(f"{one!r}," for one in measured(rows)) if for_plans else table(arms, rows))


def arms_asked(parts: str, sizes: str, epsilons: str, prototypes: str) -> list[Arm]:
    """The arms that the options name, those of few patients first.

    Raises:
        BadParameter: a word that is none of the option's.
    """
    read = (
        _words(parts, "--parts", lambda word: word if word in RECIPES else None),
        _words(sizes, "--sizes", lambda word: int(word) if word.isdecimal() and int(word) > 1 else None),
        _words(epsilons, "--epsilons", lambda word: word if word == "none" or _positive(word) else None),
        _words(prototypes, "--prototypes", lambda word: {"off": False, "on": True}.get(word)),
    )
    return [
        Arm(
            part=part,
            patients=patients,
            epsilon=None if epsilon == "none" else float(epsilon),
            prototypes=with_prototypes,
        )
        for part, patients, with_prototypes, epsilon in product(read[0], sorted(read[1]), read[3], read[2])
        if not (with_prototypes and epsilon == "none")
    ]


def quick_study(config: Federation, work: Path) -> Study:
    """A study of the same shape that takes a minute, and whose figures say nothing."""
    start = config.public_start and config.public_start.model_copy(update={"epochs": 1})
    return Study(config.model_copy(update={"public_start": start}), work / "quick", held_out=40, public=60)


def _words(text: str, option: str, read: Callable[[str], Any]) -> list[Any]:
    found = {word.strip(): read(word.strip()) for word in text.split(",")}
    for word, value in found.items():
        if value is None:
            raise typer.BadParameter(f"{word!r} cannot be used", param_hint=option)
    return list(found.values())


def _positive(word: str) -> bool:
    try:
        return 0 < float(word) < math.inf
    except ValueError:
        return False


if __name__ == "__main__":
    app()
