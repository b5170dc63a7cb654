"""Rules that a minority of malicious sites cannot move far: updates wait on disk until the last is there.

None of them can be served by a secret sum: telling an attacker's update from others takes all of them.
Weights by declared size would let a site buy influence with a claim that nobody can check: sites count alike.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strategies.messages import Arrays, check_update
from strategies.rules.rule import CannotCombine, require_weight
from strategies.rules.spill import Rows


class _FromDisk:
    """Keeps the updates of a round in one file; peak memory is the update given and a few blocks."""

    sums = False

    def __init__(self, like: Arrays, *, folder: Path) -> None:
        self._like, self._rows = like, Rows(like, folder)

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Keep one update until all are there; its weight is checked, and then not used."""
        require_weight(weight)
        check_update(update, self._like)
        self._rows.append(update)


class Median(_FromDisk):
    """The median of every coordinate, every site alike.

    Guarantees:
        Each value lies within the honest updates' values there while fewer than half of the sites are
        malicious.

    Source:
        Yin et al. (2018), arXiv:1803.01498, definition 1.
    """

    def result(self) -> Arrays:
        """The median update."""
        count = len(self._rows)
        if not count:
            raise CannotCombine("no update was folded in: there is no median")
        return self._rows.combined(lambda block: _mean_of_middle(block, cut=(count - 1) // 2))


class TrimmedMean(_FromDisk):
    """The mean of every coordinate without its largest and its smallest values, every site alike.

    Guarantees:
        Each value lies within the honest updates' values there while no more sites are malicious than are
        cut from each end, ``int(share * n)`` of n.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for every update of the round.
        share: Of the updates, cut from each end; in (0, 0.5).

    Raises:
        CannotCombine: ``share`` is out of its range.

    Source:
        Yin et al. (2018), arXiv:1803.01498, definition 2.
    """

    def __init__(self, like: Arrays, *, folder: Path, share: float) -> None:
        if not 0 < share < 0.5:
            raise CannotCombine(f"expected {share=} in (0, 0.5)")
        super().__init__(like, folder=folder)
        self._share = share

    def result(self) -> Arrays:
        """The trimmed mean."""
        count = len(self._rows)
        cut = int(self._share * count)
        if not cut:
            raise CannotCombine(
                f"a share of {self._share} of {count} updates cuts none and protects from nobody: "
                f"{fewest_to_trim(self._share)} are needed (raise strategy.min-sites), or a larger share"
            )
        return self._rows.combined(lambda block: _mean_of_middle(block, cut=cut))


def fewest_to_trim(share: float) -> int:
    """The least number of updates of which a trimmed mean cuts one at each end."""
    return next(count for count in range(3, 10**9) if int(share * count))


class Krum(_FromDisk):
    """The mean of the updates that lie closest to their neighbours.

    An update's score is the sum of its squared distances to its ``n - attackers - 2`` nearest; the
    ``selected`` with the lowest scores are averaged by their weights. One of them is Krum, several are
    Multi-Krum. Of equal scores the update that was folded in first wins.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for every update of the round.
        attackers: How many malicious sites to expect, >= 0.
        selected: How many updates to average; null: ``n - attackers - 2``, the most for which the proof for
            one carries over.

    Raises:
        CannotCombine: ``attackers`` or ``selected`` is out of its range.

    Source:
        Blanchard et al. (2017), NeurIPS, "Machine Learning with Adversaries", sections 4 and 5.
    """

    def __init__(self, like: Arrays, *, folder: Path, attackers: int, selected: int | None = 1) -> None:
        if attackers < 0 or (selected is not None and selected < 1):
            raise CannotCombine(f"expected {attackers=} >= 0 and {selected=} >= 1")
        super().__init__(like, folder=folder)
        self._attackers, self._selected = attackers, selected
        self._weights: list[float] = []

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Keep one update until all are there; its weight counts only among the selected."""
        super().fold(site, update, weight)
        self._weights.append(weight)

    def result(self) -> Arrays:
        """The mean of the selected updates."""
        count, needed = len(self._rows), fewest_for_krum(self._attackers)
        if count < needed:
            raise CannotCombine(
                f"Krum withstands {self._attackers} attackers among {needed} updates or more, and has "
                f"{count}: raise strategy.min-sites, or expect fewer attackers"
            )
        close = count - self._attackers - 2
        selected = close if self._selected is None else self._selected
        if selected > count:
            raise CannotCombine(f"{selected=} of {count} updates: select fewer, or ask more sites")
        chosen = _most_central(self._distances(), close=close)[:selected]
        shares = np.zeros(count)
        shares[chosen] = np.array(self._weights)[chosen]
        shares /= shares.sum()
        return self._rows.combined(lambda block: np.asarray(shares @ block))

    def _distances(self) -> NDArray[np.float64]:
        """Squared distances between all updates, shape (n, n)."""
        products = np.zeros((len(self._rows), len(self._rows)))
        for block in self._rows.blocks():
            values = block.astype(np.float64)
            products += values @ values.T
        squares = np.diag(products)
        return np.asarray(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))


def fewest_for_krum(attackers: int) -> int:
    """The least number of updates among which Krum withstands so many attackers: 2 f + 3."""
    return 2 * attackers + 3


def _most_central(distances: NDArray[np.float64], *, close: int) -> list[int]:
    others = distances + np.diag(np.full(len(distances), np.inf))
    scores = np.sort(others, axis=1)[:, :close].sum(axis=1)
    return [int(row) for row in np.argsort(scores, kind="stable")]


def _mean_of_middle(block: NDArray[np.float32], *, cut: int) -> NDArray[np.float64]:
    """Mean of each column without its ``cut`` largest and smallest; sorting contiguous rows is faster."""
    ordered = np.sort(np.ascontiguousarray(block.T), axis=1)
    return np.asarray(ordered[:, cut : len(block) - cut].mean(axis=1, dtype=np.float64))
