"""Drawn patients as tensors of one row for each vector that is clipped: a patient, or a group of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.augmentation import augment
from encoders.fitting import Pairs
from encoders.parts import TrainablePart
from privacy.noisy_sums import MODALITIES, Modality

Rows = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A site's training pairs beside the K public anchors, prototypes among them and last.

    Attributes:
        pairs: One row a pair.
        patients: Patient number of each pair, int, shape (N,).
        masked: Anchor k is left out for pair i, bool, shape (N, K).
        positives: How far anchor k is right for pair i too, in [0, 1], float32, shape (N, K); None: none is.
        modalities: Which side of the pairs is there; the other is a placeholder.
    """

    pairs: Pairs
    patients: Rows
    masked: Tensor
    positives: Tensor | None = None
    modalities: tuple[Modality, ...] = MODALITIES


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes batches of `TrainingData` whose row r holds pairs of the patients of row r alone.

    Attributes:
        data: All pairs.
        part: Whose inputs they are.
        studies: At most so many pairs of a patient are used, of equal weight, 1 together.
        augmented: Whether images, where they are pixels, are moved and re-exposed.
    """

    data: TrainingData
    part: TrainablePart
    studies: int
    augmented: bool

    def of_patients(self, patients: Sequence[Rows], *, sampling: np.random.Generator) -> dict[str, Tensor]:
        """A row a patient.

        Args:
            patients: The pairs of each patient.
            sampling: Chooses studies and augments.

        Returns:
            Tensors (P, S, ...) with S the most pairs of a patient here; ``weights`` 0 marks padding.
        """
        return self._padded([[own] for own in patients], sampling)

    def of_groups(
        self, patients: Sequence[Rows], groups: NDArray[np.intp], *, sampling: np.random.Generator
    ) -> dict[str, Tensor]:
        """A row a group that has someone in it.

        Args:
            patients: The pairs of each patient.
            groups: The group of each patient, shape (len(patients),).
            sampling: Chooses studies and augments.

        Returns:
            As `of_patients`, (G, S, ...), and ``negatives``: pair j of the row is one for pair i, as another
            patient's with another text, bool (G, S, S).
        """
        members = [
            [own for own, joined in zip(patients, groups, strict=True) if joined == group]
            for group in np.unique(groups)
        ]
        batch = self._padded(members, sampling)
        owners, texts, real = batch.pop("owners"), batch.pop("text_keys"), batch["weights"] > 0
        apart = (owners[:, :, None] != owners[:, None]) & (texts[:, :, None] != texts[:, None])
        return {**batch, "negatives": apart & real[:, :, None] & real[:, None]}

    def _padded(self, members: Sequence[Sequence[Rows]], sampling: np.random.Generator) -> dict[str, Tensor]:
        chosen = [[sampling.permutation(own)[: self.studies] for own in row] for row in members]
        width = max((sum(map(len, row)) for row in chosen), default=1)
        pairs = np.zeros((len(chosen), width), dtype=np.int64)
        weights = np.zeros((len(chosen), width), dtype=np.float32)
        for place, row in enumerate(chosen):
            used = np.concatenate(row)
            pairs[place] = np.resize(used, width)  # padded by the row's own pairs: others' could be NaN
            weights[place, : len(used)] = np.concatenate([np.full(len(own), 1 / len(own)) for own in row])
        return self._gathered(pairs, weights, sampling)

    def _gathered(
        self, pairs: NDArray[np.int64], weights: NDArray[np.float32], sampling: np.random.Generator
    ) -> dict[str, Tensor]:
        data, picked = self.data, torch.from_numpy(pairs)
        images = data.pairs.images[picked]
        if self.augmented and images.dtype == torch.uint8:
            images = augment(images.flatten(0, 1), rng=sampling).view_as(images)
        texts = data.pairs.texts[picked]
        batch = {
            "images": images,
            "texts": self.part.trimmed(texts) if len(pairs) else texts,
            "weights": torch.from_numpy(weights).to(images.device),
            "owners": torch.from_numpy(data.patients[pairs]).to(images.device),
            "text_keys": data.pairs.text_keys[picked],
            "masked": data.masked[picked],
        }
        return batch if data.positives is None else {**batch, "positives": data.positives[picked]}


def made_up_pairs(part: TrainablePart, *, like: Pairs, rows: int) -> Pairs:
    """Random images and texts in the form of ``like`` and with nothing of it, always the same."""
    rng, size = np.random.default_rng(0), part.encoder.preprocessing.image_size
    channels = like.images.shape[3:] if like.images.dtype == torch.uint8 else ()
    images = rng.integers(0, 256, size=(rows, size, size, *channels), dtype=np.uint8)
    texts = [" ".join(map(str, rng.integers(0, 1000, size=1 + row % 5))) for row in range(rows)]
    return Pairs.of(part, images, texts)


def made_up_data(part: TrainablePart, *, like: TrainingData, patients: int, studies: int) -> TrainingData:
    """Random pairs of so many patients, in the form of ``like`` and with nothing of it, always the same."""
    rng, rows, anchors = np.random.default_rng(1), patients * studies, like.masked.shape[1]
    device = like.masked.device
    positives = torch.from_numpy(rng.random((rows, anchors), dtype=np.float32)).to(device)
    return TrainingData(
        pairs=made_up_pairs(part, like=like.pairs, rows=rows),
        patients=np.repeat(np.arange(patients), studies),
        masked=torch.from_numpy(rng.random((rows, anchors)) < 0.1).to(device),
        positives=None if like.positives is None else positives,
        modalities=like.modalities,
    )


def rows_by_patient(patients: Rows) -> list[NDArray[np.intp]]:
    """The rows of each patient, patients in the order of their numbers."""
    order = np.argsort(patients, kind="stable")
    _, starts = np.unique(patients[order], return_index=True)
    return np.split(order, starts)[1:]  # what lies before the first start is empty
