"""Fewer dimensions before a release: noise grows with the square root of how many numbers leave."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PrivacyError


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Embeddings onto a public subspace, and back. It knows no patient, so it costs nothing.

    Attributes:
        basis: Orthonormal rows, float64, shape (d, D).
        scale: Public factor that gives back, on average, the length lost on the way down.
    """

    basis: NDArray[np.float64]
    scale: float

    @classmethod
    def random(cls, *, width: int, dimension: int, seed: int) -> Self:
        """A subspace drawn from a public seed, uniform among all.

        It keeps cosines among what is projected within about 1 / sqrt(d). It holds only d / D of any vector,
        so a direction lifted again has a cosine of at most about sqrt(d / D) with the one that went in: good
        for comparing prototypes below, a loss for anchors above.

        Args:
            width: D of the embeddings.
            dimension: d in [1, D].
            seed: Public.

        Raises:
            PrivacyError: ``dimension`` is out of its range.

        Source:
            Johnson and Lindenstrauss (1984); QR with signs, Mezzadri (2007), arXiv:math-ph/0609050.
        """
        _check(dimension, width)
        normal = np.random.default_rng(seed).standard_normal((width, dimension))
        orthogonal, triangular = np.linalg.qr(normal)
        basis = (orthogonal * np.sign(np.diagonal(triangular))).T
        return cls(basis=basis, scale=math.sqrt(width / dimension))

    @classmethod
    def principal(cls, public: NDArray[np.floating], *, dimension: int) -> Self:
        """The subspace that holds most of some public embeddings (N, D), and so most of others like them.

        Raises:
            PrivacyError: ``dimension`` is out of its range, or more than the public embeddings span.
        """
        _check(dimension, min(public.shape))
        _, lengths, directions = np.linalg.svd(public.astype(np.float64), full_matrices=False)
        kept = np.square(lengths[:dimension]).sum() / np.square(lengths).sum()
        return cls(basis=directions[:dimension], scale=1 / math.sqrt(kept))

    def apply(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Vectors (..., D) below: (..., d)."""
        return self.scale * (vectors.astype(np.float64) @ self.basis.T)

    def lift(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Vectors (..., d) back among the embeddings: (..., D)."""
        lifted: NDArray[np.float64] = vectors.astype(np.float64) @ self.basis / self.scale
        return lifted


def _check(dimension: int, most: int) -> None:
    if not 1 <= dimension <= most:
        raise PrivacyError(f"expected {dimension=} in [1, {most}]")
