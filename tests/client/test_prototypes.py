"""What a site releases as prototypes is the noised sum over its own patients, each of them bounded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.errors import Refused
from client.policy import check_plan, mechanism_for, prototypes_for
from client.prototypes import raw_prototypes, release_prototypes
from client.site import Site
from client.workbench import TrainingPairs
from encoders.fitting import Pairs
from encoders.parts import Module, trainable_part
from privacy.accounting import epsilon
from privacy.banks import PrototypeBank
from privacy.errors import UnsoundTraining
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES, Modality
from privacy.prototypes import PrototypeRelease
from strategies.messages import PROTOTYPE_SUMS, PrototypePlan
from tests.encoders.micro import TEXTS, micro_encoder, random_images
from tests.small_hospitals import EPSILON, ROUNDS, change_site, plan, request

NAMES = ("effusion present", "effusion absent", "opacity present", "opacity absent")
PART = trainable_part(micro_encoder(), "heads")
PAIRS = Pairs.of(PART, random_images(len(TEXTS), size=40), list(TEXTS))
PATIENTS = np.arange(len(TEXTS)) // 2
LABELS = {"effusion": np.resize(np.array([1, 0, np.nan], np.float32), len(TEXTS))}
KNOWN = TrainingPairs(pairs=PAIRS, modalities=MODALITIES, texts=list(TEXTS), patients=PATIENTS, labels=LABELS)
PLAN = PrototypePlan(concepts=NAMES, noise_multiplier=3.0, max_norm=2.0, count_weight=0.5)


def mechanism(noise_multiplier: float = 1e-6) -> PrototypeRelease:
    return PrototypeRelease(
        concepts=NAMES,
        dimension=PART.encoder.width,
        max_norm=100.0,
        noise_multiplier=noise_multiplier,
        count_weight=0.5,
    )


def sums(rows: list[int]) -> np.ndarray:
    picked = torch.tensor(rows)
    pairs = Pairs(images=PAIRS.images[picked], texts=PAIRS.texts[picked], text_keys=PAIRS.text_keys[picked])
    known = TrainingPairs(
        pairs=pairs,
        modalities=MODALITIES,
        texts=[TEXTS[row] for row in rows],
        patients=PATIENTS[rows],
        labels={name: values[rows] for name, values in LABELS.items()},
    )
    update = release_prototypes(PART, known, mechanism=mechanism(), noise=GaussianNoise(insecure_seed=0))
    assert set(update) == {PROTOTYPE_SUMS}
    return update[PROTOTYPE_SUMS]


class Mixing(Module):
    """Takes the batch's mean away from every row."""

    def __init__(self, between: Module) -> None:
        super().__init__()
        self.between = between

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        embeddings = self.between.embed_images(inputs)
        return embeddings - embeddings.mean(0)

    def embed_texts(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.between.embed_texts(inputs)


def test_a_module_that_mixes_rows_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PART, "module", Mixing(PART.module))
    with pytest.raises(UnsoundTraining, match="changed when other rows left the batch"):
        sums([0, 1, 2])


def test_a_sum_is_each_patients_mean_of_what_their_own_labels_state() -> None:
    rows = list(range(len(TEXTS)))
    with torch.no_grad():
        images, texts = (side.numpy() for side in PART.module(PAIRS.images, PAIRS.texts))
    expected = np.zeros((2, 4, PART.encoder.width + 1))
    for patient in np.unique(PATIENTS):
        own = [row for row in rows if PATIENTS[row] == patient]
        for row in own:
            label = LABELS["effusion"][row]
            if not np.isnan(label):
                for side, vectors in enumerate((images, texts)):
                    expected[side, int(label == 0)] += np.append(vectors[row], 0.5) / len(own)
    assert sums(rows) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text")])
