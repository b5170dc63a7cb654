"""What sites will refuse as often as they are asked is told before the first round, with site and remedy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from client.site import Site
from clipward.refusals import IN_THE_RUN, CertainRefusal, certain_refusals
from server.rounds import Start
from tests.small_hospitals import ROUNDS, bundle, federation

NAMES = ("north", "south", "west")
CENTRE = {"share": {"part": "image-head"}, "centre": {"noise-multiplier": 0.5}}


@pytest.fixture
def start() -> Start:
    return Start(bundle=bundle(), arrays={"w": np.zeros(3, dtype=np.float32)}, public_start=False)


def site(root: Path, name: str, *, declared: int = 100, modality: str = "pairs", **policy: Any) -> Site:
    """One whose data does not even exist."""
    cohort = {"table": "absent.csv", "patients-declared": declared, "modality": modality}
    rules = {key.replace("_", "-"): value for key, value in policy.items()}
    (root / name).mkdir()
    settings = {"version": 1, "name": name, "cohort": cohort, "policy": rules}
    (root / name / "site.toml").write_text(tomli_w.dumps(settings))
    return Site.open(root / name)


def told(root: Path, start: Start, sites: list[Site], **changes: Any) -> list[str]:
    return list(map(str, certain_refusals(federation(root, **changes), sites, start)))


def test_of_sites_that_allow_the_run_nothing_is_said(tmp_path: Path, start: Start) -> None:
    assert told(tmp_path, start, [site(tmp_path, name, max_rounds=ROUNDS) for name in NAMES]) == []


def test_sites_are_named_with_value_rule_and_remedy(tmp_path: Path, start: Start) -> None:
    sites = [site(tmp_path, name, max_rounds=2000 if name == "west" else 1000) for name in NAMES]
    assert told(tmp_path, start, sites, training={"rounds": 2000}) == [
        "sites north, south will refuse every round: the run has 2000 rounds, policy.max-rounds is 1000: "
        "lower training.rounds or have the hospitals raise policy.max-rounds"
    ]
    assert told(tmp_path, start, sites, training={"rounds": 2001})[0].startswith("sites north, south, west ")


def test_every_rule_that_refuses_is_told_of(tmp_path: Path, start: Start) -> None:
    strict = site(tmp_path, "north", max_rounds=1, parts=["lora"], min_patients=101, max_release_bytes=11)
    assert told(tmp_path, start, [strict, site(tmp_path, "south")]) == [
        "site north will refuse every round: part 'heads' is not among policy.parts: change share.part or "
        "have the hospital change policy.parts",
        "site north will refuse every round: 100 patients are declared, policy.min-patients is 101: have the "
        "hospital lower policy.min-patients",
        "site north will refuse every round: the run has 3 rounds, policy.max-rounds is 1: lower "
        "training.rounds or have the hospital raise policy.max-rounds",
        "site north will refuse every round: a release would hold 12 bytes, policy.max-release-bytes is 11: "
        "change share.part or share.wire or have the hospital raise policy.max-release-bytes",
    ]


def test_where_sites_differ_in_a_value_one_stands_for_all(tmp_path: Path, start: Start) -> None:
    sites = [site(tmp_path, f"site-{number}", declared=20 + number) for number in range(7)]
    assert told(tmp_path, start, sites, training={"batch": 60}) == [
        "sites site-0, site-1, site-2, site-3, site-4 and 2 more will refuse every round: sample rate 3 is "
        "above policy.max-sample-rate 0.5 at site-0: lower training.batch or sample-rate or have the "
        "hospitals raise policy.max-sample-rate"
    ]


def test_what_is_refused_beside_the_training_is_not_called_the_round(tmp_path: Path, start: Start) -> None:
    strict = site(tmp_path, "north", min_noise_multiplier=0.6)
    assert told(tmp_path, start, [strict], **CENTRE) == [
        "site north will refuse every request for the centre of its images: noise multiplier 0.5 is below "
        "policy.min-noise-multiplier 0.6: raise the release's noise-multiplier or have the hospital lower "
        "policy.min-noise-multiplier"
    ]


def test_images_alone_take_part_in_prototypes_and_refuse_to_train(tmp_path: Path, start: Start) -> None:
    alone, table = site(tmp_path, "north", modality="images"), {"findings": ["effusion"]}
    (refusal,) = told(tmp_path, start, [alone], prototypes=table)
    assert refusal.startswith("site north will refuse every request to train: cohort.modality is 'images'")


def test_of_prototypes_alone_which_begin_in_the_second_round_nothing_is_said(
    tmp_path: Path, start: Start
) -> None:
    alone = {"share": {"part": "prototypes"}, "prototypes": {"findings": ["effusion"]}}
    start = replace(start, arrays={})
    assert told(tmp_path, start, [site(tmp_path, "north", parts=["prototypes"])], **alone) == []


@pytest.mark.parametrize("simulation", [{"table": "images.csv"}, {"cut": {"sites": 2}}])
def test_of_sites_that_a_simulation_makes_its_own_file_is_the_remedy(
    simulation: dict[str, Any], tmp_path: Path, start: Start
) -> None:
    strict = site(tmp_path, "north", max_rounds=2, epsilon_max=1.0)
    made = {**({"sites": None} if "table" in simulation else {}), **simulation}
    assert told(tmp_path, start, [strict], simulation=made) == [
        "site north will refuse every round: the run has 3 rounds, policy.max-rounds is 2: lower "
        "training.rounds or raise max-rounds in [simulation.policy]",
        "site north will refuse every round: the run's epsilon 8.0 is above policy.epsilon-max 1.0: lower "
        "privacy.epsilon or raise epsilon-max in [simulation.policy]",
    ]


def test_a_site_with_a_rule_of_its_own_in_the_simulations_file_is_changed_there(
    tmp_path: Path, start: Start
) -> None:
    strict = site(tmp_path, "site-1", epsilon_max=1.0)
    cut = {"cut": {"sites": 2}, "policies": {"site-1": {"epsilon-max": 1.0}}}
    assert told(tmp_path, start, [strict], simulation=cut) == [
        "site site-1 will refuse every round: the run's epsilon 8.0 is above policy.epsilon-max 1.0: lower "
        "privacy.epsilon or raise epsilon-max in [simulation.policies]"
    ]


def test_only_rules_have_a_remedy_in_the_run(tmp_path: Path) -> None:
    assert set(IN_THE_RUN) <= set(site(tmp_path, "north").settings.policy.model_dump(by_alias=True))


def test_a_reason_may_be_its_own_remedy() -> None:
    assert str(CertainRefusal(sites=("north",), asked="every round", reason="so it is")) == (
        "site north will refuse every round: so it is"
    )
