"""What leaves a site: charged before it is computed, stored before it leaves, never made twice."""

import csv
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client import answers, training
from client.answers import answer_hello, answer_install, answer_train
from client.errors import Refused
from client.personal import PersonalWeights
from client.releases import ReleaseStore
from client.site import Site
from client.workbench import part_of, training_data
from privacy import mechanism
from privacy.errors import AlreadyReleased, HistoryLost, KeyUnusable, LedgerTampered, UnsoundTraining
from privacy.sampling import poisson_sample
from strategies.bundles import BundleStore
from strategies.messages import Hello, RefusalCode, Release, TrainRequest, digest_of
from strategies.wire import unpack
from tests.small_hospitals import BATCH, EPSILON, PATIENTS, STEPS, bundle, change_site, ready, request


@pytest.fixture
def site(hospitals: Path) -> Site:
    return ready(hospitals / "hospitals" / "site-1")


def story(site: Site) -> list[str]:
    return [row.body["event"] for row in site.ledger().rows()[1:]]


def anchored(**changes: Any) -> TrainRequest:
    return request(**changes)


def plain(**changes: Any) -> TrainRequest:
    return request(privacy="none", objective="infonce", epsilon=None, **changes)


def same(one: Release, other: Release) -> bool:
    facts = (release.facts.model_dump(exclude={"replayed", "anchor"}) for release in (one, other))
    return next(facts) == next(facts) and digest_of(one.update) == digest_of(other.update)


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("the disk is on fire")


def test_a_site_says_its_name_its_declared_size_and_whether_it_is_ready(hospitals: Path) -> None:
    site = Site.open(hospitals / "hospitals" / "site-2")
    hello = Hello(run="small", bundle=bundle().digest)
    assert answer_hello(site, hello).model_dump() == {
        "site": "site-2",
        "patients_declared": PATIENTS,
        "has_bundle": False,
    }
    assert answer_install(site, bundle()).bundle == bundle().digest
    assert answer_hello(site, hello).has_bundle


def test_a_round_is_charged_then_released(site: Site) -> None:
    asked = anchored()
    release = answer_train(site, asked)
    assert story(site) == ["reserved", "released"]
    reserved, released = (row.body for row in site.ledger().rows()[1:])
    assert released["output_digest"] == digest_of(release.update)
    charge = reserved["request"]
    assert (charge["run"], charge["server_round"], charge["request_digest"]) == ("small", 1, asked.digest)
    assert (charge["sample_rate"], charge["steps"], charge["sampler"]) == (BATCH / PATIENTS, STEPS, "poisson")
    assert charge["input_digest"] == digest_of(asked.arrays)
    assert charge["noise_std"] == release.facts.noise_multiplier  # times a sensitivity of 1
    assert not charge["insecure_seed"]
    facts = release.facts
    assert (facts.epsilon, facts.epsilon_max) == (site.ledger().spent(), 8.0)
    assert (facts.replayed, facts.insecure_seed, facts.patients_declared) == (False, False, PATIENTS)
    assert {name: value.shape for name, value in release.update.items()} == {
        name: value.shape for name, value in asked.arrays.items()
    }
    assert all(np.any(value) for value in release.update.values())


