"""Each rule refuses by its code, from the request alone: no cohort is read and nothing is charged."""

import json
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from client import answers, policy
from client.answers import answer_hello, answer_install, answer_train
from client.errors import Refused
from client.limits import Policy
from client.own_code import code_digest
from client.policy import check_code, check_plan, check_release, check_run, foreseen, mechanism_for
from client.site import Site
from privacy.accounting import epsilon
from privacy.errors import NoiseOutOfRange
from strategies.messages import (
    CentrePlan,
    Hello,
    LossPlan,
    Phase,
    PrototypePlan,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    TrainRequest,
    decode,
    digest_of,
)
from tests.fake_site import facts
from tests.small_hospitals import (
    BATCH,
    EPSILON,
    PATIENTS,
    ROUNDS,
    STEPS,
    ask,
    bundle,
    change_site,
    plain_plan,
    plan,
    ready,
    request,
)

ELSEWHERE = "0" * 64  # the digest of no code
PROTOTYPES = PrototypePlan(
    concepts=("effusion present",), noise_multiplier=9.0, max_norm=2.0, count_weight=0.5
)
HOURS = timedelta(hours=11)
AROUND_NOW = f"{datetime.now(UTC) - HOURS:%H:%M}-{datetime.now(UTC) + HOURS:%H:%M}"


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
        (
            {"privacy": "none", "objective": "infonce", "epsilon": None, "prototypes": PROTOTYPES},
            "policy.require-dp is set",
        ),
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


FORBIDDEN: list[tuple[str, Any, dict[str, Any], str]] = [
    ("parts", ["lora"], {}, "part 'heads' is not among policy.parts"),
    ("parts", [], {}, "part 'heads' is not among"),
    ("objectives", ["infonce"], {}, "objective 'anchored' is not among policy.objectives"),
    (
        "prototypes",
        False,
        {"prototypes": PROTOTYPES},
        "the plan releases prototypes or a centre of features, and policy.prototypes is",
    ),
    ("require-dp", True, {"privacy": "none", "objective": "infonce", "epsilon": None}, "has no privacy"),
    ("min-patients", 26, {}, "25 patients are declared, policy.min-patients is 26"),
    ("max-rounds", 2, {}, "the run has 3 rounds, policy.max-rounds is 2"),
    ("max-steps", 1, {}, "a round has 2 steps, policy.max-steps is 1"),
    ("max-release-bytes", 11, {}, "a release would hold 12 bytes, policy.max-release-bytes is 11"),
    ("max-sample-rate", 0.39, {}, "sample rate 0.4 is above policy.max-sample-rate 0.39"),
    ("min-noise-multiplier", 99.0, {}, r"noise multiplier 0\.\d+ is below policy.min-noise-multiplier 99"),
    ("epsilon-max", 7.9, {}, "the run's epsilon 8.0 is above policy.epsilon-max 7.9"),
    ("runs", ["chest-*", "Small"], {}, "run 'small' is none of 'chest-\\*', 'Small'"),
    ("runs", [], {}, "run 'small' is none of no runs"),
    ("code", [ELSEWHERE], {}, "this code has digest [0-9a-f]{64}, which is not among policy.code: review it"),
    ("quiet-hours", AROUND_NOW, {}, rf"no round begins during policy.quiet-hours {AROUND_NOW} \(UTC\)"),
]


@pytest.mark.parametrize(("key", "value", "changes", "reason"), FORBIDDEN)
def test_a_violation_is_a_code_outside_and_its_rule_and_remedy_inside(
    key: str,
    value: Any,
    changes: dict[str, Any],
    reason: str,
    folder: Path,
) -> None:
    """Through the whole ClientApp, at a site whose data does not exist: opening it would be another code."""
    rules = {"max-sample-rate": None, "min-noise-multiplier": None, key: value}
    change_site(folder, policy={**rules, **({"timezone": "UTC"} if key == "quiet-hours" else {})})
    demanded = replace(asked(**changes), arrays={"w": np.zeros(3, dtype=np.float32)})
    refused = decode(ask(folder, demanded).content)
    assert isinstance(refused, Refusal)
    code = RefusalCode.BUDGET if key == "epsilon-max" else RefusalCode.POLICY
    assert refused == Refusal(site="north", code=code, incident=refused.incident)
    log = (folder / "site.log").read_text()
    assert f"incident {refused.incident} code {code} rule policy.{key}" in log
    with pytest.raises(Refused, match=f"{reason}.*; to allow it, change policy.{key} in site.toml"):
        answer_train(Site.open(folder), demanded)
    (counted,) = map(json.loads, (folder / "refusals.jsonl").read_text().splitlines())
    assert counted == {
        "version": 1,
        "time": counted["time"],
        "incident": refused.incident,
        "code": code,
        "rule": key,
    }
    assert {path.name for path in folder.iterdir()} == {"site.toml", "site.log", "refusals.jsonl"}


