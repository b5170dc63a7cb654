"""The evaluation of one checkpoint: retrieval and zero-shot classification on one set of pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.embeddings import EmbeddingArray, EvaluationError
from tasks.retrieval import retrieval
from tasks.zero_shot import zero_shot


class Embedder(Protocol):
    """A model as the tasks see it: two towers into one space, in evaluation mode."""

    def image_embeddings(self, images: NDArray[np.uint8]) -> EmbeddingArray:
        """Embed packed images, shape (N, S, S) or (N, S, S, 3), as L2-normalised rows, shape (N, D)."""
        ...

    def text_embeddings(self, texts: Sequence[str]) -> EmbeddingArray:
        """Embed N texts as L2-normalised rows, shape (N, D)."""
        ...


def evaluate(
    embedder: Embedder,
    *,
    images: NDArray[np.uint8],
    texts: Sequence[str],
    labels: Mapping[str, NDArray[np.floating[Any]]],
) -> dict[str, Any]:
    """Measure what a model is worth on image-text pairs.

    Args:
        embedder: The model.
        images: Packed, shape (N, S, S), or (N, S, S, 3) with channels.
        texts: The report of each image, N of them.
        labels: For each finding 1 present, 0 absent, NaN unknown, shape (N,); empty when nothing is labelled.

    Returns:
        ``{"retrieval": {"image_to_text": {...}, "text_to_image": {...}}, "zero_shot": {...} or None}`` with
        the keys of ``Recall.as_dict`` and ``ZeroShotResult.as_dict``, made of dicts, strings, finite numbers
        and None alone: strict JSON takes it. Figures of private pairs are private themselves.

    Raises:
        EvaluationError: The set is empty, lengths disagree, a label is out of range, or the model gives
            anything but finite unit vectors.
    """
    if not len(images):
        raise EvaluationError("the evaluation set is empty: name a set with at least one image-text pair")
    if len(images) != len(texts):
        raise EvaluationError(f"expected one text per image, got {len(images)} images and {len(texts)} texts")
    image_embeddings = embedder.image_embeddings(images)
    found = retrieval(image_embeddings, embedder.text_embeddings(texts), texts)
    classified = zero_shot(image_embeddings, embedder.text_embeddings, labels) if labels else None
    return {"retrieval": found.as_dict(), "zero_shot": classified.as_dict() if classified else None}
