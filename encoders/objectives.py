"""Contrastive losses: what decomposes over pairs or groups may carry a privacy claim, InfoNCE may not."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

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
    positives: Tensor | None = None,
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
        masked: Boolean (B, K): anchor k says the same as pair i, so it is left out for it.
        inverse_temperature: s, public and fixed.
        positives: How far anchor k is a partner of pair i too, in [0, 1], shape (B, K), a function of row i
            and the anchors alone. The target is then shared: 1 for the own partner, p for an anchor, over
            their sum. None: no anchor is.

    Returns:
        Loss of each pair, shape (B,).

    Raises:
        ValueError: an anchor carries a gradient (per-pair gradients would silently be wrong).

    Source:
        Decomposed form of InfoNCE, van den Oord et al. (2018), arXiv:1807.03748, with a fixed bank; soft
        targets as in MedCLIP, Wang et al. (2022), arXiv:2210.10163, section 3.3.
    """
    _refuse_gradient(text_anchors, image_anchors)
    own = inverse_temperature * (image_embeddings * text_embeddings).sum(-1, keepdim=True)
    against_texts = inverse_temperature * image_embeddings @ text_anchors.T
    against_images = inverse_temperature * text_embeddings @ image_anchors.T
    shares = None if positives is None else positives.masked_fill(masked, 0)
    total = own.new_zeros(own.shape[:-1])
    for anchors in (against_texts, against_images):
        target = own.squeeze(-1)
        if shares is not None:
            target = (target + (shares * anchors).sum(-1)) / (1 + shares.sum(-1))
        logits = torch.cat([own, anchors.masked_fill(masked, -torch.inf)], dim=-1)
        total = total + torch.logsumexp(logits, dim=-1) - target
    return 0.5 * total


def anchored_sigmoid_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    text_anchors: Tensor,
    image_anchors: Tensor,
    masked: Tensor,
    inverse_temperature: float,
    logit_bias: float,
    positives: Tensor | None = None,
) -> Tensor:
    """SigLIP's form of `anchored_loss`: every pairing is a yes-or-no question of its own.

    With z = s <x, y> + b of a pairing, the own partner costs -log sigmoid(z), and an anchor that is a partner
    to the degree p costs -p log sigmoid(z) - (1 - p) log sigmoid(-z). The two sides' anchors are averaged, as
    every pairing of SigLIP's batch counts once for two pairs.

    Guarantees:
        As `anchored_loss`: element i depends on pair i and the anchors alone.

    Args:
        image_embeddings: Unit vectors u, shape (B, D).
        text_embeddings: Unit vectors v, shape (B, D).
        text_anchors: Unit vectors without gradient, shape (K, D).
        image_anchors: Unit vectors without gradient, shape (K, D).
        masked: Boolean (B, K): anchor k says the same as pair i, so it is left out for it.
        inverse_temperature: s, public and fixed.
        logit_bias: b, public and fixed. About -log K keeps K anchors at the start from outweighing the one
            partner (SigLIP starts at -10).
        positives: p, as for `anchored_loss`. None: 0.

    Returns:
        Loss of each pair, shape (B,).

    Raises:
        ValueError: an anchor carries a gradient (per-pair gradients would silently be wrong).

    Source:
        Zhai et al. (2023), arXiv:2303.15343, algorithm 1, with a fixed bank instead of the batch.
    """
    _refuse_gradient(text_anchors, image_anchors)
    own = inverse_temperature * (image_embeddings * text_embeddings).sum(-1) + logit_bias
    total = -F.logsigmoid(own)
    for embeddings, anchors in ((image_embeddings, text_anchors), (text_embeddings, image_anchors)):
        logits = inverse_temperature * embeddings @ anchors.T + logit_bias
        costs = -F.logsigmoid(-logits)
        if positives is not None:
            costs = costs - positives * logits
        total = total + 0.5 * costs.masked_fill(masked, 0).sum(-1)
    return total


def prototype_loss(
    embeddings: Tensor,
    *,
    anchors: Tensor,
    masked: Tensor,
    positives: Tensor,
    inverse_temperature: float,
    logit_bias: float | None = None,
) -> Tensor:
    """Each image, or text, without a partner against the other side's anchors, drawn to those it belongs to.

    Guarantees:
        Element i depends on row i and the anchors alone.

    Args:
        embeddings: Unit vectors, shape (B, D).
        anchors: Unit vectors of the other side, without gradient, shape (K, D).
        masked: Boolean (B, K): anchor k is left out for row i.
        positives: How far row i belongs to anchor k, in [0, 1], shape (B, K).
        inverse_temperature: s, public and fixed.
        logit_bias: b of the sigmoid form; None: the softmax form.

    Returns:
        Loss of each row, shape (B,). In the softmax form it is 0 for a row that belongs nowhere.

    Raises:
        ValueError: an anchor carries a gradient.

    Source:
        Prototypes as classes, Tan et al. (2022), arXiv:2105.00243 (FedProto), in the forms of `anchored_loss`
        and `anchored_sigmoid_loss` without their partner.
    """
    _refuse_gradient(anchors)
    shares = positives.masked_fill(masked, 0)
    logits = inverse_temperature * embeddings @ anchors.T
    if logit_bias is not None:
        logits = logits + logit_bias
        return (-F.logsigmoid(-logits) - shares * logits).masked_fill(masked, 0).sum(-1)
    total = shares.sum(-1)
    spread = torch.logsumexp(logits.masked_fill(masked, -torch.inf), dim=-1)
    missed = spread - (shares * logits).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, missed, 0 * embeddings.sum(-1))