def test_the_charge_is_on_the_disk_before_a_patient_is_touched(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    for name in ("training_data", "train_privately"):
        original: Callable[..., Any] = getattr(answers, name)

        def spied(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            seen.append(story(site))
            return original(*args, **kwargs)

        monkeypatch.setattr(answers, name, spied)
    answer_train(site, anchored())
    assert seen == [["reserved"], ["reserved"]]


def test_the_plans_sample_rate_is_drawn_at_divided_by_and_paid_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, tossed, divisors = 0.3, [], []
    draw, divide = poisson_sample, mechanism.Released.over

    def watched_draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> Any:
        tossed.append(sample_rate)
        return draw(generator, population=population, sample_rate=sample_rate)

    def watched_division(released: mechanism.Released, divisor: float) -> mechanism.Released:
        divisors.append(divisor)
        return divide(released, divisor)

    monkeypatch.setattr(training, "poisson_sample", watched_draw)
    monkeypatch.setattr(mechanism.Released, "over", watched_division)
    release = answer_train(site, anchored(batch=None, sample_rate=rate))
    charge = site.ledger().rows()[1].body["request"]
    assert charge["sample_rate"] == release.facts.sample_rate == rate
    assert (tossed, divisors) == ([rate] * STEPS, [rate * PATIENTS] * STEPS)
    assert [event.sample_rate for event in site.ledger().events()] == [rate]


def test_the_same_request_gets_the_same_bytes_and_costs_nothing(site: Site) -> None:
    first = answer_train(site, anchored())
    again = answer_train(site, replace(anchored(), deadline_unix_seconds=4e9))
    assert again.facts.replayed
    assert same(first, again)
    assert story(site) == ["reserved", "released"]


def test_another_round_or_run_is_another_release(site: Site) -> None:
    updates = [
        digest_of(answer_train(site, asked).update) for asked in (anchored(), anchored(server_round=2))
    ]
    assert len(set(updates)) == 2
    assert story(site) == ["reserved", "released"] * 2


def test_noise_is_never_the_same_twice(hospitals: Path) -> None:
    one, other = (
        answer_train(ready(change_site(hospitals / "hospitals" / name, name="north")), anchored())
        for name in ("site-1", "site-2")
    )
    assert all(np.any(one.update[name] != other.update[name]) for name in one.update)


def test_a_fixed_noise_seed_repeats_the_release_and_is_never_kept_secret(hospitals: Path) -> None:
    releases = []
    for name in ("first", "second"):
        folder = hospitals / name
        shutil.copytree(hospitals / "hospitals" / "site-1", folder, symlinks=True)
        site = ready(change_site(folder, testing={"insecure-noise-seed": 5}))
        releases.append(answer_train(site, anchored()))
        assert site.ledger().rows()[1].body["request"]["insecure_seed"] is True
    assert same(*releases)
    assert releases[0].facts.insecure_seed


def test_a_process_that_died_after_storing_has_its_books_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for the kill: nobody catches it."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("privacy.ledger.Ledger.released", killed)
        with pytest.raises(Killed):
            answer_train(site, anchored())
    assert story(site) == ["reserved"]
    stored = ReleaseStore(folder=site.folder / "releases").find(anchored().digest)
    assert stored is not None
    release = answer_train(site, anchored())
    assert same(release, stored)
    assert story(site) == ["reserved", "released"]


def test_a_process_that_died_while_training_trains_again_for_the_same_charge(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(answers, "train_privately", killed)
        with pytest.raises(Killed):
            answer_train(site, anchored())
    assert not answer_train(site, anchored()).facts.replayed
    assert story(site) == ["reserved", "released"]


def test_a_failure_is_recorded_before_it_is_reported_and_the_next_attempt_is_charged(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(answers, "train_privately", fail)
        with pytest.raises(RuntimeError, match="on fire"):
            answer_train(site, anchored())
    assert story(site) == ["reserved", "abandoned"]
    assert answer_train(site, anchored()).facts.epsilon == site.ledger().spent()
    assert story(site) == ["reserved", "abandoned", "reserved", "released"]


def test_a_release_stored_under_a_reported_failure_is_charged_before_it_leaves(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ReleaseStore, "store", stored_then_failed(ReleaseStore.store))
        with pytest.raises(OSError, match="after it was stored"):
            answer_train(site, anchored())
    assert answer_train(site, anchored()).facts.replayed
    assert story(site) == ["reserved", "abandoned", "reserved", "released"]


def stored_then_failed(store: Callable[..., Release]) -> Callable[..., Release]:
    def stored(*args: Any) -> Release:
        store(*args)
        raise OSError("after it was stored")

    return stored


def test_when_another_process_released_meanwhile_its_release_goes_and_not_our_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = vars(answers)["train_privately"]

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(answers, "train_privately", original)
        assert not answer_train(site, anchored()).facts.replayed
        raise RuntimeError("too slow")

    monkeypatch.setattr(answers, "train_privately", overtaken)
    assert answer_train(site, anchored()).facts.replayed
    assert story(site) == ["reserved", "released"]


def test_a_stored_release_that_was_changed_never_leaves(site: Site) -> None:
    answer_train(site, anchored())
    answer_train(site, anchored(server_round=2))
    one, other = (
        site.folder / "releases" / f"{asked.digest}.safetensors"
        for asked in (anchored(), anchored(server_round=2))
    )
    shutil.copy(other, one)
    with pytest.raises(AlreadyReleased):
        answer_train(site, anchored())


def test_a_release_whose_file_is_gone_is_not_made_again(site: Site) -> None:
    answer_train(site, anchored())
    shutil.rmtree(site.folder / "releases")
    with pytest.raises(AlreadyReleased):
        answer_train(site, anchored())
    assert story(site) == ["reserved", "released"]


def test_when_the_budget_is_spent_nothing_is_computed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for server_round in (1, 2, 3):
        answer_train(site, anchored(server_round=server_round))
    assert site.ledger().spent() == pytest.approx(EPSILON, rel=0.02)
    monkeypatch.setattr(answers, "train_privately", fail)
    monkeypatch.setattr(answers, "training_data", fail)
    with pytest.raises(Refused, match="above epsilon_max=8") as refused:
        answer_train(site, anchored(run="another"))
    assert refused.value.code is RefusalCode.BUDGET
    assert story(site) == ["reserved", "released"] * 3
    assert answer_train(site, anchored(server_round=2)).facts.replayed


def test_too_few_declared_patients_are_not_trained_on_and_cost_nothing(hospitals: Path) -> None:
    folder = change_site(hospitals / "hospitals" / "site-1", policy={"min-patients": 100})
    site = ready(folder)
    with pytest.raises(Refused, match=r"policy\.min-patients is 100") as refused:
        answer_train(site, anchored())
    assert refused.value.code is RefusalCode.POLICY
    assert story(site) == []


def test_too_few_true_patients_are_told_to_the_hospital_and_to_nobody_else(hospitals: Path) -> None:
    """Under privacy the true number decides nothing outside; without it there is nothing to protect."""
    folder = hospitals / "hospitals" / "site-1"
    changes = {"cohort": {"patients-declared": 100}, "policy": {"min-patients": 100, "require-dp": False}}
    site = ready(change_site(folder, **changes))
    assert answer_train(site, anchored()).facts.patients_declared == 100
    assert story(site) == ["reserved", "released"]
    note = (folder / "site.log").read_text()
    assert re.search(r"note: \d+ training patients, policy\.min-patients is 100: add patients, or stop", note)
    with pytest.raises(Refused, match=r"training patients, policy\.min-patients is 100") as refused:
        answer_train(site, plain())
    assert refused.value.code is RefusalCode.COHORT


def test_a_cohort_that_cannot_be_read_costs_nothing(hospitals: Path) -> None:
    folder = change_site(hospitals / "hospitals" / "site-1", cohort={"reports": "absent.csv"})
    site = ready(folder)
    with pytest.raises(Refused, match=r"absent\.csv") as refused:
        answer_train(site, anchored())
    assert refused.value.code is RefusalCode.COHORT
    assert story(site) == []


def test_without_the_bundle_the_model_is_refused_and_costs_nothing(hospitals: Path) -> None:
    site = Site.open(hospitals / "hospitals" / "site-3")
    asked = replace(anchored(), bundle="00" * 32)
    with pytest.raises(Refused, match="never stored here") as refused:
        answer_train(site, asked)
    assert refused.value.code is RefusalCode.MODEL
    assert story(site) == []


@pytest.mark.parametrize("arrays", [{}, {"w": np.zeros(3, dtype=np.float32)}])
def test_arrays_of_another_model_are_refused_and_cost_nothing(arrays: dict[str, Any], site: Site) -> None:
    with pytest.raises(Refused, match="arrays of this part") as refused:
        answer_train(site, replace(anchored(), arrays=arrays))
    assert refused.value.code is RefusalCode.MODEL
    assert story(site) == []


def test_a_ledger_that_was_tampered_with_releases_nothing(site: Site) -> None:
    answer_train(site, anchored())
    path = site.folder / "ledger.sqlite"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"patient"', b'"pateint"'))
    for server_round in (1, 2):
        with pytest.raises(LedgerTampered):
            answer_train(site, anchored(server_round=server_round))


def test_weights_that_are_no_numbers_are_refused_before_a_patient_is_looked_at(site: Site) -> None:
    """Nothing could be shown of a model that computes nothing; what was reserved stays charged."""
    weights = {name: np.full_like(value, np.nan) for name, value in anchored().arrays.items()}
    with pytest.raises(UnsoundTraining, match="the weights it was given are broken"):
        answer_train(site, replace(anchored(), arrays=weights))
    assert story(site) == ["reserved", "abandoned"]


def test_a_release_carries_the_head_of_after_it_was_recorded_and_so_does_its_replay(site: Site) -> None:
    for server_round in (1, 2):
        sent = answer_train(site, anchored(server_round=server_round)).facts.anchor
        assert sent == site.ledger().anchor
        assert sent is not None
        assert (sent.seq, sent.is_genuine) == (2 * server_round, True)
    replay = answer_train(site, anchored(server_round=1))
    assert replay.facts.anchor == site.ledger().anchor  # else the coordinator would see it go back
    kept = ReleaseStore(folder=site.folder / "releases").anchors()
    assert sorted(anchor.seq for anchor in kept.values()) == [1, 3]


def test_a_ledger_restored_from_a_back_up_charges_and_releases_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the coordinator that remembers, nor for another one while the releases are there."""
    answer_train(site, anchored())
    back_up = (site.folder / "ledger.sqlite").read_bytes()
    known = answer_train(site, anchored(server_round=2)).facts.anchor
    (site.folder / "ledger.sqlite").write_bytes(back_up)
    monkeypatch.setattr(answers, "training_data", fail)
    asked = anchored(server_round=3)
    for attempt in (asked, replace(asked, anchor=known), anchored(server_round=2), anchored(run="another")):
        with pytest.raises(HistoryLost, match="was anchored and is gone"):
            answer_train(site, attempt)
    shutil.rmtree(site.folder / "releases")
    with pytest.raises(HistoryLost, match="row 4 was anchored and is gone, the last is row 2"):
        answer_train(site, replace(asked, anchor=known))
    assert story(site) == ["reserved", "released"]


def test_with_the_coordinator_s_anchor_it_is_the_same_request(site: Site) -> None:
    first = answer_train(site, anchored())
    again = answer_train(site, replace(anchored(), anchor=first.facts.anchor))
    assert (again.facts.replayed, same(first, again)) == (True, True)


def test_without_the_key_nothing_is_computed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_train(site, anchored())
    (site.folder / "site.key").unlink()
    monkeypatch.setattr(answers, "training_data", fail)
    with pytest.raises(KeyUnusable, match="nothing can be charged"):
        answer_train(site, anchored(server_round=2))
    assert story(site) == ["reserved", "released"]
    assert answer_train(site, anchored()).facts.replayed


def test_facts_say_nothing_of_the_true_number_of_patients(hospitals: Path) -> None:
    facts = []
    for kept in (1.0, 0.7):
        folder = hospitals / f"of {kept}"
        shutil.copytree(hospitals / "hospitals" / "site-1", folder, symlinks=True)
        with (folder / "reports.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        with (folder / "reports.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows[: int(kept * len(rows))])
        site = ready(folder)
        facts.append(answer_train(site, anchored()).facts)
    sizes = [len(np.unique(Site.open(hospitals / f"of {kept}").cohort().patients)) for kept in (1.0, 0.7)]
    assert sizes[0] > sizes[1]
    told = [one.model_dump_json(exclude={"anchor"}) for one in facts]
    assert told[0] == told[1]
    assert facts[0].seconds in (10.0, 20.0)


def test_without_a_claim_there_is_no_ledger_and_the_same_seed_gives_the_same_bytes(hospitals: Path) -> None:
    site = ready(change_site(hospitals / "hospitals" / "site-1", policy={"require-dp": False}))
    one, again, next_round = (answer_train(site, plain(server_round=r)) for r in (1, 1, 2))
    assert digest_of(one.update) == digest_of(again.update) != digest_of(next_round.update)
    assert (one.facts.epsilon, one.facts.delta, one.facts.anchor) == (None, None, None)
    assert not (site.folder / "ledger.sqlite").exists()
    assert not (site.folder / "releases").exists()


def test_simulated_sites_share_one_model(hospitals: Path) -> None:
    sites = [ready(hospitals / "hospitals" / f"site-{number}") for number in (1, 2, 3)]
    part_of.cache_clear()
    for server_round in (1, 2):
        for site in sites:
            answer_train(site, anchored(server_round=server_round))
    assert part_of.cache_info().misses == 1
    assert training_data.cache_info().misses == len(sites)


def test_the_site_uses_the_threads_it_was_given(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(2)
    answer_train(site, anchored())
    assert torch.get_num_threads() == 1
    change_site(site.folder, device={"threads": 0})
    answer_train(Site.open(site.folder), anchored())
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_a_bundle_is_kept_where_only_the_site_may_read(hospitals: Path) -> None:
    site = Site.open(hospitals / "hospitals" / "site-1")
    answer_install(site, bundle())
    assert BundleStore(folder=site.folder / "bundles").has(bundle().digest)
    assert (site.folder / "bundles").stat().st_mode & 0o077 == 0


PUSH = 1e4  # a correction beside which gradient and noise are nothing


def names(release: Release) -> set[str]:
    return set(release.update)


@pytest.mark.parametrize(("server_round", "factor"), [(1, "lora_B"), (2, "lora_A")])
def test_of_lora_the_factor_of_the_round_and_the_heads_leave(
    site: Site, server_round: int, factor: str
) -> None:
    asked = anchored(part="lora", server_round=server_round)
    assert names(answer_train(site, asked)) == {
        name for name in asked.arrays if factor in name or "projection" in name
    }


def test_prompts_alone_leave_where_prompts_are_trained(site: Site) -> None:
    release = answer_train(site, anchored(part="prompts", prompt_tokens=3))
    (update,) = release.update.values()
    assert update.shape[0] == 3
    assert (update != 0).all()


@pytest.mark.parametrize(("wire", "dtype"), [("bf16", np.uint16), ("int8", np.int8)])
def test_an_update_leaves_in_the_form_of_the_plan_and_again_as_the_same_bytes(
    site: Site, wire: str, dtype: type
) -> None:
    asked = anchored(wire=wire)
    release = answer_train(site, asked)
    assert {release.update[name].dtype for name in asked.arrays} == {np.dtype(dtype)}
    assert digest_of(release.update) == digest_of(answer_train(site, asked).update)
    moved = unpack(release.update, asked.plan.wire, like=asked.arrays)
    assert all(np.abs(value).max() > 0 for value in moved.values())


def test_what_the_site_keeps_neither_leaves_nor_starts_anew(site: Site) -> None:
    def asked(server_round: int) -> TrainRequest:
        whole = anchored(part="full", personal=("heads",), server_round=server_round, wire="int8")
        shared = {name: value for name, value in whole.arrays.items() if "projection" not in name}
        return replace(whole, arrays=shared)

    def kept(server_round: int) -> dict[str, np.ndarray]:
        (folder,) = (site.folder / "personal").iterdir()
        found = PersonalWeights(folder=folder, released=lambda _: True).before(server_round + 1)
        assert found is not None
        return found

    start = bundle().weights
    assert not [name for name in names(answer_train(site, asked(1))) if "projection" in name]
    first = kept(1)
    assert set(first) == {"visual_projection.weight", "text_projection.weight"}
    assert all(np.abs(first[name] - start[name]).max() > 0 for name in first)
    answer_train(site, asked(2))
    moved = {name: np.abs(kept(2)[name] - first[name]).max() for name in first}
    fresh = {name: np.abs(first[name] - start[name]).max() for name in first}
    assert all(0 < moved[name] <= 3 * fresh[name] for name in first)  # a round's way, from where it was


def test_a_run_cannot_name_a_folder_outside_the_sites_own(site: Site) -> None:
    whole = anchored(part="full", personal=("heads",), run="../../elsewhere")
    shared = {name: value for name, value in whole.arrays.items() if "projection" not in name}
    answer_train(site, replace(whole, arrays=shared))
    assert [path.name for path in (site.folder / "personal").iterdir()] != [".."]
    assert not (site.folder.parent / "elsewhere").exists()


def test_a_correction_is_another_request_and_another_update(site: Site) -> None:
    asked = anchored(optimizer="sgd")
    push = {name: np.full_like(value, PUSH) for name, value in asked.arrays.items()}
    corrected = replace(asked, correction=push)
    assert asked.digest != corrected.digest
    update = answer_train(site, corrected).update
    for name, value in asked.arrays.items():
        assert update[name] == pytest.approx(
            np.full_like(value, -STEPS * asked.plan.learning_rate * PUSH), rel=0.1
        )


def test_a_part_that_is_not_the_models_is_refused(site: Site) -> None:
    asked = anchored(part="prompts", prompt_tokens=60)
    with pytest.raises(Refused) as refused:
        answer_train(site, asked)
    assert refused.value.code is RefusalCode.MODEL
