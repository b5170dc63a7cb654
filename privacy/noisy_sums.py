"""Sums of embeddings by concept once noise is on them: added up over hospitals, turned into directions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError
from privacy.projection import Projection

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


@dataclass(frozen=True, kw_only=True)
class NoisySums:
    """What was released, by one hospital or by several together: sums of embeddings, and counts.

    Attributes:
        concepts: Their names, K of them.
        values: float32, shape (2, K, d + 1): image and text, each the sum of embeddings and, last, weights.
        noise_std: Standard deviation of the noise in every entry of ``values``.
        count_weight: What a patient of one concept adds to the last column.
    """

    concepts: tuple[str, ...]
    values: NDArray[np.float32]
    noise_std: float
    count_weight: float

    @property
    def counts(self) -> NDArray[np.float32]:
        """Noisy patients of each concept, float32 (2, K); one who was clipped counts for less than 1."""
        counts: NDArray[np.float32] = self.values[..., -1] / np.float32(self.count_weight)
        return counts

    def bank(
        self,
        prompts: NDArray[np.floating],
        *,
        least_count: float,
        wordings: Sequence[Sequence[str]] | None = None,
        projection: Projection | None = None,
    ) -> PrototypeBank:
        """Directions of the concepts; where the noisy count is too low, the concept's prompt instead.

        A direction of length rho under its concept's patients comes out at a cosine of about
        n rho / sqrt(n² rho² + noise_std² d), so a sensible ``least_count`` grows with noise_std sqrt(d).

        Args:
            prompts: Unit embeddings of the concepts' text prompts, shape (K, D).
            least_count: Smallest noisy count that is used.
            wordings: The sentences of each concept's prompts; by default its name.
            projection: What the embeddings went through before they were summed.

        Raises:
            PrivacyError: ``prompts`` has another shape, or is not of unit length, or ``wordings`` are not one
                or more sentences a concept.
        """
        sums = self.values[..., :-1].astype(np.float64)
        sums = sums if projection is None else projection.lift(sums)
        if prompts.shape != sums.shape[1:]:
            raise PrivacyError(f"expected prompts of shape {sums.shape[1:]}, got {prompts.shape}")
        lengths = np.linalg.norm(sums, axis=-1, keepdims=True)
        used = (self.counts[..., None] >= least_count) & (lengths > 0)
        vectors = np.where(used, sums / np.where(used, lengths, 1), prompts).astype(np.float32)
        said = [(name,) for name in self.concepts] if wordings is None else wordings
        return PrototypeBank(
            concepts=self.concepts, wordings=tuple(map(tuple, said)), image=vectors[0], text=vectors[1]
        )


def add_up(releases: Sequence[NoisySums]) -> NoisySums:
    """The release of several hospitals together: sums add, and the noise of k alike grows by sqrt(k) only.

    Raises:
        PrivacyError: there is none, or they differ in concepts, dimension or count weight.
    """
    if not releases:
        raise PrivacyError("expected at least one release to add up")
    first = releases[0]
    for other in releases[1:]:
        if (other.concepts, other.values.shape, other.count_weight) != (
            first.concepts,
            first.values.shape,
            first.count_weight,
        ):
            raise PrivacyError("releases add up only with equal concepts, dimension and count weight")
    values = np.stack([release.values for release in releases]).sum(0, dtype=np.float64)
    return NoisySums(
        concepts=first.concepts,
        values=values.astype(np.float32),
        noise_std=math.hypot(*(release.noise_std for release in releases)),
        count_weight=first.count_weight,
    )
