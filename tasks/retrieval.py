"""Image-text retrieval: how often a model finds the report of an image, and an image of a report.

Reports repeat ("No acute cardiopulmonary process."), so texts that read the same count as one text, as in
CXR-CLIP (You et al. 2023, arXiv:2310.13292); without that a perfect model scores far below 1. Recall on
training patients is also a measure of leakage, which is why every recall stands beside its chance level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tasks.embeddings import EmbeddingArray, EvaluationError, checked_embeddings

IndexArray: TypeAlias = NDArray[np.intp]

TIE = 1e-6  # a float32 dot product of equal rows moves by about 1e-7 with their place in the matrix
BLOCK_SCORES = 2**24  # scores held at once: 64 MiB in float32, whatever the size of the set


@dataclass(frozen=True, kw_only=True)
class Recall:
    """One direction of retrieval.

    Attributes:
        recall: For each k, the fraction of queries with a hit among their k best candidates.
        chance: For each k, the expected recall of a random order of the candidates.
        n: Number of queries.
        median_rank: Median over queries of the rank of the first hit; 1 is best.
    """

    recall: Mapping[int, float]
    chance: Mapping[int, float]
    n: int
    median_rank: float

    def as_dict(self) -> dict[str, float | int]:
        """Return ``r1``, ``chance_r1``, ... for every k, ``n`` and ``median_rank``, ready for JSON."""
        recall = {f"r{k}": value for k, value in self.recall.items()}
        chance = {f"chance_r{k}": value for k, value in self.chance.items()}
        return {**recall, **chance, "n": self.n, "median_rank": self.median_rank}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Retrieval both ways: images that look for their text, distinct texts that look for an image."""

    image_to_text: Recall
    text_to_image: Recall

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        """Return both directions, ready for JSON."""
        return {"image_to_text": self.image_to_text.as_dict(), "text_to_image": self.text_to_image.as_dict()}


def retrieval(
    image_embeddings: NDArray[Any],
    text_embeddings: NDArray[Any],
    texts: Sequence[str],
    *,
    ranks: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """Measure Recall@k from images to distinct texts and from distinct texts to images.

    Texts that differ only in case or white space are one text, embedded as its first occurrence. An image
    hits its own text; a text hits any image that carries it.

    Guarantees:
        Ties count against the model: the first hit stands behind every wrong candidate of the same score,
        so a collapsed model, whose scores are all equal, is never above chance. Memory does not grow with
        the product of images and texts.

    Args:
        image_embeddings: L2-normalised, shape (N, D).
        text_embeddings: L2-normalised, shape (N, D); row i belongs to ``texts[i]``.
        texts: The text of each image, N of them.
        ranks: The k of Recall@k, each at least 1. A k beyond the number of candidates is a certain hit.

    Raises:
        EvaluationError: The set is empty, shapes disagree, a rank is below 1, or an embedding is not a
            finite unit vector.
    """
    if not texts:
        raise EvaluationError("expected at least one image-text pair to evaluate, got none")
    if not ranks or min(ranks) < 1:
        raise EvaluationError(f"expected one or more {ranks=}, each at least 1")
    images = checked_embeddings("image_embeddings", image_embeddings, rows=len(texts))
    all_texts = checked_embeddings("text_embeddings", text_embeddings, rows=len(texts))
    if images.shape != all_texts.shape:
        raise EvaluationError(f"expected one width, got {images.shape=} and text {all_texts.shape=}")

    text_of_image = _distinct(texts)
    text_ids, first_occurrence, images_per_text = np.unique(
        text_of_image, return_index=True, return_counts=True
    )
    distinct_texts = all_texts[first_occurrence]
    return RetrievalResult(
        image_to_text=_recall(
            _first_hit_ranks(images, distinct_texts, text_of_image, text_ids),
            chance={k: _chance(k, len(text_ids), np.ones(1)) for k in ranks},
        ),
        text_to_image=_recall(
            _first_hit_ranks(distinct_texts, images, text_ids, text_of_image),
            chance={k: _chance(k, len(images), images_per_text) for k in ranks},
        ),
    )


def _distinct(texts: Sequence[str]) -> IndexArray:
    """Number the texts by first occurrence, giving equal numbers to texts that read the same."""
    numbers: dict[str, int] = {}
    keys = (" ".join(text.split()).casefold() for text in texts)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)


def _first_hit_ranks(
    queries: EmbeddingArray, candidates: EmbeddingArray, query_ids: IndexArray, candidate_ids: IndexArray
) -> IndexArray:
    """Rank each query's best hit, a candidate with the query's id, among the wrong candidates.

    Other hits never push a hit down: ten images of one text in the first ten places are rank 1.

    Args:
        queries: Shape (Q, D).
        candidates: Shape (C, D).
        query_ids: Shape (Q,); each occurs in ``candidate_ids``.
        candidate_ids: Shape (C,).

    Returns:
        Ranks from 1, shape (Q,).
    """
    ranks = np.empty(len(queries), dtype=np.intp)
    step = max(1, BLOCK_SCORES // len(candidates))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        scores = queries[block] @ candidates.T
        hits = query_ids[block, None] == candidate_ids
        best_hit = scores.max(axis=1, where=hits, initial=-np.inf)
        ranks[block] = 1 + np.count_nonzero((scores >= best_hit[:, None] - TIE) & ~hits, axis=1)
    return ranks


def _chance(k: int, candidates: int, hits: NDArray[Any]) -> float:
    """Average over queries the chance 1 - C(N-m, k) / C(N, k) that k random ones of N hold one of m hits."""
    miss = np.ones(len(hits))
    for drawn in range(min(k, candidates)):
        miss *= np.maximum(candidates - hits - drawn, 0) / (candidates - drawn)
    return float(np.mean(1 - miss))


def _recall(ranks: IndexArray, *, chance: Mapping[int, float]) -> Recall:
    return Recall(
        recall={k: float(np.mean(ranks <= k)) for k in chance},
        chance=chance,
        n=len(ranks),
        median_rank=float(np.median(ranks)),
    )
