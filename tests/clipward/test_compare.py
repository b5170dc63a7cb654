"""What a consortium asks first: the federation beside all data in one place and every site alone."""

import csv
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from client.site import Site
from clipward import compare_reading
from clipward.cli import app
from clipward.compare import compare, table_of
from clipward.compare_arms import Arm, Asked, arms_of
from clipward.compare_picture import draw
from clipward.compare_reading import reading
from clipward.compare_results import HEADERS, Comparison
from clipward.compare_rows import MEASURES, Estimate, Row, rows_of
from clipward.compare_runs import EVENTS, RESULT, Figures, Outcome, Runner
from server.federation import Federation
from server.metrics import read_events
from strategies.settings import SettingsError
from tests.small_hospitals import EPSILON, PATIENTS, change_site, federation, without_claim, write_federation

NAMES = ["site-1", "site-2", "site-3"]
SHORT = {"training": {"rounds": 2, "steps": 2, "batch": 6}}
PROTOTYPES = {"prototypes": {"findings": ["pneumothorax"]}}


def plain(root: Path, **changes: Any) -> Federation:
    return federation(root, **without_claim(**{**SHORT, **changes}))


def by_kind(arms: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


def names_of(root: Path, **options: str) -> list[str]:
    asked = Asked.parse(**options)  # type: ignore[arg-type]
    return [arm.name for arm in arms_of(federation(root, **SHORT, **PROTOTYPES), asked, NAMES[:1])]


def run_folders(root: Path, name: str = "small") -> list[Path]:
    return sorted(path.parent for path in (root / "runs" / f"{name}-compare").glob(f"*/{RESULT}"))


def test_without_options_the_arms_are_the_files(tmp_path: Path) -> None:
    file = federation(tmp_path)
    arms = arms_of(file, Asked(), NAMES)
    assert [(arm.kind, arm.site) for arm in arms] == [
        ("federation", None),
        ("pooled", None),
        *(("alone", name) for name in NAMES),
    ]
    assert arms[0].federation == file
    assert {arm.setting for arm in arms} == {"heads, ε = 8"}


def test_a_site_alone_trains_as_in_the_federation_without_what_only_several_need(tmp_path: Path) -> None:
    file = federation(
        tmp_path,
        strategy={"name": "fedadam", "min-sites": 3, "deadline-seconds": 60.0},
        share={"keep": ["norms"], "part": "full", "wire": "int8"},
        **PROTOTYPES,
    )
    alone = by_kind(arms_of(file, Asked(), NAMES))["site-2 alone"].federation
    assert (alone.training, alone.model, alone.privacy) == (file.training, file.model, file.privacy)
    assert (alone.strategy.name, alone.strategy.min_sites) == ("fedavg", 1)
    assert alone.strategy.deadline_seconds == 60.0
    assert (alone.share.part, alone.share.keep, alone.share.wire) == ("full", (), "fp32")
    assert alone.prototypes is None


@given(sites=st.integers(1, 40), fraction=st.sampled_from([0.1, 0.5, 1.0]), private=st.booleans())
def test_pooled_as_many_pairs_are_seen_as_by_the_sites_of_a_round(
    sites: int, fraction: float, private: bool
) -> None:
    changes = {} if private else without_claim()
    file = federation(Path("nowhere"), strategy={"fraction": fraction, "min-sites": 1}, **changes)
    pooled = by_kind(arms_of(file, Asked(), [f"s{n}" for n in range(sites)]))["pooled"].federation.training
    own = file.training
    assert pooled.batch is not None
    assert own.batch is not None
    assert pooled.steps * pooled.batch == file.strategy.asked_of(sites) * own.steps * own.batch
    assert (pooled.steps == own.steps) if private else (pooled.batch == own.batch)


@pytest.mark.parametrize(("fraction", "rate"), [(1.0, 0.4), (0.5, 0.2)])
def test_pooled_a_sample_rate_is_the_share_of_all_patients_that_a_round_sees(
    tmp_path: Path, fraction: float, rate: float
) -> None:
    training = {"batch": None, "sample-rate": 0.4}
    file = federation(tmp_path, training=training, strategy={"fraction": fraction, "min-sites": 1})
    pooled = by_kind(arms_of(file, Asked(), ["a", "b", "c", "d"]))["pooled"].federation.training
    assert (pooled.steps, pooled.sample_rate, pooled.batch) == (file.training.steps, rate, None)


def test_pooled_passes_over_the_data_stay_as_many(tmp_path: Path) -> None:
    file = plain(tmp_path, training={"epochs": 2})
    assert by_kind(arms_of(file, Asked(), NAMES))["pooled"].federation.training == file.training


def test_with_and_without_privacy_each_has_the_objective_that_may_be_trained(tmp_path: Path) -> None:
    file = federation(tmp_path, training={"optimizer": "dp-adambc"}, **PROTOTYPES)
    arms = arms_of(file, Asked.parse(privacy="dp,none"), NAMES[:1])
    facts = {
        (arm.setting, arm.name): (
            arm.federation.objective.name,
            arm.federation.privacy.epsilon,
            arm.federation.training.optimizer,
        )
        for arm in arms
    }
    private, free = ("anchored", EPSILON, "dp-adambc"), ("infonce", None, "adamw")
    assert facts == {
        ("heads, ε = 8", "federation, prototypes"): private,
        ("heads, ε = 8", "pooled"): private,
        ("heads, ε = 8", "site-1 alone"): private,
        ("heads, no privacy", "federation"): free,
        ("heads, no privacy", "pooled"): free,
        ("heads, no privacy", "site-1 alone"): free,
    }
    made = arms_of(plain(tmp_path, training={"epochs": 1}), Asked.parse(privacy="dp", epsilon=3.0), NAMES)
    assert {arm.federation.privacy.epsilon for arm in made} == {3.0}
    assert {arm.federation.training.epochs for arm in made} == {None}


def test_prototypes_are_the_federations_alone_and_only_where_there_are_anchors(tmp_path: Path) -> None:
    rest = ["pooled", "site-1 alone"]
    assert names_of(tmp_path, prototypes="on,off") == ["federation", "federation, prototypes", *rest]
    assert names_of(tmp_path, prototypes="off") == ["federation", *rest]
    assert names_of(tmp_path, prototypes="on", privacy="none") == ["federation", *rest]
    soft = federation(tmp_path, **PROTOTYPES, objective={"soft-targets": 10.0})
    arms = arms_of(soft, Asked.parse(prototypes="on", privacy="none"), NAMES[:1])
    assert [arm.name for arm in arms] == ["federation, prototypes", *rest]
    with pytest.raises(SettingsError, match=r"small has no \[prototypes\] table: add one"):
        arms_of(federation(tmp_path), Asked.parse(prototypes="on"), NAMES)


def test_every_objective_has_its_arms_and_only_anchors_have_prototypes(tmp_path: Path) -> None:
    file = federation(tmp_path, **PROTOTYPES)
    arms = arms_of(file, Asked.parse(objective="anchored,microbatch", privacy="dp,none"), NAMES[:1])
    assert [(arm.setting, arm.name, arm.federation.objective.name) for arm in arms] == [
        ("heads, ε = 8", "federation, prototypes", "anchored"),
        ("heads, ε = 8", "pooled", "anchored"),
        ("heads, ε = 8", "site-1 alone", "anchored"),
        ("heads, microbatch, ε = 8", "federation", "microbatch"),
        ("heads, microbatch, ε = 8", "pooled", "microbatch"),
        ("heads, microbatch, ε = 8", "site-1 alone", "microbatch"),
        ("heads, no privacy", "federation", "infonce"),
        ("heads, no privacy", "pooled", "infonce"),
        ("heads, no privacy", "site-1 alone", "infonce"),
    ]


def test_a_centre_is_the_image_heads_alone(tmp_path: Path) -> None:
    file = federation(tmp_path, share={"part": "image-head"}, centre={"noise-multiplier": 2.0})
    arms = arms_of(file, Asked.parse(share="image-head,heads"), NAMES[:1])
    assert [arm.federation.centre for arm in arms] == [file.centre] * 3 + [None] * 3


def test_every_part_and_seed_has_its_arms(tmp_path: Path) -> None:
    asked = Asked.parse(share="heads,lora", seeds="1, 2", rounds=7)
    arms = arms_of(federation(tmp_path), asked, NAMES)
    assert len(arms) == 2 * 2 * 5
    assert {(arm.federation.share.part, arm.seed) for arm in arms} == {
        (part, seed) for part in ("heads", "lora") for seed in (1, 2)
    }
    assert all(arm.federation.model.seed == arm.seed for arm in arms)
    assert {arm.federation.training.rounds for arm in arms} == {7}


def test_a_public_start_is_the_same_for_every_seed(tmp_path: Path) -> None:
    public = {"table": str(tmp_path / "public.csv")}
    arms = arms_of(federation(tmp_path, public_start=public), Asked.parse(seeds="4,5"), NAMES)
    assert {(arm.seed, arm.federation.model.seed) for arm in arms} == {(4, 0), (5, 0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"share": "heads,loar"},
            r"--share 'loar' is none of full, image-tower, lora, .*, prompts; did you mean 'lora'",
        ),
        ({"share": ""}, r"--share '' is none of full, image-tower, lora, heads, image-head, prompts$"),
        ({"privacy": "DP"}, r"--privacy 'DP' is none of dp, none"),
        ({"objective": "infonce"}, r"--objective 'infonce' is none of anchored, microbatch"),
        ({"prototypes": "yes"}, r"--prototypes 'yes' is none of on, off"),
        ({"seeds": "1,-2"}, r"--seeds '-2' is no number from 0: say, for instance, --seeds 1,2,3"),
        ({"seeds": ""}, r"--seeds '' is no number from 0"),
    ],
)
def test_an_option_that_cannot_be_meant_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Asked.parse(**options)


