"""Prototypes of a round: what sites release is added up, handed on as anchors, and paid for once."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client import answers
from client.prototypes import release_prototypes
from client.workbench import training_pairs
from privacy.banks import PrototypeBank
from server.prototypes import PROTOTYPES_FOLDER, Prototypes, PrototypeSum, least_count
from server.start import part_of
from strategies.messages import PROTOTYPE_SUMS, Arrays, MessageError, PrototypePlan
from tasks.concepts import Concept, Studies, members, named_concepts
from tests.server.runs import Run, heard
from tests.small_hospitals import EPSILON, ROUNDS, SITES, change_site, without_claim

WIDTH = 4
TABLE = {"noise-multiplier": 2.0, "least-cosine": 0.01, "findings": ["effusion", "opacity"]}
PLAN = PrototypePlan(
    concepts=("effusion present", "effusion absent", "opacity present", "opacity absent"),
    noise_multiplier=2.0,
    max_norm=1.5,
    count_weight=0.5,
)


def prompts(arrays: Arrays, concepts: tuple[Concept, ...]) -> np.ndarray:
    return np.eye(WIDTH, dtype=np.float32)[: len(concepts)]


def prototypes(*, least_cosine: float = 0.5) -> Prototypes:
    return Prototypes(
        plan=PLAN, width=WIDTH, least_cosine=least_cosine, least_patients=1, embed=prompts, private=True
    )


def released(*rows: tuple[int, int, float]) -> Arrays:
    """A release of so many patients on a concept, all along the last axis, by modality and concept."""
    values = prototypes().like[PROTOTYPE_SUMS]
    for modality, concept, patients in rows:
        values[modality, concept, WIDTH - 1] = patients
        values[modality, concept, WIDTH] = patients * PLAN.count_weight
    return {PROTOTYPE_SUMS: values}


def test_sums_add_and_their_noise_grows_with_the_root_of_the_sites() -> None:
    total = PrototypeSum(prototypes())
    for site in "abc":
        total.fold(site, released((0, 1, 10.0)), weight=1)
    sums = total.sums()
    assert sums.counts[0, 1] == 30
    assert sums.noise_std == pytest.approx(math.sqrt(3) * 2.0 * 1.5)
    assert sums.concepts == ("effusion present", "effusion absent", "opacity present", "opacity absent")


def test_a_mean_of_many_sites_counts_as_all_of_them() -> None:
    """What a secure sum folds in."""
    total = PrototypeSum(prototypes())
    total.fold("secure sum", released((0, 1, 10.0)), weight=3)
    assert total.sums().counts[0, 1] == 30
    assert total.sums().noise_std == pytest.approx(math.sqrt(3) * 2.0 * 1.5)
    assert total.facts()["sites"] == 3


def bank_of(total: PrototypeSum) -> PrototypeBank:
    bank = total.bank({})
    assert bank is not None
    return bank


def test_where_nobody_has_released_every_concept_is_its_prompt() -> None:
    total = PrototypeSum(prototypes())
    assert np.array_equal(bank_of(total).image, np.eye(WIDTH))
    assert np.array_equal(bank_of(total).text, np.eye(WIDTH))
    assert total.facts()["used"] == {"image": 0, "text": 0}


def test_a_concept_with_enough_patients_is_a_direction_and_another_its_prompt() -> None:
    total = PrototypeSum(prototypes())
    total.fold("a", released((0, 1, 1000.0), (1, 0, 1.0)), weight=1.0)
    bank, last = bank_of(total), np.eye(WIDTH)[-1]
    assert bank.image[1] == pytest.approx(last)
    assert bank.image[0] == pytest.approx(np.eye(WIDTH)[0])
    assert bank.text == pytest.approx(np.eye(WIDTH))  # one patient is too few
    assert total.facts()["used"] == {"image": 1, "text": 0}
    assert "No pleural effusion." in {text for wording in bank.wordings for text in wording}


def of_views(*names: str, least_patients: int = 1, private: bool = True) -> PrototypeSum:
    plan = PLAN.model_copy(update={"concepts": names})
    return PrototypeSum(replace(prototypes(), plan=plan, least_patients=least_patients, private=private))


def test_a_view_that_too_few_have_is_left_out_and_without_any_there_is_no_bank() -> None:
    total = of_views("axial", "CT", "effusion present", "head")
    total.fold("a", released((0, 1, 1000.0), (1, 1, 1000.0), (0, 3, 1000.0)), weight=1.0)
    assert bank_of(total).concepts == ("CT", "effusion present")
    assert bank_of(total).image[0] == pytest.approx(np.eye(WIDTH)[-1])
    assert bank_of(total).wordings[0][0] == "CT of the head."
    assert total.facts()["used"] == {"image": 1, "text": 1}  # of the finding both are its prompts
    assert of_views("axial", "CT", "brain", "head").bank({}) is None


def test_without_privacy_there_is_no_noise_to_mind_and_the_least_number_of_patients_decides() -> None:
    total = of_views("axial", "CT", "PA", "head", least_patients=5, private=False)
    five = 5.0 - 1e-6  # a patient's sum is rounded towards zero
    total.fold("a", released((0, 0, five), (1, 0, five), (0, 1, 4.0), (1, 1, 4.0)), weight=1.0)
    assert total.sums().noise_std == 0
    assert bank_of(total).concepts == ("axial",)
    assert total.facts()["used"] == {"image": 1, "text": 1}


def test_the_least_count_is_where_noise_leaves_the_cosine() -> None:
    total = PrototypeSum(prototypes())
    total.fold("a", released(), weight=1.0)
    sums, cosine = total.sums(), 0.6
    patients = least_count(sums, least_cosine=cosine)
    noise = np.random.default_rng(0).normal(0, sums.noise_std, (20_000, WIDTH))
    direction = np.eye(WIDTH)[0] * patients
    found = (noise + direction)[:, 0] / np.linalg.norm(noise + direction, axis=1)
    assert found.mean() == pytest.approx(cosine, abs=0.1)


def test_a_release_of_another_shape_leaves_no_trace() -> None:
    total = PrototypeSum(prototypes())
    with pytest.raises(MessageError, match=PROTOTYPE_SUMS):
        total.fold("a", {PROTOTYPE_SUMS: np.zeros((2, 4, 3), np.float32)}, weight=1.0)
    assert total.facts()["sites"] == 0


def run_of(root: Path, **changes: Any) -> Run:
    return Run(root, prototypes=TABLE, **changes)


def test_every_round_releases_prototypes_first_and_stays_within_the_budget(hospitals: Path) -> None:
    run = run_of(hospitals)
    run.go()
    assert run.charges("site-1") == [("prototypes", "released"), ("anchored", "released")] * ROUNDS
    assert 0.98 * EPSILON < run.site().ledger().spent() <= EPSILON
    assert [event["sites"] for event in run.events("prototypes_made")] == [SITES] * ROUNDS
    assert len(run.events("prototypes_replied")) == len(run.events("site_replied")) == SITES * ROUNDS
    files = sorted((run.run_dir / PROTOTYPES_FOLDER).iterdir())
    assert [path.name for path in files] == [f"round-{number:04d}.safetensors" for number in (1, 2, 3)]
    assert {event["bytes_up"] for event in run.events("prototypes_replied")} == {
        2 * run.start.prototypes.like[PROTOTYPE_SUMS].size  # type: ignore[union-attr]
    }


def test_prototypes_of_every_second_round_are_paid_for_once_and_used_in_both(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = Run(hospitals, prototypes={**TABLE, "every": 2}), heard(monkeypatch)
    run.go()
    assert run.charges("site-1") == [
        ("prototypes", "released"), ("anchored", "released"), ("anchored", "released"),
        ("prototypes", "released"), ("anchored", "released"),
    ]  # fmt: skip
    assert 0.98 * EPSILON < run.site().ledger().spent() <= EPSILON
    used = {one.server_round: one.prototypes for one in asked if one.phase == "train"}
    first, second, third = (bank.image for _, bank in sorted(used.items()) if bank is not None)
    assert np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_prototypes_that_a_round_did_not_get_are_not_asked_for_in_the_next(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Arrays:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(answers, "release_prototypes", failing)
    run, asked = Run(hospitals, prototypes={**TABLE, "every": 3}), heard(monkeypatch)
    run.go()
    assert [one.phase for one in asked].count("prototypes") == SITES
    assert run.charges("site-1") == [("prototypes", "abandoned")] + [("anchored", "released")] * ROUNDS


def test_without_privacy_the_sums_are_as_they_are(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, SITES + 1):
        change_site(hospitals / "hospitals" / f"site-{number}", policy={"require-dp": False})
    asked = heard(monkeypatch)
    run = Run(
        hospitals,
        prototypes={"findings": ["effusion"], "views": ["regions"]},
        training={"rounds": 1},
        **without_claim(objective={"soft-targets": 10.0}),
    )
    run.go()
    (made,) = run.events("prototypes_made")
    assert made["sites"] == SITES
    trained = [one for one in asked if one.phase == "train"]
    assert len(trained) == SITES
    bank = trained[0].prototypes
    assert bank is not None
    assert "effusion present" in bank.concepts
    assert run.charges("site-1") == []
    part = part_of(run.settings, run.prepared.bundle)
    sums = 0
    for number in range(1, SITES + 1):
        known = training_pairs(run.site(f"site-{number}").folder, part)
        with torch.no_grad():
            embedded = part.module.embed_texts(known.pairs.texts).numpy()
        there = members(named_concepts(("lung",)), Studies(known.labels, known.texts))[:, 0]
        for patient in np.unique(known.patients):
            own = known.patients == patient
            sums = sums + (embedded[own] * there[own, None]).mean(0)
    found = bank.text[bank.concepts.index("lung")]
    assert found @ (sums / np.linalg.norm(sums)) > 0.999


def test_a_round_without_prototypes_stays_one_however_often_it_is_asked_for(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them it would be another request: those who had trained would train, and pay, again."""
    run = Run(
        hospitals,
        prototypes={"findings": [], "views": ["regions"], "noise-multiplier": 2.0, "least-patients": 10**6},
        strategy={"min-sites": SITES, "round-retries": 1},
        training={"rounds": 1},
    )
    answer, failed = answers.answer_train, list[str]()

    def failing_once(site: Any, request: Any) -> Any:
        if site.name == "site-3" and request.phase == "train" and not failed:
            failed.append(site.name)
            raise RuntimeError("the disk is on fire")
        return answer(site, request)

    monkeypatch.setattr("client.app.answer_request", failing_once)
    run.go()
    assert len(run.events("prototypes_made")) == 1
    assert len(run.events("round_repeated")) == 1
    assert run.charges("site-1") == [("prototypes", "released"), ("anchored", "released")]


