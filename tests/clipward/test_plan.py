"""`clipward plan` as a privacy officer meets it: one promise, one table, warnings with a remedy."""

import json
import struct
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from click.testing import Result
from typer.testing import CliRunner

from clipward import plan_picture
from clipward.plan import document, plan
from privacy.accounting import noise_multiplier_for
from privacy.planning import make_plan

PLANNED = ("--patients", 10_000, "--batch", 100, "--steps", 2_000, "--noise-multiplier", 1, "--delta", 1e-5)

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)


def invoke(*arguments: str | Path | float) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path | float) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path | float) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not result.stdout
    return " ".join(result.stderr.split())


def row(table: str, label: str) -> str:
    (found,) = (line for line in table.splitlines() if line.strip().startswith(label))
    return found.strip().removeprefix(label).split()[0]


def federation_file(folder: Path, **tables: dict[str, Any]) -> Path:
    whole: dict[str, Any] = {
        "version": 1,
        "name": "planned",
        "model": {"encoder": "tiny", "image-size": 32, "max-tokens": 12},
        "privacy": {"epsilon": 8.0, "max-grad-norm": 0.5},
        "training": {"rounds": 5, "steps": 12, "batch": 200},
        "strategy": {"min-sites": 4},
    }
    for name, table in tables.items():
        whole[name] = {**whole.get(name, {}), **table}
    path = folder / "federation.toml"
    path.write_text(tomli_w.dumps(whole))
    return path


def test_the_promise_comes_first_and_is_rounded_up() -> None:
    printed = done(*PLANNED)
    assert printed.startswith(
        "Every patient: epsilon = 2.59 at delta = 1e-05 (add or remove one patient with all their studies)."
    )
    assert row(printed, "epsilon of every patient") == "2.59"


def test_the_table_says_what_was_asked_and_what_follows() -> None:
    printed = done(*PLANNED, "--parameters", 10_000)
    for label, value in {
        "patients declared": "10,000",
        "expected patients per step": "100",
        "steps of the whole run": "2,000",
        "mechanism": "anchored",
        "noise multiplier": "1",
        "noise over largest signal": "1",
        "by Opacus RDP": "2.87",
        "replace one": "4.20",
        "a patient of 2 studies": "5.74",
        "a patient of 3 studies": "9.26",
        "a patient of 5 studies": "17.38",
        "a patient of 10 studies": "43.53",
    }.items():
        assert row(printed, label) == value
    assert "warning" not in printed
    assert "tune on public or synthetic data, or charge every trial" in printed


def test_without_a_terminal_it_is_plain() -> None:
    assert done(*PLANNED, "--batch", 6_000, "--steps", 1, "--studies", 2).isascii()


def test_noise_follows_from_epsilon() -> None:
    printed = done("--patients", 1_000, "--batch", 200, "--epochs", 12, "--epsilon", 8, "--studies", 2)
    assert row(printed, "epsilon of every patient") in ("7.99", "8.00")
    assert row(printed, "steps of the whole run") == "60"
    expected = noise_multiplier_for(epsilon=8, delta=1e-4, sample_rate=0.2, steps=60)
    assert float(row(printed, "noise multiplier")) == pytest.approx(expected, rel=1e-3)


def test_a_warning_names_value_and_remedy() -> None:
    printed = done(*PLANNED, "--delta", 1e-3, "--parameters", 10**8)
    assert "warning: delta = 0.001 is above 1/(10 x 10,000)" in printed
    assert "take 1e-05 or less" in printed
    assert (
        "warning: 10,000 patients are too few for this epsilon: the noise of a step is 100.0 times" in printed
    )
    assert row(printed, "lift that is kept").endswith("%")


def test_json_holds_the_same_plan() -> None:
    told = json.loads(done(*PLANNED, "--json", "--studies", 3, "--mechanism", "microbatch", "--groups", 20))
    made = make_plan(
        patients_declared=10_000,
        batch=100,
        steps=2_000,
        noise_multiplier=1,
        delta=1e-5,
        mechanism="microbatch",
        groups=20,
    )
    assert told == json.loads(json.dumps(document(made, studies=[3])))
    assert told["epsilon"] == pytest.approx(2.585, rel=1e-3)
    assert told["plan"]["mechanism"] == "microbatch"
    assert (told["unit"], told["adjacency"], told["sensitivity"]) == ("patient", "add_remove", 2.0)
    assert set(told["epsilon_by_accountant"]) == {"PLD", "Google RDP", "Opacus RDP"}
    assert told["epsilon_by_mechanism_at_this_noise"]["anchored"] < told["epsilon"]
    assert told["epsilon_if_studies_were_drawn"] == {"3": pytest.approx(9.22, rel=1e-2)}
    assert told["noise_to_signal"] is None


def test_no_bound_is_null_in_json_and_said_in_the_table() -> None:
    ruin = ("--patients", 1_000, "--batch", 1_000, "--steps", 100_000, "--noise-multiplier", 1e-3)
    told = json.loads(done(*ruin, "--json"))
    assert told["epsilon"] > 1e9
    assert told["epsilon_replace_one"] is None
    assert set(told["epsilon_if_studies_were_drawn"].values()) == {None}
    assert [concern["about"] for concern in told["concerns"]] == ["epsilon", "sample_rate"]
    printed = done(*ruin)
    assert row(printed, "a patient of 10 studies") == "no"
    assert "is weak" in printed


