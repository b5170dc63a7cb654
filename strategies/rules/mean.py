"""Federated averaging, one update at a time."""

from pathlib import Path

from strategies.messages import Arrays, check_update
from strategies.rules.rule import CannotCombine, require_weight
from strategies.rules.spill import Scratch, Sums


class Mean:
    """Weighted mean of updates.

    Guarantees:
        ``result`` is ``Σ wᵢ uᵢ / Σ wᵢ``, accumulated in float64 and rounded once to float32. Memory is a few
        blocks beside the update given, and the sums where they are kept there, however many are folded in. A
        refused update leaves no trace. The same updates in the same order give the same bits.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for twice the model while the round lasts; nothing stays in it, also after a crash.
        scratch: Memory for the sums instead; used by one mean at a time.

    Source:
        McMahan et al. (2017), arXiv:1602.05629, algorithm 1, on updates instead of weights.
    """

    sums = True

    def __init__(self, like: Arrays, *, folder: Path, scratch: Scratch | None = None) -> None:
        self._like, self._sums = like, Sums(like, folder, scratch=scratch)
        self._weight = 0.0

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one update, or the mean of several with the sum of their weights."""
        require_weight(weight)
        check_update(update, self._like)
        self._sums.add(update, weight)
        self._weight += weight

    def result(self) -> Arrays:
        """The mean update."""
        if not self._weight:
            raise CannotCombine("no update was folded in: there is nothing to average")
        return self._sums.over(self._weight)