def test_every_rule_of_the_policy_is_tried_above() -> None:
    """``timezone`` is half a rule; the others change an answer, never whether there is one."""
    keys = {field.alias for field in Policy.model_fields.values()}
    assert keys - {"delta", "epsilon-run", "metrics", "timezone"} == {key for key, *_ in FORBIDDEN}


UNFORESEEN = ("quiet-hours", "min-noise-multiplier")  # the clock, and an accountant, decide


@pytest.mark.parametrize(("key", "value", "changes", "reason"), FORBIDDEN)
def test_a_refusal_is_foreseen_where_neither_clock_nor_accountant_decides(
    key: str, value: Any, changes: dict[str, Any], reason: str, folder: Path
) -> None:
    change_site(folder, policy={key: value, **({"timezone": "UTC"} if key == "quiet-hours" else {})})
    demanded = replace(asked(**changes), arrays={"w": np.zeros(3, dtype=np.float32)})
    found = foreseen(Site.open(folder), demanded)
    assert [refused.rule for refused in found] == ([] if key in UNFORESEEN else [key])
    for refused in found:
        assert re.search(reason, refused.reason)
        assert str(refused) == f"{refused.reason}; to allow it, change policy.{key} in site.toml"
    assert {path.name for path in folder.iterdir()} == {"site.toml"}


def test_all_that_is_foreseen_is_said_and_not_the_first_alone(folder: Path) -> None:
    change_site(folder, policy={"max-rounds": 2, "runs": ["chest"], "epsilon-max": 1.0})
    found = foreseen(Site.open(folder), asked(part="full", batch=11, keep_optimizer=True))
    assert [refused.rule for refused in found] == [
        "runs", "parts", "max-rounds", None, "epsilon-max", "max-sample-rate",
    ]  # fmt: skip
    assert "no optimizer is kept" in found[3].reason


@pytest.mark.parametrize("phase", ["prototypes", "losses", "centre"])
def test_too_little_noise_beside_the_training_is_foreseen_where_it_is_asked_for(
    phase: Phase, folder: Path
) -> None:
    quiet: dict[Phase, Any] = {
        "prototypes": PROTOTYPES.model_copy(update={"noise_multiplier": 0.5}),
        "losses": LossPlan(noise_multiplier=0.5, max_loss=9.0),
        "centre": CentrePlan(noise_multiplier=0.5, max_norm=1.5, count_weight=0.5),
    }
    site = Site.open(change_site(folder, policy={"parts": ["image-head"]}))
    demanded = replace(asked(part="image-head", **{phase: quiet[phase]}), phase=phase)
    (refused,) = foreseen(site, demanded)
    assert refused.reason == "noise multiplier 0.5 is below policy.min-noise-multiplier 0.9"
    assert foreseen(site, replace(demanded, phase="train")) == []


def test_without_privacy_no_sample_rate_is_refused(folder: Path) -> None:
    site = Site.open(change_site(folder, policy={"require-dp": False}))
    assert foreseen(site, replace(asked(), plan=plain_plan(batch=26))) == []


def test_what_is_just_allowed_passes(folder: Path) -> None:
    """Every bound itself is within the rule."""
    rules = {
        "objectives": ["anchored"],
        "min-patients": 25,
        "max-rounds": ROUNDS,
        "max-steps": STEPS,
        "max-release-bytes": 12,
        "epsilon-max": EPSILON,
        "runs": ["chest-*", "s?all"],
        "code": [ELSEWHERE, code_digest()],
    }
    change_site(folder, policy=rules)
    demanded = replace(asked(), arrays={"w": np.zeros(3, dtype=np.float32)})
    check_plan(Site.open(folder), demanded)
    assert foreseen(Site.open(folder), demanded) == []


