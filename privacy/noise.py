"""Gaussian noise that nobody else can reproduce: its own generator, seeded from the operating system."""

import math
import os
import secrets
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch

from privacy.errors import NoiseCopied


def os_generator() -> np.random.Generator:
    """Make a generator with 128 bits of the operating system's entropy, for sampling and for noise.

    NumPy rather than torch, whose seed holds 64 bits; Philox rather than the faster SFC64, whose whole state
    can be read off a few outputs.
    """
    return _generator(secrets.randbits(128))


class GaussianNoise:
    """Source of the noise of one site and release.

    Guarantees:
        Two sources never share a stream: each is seeded with 128 bits from the operating system, never from
        a training seed, and refuses to be copied, pickled or used in a forked process, all of which would
        repeat noise that an observer could then subtract. Successive draws are independent.

    Args:
        insecure_seed: Fixed seed, for tests alone: whoever knows it can remove the noise. The ledger and
            the report say so.
    """

    def __init__(self, *, insecure_seed: int | None = None) -> None:
        self._insecure_seed = insecure_seed is not None
        self._generator = os_generator() if insecure_seed is None else _generator(insecure_seed)
        self._process = os.getpid()

    @property
    def insecure_seed(self) -> bool:
        """Whether the noise is reproducible, so that no privacy may be claimed for it."""
        return self._insecure_seed

    def draw(self, shape: Sequence[int], *, stddev: float) -> torch.Tensor:
        """Draw independent normal values of mean 0.

        Args:
            shape: Shape of the result; ``()`` draws one value.
            stddev: Standard deviation >= 0: noise multiplier times sensitivity, in the units of the sum.

        Returns:
            New float32 tensor on the CPU, of the given shape.

        Raises:
            ValueError: ``stddev`` is negative or not finite.
            NoiseCopied: the source was made in another process.
        """
        if not 0 <= stddev < math.inf:
            raise ValueError(f"expected {stddev=} >= 0 and finite")
        if os.getpid() != self._process:
            raise NoiseCopied("this noise source belongs to the parent process: make one where it is used")
        values = self._generator.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).mul_(stddev)

    def add_to(self, tensor: torch.Tensor, *, stddev: float) -> torch.Tensor:
        """Return ``tensor`` plus fresh noise, in a new tensor on the same device.

        A result in half precision would round the noise to a coarse grid, so it is at least float32.

        Args:
            tensor: Sum to be released, floating point, any shape.
            stddev: As for `draw`.

        Raises:
            ValueError: ``stddev`` is negative or not finite, or ``tensor`` is not floating point.
            NoiseCopied: the source was made in another process.
        """
        if not tensor.is_floating_point():
            raise ValueError(f"expected a floating point tensor, got {tensor.dtype}")
        return tensor + self.draw(tensor.shape, stddev=stddev).to(tensor.device)

    def __reduce__(self) -> NoReturn:
        raise NoiseCopied("a noise source is never copied, pickled or restored: make a new one")


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
