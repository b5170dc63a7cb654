"""A site that shares prototypes alone: its model is trained with noise, charged and kept; sums leave."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import answers
from client.answers import answer_train
from client.errors import Refused
from client.personal import personal_weights
from client.policy import mechanism_for, prototypes_for
from client.prototypes import release_prototypes
from client.releases import ReleaseStore
from client.site import Site
from client.training import train_privately
from client.workbench import InstalledBundle, LocalModel, local_model
from encoders.parts import TrainablePart
from privacy.accounting import epsilon
from privacy.banks import PrototypeBank
from privacy.prototypes import PrototypeRelease
from strategies.bundles import BundleStore
from strategies.messages import PROTOTYPE_SUMS, Arrays, PrototypePlan, RefusalCode, Release, TrainRequest
from strategies.settings import SettingsError
from strategies.wire import unpack
from tasks.concepts import finding_concepts
from tests.encoders.micro import EMBEDDING, micro_encoder
from tests.small_hospitals import EPSILON, ROUNDS, STEPS, bundle, change_site, ready, request

CONCEPTS = finding_concepts(("effusion", "opacity"))
NAMES = tuple(concept.name for concept in CONCEPTS)
PLAN = PrototypePlan(concepts=NAMES, noise_multiplier=9.0, max_norm=1.6, count_weight=0.5)
UNITS = np.eye(len(CONCEPTS), EMBEDDING, dtype=np.float32)
BANK = PrototypeBank(
    concepts=NAMES,
    wordings=tuple(concept.prompts for concept in CONCEPTS),
    image=UNITS,
    text=UNITS,
)


@pytest.fixture
def site(hospitals: Path) -> Site:
    return ready(hospitals / "hospitals" / "site-1")


def asked(phase: Any = "train", *, server_round: int = 1, **changes: Any) -> TrainRequest:
    whole = request(server_round=server_round, part="prototypes", prototypes=PLAN, **changes)
    return replace(whole, phase=phase, prototypes=BANK if phase == "train" else None)


def story(site: Site) -> list[tuple[str, str | None]]:
    """Events of the ledger, and the kind of mechanism where one is reserved."""
    bodies = [row.body for row in site.ledger().rows()[1:]]
    return [(body["event"], body.get("request", {}).get("kind")) for body in bodies]


def kept(site: Site, *, before: int = 9) -> Arrays | None:
    return personal_weights(site, "small").before(before)


def model(site: Site) -> LocalModel:
    installed = InstalledBundle(store=BundleStore(folder=site.folder / "bundles"), digest=bundle().digest)
    return local_model(installed, site.own_model, 2, 16, "cpu")


def equal(one: Arrays | None, other: Arrays | None) -> bool:
    assert one is not None
    assert other is not None
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def as_images(site: Site, **changes: Any) -> Site:
    return ready(change_site(site.folder, cohort={"modality": "images", "reports": None}, **changes))


def test_training_is_charged_and_no_weight_leaves(site: Site) -> None:
    release = answer_train(site, asked())
    assert release.update == {}
    assert story(site) == [("reserved", "anchored"), ("released", None)]
    assert release.facts.steps == STEPS
    assert release.facts.epsilon == site.ledger().spent() > 0
    own = kept(site)
    assert own is not None
    assert own.keys() == model(site).start.keys()
    assert not equal(own, model(site).start)


def test_every_round_of_training_and_every_release_is_paid_for_and_all_cost_the_runs_epsilon(
    site: Site,
) -> None:
    for server_round in range(1, ROUNDS + 1):
        if server_round > 1:
            answer_train(site, asked("prototypes", server_round=server_round))
        answer_train(site, asked(server_round=server_round))
    whole = asked().plan
    once, training = prototypes_for(site, whole, width=EMBEDDING).event, mechanism_for(site, whole).event
    expected = epsilon([once] * (ROUNDS - 1) + [training] * ROUNDS, delta=site.delta)
    assert site.ledger().spent() == pytest.approx(expected, rel=1e-9)
    assert 0.99 * EPSILON < expected <= EPSILON


def test_prototypes_are_made_by_the_weights_that_noised_steps_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Arrays] = []
    embedded: list[Arrays] = []
    train, embed = train_privately, release_prototypes

    def training(*args: Any, **kwargs: Any) -> Arrays:
        moved.append(train(*args, **kwargs))
        return moved[-1]

    def releasing(part: TrainablePart, *args: Any, **kwargs: Any) -> Arrays:
        embedded.append(part.arrays())
        return embed(part, *args, **kwargs)

    monkeypatch.setattr(answers, "train_privately", training)
    monkeypatch.setattr(answers, "release_prototypes", releasing)
    answer_train(site, asked())
    answer_train(site, asked("prototypes", server_round=2))
    start = model(site).start
    noised = {name: start[name] + moved[0][name] for name in start}
    assert all(np.abs(noised[name] - embedded[0][name]).max() < 1e-6 for name in start)
    # The learning rate of Adam's first steps moves every weight: what was not trained would stand still.
    assert all(np.count_nonzero(moved[0][name]) == start[name].size for name in start)


def test_the_same_request_again_trains_nothing(site: Site) -> None:
    first, own = answer_train(site, asked()), kept(site)
    again = answer_train(site, asked())
    assert again.facts.replayed
    assert not first.facts.replayed
    assert equal(kept(site), own)
    assert len(story(site)) == 2


def test_weights_of_a_training_that_was_killed_before_its_release_are_never_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else prototypes could be made of them, and the same charge would pay for a second training."""
    with monkeypatch.context() as patched:
        patched.setattr(ReleaseStore, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            answer_train(site, asked())
    (left,) = site.folder.glob("personal/*/*.safetensors")
    before = left.read_bytes()
    assert kept(site) is None
    answer_train(site, asked())
    assert story(site) == [("reserved", "anchored"), ("released", None)]
    assert left.read_bytes() != before
    assert kept(site) is not None


def killed(*_: object, **__: object) -> Release:
    raise KeyboardInterrupt


def test_a_model_of_its_own_embeds_as_wide_as_the_runs(site: Site) -> None:
    own = {"encoder": "tiny", "image-size": 96, "max-tokens": 16, "seed": 3}
    own_site = ready(change_site(site.folder, model=own))
    local = model(own_site)
    assert local.part.encoder.width == EMBEDDING
    assert local.part.encoder.preprocessing.image_size == 96
    answer_train(own_site, asked())
    release = answer_train(own_site, asked("prototypes", server_round=2))
    like = {PROTOTYPE_SUMS: np.zeros((2, len(CONCEPTS), EMBEDDING + 1), dtype=np.float32)}
    assert unpack(release.update, "bf16", like=like)[PROTOTYPE_SUMS].std() > 0
    assert {name: value.shape[0] for name, value in (kept(own_site) or {}).items()} == {
        "visual_projection.weight": EMBEDDING,
        "text_projection.weight": EMBEDDING,
    }


def test_an_own_model_may_lie_in_the_sites_folder(site: Site) -> None:
    micro_encoder(seed=4, image_size=48).export(site.folder / "own")
    own_site = ready(change_site(site.folder, model={"encoder": "own", "part": "lora"}))
    answer_train(own_site, asked())
    assert any("lora_B" in name for name in kept(own_site) or {})


def test_another_model_in_the_middle_of_a_run_is_refused(site: Site) -> None:
    answer_train(site, asked())
    other = ready(change_site(site.folder, model={"encoder": "tiny", "max-tokens": 16}))
    with pytest.raises(Refused, match="arrays of this part") as refused:
        answer_train(other, asked(server_round=2))
    assert refused.value.code is RefusalCode.MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privacy": "none", "objective": "infonce", "epsilon": None, "prototypes": None},
            "a model that nobody else has is trained with privacy|the plan names none",
        ),
        ({"prototypes": None}, "prototypes are all that is shared, and the plan names none"),
    ],
)
def test_what_cannot_be_claimed_is_refused(site: Site, changes: dict[str, Any], message: str) -> None:
    ready(change_site(site.folder, policy={"require-dp": False}))
    whole = request(part="prototypes", **{"prototypes": PLAN, **changes})
    with pytest.raises(Refused, match=message):
        answer_train(Site.open(site.folder), whole)


