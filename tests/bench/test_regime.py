"""The study runs in its smallest setting, keeps its rows, and trains nothing twice."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from privacy.regime import MEASURED
from server.federation import Federation

ROOT = Path(__file__).parents[2]
BENCH = runpy.run_path(str(ROOT / "bench" / "regime.py"))
CONFIG = Federation.load(ROOT / "configs" / "regime.toml")
SAMPLE_RATE_ALLOWED = 0.5  # by a site's default policy


def arm(**changes: Any) -> Any:
    return BENCH["Arm"](**{"part": "heads", "patients": 1000, "epsilon": 3.0, "prototypes": False} | changes)


def row(lift: float = 1.0, **changes: Any) -> dict[str, Any]:
    start, end = dict.fromkeys(BENCH["LIFTED"], 0.05), dict.fromkeys(BENCH["LIFTED"], 0.05 + lift / 100)
    facts = {"part": "heads", "patients": 1000, "epsilon": 3.0, "prototypes": False, "seconds": 1.0}
    return {**facts, "start": start, "end": end, **changes}


class Counted:
    """A study whose arms take no time."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def digest(self, asked: Any) -> str:
        return repr(asked)

    def run(self, asked: Any) -> dict[str, Any]:
        self.ran.append(asked)
        return row(epsilon=asked.epsilon, patients=asked.patients, digest=self.digest(asked))


def complete(study: Any, arms: Any, path: Path, *, train: bool = True) -> Any:
    return BENCH["complete"](study, arms, path, train=train, tell=lambda text: None)


@pytest.mark.parametrize("part", BENCH["RECIPES"])
@pytest.mark.parametrize("patients", [300, 10_000])
def test_an_arm_is_what_its_name_says(part: str, patients: int) -> None:
    recipe = BENCH["RECIPES"][part]
    private = arm(part=part, patients=patients, prototypes=True).federation(CONFIG)
    assert (private.share.part, private.privacy.epsilon) == (part, 3.0)
    assert private.objective.name == "anchored"
    assert private.prototypes is not None
    assert private.training.batch == pytest.approx(recipe.sample_rate * patients)
    assert private.training.batch <= SAMPLE_RATE_ALLOWED * patients
    plain = arm(part=part, patients=patients, epsilon=None).federation(CONFIG)
    assert (plain.privacy.mode, plain.objective.name, plain.prototypes) == ("none", "infonce", None)
    assert plain.training.batch <= BENCH["PLAIN_BATCH"]
    drawn, shown = (each.training.batch * each.training.steps for each in (private, plain))
    assert drawn <= shown < drawn + BENCH["PLAIN_BATCH"]


def test_a_digest_names_what_decides_an_arm_and_no_place(tmp_path: Path) -> None:
    study = BENCH["Study"](CONFIG, tmp_path)
    digest = study.digest(arm())
    assert digest == BENCH["Study"](CONFIG, tmp_path / "elsewhere").digest(arm())
    others = [
        study.digest(other)
        for other in (
            arm(part="full"),
            arm(patients=300),
            arm(epsilon=1.0),
            arm(epsilon=None),
            arm(prototypes=True),
        )
    ]
    longer = CONFIG.training.model_copy(update={"studies_per_patient": 1})
    others.append(BENCH["Study"](CONFIG.model_copy(update={"training": longer}), tmp_path).digest(arm()))
    others.append(BENCH["Study"](CONFIG, tmp_path, held_out=10).digest(arm()))
    assert len({digest, *others}) == 8
    kept_longer = CONFIG.checkpoints.model_copy(update={"keep": 9})
    assert (
        BENCH["Study"](CONFIG.model_copy(update={"checkpoints": kept_longer}), tmp_path).digest(arm())
        == digest
    )


def test_a_run_goes_on_where_it_was_and_trains_nothing_twice(tmp_path: Path) -> None:
    study, path = Counted(), tmp_path / "rows.json"
    arms = [arm(patients=size) for size in (300, 1000, 3000)]
    assert complete(study, arms[:2], path, train=False) == []
    first = complete(study, arms[:2], path)
    assert complete(study, arms, path)[:2] == first
    assert study.ran == arms
    written = json.loads(path.read_text())
    assert written["bench"] == "regime"
    assert [one["patients"] for one in written["rows"]] == [300, 1000, 3000]
    assert complete(study, [arms[2]], path, train=False) == [written["rows"][2]]


