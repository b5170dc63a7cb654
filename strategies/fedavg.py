"""Federated averaging, one update at a time."""

import math

import numpy as np
from numpy.typing import NDArray

from strategies.messages import Arrays, check_update


class FedAvg:
    """Weighted mean of updates on top of the weights they were computed from.

    Guarantees:
        ``result`` is ``base + Σ wᵢ uᵢ / Σ wᵢ``, accumulated in float64 and rounded once to float32. Memory is
        two float32 models, however many updates are folded in. A refused update leaves no trace. The same
        updates in the same order give the same bits.

    Args:
        base: The global weights the sites started from, float32.

    Source:
        McMahan et al. (2017), arXiv:1602.05629, Algorithm 1, on updates instead of weights.
    """

    def __init__(self, base: Arrays) -> None:
        self._base = base
        self._sums: dict[str, NDArray[np.float64]] = {
            name: np.zeros(value.shape, dtype=np.float64) for name, value in base.items()
        }
        self._weight = 0.0

    def fold(self, update: Arrays, weight: float) -> None:
        """Add one update.

        Raises:
            MessageError: another name, shape or dtype than the base, or a value that is not finite.
            ValueError: a weight that is not positive and finite.
        """
        if not 0 < weight < math.inf:
            raise ValueError(f"expected {weight=} positive and finite")
        check_update(update, self._base)
        for name, total in self._sums.items():
            total += np.multiply(update[name], weight, dtype=np.float64)
        self._weight += weight

    def result(self) -> Arrays:
        """The new global weights.

        Raises:
            ValueError: nothing was folded in, or the mean does not fit into float32.
        """
        if not self._weight:
            raise ValueError("no update was folded in: there is nothing to average")
        return {name: self._mean(name) for name in self._sums}

    def _mean(self, name: str) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # found and named below
            mean = np.asarray(self._base[name] + self._sums[name] / self._weight, dtype=np.float32)
        if not np.isfinite(mean).all():
            raise ValueError(
                f"the average of array {name!r} does not fit into float32: an update is too large"
            )
        return mean
