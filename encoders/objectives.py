"""Contrastive losses. One decomposes over pairs and may carry a privacy claim, the other may not."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SAME_MEANING = 0.9


def anchored_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    text_anchors: Tensor,
    image_anchors: Tensor,
    masked: Tensor,
    inverse_temperature: float,
) -> Tensor:
    """Each pair against its own partner and public anchors, never against another pair of the batch.

    Guarantees:
        Element i depends on pair i and the anchors alone, so clipping each patient's gradient to C gives a
        sum of sensitivity C under adding or removing a patient.

    Args:
        image_embeddings: Unit vectors u, shape (B, D).
        text_embeddings: Unit vectors v, shape (B, D).
        text_anchors: Unit vectors without gradient, shape (K, D).
        image_anchors: Unit vectors without gradient, shape (K, D).
        masked: Boolean (B, K): anchor k says the same as pair i, so it is no negative for it.
        inverse_temperature: s, public and fixed.

    Returns:
        Loss of each pair, shape (B,).

    Raises:
        ValueError: an anchor carries a gradient (per-pair gradients would silently be wrong).

    Source:
        Decomposed form of InfoNCE, van den Oord et al. (2018), arXiv:1807.03748, with a fixed bank.
    """
    if text_anchors.requires_grad or image_anchors.requires_grad:
        raise ValueError("anchors must be built under no_grad: a bank with gradient leaks into every pair")
    positive = inverse_temperature * (image_embeddings * text_embeddings).sum(-1, keepdim=True)
    against_texts = inverse_temperature * image_embeddings @ text_anchors.T
    against_images = inverse_temperature * text_embeddings @ image_anchors.T
    total = positive.new_zeros(positive.shape[:-1])
    for negatives in (against_texts, against_images):
        logits = torch.cat([positive, negatives.masked_fill(masked, -torch.inf)], dim=-1)
        total = total + torch.logsumexp(logits, dim=-1) - positive.squeeze(-1)
    return 0.5 * total


def infonce_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, *, same_text: Tensor, inverse_temperature: float
) -> Tensor:
    """CLIP's symmetric loss over the batch; pairs with the same text are no negatives of each other.

    It couples the pairs of a batch: never used where an epsilon is claimed.

    Args:
        image_embeddings: Unit vectors, shape (B, D).
        text_embeddings: Unit vectors, shape (B, D).
        same_text: Boolean (B, B), true where two pairs have the same text (the diagonal included).
        inverse_temperature: s = 1 / temperature.

    Returns:
        Mean loss, a scalar.

    Source:
        Radford et al. (2021), figure 3.
    """
    logits = inverse_temperature * image_embeddings @ text_embeddings.T
    others = same_text & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(others, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def same_meaning(texts: Sequence[str], anchors: Sequence[str]) -> NDArray[np.bool_]:
    """Which anchors say the same as which text: cosine of word counts >= 0.9. Shape (N, K).

    Row i depends on text i and the anchors alone.
    """
    words = sorted({word for text in anchors for word in _words(text)})
    column = {word: position for position, word in enumerate(words)}
    bank = np.stack([_counts(text, column) for text in anchors])
    bank_norm = np.array([_norm(text) for text in anchors])
    matches = np.empty((len(texts), len(anchors)), dtype=bool)
    for row, text in enumerate(texts):
        cosine = bank @ _counts(text, column) / np.maximum(bank_norm * _norm(text), 1e-12)
        matches[row] = cosine >= SAME_MEANING
    return matches


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _counts(text: str, column: dict[str, int]) -> NDArray[np.float32]:
    counts = np.zeros(len(column), dtype=np.float32)
    for word, count in Counter(_words(text)).items():
        if word in column:
            counts[column[word]] = count
    return counts


def _norm(text: str) -> float:
    return float(np.sqrt(sum(count * count for count in Counter(_words(text)).values())))
