"""A model in which every patient has a coordinate of their own, trained by the real loop: releases show all.

The attacker sees what the claim covers, every noised sum. A patient's clipped gradient is exactly -C on their
own coordinate and 0 elsewhere, so a coordinate without a patient is the noise itself, and one patient's
presence is one number.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.batches import TrainingData
from client.objectives import Anchors
from client.training import train_privately
from encoders.fitting import Pairs
from encoders.parts import Module, TrainablePart
from privacy.mechanism import AnchoredDpSgd
from privacy.noise import GaussianNoise
from strategies.messages import TrainingPlan
from tests.encoders.micro import micro_encoder

BOUND = 0.1  # below every patient's gradient (0.5), so each is clipped to exactly this
DECLARED = 100
NOBODY = -1
LEARNING_RATE = 1e-3  # so small that no weight moves far enough to change a gradient's direction
ANGLE_OF_TEXTS = 1.0


class _Tables(Module):
    """An image is a coordinate; its embedding is the unit vector at the angle stored there, 0 for nobody."""

    def __init__(self, *, layers: int, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 1) for _ in range(layers))
        for table in self.tables:
            nn.init.zeros_(cast(nn.Embedding, table).weight)
        self._rows = rows

    def embed_images(self, inputs: Tensor) -> Tensor:
        angle = torch.zeros(inputs.shape)
        for layer, table in enumerate(self.tables):
            here = inputs // self._rows == layer
            angle = angle + here * table(torch.where(here, inputs % self._rows, 0)).squeeze(-1)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def embed_texts(self, inputs: Tensor) -> Tensor:
        return torch.stack([inputs.cos(), inputs.sin()], dim=-1)


class ProbePart(TrainablePart):
    """``layers`` trained arrays of ``rows`` coordinates; their encoder has no say."""

    def __init__(self, *, layers: int, rows: int) -> None:
        super().__init__(micro_encoder(), _Tables(layers=layers, rows=rows))
        self.layers, self.rows = layers, rows

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Any coordinate for any image, and the one text: made-up data of the training's own probes."""
        numbers = images.astype(np.int64).sum((1, 2)) % (self.layers * self.rows)
        return torch.from_numpy(numbers), torch.full((len(texts),), ANGLE_OF_TEXTS)


class Watched(GaussianNoise):
    """A noise source that an attacker looks over the shoulder of; the mistakes below are its children."""

    def __init__(self, *, layers: int, seed: int | None = 0) -> None:
        super().__init__(insecure_seed=seed)
        self.layers, self.released = layers, list[Tensor]()

    def add_to(self, tensor: Tensor, *, stddev: float) -> Tensor:
        self.released.append(self.noised(tensor, stddev).clone())
        return self.released[-1]

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return super().add_to(tensor, stddev=stddev)

    @property
    def step(self) -> int:
        return len(self.released) // self.layers

    @property
    def layer(self) -> int:
        return len(self.released) % self.layers


class HalvedNoise(Watched):
    """A sensitivity of 2C, accounted as C."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return super().noised(tensor, stddev / 2)


class NoiseOfAMean(Watched):
    """Scaled for the mean over four patients, added to their sum."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return super().noised(tensor, stddev / 4)


class NoiseOnHalfTheLayers(Watched):
    """Every second array leaves as it is."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return tensor if self.layer % 2 else super().noised(tensor, stddev)


class SameNoiseEveryStep(Watched):
    """A generator that is seeded anew in each step."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return GaussianNoise(insecure_seed=self.layer).add_to(tensor, stddev=stddev)


class SameNoiseInEveryLayer(Watched):
    """One key for all arrays of equal shape."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return GaussianNoise(insecure_seed=self.step).add_to(tensor, stddev=stddev)


class ShiftedNoise(Watched):
    """One stream for all arrays, each starting seven values later than the last."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        stream = GaussianNoise(insecure_seed=self.step)
        stream.draw((7 * self.layer,), stddev=1.0)
        return stream.add_to(tensor, stddev=stddev)


class NoNoiseWhenNobodyWasDrawn(Watched):
    """Saves itself the trouble on an empty sum."""

    def noised(self, tensor: Tensor, stddev: float) -> Tensor:
        return super().noised(tensor, stddev) if tensor.any() else tensor


def mechanism(**changes: Any) -> AnchoredDpSgd:
    settings = {"max_grad_norm": BOUND, "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 3}
    return AnchoredDpSgd(**(settings | changes))


def releases(
    coordinates: Sequence[int],
    *,
    of: AnchoredDpSgd,
    part: ProbePart,
    noise: Watched,
    patients: Sequence[int] | None = None,
    spoiled: Sequence[int] = (),
    seed: int = 0,
) -> NDArray[np.float64]:
    """Train on one pair for each of ``coordinates`` and hand over every release.

    Args:
        coordinates: Where each pair's gradient points, in [0, layers * rows).
        of: The mechanism.
        part: What is trained.
        noise: Adds the noise, and records.
        patients: The patient of each pair; by default each pair is one.
        spoiled: Pairs whose report embeds as NaN.
        seed: Of the sampling.

    Guarantees:
        The weights moved by the releases over the public divisor, and by nothing else.

    Returns:
        Noised sums in units of C, shape (steps, layers, rows).
    """
    images = torch.tensor(coordinates, dtype=torch.int64)
    texts = torch.full((len(coordinates),), ANGLE_OF_TEXTS)
    texts[list(spoiled)] = torch.nan
    data = TrainingData(
        pairs=Pairs(images=images, texts=texts, text_keys=images),
        patients=np.arange(len(coordinates)) if patients is None else np.array(patients),
        masked=torch.zeros(len(coordinates), 1, dtype=torch.bool),
    )
    anchors = Anchors(images=torch.tensor([NOBODY]), texts=torch.zeros(1))
    update = train_privately(
        part,
        data,
        anchors,
        _plan(steps=of.steps),
        mechanism=of,
        patients_declared=DECLARED,
        noise=noise,
        sampling=np.random.default_rng(seed),
    )
    arrays = np.stack([value.numpy().astype(np.float64) for value in noise.released])
    found = arrays.reshape(-1, part.layers, part.rows)
    moved = np.stack([value[:, 0] for value in update.values()])
    expected = -LEARNING_RATE * found.sum(axis=0) / (of.sample_rate * DECLARED)
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    return found / of.max_grad_norm


def _plan(*, steps: int) -> TrainingPlan:
    return TrainingPlan(
        part="heads",
        objective="anchored",
        privacy="dp",
        epsilon=8.0,
        rounds=1,
        steps=steps,
        batch=4,
        optimizer="sgd",
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        max_grad_norm=BOUND,
        studies_per_patient=2,
        inverse_temperature=1.0,
        anchors=1,
        augment=False,
        lora_rank=1,
        seed=0,
    )