def test_epochs_are_counted_as_steps_of_the_declared_patients(folder: Path) -> None:
    change_site(folder, policy={"require-dp": False, "max-steps": 5})
    site = Site.open(folder)
    check_plan(site, replace(asked(), plan=plain_plan(epochs=2, steps=99)))
    with pytest.raises(Refused, match=r"a round has 8 steps, policy\.max-steps is 5"):
        check_plan(site, replace(asked(), plan=plain_plan(epochs=3)))


@pytest.mark.parametrize(
    ("hours", "zone", "moment", "quiet"),
    [
        ("22:00-06:00", "Europe/Berlin", "2026-01-15T21:59:59+01:00", False),
        ("22:00-06:00", "Europe/Berlin", "2026-01-15T22:00:00+01:00", True),
        ("22:00-06:00", "Europe/Berlin", "2026-01-16T05:59:59+01:00", True),
        ("22:00-06:00", "Europe/Berlin", "2026-01-16T06:00:00+01:00", False),
        ("22:00-06:00", "Europe/Berlin", "2026-07-15T20:00:00+00:00", True),  # summer time is two hours on
        ("22:00-06:00", "Europe/Berlin", "2026-01-15T20:00:00+00:00", False),
        ("22:00-06:00", "Asia/Kolkata", "2026-01-15T16:30:00+00:00", True),
        ("07:00-19:00", "UTC", "2026-01-15T12:00:00+00:00", True),
        ("07:00-19:00", "UTC", "2026-01-15T19:00:00+00:00", False),
        ("22:00-00:00", "UTC", "2026-01-15T00:00:00+00:00", False),
    ],
)
def test_quiet_hours_go_by_the_clock_on_the_hospitals_wall(
    hours: str, zone: str, moment: str, quiet: bool, folder: Path
) -> None:
    change_site(folder, policy={"quiet-hours": hours, "timezone": zone})
    site, now = Site.open(folder), datetime.fromisoformat(moment).timestamp()
    assert site.settings.policy.timezone == ZoneInfo(zone)
    if not quiet:
        check_plan(site, asked(), clock=lambda: now)
        return
    with pytest.raises(Refused, match=f"policy.quiet-hours {hours}") as refused:
        check_plan(site, asked(), clock=lambda: now)
    assert (refused.value.code, refused.value.rule) == (RefusalCode.POLICY, "quiet-hours")


def test_a_run_or_code_that_is_not_allowed_is_not_even_told_who_the_site_is(folder: Path) -> None:
    site = Site.open(change_site(folder, policy={"runs": ["chest"]}))
    check_run(site, "chest")
    with pytest.raises(Refused, match="run 'small' is none of 'chest'"):
        answer_hello(site, Hello(run="small", bundle="00"))
    site = Site.open(change_site(folder, policy={"code": [ELSEWHERE]}))
    with pytest.raises(Refused, match=code_digest()):
        answer_hello(site, Hello(run="chest", bundle="00"))
    with pytest.raises(Refused, match=code_digest()):
        answer_install(site, bundle())
    assert not (folder / "bundles").exists()
    check_code(Site.open(change_site(folder, policy={"code": [code_digest()]})))


def test_a_rule_that_was_made_after_a_release_holds_for_its_replay(hospitals: Path) -> None:
    folder = hospitals / "hospitals" / "site-1"
    ready(folder)
    first = decode(ask(folder, request()).content)
    assert isinstance(first, Release)
    change_site(folder, policy={"metrics": ["delta"]})
    again = decode(ask(folder, request()).content)
    assert isinstance(again, Release)
    assert digest_of(again.update) == digest_of(first.update)
    change_site(folder, policy={"max-release-bytes": 1})
    assert "policy" in str(decode(ask(folder, request()).content))


