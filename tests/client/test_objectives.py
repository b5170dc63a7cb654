"""One patient moves the sum of clipped groups by at most 2C, and can by nearly that."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from client import objectives
from client.batches import BatchMaker, TrainingData, rows_by_patient
from client.engines import engine_maker
from client.objectives import AnchoredObjective, Anchors, MicrobatchObjective, objective_of
from client.training import train_privately
from encoders.fitting import Pairs
from encoders.objectives import anchored_loss, anchored_sigmoid_loss, soft_targets
from encoders.parts import TrainablePart, trainable_part
from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError, UnsoundTraining
from privacy.mechanism import AnchoredDpSgd, MicrobatchDpSgd
from privacy.noise import GaussianNoise
from privacy.noisy_sums import Modality
from privacy.probes import refuse_coupling
from strategies.messages import TrainingPlan
from tests.encoders.micro import EMBEDDING, micro_encoder

WIDTH, ANCHORS, BOUND = 16, 4, 1e-3
Vectors = NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def heads() -> TrainablePart:
    """Two projections that take the first coordinates as they are."""
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    part.load({name: np.eye(EMBEDDING, WIDTH, dtype=np.float32) for name in part.arrays()})
    return part


def plan_of(**changes: Any) -> TrainingPlan:
    facts: dict[str, Any] = {
        "part": "heads", "objective": "microbatch", "privacy": "dp", "epsilon": 8.0, "rounds": 1, "steps": 2,
        "batch": 4, "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": BOUND, "groups": 3,
        "studies_per_patient": 2, "inverse_temperature": 10.0, "anchors": ANCHORS, "augment": False,
        "lora_rank": 1, "seed": 0,
    }  # fmt: skip
    return TrainingPlan(**(facts | changes))


def data_of(images: Vectors, texts: Vectors, patients: Sequence[int], *, soft: bool = False) -> TrainingData:
    count = len(patients)
    return TrainingData(
        pairs=Pairs(
            images=torch.from_numpy(images), texts=torch.from_numpy(texts), text_keys=torch.arange(count)
        ),
        patients=np.array(patients),
        masked=torch.zeros(count, ANCHORS, dtype=torch.bool),
        positives=torch.full((count, ANCHORS), 0.5) if soft else None,
    )


def random_data(patients: Sequence[int], *, seed: int = 0, soft: bool = False) -> TrainingData:
    rng = np.random.default_rng(seed)
    images, texts = (rng.normal(size=(len(patients), WIDTH)).astype(np.float32) for _ in "ab")
    return data_of(images, texts, patients, soft=soft)


def anchors_of() -> Anchors:
    rng = np.random.default_rng(9)
    images, texts = (torch.from_numpy(rng.normal(size=(ANCHORS, WIDTH)).astype(np.float32)) for _ in "ab")
    return Anchors(images=images, texts=texts)


def prototypes_of(count: int = 2) -> PrototypeBank:
    unit = np.eye(count, EMBEDDING, dtype=np.float32)
    names = tuple(f"concept {number}" for number in range(count))
    return PrototypeBank(concepts=names, wordings=tuple((name,) for name in names), image=unit, text=-unit)


def with_prototypes(data: TrainingData, count: int = 2, *, masked: bool = False) -> TrainingData:
    """The same data beside a bank of so many prototypes more."""
    rows = len(data.patients)
    degrees = torch.rand(rows, count, generator=torch.Generator().manual_seed(0))
    return replace(
        data,
        masked=torch.cat([data.masked, torch.full((rows, count), masked)], dim=1),
        positives=None if data.positives is None else torch.cat([data.positives, degrees], dim=1),
    )


def group_sum(
    part: TrainablePart, data: TrainingData, patients: list[int], groups: list[int], *, scale: float = 10.0
) -> dict[str, Tensor]:
    """The sum of clipped groups when ``patients`` were drawn, each into the group given."""
    objective = MicrobatchObjective(part, data, plan_of(inverse_temperature=scale))
    own = rows_by_patient(data.patients)
    batch = BatchMaker(data=data, part=part, studies=2, augmented=False).of_groups(
        [own[patient] for patient in patients],
        np.array(groups, dtype=np.intp),
        sampling=np.random.default_rng(0),
    )
    return engine_maker()(part.module, objective.losses).clipped_sum(batch, max_grad_norm=BOUND)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    squares = [float((value.double() - second[name].double()).pow(2).sum()) for name, value in first.items()]
    return math.sqrt(sum(squares))


def moved_by_leaving(
    part: TrainablePart, data: TrainingData, groups: list[int], gone: int, *, scale: float = 10.0
) -> float:
    """In units of C; the others keep their groups, as independent draws let them."""
    everyone = list(range(len(groups)))
    rest = [patient for patient in everyone if patient != gone]
    whole = group_sum(part, data, everyone, groups, scale=scale)
    return distance(whole, group_sum(part, data, rest, [groups[i] for i in rest], scale=scale)) / BOUND


def findings(images: list[int], texts: list[int]) -> TrainingData:
    """Patients of two findings: what each image shows, and what each text says."""
    unit = np.eye(WIDTH, dtype=np.float32)
    shown, said = (np.stack([unit[0] + unit[k], unit[1] + unit[k + 1]]) for k in (2, 4))
    return data_of(shown[images], said[texts], range(len(images)))


# --- what one patient moves ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.integers(0, 2), min_size=2, max_size=6),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 10.0, 100.0]),
    data=st.data(),
)
def test_a_patient_who_leaves_moves_the_sum_of_groups_by_at_most_twice_the_bound(
    heads: TrainablePart, groups: list[int], seed: int, scale: float, data: st.DataObject
) -> None:
    gone = data.draw(st.integers(0, len(groups) - 1))
    patients = [*range(len(groups)), *range(0, len(groups), 2)]  # every second one has two studies
    moved = moved_by_leaving(heads, random_data(patients, seed=seed), groups, gone, scale=scale)
    assert moved <= 2 * (1 + 1e-5)


def test_one_bound_is_not_enough_a_patient_can_turn_a_group_round(heads: TrainablePart) -> None:
    """What 2C counted as C would miss: the third patient's image shows what the second's text says."""
    moved = moved_by_leaving(heads, findings([0, 1, 0], [0, 1, 1]), [0, 0, 0], 2) * BOUND
    claimed, stated = (
        kind(max_grad_norm=BOUND, noise_multiplier=1.0, sample_rate=0.1, steps=1)
        for kind in (AnchoredDpSgd, MicrobatchDpSgd)
    )
    assert 1.8 * claimed.sensitivity < moved <= stated.sensitivity * (1 + 1e-5)


def test_chunks_of_a_shuffled_batch_would_have_moved_more_than_twice_the_bound(heads: TrainablePart) -> None:
    """The mistake: who leaves displaces the others, so more than one group changes."""
    data = findings([1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 1])
    whole = group_sum(heads, data, [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    without_the_first = group_sum(heads, data, [1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert distance(whole, without_the_first) / BOUND > 2.5
    assert moved_by_leaving(heads, data, [0, 0, 0, 1, 1, 1], 0) <= 2 * (1 + 1e-5)


def test_only_the_leavers_own_group_changes(heads: TrainablePart) -> None:
    data, groups = random_data(range(5)), [0, 0, 1, 1, 1]
    whole, rest = (
        group_sum(heads, data, [0, 1, 2, 3, 4], groups),
        group_sum(heads, data, [0, 1, 2, 3], groups[:4]),
    )
    own = [group_sum(heads, data, [2, 3, 4][:size], [1, 1, 1][:size]) for size in (3, 2)]
    change = {name: value - rest[name] for name, value in whole.items()}
    assert distance(change, {name: value - own[1][name] for name, value in own[0].items()}) < 1e-3 * BOUND


# --- the objective of a plan --------------------------------------------------------------------------------


def test_every_step_draws_groups_afresh_for_whoever_was_drawn(
    heads: TrainablePart, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def drawn(generator: np.random.Generator, *, members: int, groups: int) -> NDArray[np.intp]:
        asked.append((members, groups))
        return np.arange(members) % groups

    monkeypatch.setattr(objectives, "uniform_groups", drawn)
    train(heads, random_data([0, 1, 1, 2, 3]), plan_of())
    assert asked == [(4, 3)] * 2


def train(
    part: TrainablePart, data: TrainingData, plan: TrainingPlan, anchors: Anchors | None = None
) -> dict[str, NDArray[Any]]:
    kind = MicrobatchDpSgd if plan.objective == "microbatch" else AnchoredDpSgd
    return train_privately(
        part,
        data,
        anchors or anchors_of(),
        plan,
        mechanism=kind(max_grad_norm=BOUND, noise_multiplier=1e-6, sample_rate=1.0, steps=plan.steps),
        patients_declared=4,
        noise=GaussianNoise(insecure_seed=1),
        sampling=np.random.default_rng(0),
    )


@pytest.mark.parametrize("objective", ["anchored", "microbatch"])
def test_noise_for_another_objective_is_refused(heads: TrainablePart, objective: str) -> None:
    other = AnchoredDpSgd if objective == "microbatch" else MicrobatchDpSgd
    with pytest.raises(
        UnsoundTraining, match=rf"the noise is for the {other.kind} objective .* trains {objective}"
    ):
        train_privately(
            heads,
            random_data([0, 1]),
            anchors_of(),
            plan_of(objective=objective),
            mechanism=other(max_grad_norm=BOUND, noise_multiplier=1.0, sample_rate=1.0, steps=2),
            patients_declared=4,
            noise=GaussianNoise(insecure_seed=1),
            sampling=np.random.default_rng(0),
        )


def test_infonce_over_the_batch_is_no_objective_with_a_claim(heads: TrainablePart) -> None:
    with pytest.raises(
        UnsoundTraining, match=r"'infonce' couples the patients .* use 'anchored' or 'microbatch'"
    ):
        objective_of(heads, random_data([0]), anchors_of(), plan_of(objective="infonce"))


def test_microbatch_training_brings_partners_together() -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    data = random_data(range(12))
    before = similarity(part, data)
    train(part, data, plan_of(steps=60, groups=3, learning_rate=0.01))
    assert similarity(part, data) > before + 0.3


def similarity(part: TrainablePart, data: TrainingData) -> float:
    with torch.no_grad():
        images, texts = part.module(data.pairs.images, data.pairs.texts)
    together = images @ texts.T
    return float(together.diagonal().mean() - together.mean())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("targets", [10.0, None])
@pytest.mark.parametrize("objective", ["anchored", "microbatch"])
def test_every_objective_passes_the_probes(
    heads: TrainablePart, objective: str, loss: str, targets: float | None, soft: bool
) -> None:
    plan = plan_of(objective=objective, loss=loss, soft_targets=targets)
    made = objective_of(heads, random_data([0, 1], soft=soft), anchors_of(), plan)
    refuse_coupling(heads.module, made.losses, made.made_up())


@pytest.mark.parametrize("soft", [True, False])
def test_the_sigmoid_form_and_soft_positives_reach_the_loss(heads: TrainablePart, soft: bool) -> None:
    data = random_data([0, 1, 1], soft=soft)
    made = AnchoredObjective(
        heads, data, anchors_of(), plan_of(objective="anchored", loss="sigmoid", logit_bias=-2.5)
    )
    batch = made.batch(list(rows_by_patient(data.patients)), sampling=np.random.default_rng(0))
    with torch.no_grad():
        anchors, pairs = anchors_of(), data.pairs
        image_anchors, text_anchors = heads.module(anchors.images, anchors.texts)
        expected = anchored_sigmoid_loss(
            *heads.module(pairs.images, pairs.texts),
            text_anchors=text_anchors,
            image_anchors=image_anchors,
            masked=data.masked,
            positives=data.positives,
            inverse_temperature=10.0,
            logit_bias=-2.5,
        )
        found = made.losses(heads.module, batch)
    torch.testing.assert_close(found, torch.stack([expected[0], expected[1:].mean()]))


def test_soft_targets_go_by_the_embeddings_of_the_texts_and_carry_no_gradient() -> None:
    part, data = trainable_part(micro_encoder(), "heads", lora_rank=1), random_data([0, 1, 1])
    made = AnchoredObjective(part, data, anchors_of(), plan_of(objective="anchored", soft_targets=4.0))
    batch = made.batch(list(rows_by_patient(data.patients)), sampling=np.random.default_rng(0))
    found = made.losses(part.module, batch)
    with torch.no_grad():
        image_anchors, text_anchors = part.module(anchors_of().images, anchors_of().texts)
        _, texts = part.module(data.pairs.images, data.pairs.texts)
    expected = anchored_loss(
        *part.module(data.pairs.images, data.pairs.texts),
        text_anchors=text_anchors,
        image_anchors=image_anchors,
        masked=data.masked,
        positives=soft_targets(texts, text_anchors, inverse_temperature=4.0),
        inverse_temperature=10.0,
    )
    expected = torch.stack([expected[0], expected[1:].mean()])
    torch.testing.assert_close(found, expected)
    weights = list(part.parameters().values())
    gradients = (torch.autograd.grad(loss.sum(), weights) for loss in (found, expected))
    torch.testing.assert_close(*gradients)


# --- released prototypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("targets", [10.0, None])
def test_prototypes_pass_the_probes(
    heads: TrainablePart, loss: str, targets: float | None, soft: bool
) -> None:
    data = with_prototypes(random_data([0, 1], soft=soft))
    anchors = replace(anchors_of(), prototypes=prototypes_of())
    made = objective_of(heads, data, anchors, plan_of(objective="anchored", loss=loss, soft_targets=targets))
    refuse_coupling(heads.module, made.losses, made.made_up())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_side_alone_passes_the_probes_and_leaves_the_other(
    heads: TrainablePart, modality: Modality, loss: str
) -> None:
    data = replace(with_prototypes(random_data([0, 1, 1], soft=True)), modalities=(modality,))
    anchors = replace(anchors_of(), prototypes=prototypes_of())
    made = objective_of(heads, data, anchors, plan_of(objective="anchored", loss=loss))
    refuse_coupling(heads.module, made.losses, made.made_up())
    batch = made.batch(list(rows_by_patient(data.patients)), sampling=np.random.default_rng(0))
    found = engine_maker()(heads.module, made.losses).clipped_sum(batch, max_grad_norm=BOUND)
    moved = {name for name, value in found.items() if value.any()}
    assert moved == {"visual_projection.weight" if modality == "image" else "text_projection.weight"}


@pytest.mark.parametrize(("objective", "soft"), [("microbatch", True), ("anchored", False)])
def test_one_side_alone_needs_prototypes_to_belong_to(
    heads: TrainablePart, objective: str, soft: bool
) -> None:
    data = replace(random_data([0, 1], soft=soft), modalities=("text",))
    with pytest.raises(UnsoundTraining, match="trained towards prototypes alone"):
        objective_of(heads, data, anchors_of(), plan_of(objective=objective))


@pytest.mark.parametrize("soft", [True, False])
def test_prototypes_are_anchors_that_no_weights_encode(soft: bool) -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    data, bank = with_prototypes(random_data([0, 1, 1], soft=soft)), prototypes_of()
    plan = plan_of(objective="anchored", loss="sigmoid", logit_bias=-2.5)
    made = AnchoredObjective(part, data, replace(anchors_of(), prototypes=bank), plan)
    part.load({name: value + 1 for name, value in part.arrays().items()})
    made.refresh()
    batch = made.batch(list(rows_by_patient(data.patients)), sampling=np.random.default_rng(0))
    with torch.no_grad():
        images, texts = part.module(anchors_of().images, anchors_of().texts)
        expected = anchored_sigmoid_loss(
            *part.module(data.pairs.images, data.pairs.texts),
            text_anchors=torch.cat([texts, torch.from_numpy(bank.text)]),
            image_anchors=torch.cat([images, torch.from_numpy(bank.image)]),
            masked=data.masked,
            positives=data.positives,
            inverse_temperature=10.0,
            logit_bias=-2.5,
        )
        found = made.losses(part.module, batch)
    torch.testing.assert_close(found, torch.stack([expected[0], expected[1:].mean()]))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_prototypes_change_what_is_trained_unless_every_pair_says_the_same(loss: str) -> None:
    def trained(data: TrainingData, anchors: Anchors) -> NDArray[Any]:
        part = trainable_part(micro_encoder(), "heads", lora_rank=1)
        update = train(part, data, plan_of(objective="anchored", loss=loss), anchors)
        return np.concatenate([value.ravel() for value in update.values()])

    data, more = random_data([0, 1, 1, 2]), replace(anchors_of(), prototypes=prototypes_of())
    plain = trained(data, anchors_of())
    assert np.abs(trained(with_prototypes(data), more) - plain).max() > 1e-3
    assert trained(with_prototypes(data, masked=True), more) == pytest.approx(plain, abs=1e-5)


def test_prototypes_of_another_width_are_refused(heads: TrainablePart) -> None:
    unit = np.eye(1, EMBEDDING + 1, dtype=np.float32)
    odd = PrototypeBank(concepts=("a",), wordings=(("a",),), image=unit, text=unit)
    with pytest.raises(PrivacyError, match=rf"anchors of width {EMBEDDING}, prototypes of {EMBEDDING + 1}"):
        AnchoredObjective(
            heads, random_data([0]), replace(anchors_of(), prototypes=odd), plan_of(objective="anchored")
        )
