"""The global model measured on data the coordinator may look at."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from encoders.parts import PartEmbedder, TrainablePart
from strategies.messages import Arrays
from tasks.evaluation import evaluate


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Image-text pairs to measure on: N rows.

    Attributes:
        images: Packed images, uint8, shape (N, S, S) or (N, S, S, 3).
        texts: Their texts.
        labels: Finding to float32, shape (N,); NaN is unknown. Empty: no zero-shot figures.
    """

    images: NDArray[np.uint8]
    texts: tuple[str, ...]
    labels: Mapping[str, NDArray[np.float32]]

    def save(self, path: Path) -> None:
        """Write one file that `load` reads, without pickle."""
        texts = np.frombuffer(json.dumps(self.texts).encode(), dtype=np.uint8)
        labels = {f"label/{name}": values for name, values in self.labels.items()}
        arrays: dict[str, Any] = {"images": self.images, "texts": texts, **labels}
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            labels = {
                name.removeprefix("label/"): file[name] for name in file.files if name.startswith("label/")
            }
            texts = tuple(json.loads(file["texts"].tobytes().decode()))
            return cls(images=file["images"], texts=texts, labels=labels)


def evaluator(part: TrainablePart, data: EvaluationSet) -> Callable[[Arrays], dict[str, Any]]:
    """A function that measures the model with given weights of ``part``: retrieval and zero-shot figures."""
    embedder = PartEmbedder(part, data.images)

    def measure(arrays: Arrays) -> dict[str, Any]:
        part.load({**part.arrays(), **arrays})  # what sites keep to themselves stays as it started
        return evaluate(embedder, images=data.images, texts=data.texts, labels=data.labels)

    return measure