def test_the_files_least_number_of_patients_is_the_runs(hospitals: Path) -> None:
    run = Run(hospitals, prototypes={**TABLE, "least-patients": 7})
    assert run.start.prototypes is not None
    assert run.start.prototypes.least_patients == 7


def test_the_sites_are_given_the_prototypes_of_their_round(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = run_of(hospitals, training={"rounds": 1}), heard(monkeypatch)
    run.go()
    sums, trained = asked[:SITES], asked[SITES:]
    assert [one.phase for one in sums] == ["prototypes"] * SITES
    made = PrototypeBank.load(run.run_dir / PROTOTYPES_FOLDER / "round-0001.safetensors")
    for one in trained:
        assert one.phase == "train"
        assert one.prototypes is not None
        assert np.array_equal(one.prototypes.image, made.image)
        assert one.prototypes.wordings == made.wordings


def test_a_site_that_fails_at_prototypes_still_trains(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = release_prototypes

    def failing(part: Any, pairs: Any, **settings: Any) -> Arrays:
        failures.append(None)
        if len(failures) % SITES == 2:
            raise RuntimeError("the disk is on fire")
        return release(part, pairs, **settings)

    failures: list[None] = []
    monkeypatch.setattr(answers, "release_prototypes", failing)
    run = run_of(hospitals, training={"rounds": 1})
    run.go()
    assert [(event["site"], event["code"]) for event in run.events("prototypes_refused")] == [
        ("site-2", "failed")
    ]
    assert len(run.events("site_replied")) == SITES
    assert run.charges("site-2") == [("prototypes", "abandoned"), ("anchored", "released")]
    assert [event["sites"] for event in run.events("prototypes_made")] == [SITES - 1]


def test_a_site_whose_policy_releases_no_prototypes_says_so_before_it_trains(hospitals: Path) -> None:
    change_site(hospitals / "hospitals" / "site-3", policy={"prototypes": False})
    run = run_of(hospitals, training={"rounds": 1})
    run.go()
    assert {event["site"]: event["code"] for event in run.events("site_refused")} == {"site-3": "policy"}
    assert run.charges("site-3") == []


def test_a_round_that_is_resumed_uses_the_prototypes_it_made(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    run = run_of(hospitals, training={"rounds": 1})
    with monkeypatch.context() as patch:
        patch.setattr("client.app.answer_request", _only_prototypes(killed))
        with pytest.raises(KeyboardInterrupt):
            run.go()
    run.go(resume=True)
    assert run.charges("site-1") == [("prototypes", "released"), ("anchored", "released")]
    assert len(run.events("prototypes_made")) == 1


def _only_prototypes(otherwise: Any) -> Any:
    train = answers.answer_train
    return lambda site, request: (
        train(site, request) if request.phase == "prototypes" else otherwise(site, request)
    )
