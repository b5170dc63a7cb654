"""Plain contrastive training without any privacy claim: public starts, and runs that chose no privacy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.augmentation import augment
from encoders.objectives import infonce_loss, prototype_loss, soft_targets
from encoders.parts import TrainablePart

LARGEST_GRADIENT = 1.0
ANCHOR_REFRESH_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Image-text pairs as inputs of one `TrainablePart`.

    Attributes:
        images: One row a pair.
        texts: One row a pair.
        text_keys: Equal for pairs with equal text, int64, shape (N,).
    """

    images: Tensor
    texts: Tensor
    text_keys: Tensor

    @classmethod
    def of(cls, part: TrainablePart, images: NDArray[np.uint8], texts: Sequence[str]) -> "Pairs":
        """Packed images and their texts in the form ``part`` trains on.

        One image, or one text, stands for all of them; it is worked out once and takes no room.
        """
        rows = max(len(images), len(texts))
        numbers: dict[str, int] = {}
        keys = [numbers.setdefault(text.lower(), len(numbers)) for text in texts]
        image_inputs, text_inputs = part.inputs(images, texts)
        text_keys = torch.tensor(keys, device=image_inputs.device)
        sides = (
            value if len(value) == rows else value.expand(rows, *value.shape[1:])
            for value in (image_inputs, text_inputs, text_keys)
        )
        all_images, all_texts, all_keys = sides
        return cls(images=all_images, texts=all_texts, text_keys=all_keys)

    def __len__(self) -> int:
        return len(self.text_keys)


@dataclass(frozen=True, kw_only=True)
class PublicBank:
    """Public texts and all sites' prototypes, which images are told apart by besides their batch's texts.

    Where all texts of a site share what they are about, no batch of its own asks for that; these do.

    Attributes:
        texts: Inputs of one `TrainablePart`, one row a text, K of them.
        shares: How far pair i's own text says what public text k, or concept k - K, says, in [0, 1], float32,
            shape (N, K + P); or the inverse temperature of `encoders.objectives.soft_targets`.
        prototypes: Unit vectors of P concepts, of images and of texts, each (P, D); null: there are none.
    """

    texts: Tensor
    shares: Tensor | float
    prototypes: tuple[Tensor, Tensor] | None = None


def fit_infonce(
    part: TrainablePart,
    pairs: Pairs,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int,
    inverse_temperature: float,
    augmented: bool,
    rng: np.random.Generator,
    public: PublicBank | None = None,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Take ``steps`` steps of InfoNCE over reshuffled pairs; changes the part's weights in place.

    With ``public`` the mean `prototype_loss` of the batch is added: an image has to tell which public texts,
    and which prototypes of texts, say what its own says, and a text which prototypes of images. The public
    texts are embedded without gradient, anew every `ANCHOR_REFRESH_STEPS`; prototypes stay as they are.
    """
    parameters = list(part.parameters().values())
    batches = shuffled_batches(len(pairs), batch=batch, rng=rng)
    for step in range(steps):
        rows = torch.from_numpy(next(batches)).to(pairs.images.device)
        images = pairs.images[rows]
        if augmented and images.dtype == torch.uint8:
            images = augment(images, rng=rng)
        image_embeddings, text_embeddings = part.module(images, part.trimmed(pairs.texts[rows]))
        keys = pairs.text_keys[rows]
        loss = infonce_loss(
            image_embeddings,
            text_embeddings,
            same_text=keys[:, None] == keys[None, :],
            inverse_temperature=inverse_temperature,
        )
        if public is not None:
            if step % ANCHOR_REFRESH_STEPS == 0:
                text_anchors, image_anchors = _encoded(public, part)
            shares = (
                public.shares[rows]
                if isinstance(public.shares, Tensor)
                else soft_targets(text_embeddings, text_anchors, inverse_temperature=public.shares)
            )
            for embeddings, anchors in ((image_embeddings, text_anchors), (text_embeddings, image_anchors)):
                if anchors is None:
                    continue
                own = shares[:, -len(anchors) :]
                loss = (
                    loss
                    + prototype_loss(
                        embeddings,
                        anchors=anchors,
                        masked=torch.zeros_like(own, dtype=torch.bool),
                        positives=own,
                        inverse_temperature=inverse_temperature,
                    ).mean()
                )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        if on_step:
            on_step(step)


@torch.no_grad()
def _encoded(public: PublicBank, part: TrainablePart) -> tuple[Tensor, Tensor | None]:
    """Text anchors (K + P, D), and image anchors (P, D) if there are prototypes."""
    texts = part.module.embed_texts(part.trimmed(public.texts))
    if public.prototypes is None:
        return texts, None
    of_images, of_texts = public.prototypes
    return torch.cat([texts, of_texts]), of_images


def shuffled_batches(rows: int, *, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Row numbers without end: every pass a new order, cut into equal parts of about ``batch`` rows."""
    while True:
        yield from np.array_split(rng.permutation(rows), max(1, round(rows / batch)))
