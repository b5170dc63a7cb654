"""A site's mean loss with noise: what fair weights are made of."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.mechanism import WholeCohort
from privacy.noise import GaussianNoise

_GRID = 2.0**-24  # of the bound: a patient's 1e-7, and sums of 5e8 patients are exact in float64


@dataclass(frozen=True, kw_only=True)
class LossRelease(WholeCohort):
    """The sum of all patients' losses, each cut to a range, with noise.

    Guarantees:
        Adding or removing a patient moves `clipped_sum` by at most ``sensitivity``, and `release` of it is
        ``event``.

    Attributes:
        max_loss: Bound on a patient's loss, positive and finite; larger ones, and what is no number, count as
            the bound, negative ones as zero.

    Raises:
        PrivacyError: ``max_loss`` is out of its range.
        ValueError: the noise multiplier is (see `PoissonGaussian`).
    """

    max_loss: float

    kind: ClassVar[str] = "losses"

    def __post_init__(self) -> None:
        if not 0 < self.max_loss < math.inf:
            raise PrivacyError(f"expected max_loss={self.max_loss} positive and finite")
        _ = self.event  # checks the noise multiplier

    @property
    def sensitivity(self) -> float:
        """How far one patient moves the sum."""
        return self.max_loss

    def clipped_sum(self, raw_losses: NDArray[np.floating]) -> float:
        """Sum of the patients' cut losses, one each, shape (P,); private until it is released."""
        cut = np.clip(np.nan_to_num(raw_losses.astype(np.float64), nan=math.inf), 0.0, self.max_loss)
        return float(np.trunc(cut / self._grid).sum() * self._grid)

    def release(self, clipped_sum: float, noise: GaussianNoise) -> float:
        """The sum with fresh noise."""
        drawn = float(noise.draw((1,), stddev=self.noise_std)[0])
        # Sum and noise on one grid: the digits of float64 below the noise's own would tell the sum.
        return float((np.rint(clipped_sum / self._grid) + np.rint(drawn / self._grid)) * self._grid)

    @property
    def _grid(self) -> float:
        return _GRID * self.max_loss
