"""Hospitals with different models and halves of data learn towards common prototypes, whatever happens."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import CLIPModel
from typer.testing import CliRunner

from client.personal import personal_weights
from client.site import Site
from clipward.cli import app as command_line
from clipward.simulate import Result, simulate
from privacy.accounting import epsilon
from server.federation import Federation
from server.metrics import read_events
from strategies.messages import digest_of
from tests.e2e.test_kill_and_resume import Parent, require_sound_ledger, started_parent, wait_for_round
from tests.prototype_hospitals import ROUNDS, SITES, four_hospitals
from tests.small_hospitals import EPSILON, change_site

pytestmark = pytest.mark.slow

FAILING = "broken"


@pytest.fixture(scope="module")
def five(made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Four hospitals and one whose model is not there, after a run."""
    root = four_hospitals(made_hospitals, tmp_path_factory.mktemp("five"))
    folder = root / "hospitals" / FAILING
    shutil.copytree(root / "hospitals" / "common", folder, symlinks=True)
    change_site(folder, name=FAILING, model={"encoder": "absent"})
    settings = Federation.load(root / "federation.toml")
    return root, simulate(settings, runs=root / "runs")


def test_prototypes_are_all_that_leaves(five: tuple[Path, Result]) -> None:
    root, result = five
    events = read_events(result.run_dir / "metrics.jsonl")
    sent = {(event["kind"], event["bytes_up"]) for event in events if "bytes_up" in event}
    assert sent == {("prototypes_replied", 2 * 2 * 4 * 9), ("site_replied", 0)}
    made = [(event["round"], event["sites"]) for event in events if event["kind"] == "prototypes_made"]
    assert made == [(1, 0), *((number, len(SITES)) for number in range(2, ROUNDS + 1))]
    refused = [(event["site"], event["code"]) for event in events if event["kind"] == "site_refused"]
    assert refused == [(FAILING, "model")] * ROUNDS
    assert (events[-1]["kind"], result.summary["rounds"]) == ("run_finished", ROUNDS)
    assert not (result.run_dir / "model").exists()
    assert not any(file.stat().st_size > 1000 for file in result.run_dir.glob("checkpoints/*/*.safetensors"))
    assert Site.open(root / "hospitals" / FAILING).ledger().spent() == 0


def test_every_site_pays_for_its_training_and_for_every_release(five: tuple[Path, Result]) -> None:
    root, result = five
    for name in SITES:
        site = Site.open(root / "hospitals" / name)
        kinds = [row.body["request"]["kind"] for row in site.ledger().rows()[1:] if "request" in row.body]
        assert kinds == ["anchored", *["prototypes", "anchored"] * (ROUNDS - 1)]
        spent = site.ledger().spent()
        assert spent == pytest.approx(epsilon(site.ledger().events(), delta=site.delta))
        assert 0.99 * EPSILON < spent <= EPSILON
    assert result.summary["privacy"]["epsilon"] == max(
        Site.open(root / "hospitals" / name).ledger().spent() for name in SITES
    )


def test_each_sites_model_is_measured_beside_chance_and_none_where_there_is_none(
    five: tuple[Path, Result],
) -> None:
    _, result = five
    models = result.summary["models"]
    assert set(models) == {*SITES, FAILING}
    assert models[FAILING] is None
    assert result.summary["evaluation"] is None
    found = {name: models[name]["retrieval"]["image_to_text"] for name in SITES}
    assert len({one["n"] for one in found.values()}) == 1
    assert all(0 < one["chance_r10"] <= 1 and 0 <= one["r10"] <= 1 for one in found.values())
    page = result.report.read_text()
    assert "every site has a model of its own" in page
    assert FAILING in page


def test_a_hospital_can_have_its_model(five: tuple[Path, Result], tmp_path: Path) -> None:
    root, _ = five
    site, out = str(root / "hospitals" / "tiny"), tmp_path / "model"
    told = CliRunner().invoke(command_line, ["own-model", site, "small", "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert '"retrieval"' in told.output
    assert CLIPModel.from_pretrained(out).config.vision_config.image_size == 64
    nothing = CliRunner().invoke(command_line, ["own-model", str(root / "hospitals" / FAILING), "small"])
    assert nothing.exit_code == 2
    assert "has no model of its own in run 'small'" in nothing.output


# --- killed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    yield from started_parent(rounds=ROUNDS)


@pytest.fixture(scope="module")
def reference(parent: Parent, made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = four_hospitals(made_hospitals, tmp_path_factory.mktemp("undisturbed"))
    parent.start(root)
    assert parent.end() == 0
    return root


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(2))
def test_killed_in_every_round_the_sites_end_with_the_same_models(
    seed: int, parent: Parent, reference: Path, made_hospitals: Path, tmp_path: Path
) -> None:
    root = four_hospitals(made_hospitals, tmp_path)
    draw = random.Random(seed)  # noqa: S311
    for server_round in range(1, ROUNDS + 1):
        life = parent.start(root)
        wait_for_round(root, server_round)
        time.sleep(draw.random())
        with suppress(ProcessLookupError):
            os.kill(life, signal.SIGKILL)
        parent.end()
        for name in SITES:
            require_sound_ledger(root / "hospitals" / name, finished=2 * server_round)
    parent.start(root)
    assert parent.end() == 0
    for name in SITES:
        ours, theirs = (Site.open(one / "hospitals" / name) for one in (root, reference))
        ends = [personal_weights(site, "small").before(ROUNDS + 1) for site in (ours, theirs)]
        assert ends[0] is not None
        assert ends[1] is not None
        assert digest_of(ends[0]) == digest_of(ends[1])
        assert len(ours.ledger().events()) == len(theirs.ledger().events()) == 2 * ROUNDS - 1
        assert ours.ledger().spent() == theirs.ledger().spent()
    summaries = [json.loads((one / "runs/small/summary.json").read_text()) for one in (root, reference)]
    assert summaries[0]["models"] == summaries[1]["models"]
