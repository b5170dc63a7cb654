"""Prototypes: noisy mean directions of public concepts, the one thing a site can release without a gradient.

A concept is a sentence anyone may know ("effusion present"). Every patient adds their embeddings to the
concepts that their own report states, and their weight to a count; sums and counts leave with noise, and all
that is made of them afterwards (directions, thresholds, sums over hospitals) is post-processing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError
from privacy.mechanism import LARGEST_NORM, LEAST_NORM, WholeCohort
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES, Modality, NoisySums

_GRID = 2.0**-24  # of the bound: a patient's 1e-7, and sums of 5e8 patients are exact in float64


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """What a site knows of one modality: a row for each image, or for each report.

    Attributes:
        patients: Whose row it is, int, shape (N,).
        embeddings: Unit vectors, shape (N, d); nothing breaks where they are not.
        members: How far the row's own report, and nothing else, states each concept: in [0, 1], shape (N, K).
    """

    patients: NDArray[np.integer]
    embeddings: NDArray[np.floating]
    members: NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class PrototypeRelease(WholeCohort):
    """Sums of embeddings and counts by concept, over all patients, with noise.

    A patient's contribution is one vector, over both modalities and all concepts: the mean over their rows
    of member times (embedding, ``count_weight``). It is clipped as a whole, so that a patient of many
    concepts moves the release no farther than another; each of these concepts then gets less of them.

    Guarantees:
        Adding or removing a patient, with whatever rows, moves `clipped_sum` by at most ``sensitivity`` in
        L2 norm over all its entries, and `release` of it is ``event``.

    Attributes:
        concepts: Their names, fixed and public, K of them.
        dimension: d of the embeddings, public.
        max_norm: Bound on a patient's contribution, in [1e-12, 1e12]. The square root of
            2 (1 + count_weight²) lets a patient with an image and a report of one concept pass unclipped.
        count_weight: What a patient of one concept adds to its count, in the units of embeddings. Small, the
            count is noisy; large, the noise on the direction grows with the bound.

    Raises:
        PrivacyError: a concept twice or none, or a number out of its range.

    Source:
        Joint clipping as for a gradient: Abadi et al. (2016), arXiv:1607.00133, algorithm 1.
    """

    concepts: tuple[str, ...]
    dimension: int
    max_norm: float
    count_weight: float

    kind: ClassVar[str] = "prototypes"

    def __post_init__(self) -> None:
        if not self.concepts or len(set(self.concepts)) < len(self.concepts):
            raise PrivacyError(f"expected concepts={self.concepts} to be at least one, each once")
        if self.dimension < 1:
            raise PrivacyError(f"expected dimension={self.dimension} >= 1")
        if not LEAST_NORM <= self.max_norm <= LARGEST_NORM:
            raise PrivacyError(f"expected max_norm={self.max_norm} in [{LEAST_NORM}, {LARGEST_NORM}]")
        if not 0 < self.count_weight < math.inf:
            raise PrivacyError(f"expected count_weight={self.count_weight} > 0 and finite")
        _ = self.event  # checks the noise multiplier

    @property
    def sensitivity(self) -> float:
        """How far one patient moves the sum, in L2 norm."""
        return self.max_norm

    def clipped_sum(self, raw: Mapping[Modality, RawRows]) -> NDArray[np.float64]:
        """Sum of the patients' clipped contributions; private until it is released.

        A patient with a row, or a norm, that is not finite counts as zero. A modality that is absent, for a
        patient or for all, adds nothing; without patients the sum is zero.

        Returns:
            Sums of embeddings and, last, of weights: shape (2, K, d + 1), the modalities in the order of
            ``MODALITIES``.

        Raises:
            PrivacyError: the shapes of rows, embeddings and members do not fit the release.
        """
        for modality, rows in raw.items():
            self._check(modality, rows)
        rows_of = {modality: _rows_by_patient(rows.patients) for modality, rows in raw.items()}
        raw_total = np.zeros(self._shape)
        for patient in sorted(set().union(*rows_of.values())):
            own = {modality: rows[patient] for modality, rows in rows_of.items() if patient in rows}
            stated = self._stated(raw, own)  # all other concepts get nothing of this patient
            contribution = np.zeros((len(MODALITIES), len(stated), self.dimension + 1))
            for modality, mine in own.items():
                contribution[MODALITIES.index(modality)] = self._mean(raw[modality], mine, stated)
            # Whole numbers, rounded towards zero: no patient grows past the bound, and no rounding of a long
            # sum makes the difference of two neighbours larger than one patient.
            raw_total[:, stated] += np.trunc(_clipped(contribution, max_norm=self.max_norm) / self._grid)
        return raw_total * self._grid

    def release(self, clipped_sum: NDArray[np.float64], noise: GaussianNoise) -> NoisySums:
        """The sum with fresh noise on every coordinate, counts included.

        Raises:
            PrivacyError: the sum has another shape than this release's.
        """
        if clipped_sum.shape != self._shape:
            raise PrivacyError(f"expected a sum of shape {self._shape}, got {clipped_sum.shape}")
        # Sum and noise on one grid: the digits of float64 below the noise's own would tell the sum.
        drawn = noise.draw(self._shape, stddev=self.noise_std).numpy().astype(np.float64)
        noised = (np.rint(clipped_sum / self._grid) + np.rint(drawn / self._grid)) * self._grid
        return NoisySums(
            concepts=self.concepts,
            values=noised.astype(np.float32),
            noise_std=self.noise_std,
            count_weight=self.count_weight,
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(MODALITIES), len(self.concepts), self.dimension + 1

    @property
    def _grid(self) -> float:
        return _GRID * self.max_norm

    def _check(self, modality: Modality, rows: RawRows) -> None:
        if modality not in MODALITIES:
            raise PrivacyError(f"expected {modality=} to be one of {MODALITIES}")
        width, concepts = rows.embeddings.shape[1:], rows.members.shape[1:]
        if (width, concepts) != ((self.dimension,), (len(self.concepts),)) or not (
            rows.patients.shape == rows.embeddings.shape[:1] == rows.members.shape[:1]
        ):
            raise PrivacyError(
                f"expected {modality} rows of width {self.dimension} and {len(self.concepts)} concepts, as "
                "many of each as patients"
            )

    def _stated(
        self, raw: Mapping[Modality, RawRows], own: Mapping[Modality, NDArray[np.intp]]
    ) -> NDArray[np.intp]:
        """The concepts that one of a patient's rows states; none where a row is not finite."""
        if not all(np.isfinite(raw[modality].embeddings[rows]).all() for modality, rows in own.items()):
            return np.empty(0, dtype=np.intp)
        return np.flatnonzero(
            sum((raw[modality].members[rows] != 0).any(0) for modality, rows in own.items())
        )

    def _mean(self, raw: RawRows, own: NDArray[np.intp], concepts: NDArray[np.intp]) -> NDArray[np.float64]:
        members = raw.members[np.ix_(own, concepts)].astype(np.float64)
        embeddings = raw.embeddings[own].astype(np.float64)
        weighed = np.column_stack([embeddings, np.full(len(own), self.count_weight)])
        with np.errstate(all="ignore"):  # what is not finite is dropped with the patient
            mean: NDArray[np.float64] = np.einsum("nk,nd->kd", members, weighed) / len(own)
        return mean