def test_raw_sums_of_views_go_by_each_rows_own_words_and_the_sides_that_are_there(
    modalities: tuple[Modality, ...],
) -> None:
    texts = ["CT of the head.", "Clear lungs.", "MRI of the brain.", "CT of the lung."]
    order = [2, 0, 3, 1]
    pairs = Pairs.of(PART, random_images(len(texts), size=40), texts)
    known = TrainingPairs(
        pairs=Pairs(images=pairs.images[order], texts=pairs.texts[order], text_keys=pairs.text_keys[order]),
        modalities=modalities,
        texts=[texts[row] for row in order],
        patients=np.array(order),
        labels={},
    )
    found = raw_prototypes(PART, known, mechanism=replace(mechanism(), concepts=("CT", "lung")))[
        PROTOTYPE_SUMS
    ]
    with torch.no_grad():
        sides = [side.numpy() for side in PART.module(pairs.images, pairs.texts)]
    for side, (name, vectors) in enumerate(zip(("image", "text"), sides, strict=True)):
        expected = np.stack([vectors[[0, 3]].sum(0), vectors[[1, 3]].sum(0)])
        assert found[side, :, :-1] == pytest.approx(expected if name in modalities else 0, abs=1e-4)
        assert found[side, :, -1] == pytest.approx(1.0 if name in modalities else 0, abs=1e-4)


def test_prototypes_are_refused_in_a_round_between_and_of_concepts_unknown_here(site: Site) -> None:
    between = PLAN.model_copy(update={"every": 2})
    made = request(server_round=2, prototypes=between)
    with pytest.raises(Refused, match="the plan names none for this round"):
        check_plan(site, replace(made, phase="prototypes"))
    check_plan(site, made)
    unknown = request(prototypes=PLAN.model_copy(update={"concepts": ("effusion perhaps",)}))
    for phase in ("train", "prototypes"):
        with pytest.raises(Refused, match="concepts that this code does not know"):
            check_plan(site, replace(unknown, phase=phase))
    unit = np.eye(1, 8, dtype=np.float32)
    bank = PrototypeBank(concepts=("nobody's",), wordings=(("a",),), image=unit, text=unit)
    with pytest.raises(Refused, match="concepts that this code does not know"):
        check_plan(site, replace(request(prototypes=PLAN), prototypes=bank))


def test_a_site_without_labels_takes_part_with_noise_alone() -> None:
    update = release_prototypes(
        PART,
        replace(KNOWN, labels={}),
        mechanism=mechanism(noise_multiplier=0.01),
        noise=GaussianNoise(insecure_seed=0),
    )
    assert update[PROTOTYPE_SUMS].std() == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize(("modality", "absent"), [("image", 1), ("text", 0)])
def test_of_a_side_that_is_not_there_a_release_is_noise_alone(modality: Modality, absent: int) -> None:
    update = release_prototypes(
        PART,
        replace(KNOWN, modalities=(modality,)),
        mechanism=mechanism(),
        noise=GaussianNoise(insecure_seed=0),
    )[PROTOTYPE_SUMS]
    assert np.abs(update[absent]).max() < 1e-2
    assert update[1 - absent, 0, -1] == pytest.approx(
        sums(list(range(len(TEXTS))))[1 - absent, 0, -1], abs=1e-2
    )


@pytest.fixture
def site(made_hospitals: Path) -> Site:
    return Site.open(made_hospitals / "hospitals" / "site-1")


def test_prototypes_and_training_cost_the_plans_epsilon_together(site: Site) -> None:
    asked = plan(prototypes=PLAN)
    both = [prototypes_for(site, asked, width=8).event, mechanism_for(site, asked).event] * ROUNDS
    assert 0.99 * EPSILON < epsilon(both, delta=site.delta) <= EPSILON
    assert mechanism_for(site, asked).noise_multiplier > mechanism_for(site, plan()).noise_multiplier


def test_the_mechanism_is_the_plans(site: Site) -> None:
    found = prototypes_for(site, plan(prototypes=PLAN), width=8)
    assert (found.noise_std, found.max_norm, found.dimension) == (6.0, 2.0, 8)
    assert found.concepts[:2] == ("effusion present", "effusion absent")


def test_noise_below_the_policys_is_refused(hospitals: Path) -> None:
    folder = change_site(hospitals / "hospitals" / "site-1", policy={"min-noise-multiplier": 5.0})
    with pytest.raises(Refused, match=r"noise multiplier 3 is below policy.min-noise-multiplier 5"):
        prototypes_for(Site.open(folder), plan(prototypes=PLAN), width=8)


def test_a_plan_without_prototypes_has_none(site: Site) -> None:
    with pytest.raises(Refused, match="the plan names no prototypes"):
        prototypes_for(site, plan(), width=8)