def test_a_row_is_kept_before_the_next_arm_begins(tmp_path: Path) -> None:
    class Killed(Counted):
        def run(self, asked: Any) -> dict[str, Any]:
            if self.ran:
                raise KeyboardInterrupt
            return super().run(asked)

    with pytest.raises(KeyboardInterrupt):
        complete(Killed(), [arm(patients=300), arm()], tmp_path / "rows.json")
    study = Counted()
    assert len(complete(study, [arm(patients=300), arm()], tmp_path / "rows.json")) == 2
    assert study.ran == [arm()]


def test_a_lift_is_the_mean_of_both_directions_in_points() -> None:
    start, end = (dict(zip(BENCH["LIFTED"], values, strict=True)) for values in ((0.1, 0.2), (0.13, 0.21)))
    assert BENCH["lift"]({"start": start, "end": end}) == pytest.approx(2.0)


def test_the_table_has_a_dash_for_what_was_not_trained() -> None:
    arms = [arm(patients=size, epsilon=epsilon) for size in (300, 10_000) for epsilon in (3.0, None)]
    said = BENCH["table"](arms, [row(2.04), row(-0.5, patients=10_000, epsilon=None)])
    assert said.splitlines() == [
        "| part | ε | 300 patients | 10,000 patients |",
        "| --- | ---: | ---: | ---: |",
        "| heads | 3 | - | - |",
        "| heads | none | - | -0.5 |",
    ]


def test_options_name_the_arms_and_prototypes_need_privacy() -> None:
    arms = BENCH["arms_asked"]("full,heads", "1000,300", "8,none", "off,on")
    assert len(arms) == 2 * 2 * 3
    assert [one.patients for one in arms[:6]] == [300] * 3 + [1000] * 3
    assert not any(one.prototypes and one.epsilon is None for one in arms)


@pytest.mark.parametrize(
    "words", [("head", "300", "1", "on"), ("heads", "1", "1", "on"), ("heads", "300", "0", "on")]
)
def test_a_word_that_means_nothing_is_named(words: tuple[str, ...]) -> None:
    with pytest.raises(typer.BadParameter, match="cannot be used"):
        BENCH["arms_asked"](*words)


def test_the_rows_that_are_kept_are_of_these_settings() -> None:
    """Else a change has made them worthless: raise VERSION, and train the study anew."""
    study, kept = BENCH["Study"](CONFIG, Path("anywhere")), BENCH["kept_rows"](BENCH["ROWS"])
    assert kept
    for digest, each in kept.items():
        asked = {name: each[name] for name in ("part", "patients", "epsilon", "prototypes")}
        assert study.digest(arm(**asked)) == digest
        assert (each["epsilon_spent"] is None) == (each["epsilon"] is None)
        assert each["epsilon_spent"] is None or each["epsilon_spent"] <= each["epsilon"]


def test_plans_read_what_the_rows_say() -> None:
    assert BENCH["measured"](list(BENCH["kept_rows"](BENCH["ROWS"]).values())) == MEASURED


def test_a_share_is_of_the_same_training_without_privacy() -> None:
    facts = {"parameters": 9, "noise_to_signal": 1.23456}
    rows = [
        row(4.0, epsilon=None),
        row(0.5, epsilon=None, patients=300),
        row(1.0, **facts),
        row(9.0, **facts, prototypes=True),
        row(-1.0, **{**facts, "noise_to_signal": 5.0}),
        row(0.5, **facts, patients=300),
    ]
    read = [(one.noise_to_signal, one.share) for one in BENCH["measured"](rows)]
    assert read == [(1.235, 0.25), (5.0, 0.0)]


@pytest.mark.slow
def test_quick_trains_real_federations_and_draws_them(tmp_path: Path) -> None:
    options = ["--quick", "--work", str(tmp_path), "--picture", str(tmp_path / "lifts.svg")]
    first = CliRunner().invoke(BENCH["app"], options)
    assert first.exit_code == 0, first.output
    assert "heads, prototypes | 8 | " in first.stdout
    again = CliRunner().invoke(BENCH["app"], options)
    assert again.stdout == first.stdout
    assert "of 6" not in again.stderr
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert len(rows) == 6
    private = [one for one in rows if one["epsilon"] is not None]
    assert all(0 < one["epsilon_spent"] <= one["epsilon"] for one in private)
    assert all(one["noise_to_signal"] > 0 for one in private)
    assert len({json.dumps(one["start"]) for one in rows}) == 1
    assert "ε = 8, prototypes" in (tmp_path / "lifts.svg").read_text()
    assert not list((tmp_path / "quick" / "runs").iterdir())
