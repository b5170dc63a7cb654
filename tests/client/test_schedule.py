"""The learning rate over a whole run, and how many steps a round has without privacy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.batches import TrainingData
from client.objectives import Anchors
from client.training import plain_batch, plain_steps, rate_factor, train_plainly
from encoders.clip import ClipEncoder
from encoders.fitting import Pairs
from encoders.parts import trainable_part
from strategies.messages import TrainingPlan
from tests.encoders.micro import micro_encoder, random_images


def plan_of(**changes: object) -> TrainingPlan:
    settings = {
        "part": "full", "objective": "infonce", "privacy": "none", "rounds": 10, "steps": 7, "batch": 8,
        "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0, "studies_per_patient": 1,
        "inverse_temperature": 10.0, "anchors": 1, "augment": False, "lora_rank": 1, "seed": 0,
    }  # fmt: skip
    return TrainingPlan.model_validate(settings | changes)


@given(progress=st.floats(0, 1))
def test_a_constant_schedule_never_changes_the_rate(progress: float) -> None:
    assert rate_factor(plan_of(), progress) == 1.0


def test_a_cosine_rises_for_a_tenth_of_the_run_and_then_falls_to_zero() -> None:
    plan = plan_of(schedule="cosine")
    factors = np.array([rate_factor(plan, progress) for progress in np.linspace(0, 1, 101)])

    assert factors[0] == 0
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert (np.diff(factors[:11]) > 0).all()
    assert (np.diff(factors[10:]) < 0).all()


@pytest.mark.parametrize(("pairs", "steps"), [(1, 1), (8, 2), (20, 5), (200, 50)])
def test_epochs_are_counted_in_the_site_s_own_pairs(pairs: int, steps: int) -> None:
    assert plain_steps(plan_of(epochs=2), pairs=pairs) == steps


@pytest.mark.parametrize(("pairs", "batch"), [(1, 1), (10, 2), (1000, 250)])
def test_a_sample_rate_is_a_share_of_the_site_s_own_pairs(pairs: int, batch: int) -> None:
    plan = plan_of(batch=None, sample_rate=0.25, epochs=2)
    assert plain_batch(plan, pairs=pairs) == batch
    assert plain_steps(plan, pairs=pairs) == max(1, round(2 * pairs / batch))


def test_without_epochs_every_site_takes_the_same_number_of_steps() -> None:
    assert {plain_steps(plan_of(), pairs=pairs) for pairs in (1, 10, 1000)} == {7}


def test_a_kept_optimizer_makes_two_rounds_one_training() -> None:
    """Two rounds of two steps with a kept state equal four steps in one round, from the same batches."""
    encoder = micro_encoder()
    images, texts = random_images(4), [f"finding number {row}" for row in range(4)]

    def trained(rounds: int, steps: int, kept: dict[str, object] | None) -> list[np.ndarray]:
        part = trainable_part(ClipEncoder.parse(encoder.describe(), encoder.weights()), "heads", lora_rank=1)
        pairs = Pairs.of(part, images, texts)
        data = TrainingData(pairs=pairs, patients=np.arange(4), masked=torch.zeros(4, 1, dtype=torch.bool))
        anchors = Anchors(images=pairs.images[:1], texts=pairs.texts[:1])
        plan = plan_of(part="heads", rounds=rounds, steps=steps, batch=4, keep_optimizer=kept is not None)
        for server_round in range(1, rounds + 1):  # one batch holds every pair, so its order does not matter
            rng = np.random.default_rng(0)
            train_plainly(part, data, anchors, plan, rng=rng, server_round=server_round, kept=kept)
        return [value for _, value in sorted(part.arrays().items())]

    once, kept, forgotten = trained(1, 4, None), trained(2, 2, {}), trained(2, 2, None)
    assert all(np.allclose(one, two, atol=1e-5) for one, two in zip(once, kept, strict=True))
    assert not all(np.allclose(one, two, atol=1e-5) for one, two in zip(once, forgotten, strict=True))
