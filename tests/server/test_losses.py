"""Strategies that weigh sites by losses hear noised ones, once a round, paid from the run's epsilon."""

from pathlib import Path

import numpy as np
import pytest

from server.losses import MeanLosses
from strategies.messages import MEAN_LOSS, MessageError
from strategies.settings import SettingsError
from tests.server.runs import Run
from tests.small_hospitals import EPSILON, ROUNDS, SITES, federation, without_claim


@pytest.mark.parametrize("name", ["q-ffl", "afl"])
def test_every_round_hears_each_sites_loss_and_stays_within_the_budget(name: str, hospitals: Path) -> None:
    run = Run(hospitals, strategy={"name": name}, losses={"noise-multiplier": 5.0})
    run.go()
    heard = [event["losses"] for event in run.events("losses_heard")]
    assert [sorted(losses) for losses in heard] == [["site-1", "site-2", "site-3"]] * ROUNDS
    assert run.charges() == [("losses", "released"), ("anchored", "released")] * ROUNDS
    assert 0.98 * EPSILON < run.site().ledger().spent() <= EPSILON
    assert len(run.events("losses_replied")) == SITES * ROUNDS


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