def test_a_hospital_can_forbid_it(site: Site) -> None:
    strict = ready(change_site(site.folder, policy={"parts": ["heads"]}))
    with pytest.raises(Refused, match=r"part 'prototypes' is not among policy.parts"):
        answer_train(strict, asked())


# --- images, or reports, by themselves ----------------------------------------------------------------------


def test_images_alone_train_the_image_side(site: Site) -> None:
    images = as_images(site)
    answer_train(images, asked())
    own, start = kept(images), model(images).start
    assert own is not None
    changed = {name for name in own if not np.array_equal(own[name], start[name])}
    assert changed == {"visual_projection.weight"}


def test_of_images_alone_the_text_rows_are_noise_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[np.ndarray] = []
    clipped = PrototypeRelease.clipped_sum

    def spied(self: PrototypeRelease, raw: Any) -> Any:
        summed.append(clipped(self, raw))
        return summed[-1]

    monkeypatch.setattr(PrototypeRelease, "clipped_sum", spied)
    answer_train(as_images(site), asked("prototypes", server_round=2))
    of_images, of_texts = summed[0]
    assert of_images[..., -1].sum() > 1
    assert not of_texts.any()


def test_of_a_whole_run_they_take_part_in_prototypes_and_not_in_weights(site: Site) -> None:
    images = as_images(site)
    weights = request(prototypes=PLAN)
    with pytest.raises(Refused, match=r"cohort.modality is 'images'") as refused:
        answer_train(images, weights)
    assert refused.value.code is RefusalCode.COHORT
    assert not (images.folder / "ledger.sqlite").exists()
    assert set(answer_train(images, replace(weights, phase="prototypes")).update) == {PROTOTYPE_SUMS}


def test_images_have_no_prompts_to_train(site: Site) -> None:
    with pytest.raises(SettingsError, match="prompts are trained on texts"):
        as_images(site, model={"part": "prompts"})
