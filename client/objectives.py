"""What a plan's objective makes of drawn patients: a batch, and one loss for each of its rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from client.batches import BatchMaker, Rows, TrainingData, made_up_data, rows_by_patient
from encoders.objectives import (
    anchored_loss,
    anchored_sigmoid_loss,
    grouped_infonce_loss,
    prototype_loss,
    soft_targets,
)
from encoders.parts import TrainablePart
from privacy.banks import PrototypeBank
from privacy.engine import Batch
from privacy.errors import UnsoundTraining
from privacy.noisy_sums import MODALITIES
from privacy.prototypes import append_prototypes
from privacy.sampling import uniform_groups
from strategies.messages import TrainingPlan

ENCODE_ROWS = 128
PROBE_GROUPS, PROBE_MEMBERS, PROBE_STUDIES = 3, 2, 2
Call = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The public bank: inputs of a `TrainablePart`, K rows each, and behind them what is encoded already."""

    images: Tensor
    texts: Tensor
    prototypes: PrototypeBank | None = None

    @property
    def wordings(self) -> tuple[tuple[str, ...], ...]:
        """The sentences of each prototype."""
        return () if self.prototypes is None else self.prototypes.wordings

    @property
    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """The prototypes of images and of texts, if there are any."""
        if self.prototypes is None:
            return None
        device = self.texts.device
        return torch.tensor(self.prototypes.image, device=device), torch.tensor(
            self.prototypes.text, device=device
        )


class Objective(ABC):
    """An objective that decomposes over the rows of its batches, so that each row's gradient can be clipped.

    Args:
        part: What is trained.
        data: All pairs of the site.
        plan: Says everything else; all of it is public.
    """

    def __init__(self, part: TrainablePart, data: TrainingData, plan: TrainingPlan) -> None:
        self._batches = BatchMaker(
            data=data, part=part, studies=plan.studies_per_patient, augmented=plan.augment
        )
        self._plan = plan

    @abstractmethod
    def batch(self, patients: Sequence[Rows], *, sampling: np.random.Generator) -> dict[str, Tensor]:
        """The rows of one step in which ``patients`` take part, each given by their pairs."""

    @abstractmethod
    def made_up(self) -> dict[str, Tensor]:
        """A batch of random images and texts in random rows, for probes."""

    @abstractmethod
    def losses(self, call: Call, batch: Batch) -> Tensor:
        """One loss a row; see `privacy.engine.PatientLosses`."""

    def refresh(self) -> None:
        """Bring up to date what depends on the part's current weights; its default: nothing does."""
        return

    def _made_up_batches(self) -> tuple[BatchMaker, list[Rows]]:
        patients = PROBE_GROUPS * PROBE_MEMBERS
        part = self._batches.part
        data = made_up_data(part, like=self._batches.data, patients=patients, studies=PROBE_STUDIES)
        maker = BatchMaker(data=data, part=part, studies=PROBE_STUDIES, augmented=False)
        return maker, list(rows_by_patient(data.patients))


class AnchoredObjective(Objective):
    """A row a patient: the mean loss of their pairs against public anchors."""

    def __init__(self, part: TrainablePart, data: TrainingData, anchors: Anchors, plan: TrainingPlan) -> None:
        super().__init__(part, data, plan)
        self._anchors = anchors
        self._loss: Callable[..., Tensor] = partial(
            anchored_loss, inverse_temperature=plan.inverse_temperature
        )
        if plan.loss == "sigmoid":
            self._loss = partial(
                anchored_sigmoid_loss,
                inverse_temperature=plan.inverse_temperature,
                logit_bias=plan.logit_bias,
            )
        self.refresh()

    def batch(self, patients: Sequence[Rows], *, sampling: np.random.Generator) -> dict[str, Tensor]:
        """See `BatchMaker.of_patients`."""
        return self._batches.of_patients(patients, sampling=sampling)

    def made_up(self) -> dict[str, Tensor]:
        """See `Objective.made_up`."""
        maker, patients = self._made_up_batches()
        return maker.of_patients(patients, sampling=np.random.default_rng(0))

    @torch.no_grad()
    def refresh(self) -> None:
        """Encode the anchors with the current weights, without gradient; prototypes stay as they are."""
        part, sides = self._batches.part, (self._anchors.images, self._anchors.texts)
        chunks = zip(*(torch.split(side, ENCODE_ROWS) for side in sides), strict=True)
        encoded = [part.module(images, part.trimmed(texts)) for images, texts in chunks]
        bank = torch.cat([image for image, _ in encoded]), torch.cat([text for _, text in encoded])
        if self._anchors.prototypes is not None:
            bank = append_prototypes(bank, self._anchors.prototypes)
        self._image_anchors, self._text_anchors = bank

    def losses(self, call: Call, batch: Batch) -> Tensor:
        """Shape (P,)."""
        images, texts = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
        losses = self._loss(
            images,
            texts,
            text_anchors=self._text_anchors,
            image_anchors=self._image_anchors,
            masked=batch["masked"].flatten(0, 1),
            positives=self._positives(batch, texts),
        )
        weights = batch["weights"]
        return (weights * losses.view_as(weights)).sum(1)

    def _positives(self, batch: Batch, texts: Tensor) -> Tensor | None:
        if "positives" in batch:
            return batch["positives"].flatten(0, 1)
        if self._plan.soft_targets is None:
            return None
        return soft_targets(texts, self._text_anchors, inverse_temperature=self._plan.soft_targets)