def test_privacy_needs_an_epsilon_and_every_arm_must_be_a_file_that_could_be_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="small names no epsilon: say --epsilon"):
        arms_of(plain(tmp_path), Asked.parse(privacy="dp"), NAMES)
    with pytest.raises(SettingsError, match=r"training.rounds: Input should be greater than"):
        arms_of(federation(tmp_path), Asked(rounds=0), NAMES)
    for epsilon in (0.0, float("nan")):
        with pytest.raises(SettingsError, match=r"privacy.epsilon: Input should be greater than 0"):
            arms_of(federation(tmp_path), Asked(epsilon=epsilon), NAMES)


@pytest.fixture(scope="module")
def compared(
    made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Federation, Asked, Comparison]:
    """A finished comparison over two hospitals: with and without privacy and prototypes, two seeds."""
    root = tmp_path_factory.mktemp("compared")
    without = shutil.ignore_patterns("site-3")
    shutil.copytree(made_hospitals, root, symlinks=True, dirs_exist_ok=True, ignore=without)
    file = federation(root, training={"rounds": 1, "steps": 2, "batch": 6}, **PROTOTYPES)
    asked = Asked.parse(privacy="dp,none", prototypes="on,off", seeds="1,2")
    comparison, _ = compare(file, asked, runs=root / "runs")
    return root, file, asked, comparison