def append_prototypes(bank: tuple[Tensor, Tensor], prototypes: PrototypeBank) -> tuple[Tensor, Tensor]:
    """An encoded anchor bank, image and text anchors (M, D), and behind it the prototypes: each (M + K, D).

    They are vectors already, so no weights re-encode them. A prototype is no negative of a pair whose own
    report states its concept: mask it there, as an anchor that says the same.

    Raises:
        PrivacyError: bank and prototypes differ in width.
    """
    images, texts = bank
    if images.shape[1] != prototypes.image.shape[1]:
        raise PrivacyError(f"anchors of width {images.shape[1]}, prototypes of {prototypes.image.shape[1]}")
    return (
        torch.cat([images, torch.tensor(prototypes.image).to(images)]),
        torch.cat([texts, torch.tensor(prototypes.text).to(texts)]),
    )


def _rows_by_patient(patients: NDArray[np.integer]) -> dict[int, NDArray[np.intp]]:
    order = np.argsort(patients, kind="stable")
    found, starts = np.unique(patients[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts)[1:], strict=True))  # before the first: nothing


def _clipped(contribution: NDArray[np.float64], *, max_norm: float) -> NDArray[np.float64]:
    """The vector at length ``max_norm`` at most; zero if its length is not finite."""
    with np.errstate(all="ignore"):
        norm = float(np.sqrt(np.square(contribution).sum()))
    if not math.isfinite(norm):
        return np.zeros_like(contribution)
    return contribution * min(1.0, max_norm / norm) if norm > 0 else contribution
