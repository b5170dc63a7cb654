"""Each rule refuses by its code, from the request alone: no cohort is read and nothing is charged."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import policy
from client.answers import answer_train
from client.errors import Refused
from client.policy import check_plan, mechanism_for
from client.site import Site
from privacy.accounting import epsilon
from privacy.errors import NoiseOutOfRange
from strategies.messages import RefusalCode, TrainRequest
from tests.small_hospitals import BATCH, EPSILON, PATIENTS, ROUNDS, STEPS, plain_plan, plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site of 25 declared patients whose data does not even exist."""
    (tmp_path / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ntable = "absent.csv"\npatients-declared = 25\n'
        '[policy]\nmax-sample-rate = 0.4\nmin-noise-multiplier = 0.9\nparts = ["heads", "lora"]\n'
    )
    return tmp_path


def asked(server_round: int = 1, **changes: Any) -> TrainRequest:
    return TrainRequest(run="small", server_round=server_round, bundle="00", plan=plan(**changes), arrays={})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"part": "full"}, "part 'full' is not among policy.parts"),
        ({"privacy": "none", "objective": "infonce", "epsilon": None}, "policy.require-dp is set"),
        ({"objective": "infonce"}, "in-batch negatives couple patients: no epsilon can be claimed"),
        ({"epochs": 1}, "the same public number of steps: epochs would tell its size"),
        ({"keep_optimizer": True}, "a round depends on nothing but its request: no optimizer is kept"),
        ({"epsilon": None}, "a plan with privacy names an epsilon"),
        ({"server_round": 4}, "round is past the plan's last"),
        ({"batch": 11}, "sample rate 0.44 is above policy.max-sample-rate 0.4"),
        ({"batch": 26}, "sample rate 1.04 is above policy.max-sample-rate"),
        ({}, r"noise multiplier 0\.\d+ is below policy.min-noise-multiplier 0.9"),
    ],
)
def test_each_rule_refuses_before_anything_is_touched(
    changes: dict[str, Any], reason: str, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(Refused, match=reason) as refused:
        answer_train(Site.open(folder), asked(**changes))
    assert refused.value.code is RefusalCode.POLICY
    assert sorted(folder.iterdir()) == before


def test_without_privacy_only_infonce_is_trained(folder: Path) -> None:
    (folder / "site.toml").write_text((folder / "site.toml").read_text() + "require-dp = false\n")
    site = Site.open(folder)
    check_plan(site, replace(asked(), plan=plain_plan()))
    with pytest.raises(Refused, match="only the infonce objective") as refused:
        check_plan(site, replace(asked(), plan=plain_plan(objective="anchored")))
    assert refused.value.code is RefusalCode.POLICY


def test_a_request_whose_deadline_passed_is_refused_before_anything_is_touched(folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(Refused, match="the deadline has passed") as refused:
        answer_train(Site.open(folder), replace(asked(), deadline_unix_seconds=time.time() - 1))
    assert refused.value.code is RefusalCode.DEADLINE
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("deadline", [None, time.time() + 3600])
def test_a_request_in_time_passes(deadline: float | None, folder: Path) -> None:
    check_plan(Site.open(folder), replace(asked(server_round=3), deadline_unix_seconds=deadline))


def test_an_epsilon_that_no_noise_reaches_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_range(**_: object) -> float:
        raise NoiseOutOfRange("no noise multiplier up to 1000")

    monkeypatch.setattr(policy, "noise_multiplier_for", out_of_range)
    with pytest.raises(Refused, match="no noise multiplier up to 1000") as refused:
        mechanism_for(Site.open(folder), plan())
    assert refused.value.code is RefusalCode.POLICY


@pytest.mark.parametrize("rounds", [1, ROUNDS])
def test_all_rounds_together_cost_what_the_plan_says_and_no_more(rounds: int, folder: Path) -> None:
    """The bounds of the policy themselves pass: a sample rate of 0.4, and just that much noise."""
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text.replace("min-noise-multiplier = 0.9", ""))
    mechanism = mechanism_for(Site.open(folder), plan(rounds=rounds))
    spent = epsilon([mechanism.event] * rounds, delta=Site.open(folder).delta)
    assert 0.99 * EPSILON < spent <= EPSILON
    assert (mechanism.sample_rate, mechanism.steps) == (BATCH / PATIENTS, STEPS)
    exactly = f"min-noise-multiplier = {mechanism.noise_multiplier!r}"
    (folder / "site.toml").write_text(text.replace("min-noise-multiplier = 0.9", exactly))
    assert mechanism_for(Site.open(folder), plan(rounds=rounds)) == mechanism
