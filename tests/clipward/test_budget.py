"""What a hospital is told of its budget, and which tampering with it is named."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from client.site import Site
from clipward import budget
from privacy.accounting import epsilon, noise_multiplier_for
from privacy.ledger import ReservationRequest
from privacy.signing import SiteKey
from server.anchors import AnchorBook
from tests.small_hospitals import write_federation

Q, STEPS, DELTA = 10 / 25, 2, 1e-3


@pytest.fixture(scope="module")
def noise() -> float:
    return noise_multiplier_for(epsilon=8.0, delta=DELTA, sample_rate=Q, steps=3 * STEPS)


@pytest.fixture
def folder(tmp_path: Path, noise: float) -> Path:
    """A site that was charged for two rounds of one run, and for a failed one of another."""
    folder = tmp_path / "site-1"
    folder.mkdir()
    (folder / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ntable = "absent.csv"\npatients-declared = 25\n'
    )
    ledger = Site.open(folder).ledger()
    for number in (1, 2):
        ledger.released(ledger.reserve(charge(noise, number)), output_digest=f"out-{number}")
    ledger.abandoned(ledger.reserve(charge(3 * noise, 3, run="other")), code="failed")
    return folder


def charge(noise: float, number: int, **changes: Any) -> ReservationRequest:
    request = ReservationRequest(
        request_digest=f"request-{number}", run="small", server_round=number, kind="anchored", unit="patient",
        adjacency="add_remove", sampler="poisson", sample_rate=Q, steps=STEPS, max_grad_norm=1.0,
        sensitivity=1.0, noise_std=noise, insecure_seed=False, code_version="0.1.0", input_digest="in",
    )  # fmt: skip
    return replace(request, **changes)


def invoke(*arguments: str | Path) -> Result:
    program = typer.Typer()
    program.add_typer(budget.app, name="budget")
    program.command("other")(lambda: None)
    return CliRunner().invoke(program, ["budget", *map(str, arguments)])


def told(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == status, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def words(result: Result) -> str:
    return " ".join(result.output.split())


# What is spent


def test_a_site_is_shown_what_is_spent_and_left_by_run_and_mechanism(folder: Path, noise: float) -> None:
    spent = told(folder)
    events = [charge(factor * noise, 1).event() for factor in (1, 1, 3)]
    assert spent["epsilon_spent"] == epsilon(events, delta=DELTA)
    assert spent["epsilon_left"] == 8.0 - spent["epsilon_spent"]
    assert (spent["site"], spent["delta"], spent["formal_guarantee"]) == ("north", DELTA, True)
    first, second = spent["charges"]
    assert (first["run"], first["mechanism"], first["charges"], first["steps"]) == ("small", "anchored", 2, 4)
    assert (first["released"], first["abandoned"], first["open"]) == (2, 0, 0)
    assert (second["run"], second["released"], second["abandoned"]) == ("other", 0, 1)
    assert first["epsilon_alone"] == epsilon(events[:2], delta=DELTA)
    assert first["noise_multipliers"] == [noise]


def test_the_table_says_the_same_in_words(folder: Path) -> None:
    result = invoke(folder)
    spent = told(folder)
    assert result.exit_code == 0
    assert f"north: epsilon = {budget._shown(spent['epsilon_spent'])} of 8 spent at delta = 0.001" in words(
        result
    )
    assert "small anchored 2 0 0 4 0.4" in words(result)
    assert "other anchored 0 1 0 2 0.4" in words(result)


def test_show_may_be_said_and_options_may_come_first(folder: Path) -> None:
    assert invoke("show", folder).output == invoke(folder).output
    assert json.loads(invoke("--json", folder).stdout) == told(folder)


def test_noise_of_a_fixed_seed_is_no_guarantee(folder: Path, noise: float) -> None:
    Site.open(folder).ledger().reserve(charge(9 * noise, 9, insecure_seed=True))
    assert told(folder)["formal_guarantee"] is False
    assert "No formal guarantee" in invoke(folder).output


def test_nothing_spent_yet_is_said(folder: Path) -> None:
    (folder / "ledger.sqlite").unlink()
    Site.open(folder).ledger()
    assert told(folder)["epsilon_spent"] == 0.0
    assert "Nothing was charged yet." in invoke(folder).output


# What a run would cost


def test_a_federation_that_does_not_fit_any_more_is_priced_with_the_rounds_that_do(
    folder: Path, tmp_path: Path, noise: float
) -> None:
    planned = told(folder, "--plan", write_federation(tmp_path))["planned"]
    assert (planned["rounds"], planned["steps"], planned["sample_rate"]) == (3, 6, Q)
    assert planned["noise_multiplier"] == noise
    assert planned["epsilon_alone"] <= 8.0 < planned["epsilon_after"]
    assert (planned["fits"], planned["rounds_that_fit"] < 3) == (False, True)
    ledger = Site.open(folder).ledger()
    for number in range(planned["rounds_that_fit"]):
        ledger.reserve(charge(noise, 10 + number))
    assert ledger.would_spend(charge(noise, 99)) > 8.0
    assert "it does not fit, and would be refused after" in words(
        invoke(folder, "--plan", tmp_path / "federation.toml")
    )


def test_a_run_is_priced_by_its_promise_steps_and_batch(folder: Path) -> None:
    planned = told(folder, "--epsilon", "0.5", "--steps", "10", "--batch", "5")["planned"]
    assert (planned["fits"], planned["rounds_that_fit"], planned["sample_rate"]) == (True, 1, 5 / 25)
    assert planned["epsilon_alone"] <= 0.5
    before = told(folder)["epsilon_spent"]
    assert before < planned["epsilon_after"] <= before + 0.5 + 1e-3
    assert "it fits." in words(invoke(folder, "--epsilon", "0.5", "--steps", "10", "--batch", "5"))
    assert told(folder)["epsilon_spent"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epsilon", "1"), "--epsilon, --steps and --batch together"),
        (("--epsilon", "-1", "--steps", "1", "--batch", "1"), "expected epsilon=-1.0 > 0"),
        (("--epsilon", "1", "--steps", "1", "--batch", "26"), "sample_rate=1.04 in (0, 1]"),
        (("--plan", "absent.toml"), "no settings file at absent.toml"),
    ],
)
def test_a_price_that_cannot_be_meant_is_refused(
    arguments: tuple[str, ...], message: str, folder: Path
) -> None:
    result = invoke(folder, *arguments)
    assert result.exit_code == 2
    assert message in words(result).replace("│ ", "").replace(" │", "")


def test_a_plan_without_privacy_has_no_price(folder: Path, tmp_path: Path) -> None:
    changes = {"privacy": {"mode": "none", "epsilon": None}, "objective": {"name": "infonce"}}
    result = invoke(folder, "--plan", write_federation(tmp_path, **changes))
    assert (result.exit_code, "promises nothing, so it has no price" in words(result)) == (2, True)


def test_a_plan_the_policy_refuses_is_refused_with_the_rule(folder: Path, tmp_path: Path) -> None:
    result = invoke(folder, "--plan", write_federation(tmp_path, training={"batch": 20}))
    assert (result.exit_code, "policy.max-sample-rate" in words(result)) == (2, True)


# What is missing


@pytest.mark.parametrize("command", ["show", "verify", "sign"])
def test_a_missing_site_or_ledger_is_named_with_the_remedy_and_not_made(command: str, folder: Path) -> None:
    assert "no site folder absent: make it with a site.toml" in words(invoke(command, "absent"))
    (folder / "ledger.sqlite").unlink()
    result = invoke(command, folder)
    assert result.exit_code == 2
    assert "nothing was charged here, the first private round makes it" in words(result)
    assert not (folder / "ledger.sqlite").exists()


def test_a_site_without_a_ledger_gets_a_key_that_stays(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ntable = "absent.csv"\npatients-declared = 25\n'
    )
    first, again = invoke("key", tmp_path), invoke("key", tmp_path)
    assert first.exit_code == 0
    assert first.output == again.output == (tmp_path / "site.pub").read_text()
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_lost_key_reads_but_does_not_charge_until_the_ledger_is_signed_over(
    folder: Path, noise: float
) -> None:
    before = told(folder)
    old = SiteKey.open(folder).public
    (folder / "site.key").unlink()
    assert told(folder) == before
    assert told("verify", folder)["key"] == old
    (folder / "site.pub").unlink()
    result = invoke(folder)
    assert result.exit_code == 2
    assert "restore site.key from the site's back-up" in words(result)
    assert "signed with key" in invoke("sign", folder).output
    found = told("verify", folder)
    assert found["key"] == SiteKey.open(folder).public != old
    assert found["notices"] == ["row 7 brought a new key: for the rows before it, it vouches alone"]
    assert told(folder) == before


def test_a_key_that_others_may_read_is_refused_with_the_remedy(folder: Path) -> None:
    (folder / "site.key").chmod(0o640)
    result = invoke(folder)
    assert (result.exit_code, "mode 640, so others can sign as this site: chmod 600" in words(result)) == (
        2,
        True,
    )


# What is verified


def test_whole_books_are_said_to_be_whole(folder: Path) -> None:
    found = told("verify", folder)
    assert (found["rows"], found["problems"], found["notices"], found["anchors"]) == (7, [], [], None)
    assert found["key"] == SiteKey.open(folder).public
    by = found["epsilon"]
    assert by.keys() == {"PLD", "Google RDP", "Opacus RDP"}
    assert by["PLD"] == Site.open(folder).ledger().spent() <= min(by["Google RDP"], by["Opacus RDP"])
    result = invoke("verify", folder)
    assert result.exit_code == 0
    assert "The books are whole." in result.output
    assert "add --anchors RUN/anchors.jsonl" in words(result)


def tamper(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    with connection:
        connection.execute("DROP TRIGGER never_updated")
        connection.execute("DROP TRIGGER never_deleted")
        for statement in statements:
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["UPDATE rows SET body = replace(body, 'poisson', 'none') WHERE seq = 3"], "row 3 was edited"),
        (["DELETE FROM rows WHERE seq = 2"], "row 2 is missing or repeated: found row 3 in its place"),
        (
            ["UPDATE rows SET seq = 99 WHERE seq = 1", "UPDATE rows SET seq = 1 WHERE seq = 3",
             "UPDATE rows SET seq = 3 WHERE seq = 99"],
            "row 1 holds row 3: it was moved or copied",
        ),
        (
            ["INSERT INTO rows SELECT 7, previous, body, hash, signature FROM rows WHERE seq = 2"],
            "row 7 holds row 2: it was moved or copied",
        ),
        (["UPDATE rows SET signature = hash || hash WHERE seq = 2"], "row 2 is not signed with the key"),
    ],
    ids=["edit", "delete", "reorder", "copy", "signature"],
)  # fmt: skip
def test_tampering_is_named_with_its_row(folder: Path, statements: list[str], problem: str) -> None:
    tamper(folder, *statements)
    assert told("verify", folder, status=1)["problems"][0].startswith(problem)
    result = invoke("verify", folder)
    assert result.exit_code == 1
    assert f"problem: {problem}" in words(result)
    assert "The books are whole." not in result.output


def test_several_problems_are_all_named(folder: Path) -> None:
    tamper(
        folder,
        "UPDATE rows SET body = body || ' ' WHERE seq IN (2, 5)",
        "UPDATE rows SET signature = '' WHERE seq = 3",
    )
    found = told("verify", folder, status=1)
    assert [problem[:5] for problem in found["problems"]] == ["row 2", "row 3", "row 5"]
    assert (found["rows"], found["epsilon"]) == (None, {})


@pytest.fixture
def anchors(folder: Path) -> Path:
    """What a coordinator has kept of this site, and of another."""
    path = folder.parent / "anchors.jsonl"
    book = AnchorBook(path)
    book.take("north", Site.open(folder).ledger().anchor, run="small", server_round=2)
    return path


def test_a_ledger_is_held_against_what_the_coordinator_kept(
    folder: Path, anchors: Path, noise: float
) -> None:
    assert told("verify", folder, "--anchors", anchors)["anchors"] == 1
    tamper(folder, "DELETE FROM rows WHERE seq > 4")
    assert told("verify", folder)["problems"] == []
    (problem,) = told("verify", folder, "--anchors", anchors, status=1)["problems"]
    assert problem.startswith("anchor of the coordinator: row 6 was anchored and is gone, the last is row 4")
    for number in (7, 8):  # grown again beyond what was cut off
        Site.open(folder).ledger().reserve(charge(9 * noise, number))
    (problem,) = told("verify", folder, "--anchors", anchors, status=1)["problems"]
    assert "row 6 is another than was anchored" in problem


def test_a_ledger_begun_afresh_with_another_key_is_held_against_the_anchors(
    folder: Path, anchors: Path
) -> None:
    for name in ("ledger.sqlite", "site.key", "site.pub"):
        (folder / name).unlink()
    Site.open(folder).ledger()
    (problem,) = told("verify", folder, "--anchors", anchors, status=1)["problems"]
    assert "the anchor of row 6 was not made with a key of this ledger" in problem


def test_a_ledger_of_a_foreign_key_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    SiteKey.open_or_make(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "site.key", folder / "site.key")
    (problem,) = told("verify", folder, status=1)["problems"]
    assert problem.startswith("row 0 names key")


def test_a_file_that_is_no_anchors_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"version": 1, "site": "north"}\n')
    result = invoke("verify", folder, "--anchors", tmp_path / "a.jsonl")
    assert (result.exit_code, "line 1 is no anchor" in words(result)) == (2, True)