def infonce_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    same_text: Tensor,
    inverse_temperature: float,
    soft_targets: Tensor | None = None,
) -> Tensor:
    """CLIP's symmetric loss over the batch; pairs with the same text are no negatives of each other.

    It couples the pairs of a batch: never used where an epsilon is claimed.

    Args:
        image_embeddings: Unit vectors, shape (B, D).
        text_embeddings: Unit vectors, shape (B, D).
        same_text: Boolean (B, B), true where two pairs have the same text (the diagonal included).
        inverse_temperature: s = 1 / temperature.
        soft_targets: How far text j is a partner of image i too, from the similarity of the texts: >= 0 and
            of positive diagonal, shape (B, B). Rows, and columns for the other direction, are divided by
            their sum. A pair with the same text and a target above 0 is a positive instead of left out.
            None: the identity.

    Returns:
        Mean loss, a scalar.

    Source:
        Radford et al. (2021), figure 3; semantic matching of Wang et al. (2022), arXiv:2210.10163, section
        3.3, whose targets are the softmax of a similarity: give its exponential.
    """
    logits = inverse_temperature * image_embeddings @ text_embeddings.T
    diagonal = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    targets = diagonal if soft_targets is None else soft_targets
    left_out = same_text & (targets == 0)
    candidates = logits.masked_fill(left_out, -torch.inf)
    per_image = candidates.logsumexp(1) - (targets * logits).sum(1) / targets.sum(1)
    per_text = candidates.logsumexp(0) - (targets * logits).sum(0) / targets.sum(0)
    return 0.5 * (per_image.mean() + per_text.mean())


def grouped_infonce_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, *, negatives: Tensor, inverse_temperature: float
) -> Tensor:
    """CLIP's symmetric loss inside each of G groups that never see each other.

    Guarantees:
        Element (g, i) depends on group g alone. It depends on the whole of that group: what is clipped is a
        group's gradient, and a patient moves the sum of those by up to twice the bound.

    Args:
        image_embeddings: Unit vectors, shape (G, S, D).
        text_embeddings: Unit vectors, shape (G, S, D).
        negatives: Boolean (G, S, S): pair j is a negative for pair i of the group.
        inverse_temperature: s = 1 / temperature.

    Returns:
        Loss of each pair, shape (G, S); 0 without negatives.

    Source:
        Radford et al. (2021), figure 3, on each group.
    """
    logits = inverse_temperature * image_embeddings @ text_embeddings.transpose(-1, -2)
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    candidates = logits.masked_fill(~(negatives | itself), -torch.inf)
    own = logits.diagonal(dim1=-2, dim2=-1)
    return 0.5 * (candidates.logsumexp(-1) + candidates.logsumexp(-2)) - own


def text_similarity(texts: Sequence[str], anchors: Sequence[str]) -> NDArray[np.float32]:
    """Cosine of the word counts of each text and each anchor, in [0, 1], shape (N, K).

    Row i depends on text i and the anchors alone. A text without a word is like nothing, itself included.
    """
    similarity = np.empty((len(texts), len(anchors)), dtype=np.float32)
    for row, cosines in enumerate(_cosines(texts, anchors)):
        similarity[row] = np.minimum(cosines, 1)
    return similarity


def same_meaning(texts: Sequence[str], anchors: Sequence[str]) -> NDArray[np.bool_]:
    """Which anchors say the same as which text: `text_similarity` of at least 0.9. Shape (N, K)."""
    matches = np.empty((len(texts), len(anchors)), dtype=bool)
    for row, cosines in enumerate(_cosines(texts, anchors)):
        matches[row] = cosines >= SAME_MEANING
    return matches


def soft_positives(similarity: NDArray[np.float32], *, least: float) -> NDArray[np.float32]:
    """How far an anchor is a positive: 0 up to a similarity of ``least``, 1 from 0.9 on, a line between.

    Two reports share words whatever they say, and an objective divides its target among all positives: the
    similarity itself would leave nothing to the own partner.

    Args:
        similarity: Of `text_similarity`, any shape.
        least: In [0, 0.9).

    Raises:
        ValueError: ``least`` is out of its range.
    """
    if not 0 <= least < SAME_MEANING:
        raise ValueError(f"expected {least=} in [0, {SAME_MEANING})")
    return np.asarray(np.clip((similarity - least) / (SAME_MEANING - least), 0, 1), dtype=np.float32)


def soft_targets(text_embeddings: Tensor, text_anchors: Tensor, *, inverse_temperature: float) -> Tensor:
    """How far each anchor is right for a pair, by how near its text is to the pair's own: 1 for all together.

    Row i depends on row i and the anchors alone, and carries no gradient.

    Args:
        text_embeddings: Unit vectors, shape (B, D).
        text_anchors: Unit vectors, shape (K, D).
        inverse_temperature: The larger, the fewer anchors share the target.

    Returns:
        Shape (B, K).

    Source:
        Semantic matching of Wang et al. (2022), arXiv:2210.10163, section 3.3, by embeddings for labels.
    """
    return (inverse_temperature * text_embeddings.detach() @ text_anchors.T).softmax(-1)


def _refuse_gradient(*anchors: Tensor) -> None:
    if any(side.requires_grad for side in anchors):
        raise ValueError("anchors must be built under no_grad: a bank with gradient leaks into every pair")


def _cosines(texts: Sequence[str], anchors: Sequence[str]) -> Iterator[NDArray[np.float64]]:
    """For each text, the cosine of its word counts with every anchor's, shape (K,)."""
    words = sorted({word for text in anchors for word in _words(text)})
    column = {word: position for position, word in enumerate(words)}
    bank = np.array([_counts(text, column) for text in anchors]).reshape(len(anchors), len(words))
    bank_norm = np.array([_norm(text) for text in anchors])
    for text in texts:
        yield bank @ _counts(text, column) / np.maximum(bank_norm * _norm(text), 1e-12)


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
