"""What every task asks of embeddings before it trusts a figure computed from them."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

EmbeddingArray: TypeAlias = NDArray[np.float32]

NORM_TOLERANCE = 1e-2  # bfloat16 keeps 8 bits: rounding alone moves a unit norm by up to 4e-3


class EvaluationError(ValueError):
    """An evaluation was asked for that has no meaningful answer."""


def checked_embeddings(name: str, embeddings: NDArray[Any], *, rows: int) -> EmbeddingArray:
    """Refuse embeddings whose scores would mean nothing.

    Guarantees:
        The result is float32, finite and L2-normalised row by row within 1 %, so that
        a dot product of two rows is their cosine.

    Args:
        name: What the caller calls these embeddings; appears in errors.
        embeddings: Shape (rows, D).
        rows: Expected number of embeddings.

    Raises:
        EvaluationError: The shape is wrong, or a row is not finite or not of unit length.
    """
    if embeddings.ndim != 2 or len(embeddings) != rows:
        raise EvaluationError(f"expected {name} of shape ({rows}, D), got {embeddings.shape}")
    embeddings = embeddings.astype(np.float32, copy=False)
    norms = np.linalg.norm(embeddings, axis=1)
    if broken := int(np.count_nonzero(~np.isfinite(norms))):
        raise EvaluationError(
            f"{broken} of {rows} rows of {name} are NaN or infinite: the model diverged, "
            "evaluate an earlier checkpoint"
        )
    if (worst := float(np.abs(norms - 1).max(initial=0))) > NORM_TOLERANCE:
        raise EvaluationError(
            f"expected L2-normalised rows in {name}, one norm is off by {worst:.3g}: "
            "divide each row by its norm"
        )
    return embeddings
