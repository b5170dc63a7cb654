"""No update weighs more than its direction: each is scaled down to a bound before the mean."""

from pathlib import Path

import numpy as np

from strategies.messages import Arrays, check_update
from strategies.rules.rule import CannotCombine, require_weight
from strategies.rules.spill import Rows, Sums, norm


class NormBound:
    """Weighted mean of updates of at most a given L2 norm each, taken over all arrays together.

    Guarantees:
        No site moves the result by more than ``bound`` times its share of the weights. An update within the
        bound is not changed. Sums lie in a file, as for `strategies.rules.mean.Mean`.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for twice the model while the round lasts.
        bound: Largest norm, > 0.

    Source:
        Sun et al. (2019), arXiv:1911.07963, section 4 (norm thresholding).
    """

    sums = False

    def __init__(self, like: Arrays, *, folder: Path, bound: float) -> None:
        if not 0 < bound < float("inf"):
            raise CannotCombine(f"expected {bound=} positive and finite")
        self._like, self._bound = like, bound
        self._sums, self._weight = Sums(like, folder), 0.0

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one update, scaled down if it is longer than the bound."""
        require_weight(weight)
        check_update(update, self._like)
        self._sums.add(update, weight * factor(norm(update), self._bound))
        self._weight += weight

    def result(self) -> Arrays:
        """The mean of the bounded updates."""
        if not self._weight:
            raise CannotCombine("no update was folded in: there is nothing to average")
        return self._sums.over(self._weight)


class MedianNormBound:
    """`NormBound` whose bound is the median norm of the round's own updates.

    Guarantees:
        While fewer than half of the sites are malicious, the bound is within the honest updates' norms,
        from the first round on. Nothing is carried from round to round.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for every update of the round.
    """

    sums = False

    def __init__(self, like: Arrays, *, folder: Path) -> None:
        self._like, self._rows = like, Rows(like, folder)
        self._norms: list[float] = []
        self._weights: list[float] = []

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Keep one update until all are there."""
        require_weight(weight)
        check_update(update, self._like)
        self._rows.append(update)
        self._norms.append(norm(update))
        self._weights.append(weight)

    def result(self) -> Arrays:
        """The mean of the bounded updates."""
        if not self._norms:
            raise CannotCombine("no update was folded in: there is nothing to average")
        bound = float(np.median(self._norms))
        shares = np.array(self._weights) / sum(self._weights)
        shares *= [factor(length, bound) for length in self._norms]
        return self._rows.combined(lambda block: np.asarray(shares @ block))


def factor(length: float, bound: float) -> float:
    """What takes a vector of this length to at most ``bound``; 1 where it is no longer than that."""
    return min(1.0, bound / length) if length else 1.0