def test_a_federation_file_gives_what_the_flags_leave_out(tmp_path: Path) -> None:
    config = federation_file(tmp_path)
    told = json.loads(done("--config", config, "--patients", 1_000, "--json", "--studies", 2))
    assert told["epsilon"] <= 8.0
    assert told["plan"] | {"noise_multiplier": None} == {
        "patients_declared": 1_000,
        "batch": 200,
        "steps": 60,
        "noise_multiplier": None,
        "delta": 1e-4,
        "mechanism": "anchored",
        "max_grad_norm": 0.5,
        "groups": None,
        "parameters": 65_536,
        "sites": 4,
    }


def test_flags_go_before_the_federation_file(tmp_path: Path) -> None:
    config = federation_file(tmp_path)
    given = ("--steps", 30, "--noise-multiplier", 2, "--parameters", 7, "--batch", 100, "--sites", 1)
    told = json.loads(done("--config", config, "--patients", 1_000, *given, "--json", "--studies", 2))["plan"]
    assert {name: told[name] for name in ("steps", "noise_multiplier", "parameters", "batch", "sites")} == {
        "steps": 30,
        "noise_multiplier": 2,
        "parameters": 7,
        "batch": 100,
        "sites": 1,
    }


def test_groups_come_from_the_federation_file_too(tmp_path: Path) -> None:
    config = federation_file(tmp_path, objective={"name": "microbatch", "groups": 50})
    given = ("--noise-multiplier", 2, "--parameters", 10_000)
    told = json.loads(done("--config", config, "--patients", 1_000, *given, "--json", "--studies", 2))
    assert told["plan"]["mechanism"] == "microbatch"
    assert told["plan"]["groups"] == 50
    assert told["noise_to_signal"] == pytest.approx(2 * 2 * 100 / 50 / 2)


def test_a_files_sample_rate_is_a_batch_of_the_patients_that_are_asked_about(tmp_path: Path) -> None:
    config = tmp_path / "federation.toml"
    config.write_text(
        'version = 1\nname = "rated"\n[privacy]\nepsilon = 8.0\n[training]\nsample-rate = 0.125\n'
    )
    told = json.loads(done("--config", config, "--patients", 400, "--json", "--studies", 2))
    assert (told["plan"]["batch"], told["sample_rate"]) == (50, 0.125)


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_picture, "STEP_FACTORS", (1.0, 2.0))
    monkeypatch.setattr(plan_picture, "SIZE_FACTORS", (0.005, 1.0))


SMALL = ("--patients", 2_000, "--batch", 200, "--steps", 10, "--noise-multiplier", 1, "--studies", 2)


@pytest.mark.usefixtures("few_points")
def test_a_picture_is_drawn_as_png(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    printed = done(*SMALL, "--picture", picture)
    assert f"picture: {picture}" in printed.replace("\n", "")
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert struct.unpack(">II", head[16:24])[0] > 1_000


@pytest.mark.usefixtures("few_points")
def test_a_picture_is_drawn_as_svg_with_its_words_and_the_signal_where_it_is_known(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    done(*SMALL, "--parameters", 10_000, "--picture", picture)
    texts = [element.text for element in ET.parse(picture).iter() if element.tag.endswith("text")]  # noqa: S314
    for words in (
        "steps of the whole run",
        "patients declared",
        "expected patients per step",
        "drowned above",
    ):
        assert words in texts
    again = tmp_path / "again.svg"
    done(*SMALL, "--parameters", 10_000, "--picture", again)
    assert again.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--patients", 0, *PLANNED[2:]), "expected patients_declared=0 >= 1"),
        ((*PLANNED, "--batch", 10_001), "batch=10001.0 patients a step in (0, 10000]"),
        ((*PLANNED, "--epochs", 3), "expected either steps=2000 or epochs=3.0"),
        ((*PLANNED, "--epsilon", 3), "expected either epsilon=3.0 or noise_multiplier=1.0"),
        ((*PLANNED, "--delta", 1), "delta=1.0"),
        ((*PLANNED, "--studies", 0), "studies=0"),
        (("--patients", 10), "missing --batch"),
        (("--patients", 10, "--batch", 5), "expected either steps=None or epochs=None"),
        ((*PLANNED, "--picture", "plan.jpeg"), "expected --picture plan.jpeg to end in .png or .svg"),
        ((*PLANNED, "--picture", "nowhere/plan.png"), "no folder nowhere for --picture plan.png"),
        ((*PLANNED, "--config", "nowhere.toml"), "no settings file at nowhere.toml"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: tuple[str | float, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = refused(*arguments)
    assert words.startswith("error: ")
    assert message in words


def test_a_federation_without_privacy_promises_nothing(tmp_path: Path) -> None:
    config = federation_file(tmp_path, objective={"name": "infonce"})
    whole = config.read_text().replace("epsilon = 8.0", 'mode = "none"')
    config.write_text(whole)
    assert "promises nothing, so nothing is planned" in refused("--config", config, "--patients", 100)


def test_help_gives_an_example_of_every_flag() -> None:
    shown = " ".join(done("--help").split())
    assert "clipward plan --patients 2000 --batch 64 --epochs 20 --epsilon 8" in shown
    assert "--noise-multiplier" in shown
