"""Prototypes once they are released: unit vectors with the concepts they stand for, kept in a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from privacy.errors import PrivacyError

VERSION = 1
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PrototypeBank:
    """One unit vector a concept and modality, in the space of the embeddings.

    Attributes:
        concepts: Their names, K of them, each once.
        wordings: How a report writes each concept, K times one sentence or more; public.
        image: float32, shape (K, D).
        text: float32, shape (K, D).

    Raises:
        PrivacyError: shapes do not fit, a name or sentence is blank, or a row is not a finite vector of
            length 1.
    """

    concepts: tuple[str, ...]
    wordings: tuple[tuple[str, ...], ...]
    image: NDArray[np.float32]
    text: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not _sentences(self.concepts) or len(set(self.concepts)) < len(self.concepts):
            raise PrivacyError("expected the names of at least one concept, each once and none blank")
        if len(self.wordings) != len(self.concepts) or not all(map(_sentences, self.wordings)):
            raise PrivacyError(
                f"expected wordings of {len(self.concepts)} concepts, a sentence or more for each"
            )
        for name, vectors in (("image", self.image), ("text", self.text)):
            if vectors.shape != (len(self.concepts), *self.image.shape[1:2]):
                raise PrivacyError(
                    f"expected {name} prototypes of {len(self.concepts)} concepts in rows of D"
                )
            if vectors.dtype != np.float32:
                raise PrivacyError(f"expected {name} prototypes in float32, got {vectors.dtype}")
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            if not (np.abs(lengths - 1) <= _UNIT_TOLERANCE).all():
                raise PrivacyError(f"expected {name} prototypes of length 1: divide each by its norm")

    def require_width(self, width: int) -> None:
        """Nothing, if the vectors have so many entries.

        Raises:
            PrivacyError: they have another number.
        """
        if self.image.shape[1] != width:
            raise PrivacyError(
                f"prototypes of width {self.image.shape[1]}, and the model embeds in {width}: release them "
                "with this model, or with one trained on from it"
            )

    def facts(self) -> dict[str, Any]:
        """What is no array, JSON-ready."""
        return {"concepts": list(self.concepts), "wordings": [list(texts) for texts in self.wordings]}

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """``image`` and ``text``, row after row in memory: safetensors writes bytes as they lie."""
        return {"image": np.ascontiguousarray(self.image), "text": np.ascontiguousarray(self.text)}

    @classmethod
    def parse(cls, facts: Any, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The bank of these `facts` and `arrays`.

        Raises:
            PrivacyError: a part is missing, or is not what it should be.
        """
        match facts:
            case {"concepts": [*concepts], "wordings": [*wordings]} if {"image", "text"} <= set(arrays):
                if not all(isinstance(texts, list) for texts in wordings):
                    raise PrivacyError("expected the wordings of a concept to be a list of sentences")
                return cls(
                    concepts=tuple(concepts),
                    wordings=tuple(map(tuple, wordings)),
                    image=arrays["image"],
                    text=arrays["text"],
                )
        raise PrivacyError("prototypes need concepts, wordings, image and text")

    def save(self, path: Path) -> None:
        """Write the bank to a safetensors file, concepts and wordings as JSON in its metadata."""
        facts = json.dumps({"version": VERSION, **self.facts()}, sort_keys=True)
        save_file(self.arrays(), path, metadata={"prototypes": facts})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PrivacyError: naming the file and what is wrong with it.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["prototypes"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except FileNotFoundError:
            raise PrivacyError(f"no prototypes at {path}") from None
        except (OSError, SafetensorError, KeyError, ValueError):
            raise PrivacyError(f"{path} holds no prototypes: write it by PrototypeBank.save") from None
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            raise PrivacyError(f"{path} holds prototypes of another version: expected {VERSION}")
        try:
            return cls.parse(facts, arrays)
        except PrivacyError as error:
            raise PrivacyError(f"{path}: {error}") from None


def _sentences(texts: tuple[str, ...]) -> bool:
    """At least one, and none blank."""
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
