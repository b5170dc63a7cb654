"""Local training of one round: with a privacy claim, or plainly without one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from encoders.augmentation import augment
from encoders.fitting import Pairs, fit_infonce
from encoders.objectives import anchored_loss
from encoders.parts import TrainablePart
from privacy.engine import ClippingEngine
from privacy.mechanism import Mechanism
from privacy.noise import GaussianNoise
from privacy.sampling import poisson_sample
from privacy.vmap import VmapEngine
from strategies.messages import Arrays, TrainingPlan

ANCHOR_REFRESH_STEPS = 20
ENCODE_ROWS = 128
WARM_UP = 0.1
Call = Callable[..., tuple[Tensor, Tensor]]
OptimizerState = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The public bank as inputs of a `TrainablePart`, K rows each."""

    images: Tensor
    texts: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A site's training pairs beside the public anchors.

    Attributes:
        pairs: One row a pair.
        patients: Patient number of each pair, int, shape (N,).
        masked: Anchor k says the same as pair i, bool, shape (N, K).
    """

    pairs: Pairs
    patients: NDArray[np.integer[Any]]
    masked: Tensor


def train_privately(
    part: TrainablePart,
    data: TrainingData,
    anchors: Anchors,
    plan: TrainingPlan,
    *,
    mechanism: Mechanism,
    patients_declared: int,
    noise: GaussianNoise,
    sampling: np.random.Generator,
    server_round: int = 1,
) -> Arrays:
    """Take ``mechanism.steps`` noised steps with the anchored loss.

    Guarantees:
        The result is a function of public values and of ``mechanism.steps`` releases of ``mechanism`` alone.
        Every step is taken, noised and counted, also when nobody was drawn; the divisor is the public
        sample rate times the declared number of patients.

    Returns:
        Trained minus given weights, float32.
    """
    before = part.arrays()
    parameters = dict(part.module.named_parameters())
    optimizer, schedule = _optimizer(part, plan, server_round=server_round, steps=mechanism.steps)
    rows_of = _rows_by_patient(data.patients)
    divisor = mechanism.sample_rate * patients_declared
    for step in range(mechanism.steps):
        if step % ANCHOR_REFRESH_STEPS == 0:
            engine = _engine(part, _encode(part, anchors), plan)
        drawn = poisson_sample(sampling, population=len(rows_of), sample_rate=mechanism.sample_rate)
        raw_batch = _patient_batch(
            data,
            [rows_of[patient] for patient in drawn],
            studies=plan.studies_per_patient,
            augmented=plan.augment,
            part=part,
            sampling=sampling,
        )
        raw_sum = engine.clipped_sum(raw_batch, max_grad_norm=mechanism.max_grad_norm)
        for name, value in mechanism.release(raw_sum, noise).over(divisor).arrays.items():
            parameters[name].grad = value
        optimizer.step()
        schedule.step()
    return _difference(part.arrays(), before)


def train_plainly(
    part: TrainablePart,
    pairs: Pairs,
    plan: TrainingPlan,
    *,
    rng: np.random.Generator,
    server_round: int = 1,
    kept: OptimizerState | None = None,
) -> Arrays:
    """Take this round's steps of InfoNCE on shuffled pairs. No privacy guarantee of any kind.

    Args:
        part: Has the round's weights in it.
        pairs: The site's training pairs.
        plan: What the coordinator asks.
        rng: Orders and augments.
        server_round: From 1; decides where the learning-rate schedule is.
        kept: The optimizer's state after the round before, empty at first; it is replaced in place.

    Returns:
        Trained minus given weights, float32.
    """
    before = part.arrays()
    steps = plain_steps(plan, pairs=len(pairs))
    optimizer, schedule = _optimizer(part, plan, server_round=server_round, steps=steps, kept=kept)
    fit_infonce(
        part,
        pairs,
        optimizer=optimizer,
        steps=steps,
        batch=plan.batch,
        inverse_temperature=plan.inverse_temperature,
        augmented=plan.augment,
        rng=rng,
        on_step=lambda _: schedule.step(),
    )
    if kept is not None:
        kept.update(optimizer.state_dict())
    return _difference(part.arrays(), before)


def plain_steps(plan: TrainingPlan, *, pairs: int) -> int:
    """Steps of one round without privacy, for a site of so many pairs."""
    return plan.steps if plan.epochs is None else max(1, round(plan.epochs * pairs / plan.batch))


def _optimizer(
    part: TrainablePart,
    plan: TrainingPlan,
    *,
    server_round: int,
    steps: int,
    kept: OptimizerState | None = None,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """This round's optimizer, at the learning rate that the whole run's schedule has reached."""
    parameters = list(part.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    if kept:
        groups = optimizer.state_dict()["param_groups"]  # the schedule starts from the plan's rate again
        optimizer.load_state_dict({"state": kept["state"], "param_groups": groups})

    def factor(step: int) -> float:
        return rate_factor(plan, (server_round - 1 + (step + 0.5) / steps) / plan.rounds)

    return optimizer, LambdaLR(optimizer, factor)


def rate_factor(plan: TrainingPlan, progress: float) -> float:
    """What the learning rate is multiplied by after a share ``progress`` in (0, 1] of the whole run."""
    if plan.schedule == "constant":
        return 1.0
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def _difference(after: Arrays, before: Arrays) -> Arrays:
    return {name: after[name] - before[name] for name in before}


def _rows_by_patient(patients: NDArray[np.integer[Any]]) -> list[NDArray[np.intp]]:
    order = np.argsort(patients, kind="stable")
    _, starts = np.unique(patients[order], return_index=True)
    return np.split(order, starts)[1:]  # what lies before the first start is empty


def _patient_batch(
    data: TrainingData,
    patients: list[NDArray[np.intp]],
    *,
    studies: int,
    augmented: bool,
    part: TrainablePart,
    sampling: np.random.Generator,
) -> dict[str, Tensor]:
    """Up to ``studies`` pairs of each drawn patient, padded by weight 0: every tensor is (P, studies, …)."""
    rows = np.zeros((len(patients), studies), dtype=np.int64)
    weights = np.zeros((len(patients), studies), dtype=np.float32)
    for place, own in enumerate(patients):
        chosen = sampling.permutation(own)[:studies]
        rows[place] = np.resize(chosen, studies)
        weights[place, : len(chosen)] = 1 / len(chosen)
    picked = torch.from_numpy(rows)
    images = data.pairs.images[picked]
    if augmented and images.dtype == torch.uint8:
        images = augment(images.flatten(0, 1), rng=sampling).view_as(images)
    texts = data.pairs.texts[picked]
    return {
        "images": images,
        "texts": part.trimmed(texts) if len(patients) else texts,
        "masked": data.masked[picked],
        "weights": torch.from_numpy(weights).to(images.device),
    }


@torch.no_grad()
def _encode(part: TrainablePart, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """The bank with the current weights: image and text anchors, unit vectors (K, D), without gradient."""
    chunks = zip(*(torch.split(side, ENCODE_ROWS) for side in (anchors.images, anchors.texts)), strict=True)
    encoded = [part.module(images, part.trimmed(texts)) for images, texts in chunks]
    return torch.cat([image for image, _ in encoded]), torch.cat([text for _, text in encoded])


def _engine(part: TrainablePart, bank: tuple[Tensor, Tensor], plan: TrainingPlan) -> ClippingEngine:
    image_anchors, text_anchors = bank

    def patient_losses(call: Call, batch: Mapping[str, Tensor]) -> Tensor:
        weights = batch["weights"]
        image_embeddings, text_embeddings = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
        losses = anchored_loss(
            image_embeddings,
            text_embeddings,
            text_anchors=text_anchors,
            image_anchors=image_anchors,
            masked=batch["masked"].flatten(0, 1),
            inverse_temperature=plan.inverse_temperature,
        )
        return (weights * losses.view_as(weights)).sum(1)

    return VmapEngine(part.module, patient_losses)
