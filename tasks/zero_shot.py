"""Zero-shot classification: the model reads "there is" and "there is no", and nothing is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from tasks.embeddings import EmbeddingArray, EvaluationError, checked_embeddings
from tasks.prompts import prompts_for

TextEncoder: TypeAlias = Callable[[Sequence[str]], NDArray[Any]]

MIN_PER_SIDE = 2  # positives, and negatives, a class needs: with one image an AUROC is a single rank
CHANCE = 0.5  # AUROC of scores that know nothing of the label


@dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """Area under the ROC curve of each finding.

    Attributes:
        per_class: AUROC by finding; None where fewer than ``MIN_PER_SIDE`` positives or negatives are known.
        macro_auroc: Mean over the findings with an AUROC; None when there is none.
    """

    per_class: Mapping[str, float | None]
    macro_auroc: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return ``macro_auroc``, ``chance`` and ``per_class``, ready for JSON."""
        return {"macro_auroc": self.macro_auroc, "chance": CHANCE, "per_class": dict(self.per_class)}


def zero_shot(
    image_embeddings: NDArray[Any],
    encode_texts: TextEncoder,
    labels: Mapping[str, NDArray[np.floating[Any]]],
) -> ZeroShotResult:
    """Classify every finding by its prompts and compare with the labels.

    Args:
        image_embeddings: L2-normalised, shape (N, D).
        encode_texts: Gives the L2-normalised embeddings, shape (M, D), of M sentences.
        labels: For each finding 1 present, 0 absent, NaN unknown, shape (N,). Unknown images are left out
            of that finding alone.

    Raises:
        EvaluationError: A label has another shape or value, or an embedding is not a finite unit vector.
    """
    images = checked_embeddings("image_embeddings", image_embeddings, rows=len(image_embeddings))
    per_class = {
        finding: _auroc(
            presence_probability(images, encode_texts, finding=finding),
            _checked_labels(finding, known, rows=len(images)),
        )
        for finding, known in labels.items()
    }
    defined = [auroc for auroc in per_class.values() if auroc is not None]
    return ZeroShotResult(per_class=per_class, macro_auroc=float(np.mean(defined)) if defined else None)


def presence_probability(
    images: EmbeddingArray, encode_texts: TextEncoder, *, finding: str
) -> NDArray[np.float64]:
    """Score each image as the softmax of its cosines with the prompts for and against a finding.

    The prompts of one side are one direction: the mean of their unit embeddings, normalised again. The
    cosines are raw, without the model's inverse temperature.

    Args:
        images: L2-normalised, shape (N, D).
        encode_texts: Gives the L2-normalised embeddings, shape (M, D), of M sentences.
        finding: A name that ``tasks.prompts`` is asked for.

    Returns:
        Probabilities, shape (N,). Calibrated to nothing; only their order means something.

    Source:
        CheXzero, Tiu et al. (2022), Nature Biomedical Engineering 6:1399; its public zero_shot.py.
    """
    prompts = prompts_for(finding)
    sentences = prompts.positive + prompts.negative
    embeddings = checked_embeddings(f"prompts for {finding!r}", encode_texts(sentences), rows=len(sentences))
    if embeddings.shape[1] != images.shape[1]:
        raise EvaluationError(f"expected one width, got {images.shape=} and prompt {embeddings.shape=}")
    positive, negative = np.split(embeddings.astype(np.float64), [len(prompts.positive)])
    axis = _direction(positive) - _direction(negative)
    margin = np.einsum("nd,d->n", images, axis)  # not @: BLAS rounds equal rows apart, einsum lets them tie
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-margin))  # softmax of two
    return probability


def _direction(embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = embeddings.mean(axis=0)
    direction: NDArray[np.float64] = mean / np.linalg.norm(mean)
    return direction


def _checked_labels(
    finding: str, labels: NDArray[np.floating[Any]], *, rows: int
) -> NDArray[np.floating[Any]]:
    if labels.shape != (rows,):
        raise EvaluationError(f"expected labels of {finding!r} of shape ({rows},), got {labels.shape}")
    if strange := set(labels[~np.isnan(labels)].tolist()) - {0.0, 1.0}:
        raise EvaluationError(
            f"expected labels of {finding!r} in {{0, 1, NaN}}, got {min(strange)}: write uncertain as NaN"
        )
    return labels


def _auroc(scores: NDArray[np.float64], labels: NDArray[np.floating[Any]]) -> float | None:
    known = ~np.isnan(labels)
    present = labels[known] == 1
    if min(np.count_nonzero(present), np.count_nonzero(~present)) < MIN_PER_SIDE:
        return None
    return float(roc_auc_score(present, scores[known]))