@pytest.mark.parametrize("metrics", [[], ["epsilon", "delta"], None])
def test_a_release_says_of_itself_what_the_policy_lets_it_say(
    metrics: list[str] | None, folder: Path
) -> None:
    site = Site.open(change_site(folder, policy={} if metrics is None else {"metrics": metrics}))
    optional = {name.replace("-", "_") for name in site.settings.policy.metrics}
    known = {
        "epsilon": 1.0, "epsilon_max": 2.0, "delta": 1e-5,
        "noise_multiplier": 1.0, "sample_rate": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    told = facts("north", 1, 25).model_copy(update=known)
    left = check_release(site, Release(facts=told, update={})).facts.model_dump()
    assert {name for name in known if left[name] is not None} == optional
    assert {name: left[name] for name in left.keys() - known.keys()} == {
        name: value for name, value in told.model_dump().items() if name not in known
    }
    assert (set(known) == optional) == (metrics is None)
    ReleaseFacts.model_validate(left)  # and can still be read


def test_a_release_larger_than_was_foreseen_does_not_leave_and_stays_charged(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are checked before anything is spent; this is the lock behind it, for an engine at fault."""
    folder = hospitals / "hospitals" / "site-1"
    site, demanded = ready(folder), request()
    size = sum(value.nbytes for value in demanded.arrays.values())
    change_site(folder, policy={"max-release-bytes": size})
    twice = {name: value.astype(np.float64) for name, value in demanded.arrays.items()}
    with monkeypatch.context() as patch:
        patch.setattr(answers, "train_privately", lambda *_, **__: twice)
        refused = decode(ask(folder, demanded).content)
    assert isinstance(refused, Refusal)
    assert refused.code is RefusalCode.POLICY
    assert (
        f"the release holds {2 * size} bytes, policy.max-release-bytes is {size}"
        in (folder / "site.log").read_text()
    )
    assert [row.body["event"] for row in site.ledger().rows()[1:]] == ["reserved", "released"]
    assert isinstance(decode(ask(folder, request(server_round=2)).content), Release)


def test_without_privacy_only_infonce_is_trained(folder: Path) -> None:
    (folder / "site.toml").write_text((folder / "site.toml").read_text() + "require-dp = false\n")
    site = Site.open(folder)
    check_plan(site, replace(asked(), plan=plain_plan()))
    with pytest.raises(Refused, match="only the infonce objective") as refused:
        check_plan(site, replace(asked(), plan=plain_plan(objective="anchored")))
    assert refused.value.code is RefusalCode.POLICY
    with pytest.raises(Refused, match="'dp-adambc' subtracts noise, and without privacy there is none"):
        check_plan(site, replace(asked(), plan=plain_plan(optimizer="dp-adambc")))


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


RATE = 0.3


def test_a_plans_sample_rate_is_the_rate_that_is_paid_for_whatever_the_sites_size(folder: Path) -> None:
    change_site(folder, policy={"min-noise-multiplier": None})
    asked_for = plan(batch=None, sample_rate=RATE)
    small = mechanism_for(Site.open(folder), asked_for)
    assert small.sample_rate == small.event.sample_rate == RATE
    assert 0.99 * EPSILON < epsilon([small.event] * ROUNDS, delta=Site.open(folder).delta) <= EPSILON
    large = mechanism_for(Site.open(change_site(folder, cohort={"patients-declared": 99})), asked_for)
    assert (large.sample_rate, large.noise_std) == (RATE, small.noise_std)  # of one delta, so of one noise


def test_a_plans_sample_rate_is_held_to_the_policys(folder: Path) -> None:
    change_site(folder, policy={"max-sample-rate": 0.29})
    with pytest.raises(Refused, match=r"sample rate 0.3 is above policy.max-sample-rate 0.29"):
        mechanism_for(Site.open(folder), plan(batch=None, sample_rate=RATE))


def test_a_site_may_add_the_noise_of_a_smaller_epsilon_than_the_plan_asks_for(folder: Path) -> None:
    change_site(folder, policy={"min-noise-multiplier": None})
    asked_for, own = mechanism_for(Site.open(folder), plan()), EPSILON / 4
    change_site(folder, policy={"epsilon-run": own})
    mechanism = mechanism_for(Site.open(folder), plan())
    assert mechanism.noise_multiplier > asked_for.noise_multiplier
    assert 0.98 * own < epsilon([mechanism.event] * ROUNDS, delta=Site.open(folder).delta) <= own
    change_site(folder, policy={"epsilon-max": own})  # the plan's own epsilon no longer passes it
    check_plan(Site.open(folder), asked())
    change_site(folder, policy={"epsilon-run": 2 * EPSILON, "epsilon-max": EPSILON})
    assert mechanism_for(Site.open(folder), plan()) == asked_for


def test_an_objective_of_groups_has_twice_the_noise_at_the_same_cost(folder: Path) -> None:
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text.replace("min-noise-multiplier = 0.9", ""))
    alone, grouped = (
        mechanism_for(Site.open(folder), plan(objective=objective))
        for objective in ("anchored", "microbatch")
    )
    assert (alone.kind, grouped.kind) == ("anchored", "microbatch")
    assert grouped.event == alone.event
    assert grouped.noise_std == 2 * alone.noise_std