class PrototypeObjective(AnchoredObjective):
    """A row a patient: the mean loss of their images, or texts, that have no partner.

    The module embeds the placeholders of the other side too; nothing is made of them.
    """

    def losses(self, call: Call, batch: Batch) -> Tensor:
        """Shape (P,)."""
        images, texts = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
        of_images = self._batches.data.modalities == ("image",)
        losses = prototype_loss(
            images if of_images else texts,
            anchors=self._text_anchors if of_images else self._image_anchors,
            masked=batch["masked"].flatten(0, 1),
            positives=batch["positives"].flatten(0, 1),
            inverse_temperature=self._plan.inverse_temperature,
            logit_bias=self._plan.logit_bias if self._plan.loss == "sigmoid" else None,
        )
        weights = batch["weights"]
        return (weights * losses.view_as(weights)).sum(1)


class MicrobatchObjective(Objective):
    """A row a group: InfoNCE among its pairs, every patient of weight 1.

    Summed and not averaged over a group's patients, so that without a bound the rows' sum would be the sum
    over patients that the public divisor is made for.
    """

    def batch(self, patients: Sequence[Rows], *, sampling: np.random.Generator) -> dict[str, Tensor]:
        """Every patient in a fresh group; see `BatchMaker.of_groups`."""
        groups = uniform_groups(sampling, members=len(patients), groups=self._plan.groups)
        return self._batches.of_groups(patients, groups, sampling=sampling)

    def made_up(self) -> dict[str, Tensor]:
        """See `Objective.made_up`."""
        maker, patients = self._made_up_batches()
        groups = np.repeat(np.arange(PROBE_GROUPS), PROBE_MEMBERS)
        return maker.of_groups(patients, groups, sampling=np.random.default_rng(0))

    def losses(self, call: Call, batch: Batch) -> Tensor:
        """Shape (G,)."""
        weights = batch["weights"]
        image_embeddings, text_embeddings = (
            side.view(*weights.shape, -1)
            for side in call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
        )
        losses = grouped_infonce_loss(
            image_embeddings,
            text_embeddings,
            negatives=batch["negatives"],
            inverse_temperature=self._plan.inverse_temperature,
        )
        return (weights * losses).sum(1)


def objective_of(part: TrainablePart, data: TrainingData, anchors: Anchors, plan: TrainingPlan) -> Objective:
    """The objective that ``plan`` names.

    Raises:
        UnsoundTraining: it couples patients, so nothing may be claimed for it; or it needs pairs.
    """
    if data.modalities != MODALITIES:
        if plan.objective != "anchored" or data.positives is None:
            raise UnsoundTraining(
                "images, or texts, without a partner are trained towards prototypes alone: with the anchored "
                "objective, and the concepts that their labels state"
            )
        return PrototypeObjective(part, data, anchors, plan)
    if plan.objective == "anchored":
        return AnchoredObjective(part, data, anchors, plan)
    if plan.objective == "microbatch":
        return MicrobatchObjective(part, data, plan)
    raise UnsoundTraining(
        f"objective {plan.objective!r} couples the patients of a batch: no epsilon can be claimed for it; "
        "use 'anchored' or 'microbatch'"
    )
