"""How the evaluations of a run went: which round was the best, and whether it is time to stop."""

import math
from collections.abc import Mapping
from typing import Any, Self


class Improvement:
    """The values of one metric, larger is better, round by round.

    Guarantees:
        A function of the values alone: rebuilt from a checkpoint, it says what it said before. An evaluation
        without the metric, or with one that is not finite, counts for nothing. Of equal values the earliest
        is the best.

    Args:
        metric: Path into an evaluation, such as ``zero_shot.macro_auroc``.
        stop_after: So many evaluations in a row that are no better than the best end a run; 0: none do.
        values: What was measured before, by round.
    """

    def __init__(self, metric: str, *, stop_after: int, values: Mapping[int, float] | None = None) -> None:
        self.metric, self._stop_after = metric, stop_after
        self._values = dict(values or {})

    @classmethod
    def parse(cls, metric: str, *, stop_after: int, values: Mapping[str, float]) -> Self:
        """The state of which `as_json` wrote the values."""
        return cls(
            metric, stop_after=stop_after, values={int(number): value for number, value in values.items()}
        )

    def as_json(self) -> dict[str, float]:
        """The values, for a checkpoint."""
        return {str(number): value for number, value in sorted(self._values.items())}

    def see(self, server_round: int, evaluation: Mapping[str, Any]) -> None:
        """Take an evaluation in; another one of the same round replaces it."""
        found: Any = evaluation
        for name in self.metric.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, int | float) and math.isfinite(found):
            self._values[server_round] = float(found)

    @property
    def best(self) -> tuple[int, float] | None:
        """Round and value of the best evaluation; None: there was none."""
        if not self._values:
            return None
        return max(sorted(self._values.items()), key=lambda pair: pair[1])

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations were no better that the run should stop."""
        if self.best is None or not self._stop_after:
            return False
        return sum(server_round > self.best[0] for server_round in self._values) >= self._stop_after
