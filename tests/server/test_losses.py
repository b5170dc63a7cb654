"""Strategies that weigh sites by losses hear noised ones, once a round, paid from the run's epsilon."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.app import app
from client.site import Site
from server.losses import MeanLosses
from server.metrics import RunLog, effective, read_events
from server.rounds import run_rounds
from server.start import prepare_from_settings, start_of
from strategies.in_process import InProcessGrid
from strategies.messages import MEAN_LOSS, MessageError
from strategies.settings import SettingsError
from tests.small_hospitals import EPSILON, ROUNDS, SITES, federation, without_claim


def events_of(root: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = federation(root, **changes)
    run_rounds(
        InProcessGrid(app, [{"site": str(folder)} for folder in sorted((root / "hospitals").iterdir())]),
        settings,
        run_dir=root / "run",
        start=start_of(settings, prepare_from_settings(settings)),
        evaluate=lambda _: None,
        log=RunLog(root / "run" / "metrics.jsonl"),
        resume=False,
    )
    return effective(read_events(root / "run" / "metrics.jsonl"))


@pytest.mark.parametrize("name", ["q-ffl", "afl"])
def test_every_round_hears_each_sites_loss_and_stays_within_the_budget(name: str, hospitals: Path) -> None:
    found = events_of(hospitals, strategy={"name": name}, losses={"noise-multiplier": 5.0})
    heard = [event["losses"] for event in found if event["kind"] == "losses_heard"]
    assert [sorted(losses) for losses in heard] == [["site-1", "site-2", "site-3"]] * ROUNDS
    ledger = Site.open(hospitals / "hospitals" / "site-1").ledger()
    assert [one.request.kind for one in ledger.charges()] == ["losses", "anchored"] * ROUNDS
    assert 0.98 * EPSILON < ledger.spent() <= EPSILON
    assert len([event for event in found if event["kind"] == "losses_replied"]) == SITES * ROUNDS


def test_a_loss_that_is_no_number_is_refused() -> None:
    losses = MeanLosses()
    with pytest.raises(MessageError, match="not finite"):
        losses.fold("a", {MEAN_LOSS: np.array([np.nan], np.float32)}, 1.0)
    assert losses.by_site == {}


def test_losses_without_privacy_are_refused(hospitals: Path) -> None:
    with pytest.raises(SettingsError, match=r"'afl' weighs sites by losses .* needs privacy.mode = 'dp'"):
        federation(hospitals, **without_claim(strategy={"name": "afl"}))


def test_a_table_of_losses_that_nobody_hears_is_refused(hospitals: Path) -> None:
    with pytest.raises(SettingsError, match="strategy 'fedavg' uses no losses: remove the table"):
        federation(hospitals, losses={"noise-multiplier": 5.0})
