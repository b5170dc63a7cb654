"""Anchor banks: the public texts and images that every private pair is contrasted with.

A bank is drawn from several sources in turn. Whatever they are, they are public: no patient of the federation
is in them. What a federation has released before joins a bank later, as vectors: see `privacy.banks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.prompts import PROMPTS
from tasks.views import view_sentences

COARSE_PIXELS = 8  # of noise: finer, an image tower would see grey
T = TypeVar("T")


def _no_images() -> NDArray[np.uint8]:
    return np.empty((0, 0, 0), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class PublicAnchors:
    """Public texts and images, in no relation to each other. A source may have one kind only.

    Attributes:
        texts: M of them.
        images: Grey, at the model's size H, uint8 (N, H, H).
    """

    texts: tuple[str, ...] = ()
    images: NDArray[np.uint8] = field(default_factory=_no_images)


def label_prompts() -> PublicAnchors:
    """The sentences of zero-shot classification: findings that are there, and that are not."""
    pairs = PROMPTS.values()
    return PublicAnchors(texts=tuple(text for pair in pairs for text in (*pair.positive, *pair.negative)))


def view_texts() -> PublicAnchors:
    """How radiology captions begin: plane, technique, region, and a finding."""
    return PublicAnchors(texts=view_sentences())


def noise_images(count: int, *, size: int) -> PublicAnchors:
    """``count`` images of coarse uniform noise; the same ones every time."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, size=(count, COARSE_PIXELS, COARSE_PIXELS), dtype=np.uint8)
    repeat = -(-size // COARSE_PIXELS)
    return PublicAnchors(
        images=np.kron(coarse, np.ones((1, repeat, repeat), dtype=np.uint8))[:, :size, :size]
    )


def anchor_bank(sources: Sequence[PublicAnchors], *, count: int) -> PublicAnchors:
    """A bank of at most ``count`` texts and as many images, taken from the sources in turn.

    Guarantees:
        No text comes twice, whatever its case. The first rows of a bank are the same sources' bank of a
        smaller count, so that a site may use fewer. A source that has run out leaves its turns to the others.

    Args:
        sources: At least one has texts and one images; all images are of one size.
        count: K >= 1. Where texts or images are fewer, the bank is as small.
    """
    distinct: dict[str, str] = {}
    for text in _in_turn([source.texts for source in sources]):
        distinct.setdefault(text.lower(), text)
    texts = tuple(distinct.values())
    images = _in_turn([list(source.images) for source in sources])
    rows = min(count, len(texts), len(images))
    return PublicAnchors(texts=texts[:rows], images=np.stack(images[:rows]))


def _in_turn(sources: Sequence[Sequence[T]]) -> list[T]:
    """One of each source, then the second of each, and so on."""
    turns = zip_longest(*([(each,) for each in source] for source in sources), fillvalue=())
    return [each for turn in turns for place in turn for each in place]