Compared = tuple[Path, Federation, Asked, Comparison]


def test_every_arm_is_measured_on_the_held_out_pairs_of_all_sites(compared: Compared) -> None:
    root, file, _, comparison = compared
    cohorts = [Site.open(folder).cohort() for folder in sorted(root.glob("hospitals/site-*"))]
    runner = Runner(file, runs=root / "runs")
    texts = [cohort.texts[row] for cohort in cohorts for row in cohort.test()]
    assert list(runner.held_out.texts) == texts
    assert np.array_equal(
        runner.held_out.images, np.concatenate([cohort.images[cohort.test()] for cohort in cohorts])
    )
    assert comparison.pairs == len(texts)
    for folder in run_folders(root):
        figures = json.loads((folder / RESULT).read_text())
        assert figures["evaluation"]["retrieval"]["image_to_text"]["n"] == len(texts)


def test_a_row_has_estimates_and_costs(compared: Compared) -> None:
    *_, comparison = compared
    rows = {(row.setting, row.name): row for row in comparison.rows}
    assert len(rows) == 5 + 4
    joined = rows["heads, ε = 8", "federation, prototypes"]
    assert set(joined.measures) == set(MEASURES)
    assert set(joined.values["retrieval.image_to_text.r10"]) == {1, 2}
    assert all(estimate.margin is not None for estimate in joined.measures.values())
    assert joined.epsilon is not None
    assert 0 < joined.epsilon <= EPSILON
    assert (joined.sites, joined.problem) == (2, None)
    assert joined.bytes_up is not None
    without = rows["heads, ε = 8", "federation"].bytes_up
    assert without is not None
    assert joined.bytes_up > without > 0
    alone = rows["heads, no privacy", "site-2 alone"]
    assert (alone.epsilon, alone.bytes_up, alone.bytes_down, alone.sites) == (None, None, None, 1)
    pooled = rows["heads, ε = 8", "pooled"]
    assert pooled.epsilon is not None
    assert pooled.epsilon <= EPSILON
    assert pooled.delta == joined.delta


