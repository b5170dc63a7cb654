"""The mean loss of a site's training patients under given weights, with noise."""

from collections.abc import Sequence

import numpy as np
import torch

from client.batches import Rows, TrainingData, rows_by_patient
from client.objectives import Anchors, objective_of
from encoders.parts import TrainablePart
from privacy.losses import LossRelease
from privacy.noise import GaussianNoise
from privacy.probes import refuse_coupling
from strategies.messages import MEAN_LOSS, Arrays, TrainingPlan

CHUNK = 64


@torch.no_grad()
def release_mean_loss(
    part: TrainablePart,
    data: TrainingData,
    anchors: Anchors,
    plan: TrainingPlan,
    *,
    mechanism: LossRelease,
    patients_declared: int,
    noise: GaussianNoise,
    sampling: np.random.Generator,
) -> Arrays:
    """Release the sum of all training patients' losses over the declared number of patients, once.

    Args:
        part: Has the round's weights in it.
        data: The site's training pairs.
        anchors: The public bank.
        plan: Its objective must be one that gives each patient a loss of their own.
        mechanism: Bound and noise.
        patients_declared: The cohort's public size.
        noise: Its source, of this release alone.
        sampling: Draws a patient's studies.

    Returns:
        One number, float32, shape (1,).

    Raises:
        UnsoundTraining: a patient's loss depends on other patients; no patient's pair was looked at.
    """
    part.module.eval()
    objective, rows_of = objective_of(part, data, anchors, plan), rows_by_patient(data.patients)
    with torch.enable_grad():
        refuse_coupling(part.module, objective.losses, objective.made_up())
    raw_losses = [
        objective.losses(part.module, objective.batch(chunk, sampling=sampling)).cpu().numpy()
        for chunk in _chunks(rows_of)
    ]
    raw_sum = mechanism.clipped_sum(np.concatenate([np.zeros(0), *raw_losses]))
    mean = mechanism.release(raw_sum, noise) / patients_declared
    return {MEAN_LOSS: np.array([mean], dtype=np.float32)}


def _chunks(rows_of: Sequence[Rows]) -> list[Sequence[Rows]]:
    return [rows_of[first : first + CHUNK] for first in range(0, len(rows_of), CHUNK)]
