"""A private round is public numbers plus noised, bounded sums, whoever was drawn; a plain one learns."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from client import objectives, training
from client.batches import TrainingData
from client.engines import MakeEngine, engine_maker
from client.objectives import Anchors
from client.site import EngineName
from client.training import BOOK_KEEPING, train_plainly, train_privately
from encoders.fitting import ANCHOR_REFRESH_STEPS, Pairs
from encoders.objectives import anchored_loss, infonce_loss, same_meaning
from encoders.parts import TrainablePart, trainable_part
from encoders.preprocessing import with_channels
from privacy.mechanism import AnchoredDpSgd
from privacy.noise import GaussianNoise
from strategies.messages import Arrays, Part, TrainingPlan
from strategies.share import trained
from tests.encoders.micro import TEXTS, micro_encoder, random_images

ANCHORS = ("normal chest", "large heart", "fluid in the left lung", "air where none should be", "clear lungs")
BOUND, DECLARED = 0.25, 40
SILENT = 1e-9  # noise far below any gradient, where the sum itself is looked at
KINDS: tuple[Part, ...] = ("heads", "image-head", "image-tower", "lora", "full")
# Steps of size one along the release, so that an update shows the released sums themselves.
SHOWN: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(generator: object, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        return np.empty(0, dtype=np.intp)

    monkeypatch.setattr(training, "poisson_sample", drawn)


def part_of(kind: Part = "heads") -> TrainablePart:
    return trainable_part(micro_encoder(), kind, lora_rank=2)


def plan_of(**changes: Any) -> TrainingPlan:
    settings: dict[str, Any] = {
        "part": "heads",
        "objective": "anchored",
        "privacy": "dp",
        "epsilon": 8.0,
        "rounds": 1,
        "steps": 3,
        "batch": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": BOUND,
        "studies_per_patient": 2,
        "inverse_temperature": 10.0,
        "anchors": len(ANCHORS),
        "augment": False,
        "lora_rank": 2,
        "seed": 0,
    }
    return TrainingPlan(**(settings | changes))


def data_of(part: TrainablePart, patients: list[int], *, seed: int = 0) -> TrainingData:
    rng = np.random.default_rng(seed)
    texts = [TEXTS[row] for row in rng.integers(0, len(TEXTS), size=len(patients))]
    images = random_images(len(patients), seed=seed)
    if not patients:  # the towers take one row at least
        whole = data_of(part, [0])
        pairs = Pairs(images=whole.pairs.images[:0], texts=whole.pairs.texts[:0], text_keys=torch.empty(0))
        return TrainingData(pairs=pairs, patients=np.empty(0, dtype=np.int64), masked=whole.masked[:0])
    return TrainingData(
        pairs=Pairs.of(part, images, texts),
        patients=np.array(patients),
        masked=torch.from_numpy(same_meaning(texts, ANCHORS)),
    )


def anchors_of(part: TrainablePart) -> Anchors:
    images, texts = part.inputs(random_images(len(ANCHORS), seed=99), ANCHORS)
    return Anchors(images=images, texts=texts)


def mechanism(**changes: Any) -> AnchoredDpSgd:
    settings = {"max_grad_norm": BOUND, "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 3}
    return AnchoredDpSgd(**(settings | changes))


def private_update(
    part: TrainablePart,
    patients: list[int],
    *,
    of: AnchoredDpSgd,
    declared: int = DECLARED,
    noise: GaussianNoise | None = None,
    seed: int = 0,
    make_engine: MakeEngine = BOOK_KEEPING,
    **plan: Any,
) -> Arrays:
    return train_privately(
        part,
        data_of(part, patients),
        anchors_of(part),
        plan_of(**plan),
        mechanism=of,
        patients_declared=declared,
        noise=noise or GaussianNoise(insecure_seed=7),
        sampling=np.random.default_rng(seed),
        make_engine=make_engine,
    )


def norm(update: Arrays) -> float:
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in update.values()))


def equal(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(value, second[name]) for name, value in first.items()
    )


def distance(first: Arrays, second: Arrays) -> float:
    return norm({name: value - second[name] for name, value in first.items()})


class CountedNoise(GaussianNoise):
    """Remembers what was noised, and how."""

    def __init__(self) -> None:
        super().__init__(insecure_seed=7)
        self.drawn: list[tuple[tuple[int, ...], float]] = []

    def add_to(self, tensor: Tensor, *, stddev: float) -> Tensor:
        self.drawn.append((tuple(tensor.shape), stddev))
        return super().add_to(tensor, stddev=stddev)


# --- every step is taken and noised -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_array_is_noised_once_a_step_whoever_was_drawn(kind: Part, steps: int) -> None:
    part, noise = part_of(kind), CountedNoise()
    arrays = part.arrays()
    shapes = [arrays[name].shape for name in arrays if name in trained(arrays, plan_of(part=kind), 1)]
    private_update(part, [0, 1, 1, 2], of=mechanism(steps=steps, sample_rate=0.3), noise=noise)
    assert noise.drawn == [(shape, BOUND) for shape in shapes] * steps


@pytest.mark.usefixtures("nobody")
def test_a_round_in_which_nobody_was_drawn_is_its_noise_and_calls_the_module_for_anchors_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = part_of()
    rows: list[int] = []
    forward = part.module.forward

    def counted(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(images))
        return forward(images, texts)

    monkeypatch.setattr(part.module, "forward", counted)
    monkeypatch.setattr(training, "refuse_coupling", lambda *_: None)
    of = mechanism(steps=4, sample_rate=0.25)
    update = private_update(part, [0, 1, 1, 2], of=of)
    assert rows == [len(ANCHORS)]
    assert equal(update, noise_alone(of, divisor=0.25 * DECLARED))


def noise_alone(of: AnchoredDpSgd, *, divisor: float) -> Arrays:
    """AdamW on nothing but the mechanism's noise over a public divisor."""
    part, noise, plan = part_of(), GaussianNoise(insecure_seed=7), plan_of()
    before, parameters = part.arrays(), list(part.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    for _ in range(of.steps):
        for value in parameters:
            value.grad = noise.draw(value.shape, stddev=of.noise_std) / divisor
        optimizer.step()
    return {name: value - before[name] for name, value in part.arrays().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_of_nobody_trains_on_noise(kind: Part) -> None:
    update = private_update(part_of(kind), [], of=mechanism(sample_rate=1.0), augment=True)
    assert norm(update) > 0


# --- the divisor is public ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("others", [[], [0], [0, 0, 0, 1], list(range(30))])
def test_the_true_size_of_the_cohort_does_not_show_when_nobody_was_drawn(others: list[int]) -> None:
    of = mechanism()
    first = private_update(part_of(), [0, 1, 1, 2], of=of, **SHOWN)
    assert equal(first, private_update(part_of(), others, of=of, **SHOWN))


@pytest.mark.usefixtures("nobody")
def test_the_noise_is_divided_by_the_declared_number_of_expected_patients() -> None:
    update = private_update(part_of(), [0, 1], of=mechanism(steps=1, sample_rate=0.2), declared=100, **SHOWN)
    noise = GaussianNoise(insecure_seed=7)
    for value in update.values():
        expected = -noise.draw(value.shape, stddev=BOUND) / (0.2 * 100)
        assert value == pytest.approx(expected.numpy(), abs=1e-6)


def test_twice_the_patients_are_twice_the_update_a_sum_and_no_mean() -> None:
    once = data_of(part_of(), [0, 1, 2])
    twice = rows_of(once, [0, 1, 2, 0, 1, 2], patients=range(6))
    assert norm(full_step(twice)) == pytest.approx(2 * norm(full_step(once)), rel=1e-3)


@pytest.mark.usefixtures("nobody")
def test_a_divisor_of_the_true_size_would_have_shown() -> None:
    first, second = (private_update(part_of(), [0] * n, of=mechanism(), declared=n, **SHOWN) for n in (3, 4))
    assert not equal(first, second)


def test_coins_are_tossed_for_patients_at_the_public_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    tossed: list[tuple[int, float]] = []

    def drawn(generator: object, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        tossed.append((population, sample_rate))
        return np.arange(population)

    monkeypatch.setattr(training, "poisson_sample", drawn)
    private_update(part_of(), [9, 4, 4, 4, 7], of=mechanism(steps=2, sample_rate=0.125))
    assert tossed == [(3, 0.125)] * 2


# --- one patient, one contribution --------------------------------------------------------------------------


def rows_of(data: TrainingData, rows: list[int], *, patients: Iterable[int] | None = None) -> TrainingData:
    pairs = Pairs(
        images=data.pairs.images[rows], texts=data.pairs.texts[rows], text_keys=data.pairs.text_keys[rows]
    )
    numbers = data.patients[rows] if patients is None else np.array(list(patients))
    return TrainingData(pairs=pairs, patients=numbers, masked=data.masked[rows])


def full_step(data: TrainingData, kind: Part = "heads", *, studies: int = 6, bound: float = BOUND) -> Arrays:
    """The update of one step that everyone joins, next to no noise in it."""
    part = part_of(kind)
    return train_privately(
        part,
        data,
        anchors_of(part),
        plan_of(studies_per_patient=studies, **SHOWN),
        mechanism=mechanism(max_grad_norm=bound, noise_multiplier=SILENT, sample_rate=1.0, steps=1),
        patients_declared=DECLARED,
        noise=GaussianNoise(insecure_seed=7),
        sampling=np.random.default_rng(0),
    )


def moved_by_leaving(kind: Part, patients: list[int], gone: int) -> float:
    """How far a full step's sum moves when a patient leaves; all studies are used, so no coin differs."""
    whole = data_of(part_of(kind), patients)
    rest = rows_of(whole, [row for row, patient in enumerate(patients) if patient != gone])
    return distance(full_step(whole, kind), full_step(rest, kind)) * DECLARED


@pytest.mark.parametrize("bound", [BOUND, 12.0, 1000.0])
def test_a_contribution_is_the_clipped_gradient_of_the_mean_anchored_loss_of_a_patients_studies(
    bound: float,
) -> None:
    part = part_of()
    data, anchors = data_of(part, [0, 1, 1, 2, 2, 2]), anchors_of(part)
    data.masked[::2, 1:3] = True
    weights = list(part.parameters().values())
    with torch.no_grad():
        image_anchors, text_anchors = part.module(anchors.images, anchors.texts)
    expected = [np.zeros(value.shape) for value in weights]
    for patient in (0, 1, 2):
        rows = torch.from_numpy(data.patients == patient)
        losses = anchored_loss(
            *part.module(data.pairs.images[rows], data.pairs.texts[rows]),
            image_anchors=image_anchors,
            text_anchors=text_anchors,
            masked=data.masked[rows],
            inverse_temperature=10.0,
        )
        raw = [each.numpy().astype(np.float64) for each in torch.autograd.grad(losses.mean(), weights)]
        factor = min(1.0, bound / math.sqrt(sum(float((each**2).sum()) for each in raw)))
        expected = [total - factor * each / DECLARED for total, each in zip(expected, raw, strict=True)]
    for found, value in zip(full_step(data, bound=bound).values(), expected, strict=True):
        assert found == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("studies", [1, 2, 5])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_patient_is_one_contribution_however_many_studies(studies: int, kept: int) -> None:
    update = full_step(data_of(part_of(), [4] * studies), studies=kept)
    assert norm(update) * DECLARED == pytest.approx(BOUND, rel=1e-4)  # gradients here are above the bound


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patients=st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(lambda rows: len(set(rows)) > 1),
    data=st.data(),
)
def test_a_patient_who_leaves_moves_a_step_by_at_most_the_bound(
    kind: Part, patients: list[int], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(patients))
    assert moved_by_leaving(kind, patients, gone) <= BOUND * (1 + 1e-3)


def test_study_level_clipping_would_have_passed_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_study_a_patient(patients: NDArray[Any]) -> list[NDArray[np.intp]]:
        return [np.array([row]) for row in range(len(patients))]

    monkeypatch.setattr(training, "rows_by_patient", every_study_a_patient)
    assert moved_by_leaving("heads", [0, 1, 1, 1], 1) > 2 * BOUND


# --- noise, seeds, augmentation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_insecure_seeds_give_equal_updates(kind: Part) -> None:
    first, second = (private_update(part_of(kind), [0, 1, 1, 2], of=mechanism(), augment=True) for _ in "ab")
    assert equal(first, second)
    assert all(value.dtype == np.float32 for value in first.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", get_args(EngineName))
def test_channels_train_as_grey_does_where_they_are_equal_and_otherwise_where_they_are_not(
    kind: Part, engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchors are grey in every case, as a federation's public ones are."""

    def update(channels: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Arrays:
        part, made_of_grey = part_of(kind), Pairs.of

        def of(part: TrainablePart, images: NDArray[np.uint8], texts: list[str]) -> Pairs:
            made_up = images.ndim > 3  # for a probe, in the form of the others
            return made_of_grey(part, images if made_up else channels(images), texts)

        with monkeypatch.context() as patch:
            patch.setattr(Pairs, "of", of)
            return private_update(
                part, [0, 1, 1, 2], of=mechanism(noise_multiplier=SILENT), augment=True,
                make_engine=engine_maker(engine),
            )  # fmt: skip

    def windows(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack([grey, grey // 2, 255 - grey], axis=-1)

    alone, repeated, in_order, in_another = map(
        update, (lambda grey: grey, with_channels, windows, lambda grey: windows(grey)[..., ::-1])
    )
    assert distance(alone, repeated) < 1e-5 * norm(alone)
    assert distance(alone, in_order) > 0.01 * norm(alone)
    assert distance(in_order, in_another) > 0.01 * norm(alone)


def test_without_a_seed_no_two_updates_are_alike() -> None:
    first, second = (private_update(part_of(), [0, 1], of=mechanism(), noise=GaussianNoise()) for _ in "ab")
    assert not equal(first, second)


def test_the_update_is_what_the_part_moved_by() -> None:
    part = part_of("lora")
    before = part.arrays()
    update = private_update(part, [0, 1, 1, 2], of=mechanism())
    for name, value in part.arrays().items():
        assert np.array_equal(value - before[name], update.get(name, np.zeros_like(value)))
    assert len(update) < len(before)  # the factors that this round holds fixed


# --- anchors ------------------------------------------------------------------------------------------------


def recorded_banks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    banks: list[tuple[Tensor, Tensor]] = []
    loss: Callable[..., Tensor] = anchored_loss

    def recording(*embeddings: Tensor, **rest: Any) -> Tensor:
        assert not rest["image_anchors"].requires_grad
        assert not rest["text_anchors"].requires_grad
        banks.append((rest["image_anchors"].clone(), rest["text_anchors"].clone()))
        return loss(*embeddings, **rest)

    monkeypatch.setattr(objectives, "anchored_loss", recording)
    monkeypatch.setattr(training, "refuse_coupling", lambda *_: None)
    return banks


@pytest.mark.parametrize("kind", ["heads", "full"])
def test_anchors_are_encoded_anew_every_twenty_steps_without_gradient(
    kind: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = recorded_banks(monkeypatch)
    steps = ANCHOR_REFRESH_STEPS + 2
    private_update(
        part_of(kind), [0, 1], of=mechanism(sample_rate=1.0, steps=steps), make_engine=engine_maker("vmap")
    )
    assert ANCHOR_REFRESH_STEPS <= 20
    assert len(banks) == steps
    changed = [not torch.equal(now[0], before[0]) for before, now in itertools.pairwise(banks)]
    assert changed == [step == ANCHOR_REFRESH_STEPS for step in range(1, steps)]
    part = part_of(kind)  # the same first steps again: the weights that the second bank should be made with
    of = mechanism(sample_rate=1.0, steps=ANCHOR_REFRESH_STEPS)
    private_update(part, [0, 1], of=of, make_engine=engine_maker("vmap"))
    anchors = anchors_of(part)
    with torch.no_grad():
        expected = part.module(anchors.images, anchors.texts)
    for bank, current in zip(banks[ANCHOR_REFRESH_STEPS], expected, strict=True):
        torch.testing.assert_close(bank, current, rtol=1e-5, atol=1e-6)


# --- without privacy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_training_is_deterministic_for_a_seed(kind: Part) -> None:
    updates = []
    for seed in (3, 3, 4):
        part = part_of(kind)
        data = data_of(part, [0, 1, 2, 3, 4])
        plan = plan_of(privacy="none", objective="infonce", epsilon=None, batch=2, augment=True)
        updates.append(train_plainly(part, data, anchors_of(part), plan, rng=np.random.default_rng(seed)))
    assert equal(updates[0], updates[1])
    assert not equal(updates[0], updates[2])


@pytest.mark.parametrize("kind", KINDS)
def test_plain_training_lowers_the_loss_of_a_toy(kind: Part) -> None:
    part = part_of(kind)
    data = data_of(part, list(range(len(TEXTS))))
    pairs = Pairs.of(part, random_images(len(TEXTS), seed=1), list(TEXTS))
    before = infonce(part, pairs)
    plan = plan_of(
        privacy="none", objective="infonce", epsilon=None, steps=25, batch=len(TEXTS), learning_rate=0.02
    )
    train_plainly(part, replace(data, pairs=pairs), anchors_of(part), plan, rng=np.random.default_rng(0))
    assert infonce(part, pairs) < (0.9 if kind == "image-head" else 0.7) * before  # one side of two


def test_plain_training_asks_for_anchors_only_where_pairs_are_right_for_them() -> None:
    """Every pair says what anchor 0 says and nothing else, so images move towards it."""
    nearer = {}
    plan = plan_of(privacy="none", objective="infonce", epsilon=None, steps=60, batch=5, learning_rate=0.02)
    shares = torch.tensor([1.0, *(0.0 for _ in ANCHORS[1:])]).expand(5, -1)
    for positives in (None, shares):
        part = part_of("image-tower")
        data, anchors = replace(data_of(part, [0, 1, 2, 3, 4]), positives=positives), anchors_of(part)
        train_plainly(part, data, anchors, plan, rng=np.random.default_rng(0))
        with torch.no_grad():
            images, texts = part.module(data.pairs.images, anchors.texts[:1].expand(5, -1))
        nearer[positives is not None] = float((images * texts).sum(-1).mean())
    assert nearer[True] > nearer[False] + 0.02


def infonce(part: TrainablePart, pairs: Pairs) -> float:
    with torch.no_grad():
        embeddings = part.module(pairs.images, pairs.texts)
        same = torch.eye(len(pairs), dtype=torch.bool)
        return float(infonce_loss(*embeddings, same_text=same, inverse_temperature=10.0))