def test_the_given_sites_are_neither_charged_nor_changed(compared: Compared) -> None:
    root, *_ = compared
    for name in ("ledger.sqlite", "releases", "bundles", "site.log"):
        assert not list(root.glob(f"hospitals/*/{name}"))
    assert all(Site.open(folder).settings.policy.require_dp for folder in root.glob("hospitals/site-*"))


def test_a_finished_arm_leaves_figures_and_events_and_no_weights(compared: Compared) -> None:
    root, *_ = compared
    folders = run_folders(root)
    assert len(folders) == 2 * (5 + 4)
    for folder in folders:
        assert read_events(folder / EVENTS)[-1]["kind"] == "run_finished"
        assert not [path for path in folder.iterdir() if path.is_dir()]


def test_compared_again_nothing_is_trained_and_nothing_changes(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, file, asked, comparison = compared
    monkeypatch.setattr(Runner, "_train", lambda *_: pytest.fail("a finished arm was run again"))
    files = {path: path.read_bytes() for path in (root / "runs/small-compare").glob("compare.*")}
    assert {path.suffix for path in files} == {".json", ".csv", ".md", ".png"}
    again, folder = compare(file, asked, runs=root / "runs")
    assert again == comparison
    assert {path: path.read_bytes() for path in folder.glob("compare.*")} == files


def test_what_decides_the_figures_decides_the_folder(compared: Compared) -> None:
    root, file, asked, _ = compared
    runner = Runner(file, runs=root / "runs")
    arms = arms_of(file, asked, runner.sites)
    digests = [runner.digest(arm) for arm in arms]
    assert sorted(digests) == sorted({folder.name for folder in run_folders(root)})
    slower = file.model_copy(update={"training": file.training.model_copy(update={"learning_rate": 0.5})})
    kept = file.model_copy(update={"checkpoints": file.checkpoints.model_copy(update={"keep": 9})})
    own, other, same = (
        runner.digest(Arm(kind="federation", federation=each)) for each in (file, slower, kept)
    )
    assert own == same != other
    change_site(root / "hospitals" / "site-1", cohort={"patients-declared": 26})
    declared = Runner(file, runs=root / "runs").digest(Arm(kind="federation", federation=file))
    change_site(root / "hospitals" / "site-1", cohort={"patients-declared": PATIENTS})
    assert declared != own


def test_the_files_say_what_the_rows_say(compared: Compared) -> None:
    root, _, _, comparison = compared
    folder = root / "runs" / "small-compare"
    document = json.loads((folder / "compare.json").read_text())
    assert [row["name"] for row in document["rows"]] == [row.name for row in comparison.rows]
    with (folder / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(comparison.rows, lines, strict=True):
        estimate = row.measures["retrieval.text_to_image.r5"]
        assert float(line["retrieval.text_to_image.r5"]) == estimate.mean
        assert float(line["retrieval.text_to_image.r5.margin"]) == estimate.margin
        assert line["bytes_up"] == ("" if row.bytes_up is None else str(row.bytes_up))
    page = (folder / "compare.md").read_text()
    assert f"| {' | '.join(HEADERS)} |" in page
    assert all(f"| {row.name} |" in page for row in comparison.rows)
    assert "on the same patients, all arms and seeds together would cost the sum" in page
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_it_goes_on_to_the_same_end(hospitals: Path) -> None:
    file, asked = plain(hospitals), Asked.parse(seeds="1")

    def impatient(what: str, done: int, total: int) -> None:
        if what.endswith("pooled") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(file, asked, runs=hospitals / "runs", on_progress=impatient)
    (federated,) = run_folders(hospitals)
    comparison, _ = compare(file, asked, runs=hospitals / "runs")
    resumed = [
        folder
        for folder in run_folders(hospitals)
        if "run_resumed" in {event["kind"] for event in read_events(folder / EVENTS)}
    ]
    assert len(resumed) == 1
    assert federated not in resumed
    whole, _ = compare(file, asked, runs=hospitals / "other")
    assert [row.measures for row in whole.rows] == [row.measures for row in comparison.rows]


def test_a_site_that_refuses_has_no_figures_and_the_others_do(
    hospitals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_site(hospitals / "hospitals" / "site-2", policy={"min-patients": 1000})
    comparison, _ = compare(plain(hospitals), Asked(), runs=hospitals / "runs")
    rows = {row.name: row for row in comparison.rows}
    assert rows["site-2 alone"].measures == {}
    assert "site-2 policy" in str(rows["site-2 alone"].problem)
    assert rows["federation"].sites == 2
    warning = f"site site-2 will refuse every round: {PATIENTS} patients are declared"
    assert caplog.text.count(warning) == 1  # and not once more where it is alone
    text = "\n".join(comparison.reading)
    assert "Only 2 of 3 sites trained in it" in text
    assert "of 2 sites, in points of it: site-" in text
    assert "no privacy, site-2 alone: not every seed has figures: round 1: 0 sites replied" in text


def test_without_held_out_patients_there_is_nothing_to_compare_on(hospitals: Path) -> None:
    for site in hospitals.glob("hospitals/site-*"):
        change_site(site, cohort={"test-fraction": 0.0})
    with pytest.raises(SettingsError, match="no site of small has held-out patients to compare on"):
        Runner(plain(hospitals), runs=hospitals / "runs")


def test_sites_must_pack_images_alike(hospitals: Path) -> None:
    change_site(hospitals / "hospitals" / "site-3", cohort={"image-size": 48})
    with pytest.raises(SettingsError, match=r"different sizes \[32, 48\]: use one image-size"):
        Runner(plain(hospitals), runs=hospitals / "runs")


@pytest.mark.parametrize(
    ("values", "mean", "margin"),
    [([], None, None), ([0.5], 0.5, None), ([0.1, 0.3], 0.2, 1.2706), ([1.0, 2.0, 3.0], 2.0, 2.4841)],
)
def test_the_interval_is_students(values: list[float], mean: float | None, margin: float | None) -> None:
    """Margins from a table of t at 97.5 %: 12.706 for one degree of freedom, 4.3027 for two."""
    estimate = Estimate.of(values)
    assert (None if estimate is None else estimate.mean) == (None if mean is None else pytest.approx(mean))
    if estimate is not None:
        assert estimate.margin == (None if margin is None else pytest.approx(margin, rel=1e-4))


def evaluation(r10: float) -> dict[str, Any]:
    recall = {"r1": 0.0, "r5": 0.1, "r10": r10, "chance_r10": 0.1, "n": 50}
    return {"retrieval": {"image_to_text": recall, "text_to_image": recall}, "zero_shot": None}


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., list[Row]]:
    """Rows of the arms of ``small`` without privacy from R@10 by arm and seed."""

    def rows(values: dict[str, list[float]]) -> list[Row]:
        seeds = ",".join(str(seed) for seed in range(len(values["federation"])))
        arms = arms_of(plain(tmp_path), Asked.parse(seeds=seeds), NAMES[:2])
        facts: dict[str, Any] = {
            "bytes_up": 10,
            "bytes_down": 20,
            "seconds": 1.0,
            "epsilon": None,
            "delta": None,
            "sites": 2,
        }
        return rows_of(
            Outcome(arm=arm, figures=Figures(evaluation=evaluation(values[arm.name][arm.seed]), **facts))
            for arm in arms
        )

    return rows


def test_the_reading_says_who_gains_and_how_sure_that_is(told: Callable[..., list[Row]]) -> None:
    rows = told(
        {
            "federation": [0.30, 0.32],
            "pooled": [0.40, 0.42],
            "site-1 alone": [0.20, 0.22],
            "site-2 alone": [0.35, 0.31],
        }
    )
    text = reading(rows, metric="retrieval.image_to_text.r10", pairs=50, sites=2)[0]
    assert "the federation reaches 31.0 ± 12.7 % image to text R@10 (chance 10.0 %)" in text
    assert "0.76 of pooled (41.0 ± 12.7 %) and 0.68 of its lift over chance" in text
    assert "better than training alone for 1 of 2 sites" in text
    assert ": site-1 +10.0 ± 0.0, site-2 -2.0 ± 38.1." in text
    assert "zero is outside the 95% interval of that gain for 1 of them" in text
    assert "Only" not in text


def test_of_many_sites_the_ends_are_told(
    told: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_reading, "SITES_TOLD", 2)
    rows = told({"federation": [0.3], "pooled": [0.3], "site-1 alone": [0.2], "site-2 alone": [0.1]})
    between = replace(rows[-1], site="site-3", values={MEASURES[2]: {0: 0.15}})
    text = reading([*rows, between], metric="retrieval.image_to_text.r10", pairs=50, sites=3)[0]
    assert ": site-2 +20.0, site-1 +10.0." in text


def test_one_seed_is_called_what_it_is(told: Callable[..., list[Row]]) -> None:
    values = {"federation": [0.3], "pooled": [0.05], "site-1 alone": [0.2], "site-2 alone": [0.2]}
    text = reading(told(values), metric="retrieval.image_to_text.r10", pairs=50, sites=2)[0]
    assert "which is not above chance itself" in text
    assert "One seed: nothing is known of how much of that is chance." in text
    unmeasured = reading(told(values), metric="zero_shot.macro_auroc", pairs=50, sites=2)[0]
    assert unmeasured == "heads, no privacy: federation without figures."


def test_a_terminal_of_80_columns_shows_every_figure_whole() -> None:
    wide = Estimate(mean=0.234, margin=0.229)
    row = Row(
        setting="heads, ε = 8",
        name="vascular-and-lymphatic alone",
        kind="alone",
        site="vascular-and-lymphatic",
        values={},
        measures=dict.fromkeys(MEASURES, wide),
        chances={},
        bytes_up=369.7e6,
        bytes_down=369.7e6,
        seconds=1331.0,
        epsilon=8.0,
        delta=1e-3,
        sites=10,
        problem=None,
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table_of("small: heads, ε = 8", [row]))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for figure in ("23.4 ± 22.9", "369.7 MB", "1331", "8.00"):
        assert figure in printed


def test_a_picture_is_drawn_even_of_nothing(told: Callable[..., list[Row]], tmp_path: Path) -> None:
    values = {"federation": [0.3], "pooled": [0.05], "site-1 alone": [0.2], "site-2 alone": [0.2]}
    facts: dict[str, Any] = {"name": "a$b", "pairs": 50, "sites": 2, "rows": told(values), "reading": ()}
    for metric in ("retrieval.image_to_text.r10", "zero_shot.macro_auroc"):
        path = tmp_path / f"{metric}.svg"
        draw(Comparison(metric=metric, **facts), path)
        assert path.read_text().startswith("<?xml")


@pytest.fixture
def _logging_as_it_was() -> Iterator[None]:
    """The program sets up logging for its process, which here is everybody's."""
    root, own = logging.getLogger(), logging.getLogger("clipward")
    handlers, levels = root.handlers.copy(), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.mark.usefixtures("_logging_as_it_was")
def test_the_command_prints_table_and_reading_or_one_line(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hospitals)
    write_federation(hospitals, **without_claim(**SHORT))
    result = CliRunner().invoke(app, ["compare", "federation.toml", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    for words in ("small: heads, no privacy", "site-3 alone", "of pooled", "small-compare/compare.png"):
        assert words in result.stdout
    assert "arms: 5 of 5" in result.stderr
    wrong = CliRunner().invoke(app, ["compare", "federation.toml", "--share", "headz"])
    assert wrong.exit_code == 2
    assert (
        "error: --share 'headz' is none of full, image-tower, lora, heads, image-head, prompts; did you "
        "mean 'heads'?" in wrong.stderr
    )
