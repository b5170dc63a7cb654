"""A site's mean loss is that of its patients, over its declared size, and nobody's else."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from client.losses import release_mean_loss
from client.objectives import AnchoredObjective
from encoders.parts import trainable_part
from privacy.errors import UnsoundTraining
from privacy.losses import LossRelease
from privacy.noise import GaussianNoise
from strategies.messages import MEAN_LOSS
from tests.client.test_training import ANCHORS, anchors_of, data_of, plan_of
from tests.encoders.micro import micro_encoder

DECLARED = 10


def mean_loss(
    patients: list[int], *, scale: float = 10.0, max_loss: float = 50.0, noise: float = 1e-9
) -> float:
    part = trainable_part(micro_encoder(), "heads")
    update = release_mean_loss(
        part,
        data_of(part, patients),
        anchors_of(part),
        plan_of(inverse_temperature=scale),
        mechanism=LossRelease(max_loss=max_loss, noise_multiplier=noise),
        patients_declared=DECLARED,
        noise=GaussianNoise(insecure_seed=3),
        sampling=np.random.default_rng(0),
    )
    assert {name: value.shape for name, value in update.items()} == {MEAN_LOSS: (1,)}
    return float(update[MEAN_LOSS][0])


def test_a_loss_that_sees_other_patients_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = AnchoredObjective.losses

    def less_the_mean(self: AnchoredObjective, *given: Any) -> torch.Tensor:
        losses = alone(self, *given)
        return losses - losses.mean()

    monkeypatch.setattr(AnchoredObjective, "losses", less_the_mean)
    with pytest.raises(UnsoundTraining, match="gradient to other rows"):
        mean_loss([0, 1, 2, 3])


def test_a_model_that_cannot_tell_guesses_among_partner_and_anchors() -> None:
    """At a scale of nearly 0 all logits are alike; anchors that say the same as a pair are left out."""
    fewest, most = (2 * math.log(1 + count) for count in (1, len(ANCHORS)))
    found = mean_loss([0, 1, 2, 3, 4], scale=1e-6) * DECLARED / 5
    assert fewest / 2 < found / 2 <= most
    assert mean_loss([0, 0, 1, 1], scale=1e-6) * DECLARED / 2 == pytest.approx(found, rel=0.3)


def test_every_patient_counts_once_and_is_cut_at_the_bound() -> None:
    assert mean_loss([0, 0, 0, 1, 2, 2], max_loss=1e-3) == pytest.approx(3 * 1e-3 / DECLARED, rel=1e-4)


def test_more_patients_than_a_chunk_are_all_counted() -> None:
    assert mean_loss(list(range(150)), max_loss=1e-3) == pytest.approx(150 * 1e-3 / DECLARED, rel=1e-4)


def test_a_site_without_patients_releases_noise() -> None:
    found = mean_loss([], max_loss=1.0, noise=5.0)
    drawn = float(GaussianNoise(insecure_seed=3).draw((1,), stddev=5.0)[0]) / DECLARED
    assert found == pytest.approx(drawn, rel=1e-4)


def test_nothing_is_left_to_differentiate() -> None:
    mean_loss([0, 1])
    assert torch.is_grad_enabled()
