"""Local training of one round: with a privacy claim, or plainly without one."""

import math
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from client.batches import TrainingData, rows_by_patient
from client.drift import correct_drift
from client.engines import MakeEngine, engine_maker
from client.objectives import Anchors, objective_of
from encoders.fitting import ANCHOR_REFRESH_STEPS, PublicBank, fit_infonce
from encoders.parts import TrainablePart, of_image_side
from privacy.errors import UnsoundTraining
from privacy.mechanism import Mechanism
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES, Modality
from privacy.optimizers import make_optimizer, take_step
from privacy.probes import refuse_coupling
from privacy.sampling import poisson_sample
from strategies.messages import Arrays, TrainingPlan
from strategies.share import trained

WARM_UP = 0.1
BOOK_KEEPING = engine_maker()
OptimizerState = dict[str, Any]


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
    correction: Arrays | None = None,
    make_engine: MakeEngine = BOOK_KEEPING,
) -> Arrays:
    """Take ``mechanism.steps`` noised steps.

    Guarantees:
        The result is a function of public values and of ``mechanism.steps`` releases of ``mechanism`` alone.
        Every step is taken, noised and counted, also when nobody was drawn; the divisor is the public
        sample rate times the declared number of patients.

    Args:
        part: Has the round's weights in it.
        data: The site's training pairs.
        anchors: The public bank of the anchored objective.
        plan: What the coordinator asks.
        mechanism: The noise, and for which objective.
        patients_declared: The cohort's public size.
        noise: Its source, of this release alone.
        sampling: Draws patients, groups, studies and augmentation.
        server_round: From 1; decides what is trained and where the learning-rate schedule is.
        correction: Added to every noised gradient, with the plan's proximal term; see `client.drift`.
        make_engine: The site's choice of what clips.

    Returns:
        Trained minus given weights, float32, of what this round trains: where one side of the pairs is not
        there, nothing of that side's tower and head.

    Raises:
        UnsoundTraining: mechanism and plan are for two objectives, or the objective or the model couples what
            is clipped apart (`privacy.probes`); no patient's pair was looked at.
    """
    if mechanism.kind != plan.objective:
        raise UnsoundTraining(
            f"the noise is for the {mechanism.kind} objective and the plan trains {plan.objective}"
        )
    part.module.eval()  # dropout would be noise that nobody accounts for, and slower
    before = _begin(part, plan, server_round, modalities=data.modalities)
    parameters = dict(part.module.named_parameters())
    optimizer, schedule = _optimizer(
        part, plan, server_round=server_round, steps=mechanism.steps, correction=correction
    )
    objective = objective_of(part, data, anchors, plan)
    engine = make_engine(part.module, objective.losses)
    refuse_coupling(part.module, objective.losses, objective.made_up())
    rows_of = rows_by_patient(data.patients)
    divisor = mechanism.sample_rate * patients_declared
    for step in range(mechanism.steps):
        if step and step % ANCHOR_REFRESH_STEPS == 0:
            objective.refresh()
        drawn = poisson_sample(sampling, population=len(rows_of), sample_rate=mechanism.sample_rate)
        raw_batch = objective.batch([rows_of[patient] for patient in drawn], sampling=sampling)
        raw_sum = engine.clipped_sum(raw_batch, max_grad_norm=mechanism.max_grad_norm)
        take_step(optimizer, parameters, mechanism.release(raw_sum, noise).over(divisor))
        schedule.step()
    return _difference(part.arrays(), before)


def train_plainly(
    part: TrainablePart,
    data: TrainingData,
    anchors: Anchors,
    plan: TrainingPlan,
    *,
    rng: np.random.Generator,
    server_round: int = 1,
    correction: Arrays | None = None,
    kept: OptimizerState | None = None,
) -> Arrays:
    """Take this round's steps of InfoNCE on shuffled pairs. No privacy guarantee of any kind.

    Args:
        part: Has the round's weights in it.
        data: The site's training pairs. With soft positives or targets each image is also asked for those
            among the anchors' texts and prototypes, and each text for those among the prototypes.
        anchors: The public bank; without soft positives or targets it is not used.
        plan: What the coordinator asks.
        rng: Orders and augments.
        server_round: From 1; decides what is trained and where the learning-rate schedule is.
        correction: Added to every gradient, with the plan's proximal term; see `client.drift`.
        kept: The optimizer's state after the round before, empty at first; it is replaced in place.

    Returns:
        Trained minus given weights, float32, of what this round trains.
    """
    before = _begin(part, plan, server_round)
    pairs = data.pairs
    shares = plan.soft_targets if data.positives is None else data.positives
    steps = plain_steps(plan, pairs=len(pairs))
    optimizer, schedule = _optimizer(
        part, plan, server_round=server_round, steps=steps, correction=correction, kept=kept
    )
    public = None
    if shares is not None:
        public = PublicBank(texts=anchors.texts, shares=shares, prototypes=anchors.vectors)
    fit_infonce(
        part,
        pairs,
        optimizer=optimizer,
        steps=steps,
        batch=plain_batch(plan, pairs=len(pairs)),
        inverse_temperature=plan.inverse_temperature,
        augmented=plan.augment,
        rng=rng,
        public=public,
        on_step=lambda _: schedule.step(),
    )
    if kept is not None:
        kept.update(optimizer.state_dict())
    return _difference(part.arrays(), before)


def plain_steps(plan: TrainingPlan, *, pairs: int) -> int:
    """Steps of one round without privacy, for a site of so many pairs."""
    if plan.epochs is None:
        return plan.steps
    return max(1, round(plan.epochs * pairs / plain_batch(plan, pairs=pairs)))


def plain_batch(plan: TrainingPlan, *, pairs: int) -> int:
    """Pairs of one step without privacy, for a site of so many."""
    return max(1, round(plan.batch_of(pairs)))


def _optimizer(
    part: TrainablePart,
    plan: TrainingPlan,
    *,
    server_round: int,
    steps: int,
    correction: Arrays | None,
    kept: OptimizerState | None = None,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """This round's optimizer, at the learning rate that the whole run's schedule has reached."""
    parameters = part.parameters()
    optimizer = make_optimizer(
        plan.optimizer, parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    correct_drift(optimizer, parameters, correction=correction or {}, proximal=plan.proximal)
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


def _begin(
    part: TrainablePart,
    plan: TrainingPlan,
    server_round: int,
    *,
    modalities: tuple[Modality, ...] = MODALITIES,
) -> Arrays:
    """Let only this round's parameters be trained, of sides that are there; their values."""
    arrays = part.arrays()
    sides = {modality == "image" for modality in modalities}
    names = {name for name in trained(arrays, plan, server_round) if of_image_side(name) in sides}
    part.train_only(names)
    return {name: value for name, value in arrays.items() if name in names}


def _difference(after: Arrays, before: Arrays) -> Arrays:
    return {name: after[name] - before[name] for name in before}
