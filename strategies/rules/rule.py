"""What the round loop may expect of a rule, whichever it is."""

from typing import Protocol

from strategies.messages import Arrays


class CannotCombine(ValueError):
    """The updates of a round cannot become one; the text says which rule and what it lacks."""


class Rule(Protocol):
    """Combines the updates of one round; made anew for each."""

    @property
    def sums(self) -> bool:
        """Whether the weighted sum of the updates is all it needs, so that they may be summed in secret."""

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Take one update; one that is refused leaves no trace.

        Raises:
            MessageError: another name, shape or dtype than the model, or a value that is not finite.
            CannotCombine: a weight that is not positive and finite.
        """

    def result(self) -> Arrays:
        """The combined update, float32.

        Raises:
            CannotCombine: too few updates, or a value does not fit into float32.
        """


def require_weight(weight: float) -> None:
    """Refuse a weight that is not positive and finite.

    Raises:
        CannotCombine: it is not.
    """
    if not 0 < weight < float("inf"):
        raise CannotCombine(f"expected {weight=} positive and finite")
