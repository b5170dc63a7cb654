"""How the combined update moves the global weights: the coordinator's optimizer.

The combined update takes the place of a negative gradient. All of it is post-processing of releases. Moments
are kept in float32 and every step is computed in float64. A round may hold some of the arrays only (LoRA
factors by turns): each array's moments know its own rounds alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.messages import Arrays
from strategies.rules.spill import Piece, fitted

Values = NDArray[np.float64]
_STEPS = "steps/"


class ServerOptimizer(Protocol):
    """Moves the weights once a round."""

    def step(self, base: Arrays, update: Arrays) -> Arrays:
        """The new weights, float32, in the place of ``update``, which is used up; ``base`` is not changed.

        Raises:
            CannotCombine: a value does not fit into float32.
        """

    def state(self) -> Arrays:
        """What the next step depends on, for a checkpoint; empty before the first."""

    def restore(self, state: Arrays) -> None:
        """Go on as after the step at which ``state`` was taken: the next one gives the same bits."""


class Plain:
    """Adds ``rate`` times the update. At rate 1 the new weights are the mean of the sites' weights."""

    def __init__(self, *, rate: float = 1.0) -> None:
        self._rate = rate

    def step(self, base: Arrays, update: Arrays) -> Arrays:
        """The base plus the scaled update."""
        return _moved(update, lambda at: _double(at, base) + self._rate * _double(at, update))

    def state(self) -> Arrays:
        """Nothing."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to go on with."""


class Momentum:
    """FedAvgM: ``v = momentum · v + update``, then the base plus ``rate · v``, in PyTorch's form.

    Source:
        Hsu et al. (2019), arXiv:1909.06335, section 4.3; as Flower's ``FedAvgM``.
    """

    def __init__(self, *, rate: float, momentum: float) -> None:
        self._rate, self._momentum = rate, momentum
        self._velocity: Arrays = {}

    def step(self, base: Arrays, update: Arrays) -> Arrays:
        """The base plus the scaled velocity."""
        velocity = {**_zeros(base), **self._velocity}
        self._velocity |= fitted(
            base, lambda at: self._momentum * _double(at, velocity) + _double(at, update), what="the velocity"
        )
        return _moved(update, lambda at: _double(at, base) + self._rate * _double(at, self._velocity))

    def state(self) -> Arrays:
        """The velocity."""
        return dict(self._velocity)

    def restore(self, state: Arrays) -> None:
        """Go on with this velocity."""
        self._velocity = dict(state)


class _Adaptive(ABC):
    """Steps by the update's moving mean over the root of its moving square, coordinate by coordinate.

    ``m = beta_1 m + (1 - beta_1) u``; ``v`` as the child says; the base plus ``rate · m / (√v + tau)``. Both
    start at zero, as in Flower (the paper starts v at tau² at least).

    Args:
        rate: Server learning rate.
        beta_1: Decay of the mean.
        beta_2: Decay of the square.
        tau: Added to the root; where the root is far below it, this is momentum with rate / tau.

    Source:
        Reddi et al. (2021), arXiv:2003.00295, algorithm 2; constants and form as in Flower's ``FedOpt``.
    """

    _MEAN: ClassVar[str] = "mean/"
    _SQUARE: ClassVar[str] = "square/"

    def __init__(self, *, rate: float, beta_1: float, beta_2: float, tau: float) -> None:
        self._rate, self._beta_1, self._beta_2, self._tau = rate, beta_1, beta_2, tau
        self._mean: Arrays = {}
        self._square: Arrays = {}
        self._steps: dict[str, int] = {}

    def step(self, base: Arrays, update: Arrays) -> Arrays:
        """The base plus the adapted step."""
        mean, square = {**_zeros(base), **self._mean}, {**_zeros(base), **self._square}
        steps = {name: self._steps.get(name, 0) + 1 for name in base}

        def mean_at(at: Piece) -> Values:
            return self._beta_1 * _double(at, mean) + (1 - self._beta_1) * _double(at, update)

        def square_at(at: Piece) -> Values:
            return self._squared(_double(at, square), np.square(_double(at, update)))

        new_mean = fitted(base, mean_at, what="the optimizer's mean")
        new_square = fitted(base, square_at, what="the optimizer's square")

        def moved(at: Piece) -> Values:
            root = np.sqrt(_double(at, new_square))
            rate = self._rate * self._correction(steps[at.name])
            return np.asarray(_double(at, base) + rate * _double(at, new_mean) / (root + self._tau))

        self._mean |= new_mean
        self._square |= new_square
        self._steps |= steps
        return _moved(update, moved)

    def state(self) -> Arrays:
        """Both moments and the number of steps, by array."""
        return {
            **{f"{self._MEAN}{name}": value for name, value in self._mean.items()},
            **{f"{self._SQUARE}{name}": value for name, value in self._square.items()},
            **{f"{_STEPS}{name}": np.array(steps) for name, steps in self._steps.items()},
        }

    def restore(self, state: Arrays) -> None:
        """Go on with these moments."""
        self._mean, self._square, steps = (
            {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            for start in (self._MEAN, self._SQUARE, _STEPS)
        )
        self._steps = {name: int(value) for name, value in steps.items()}

    @abstractmethod
    def _squared(self, square: Values, squared_update: Values) -> Values:
        """The moving square after one more update."""

    def _correction(self, steps: int) -> float:
        return 1.0


class FedAdam(_Adaptive):
    """Adam: an exponential mean of squares, with the correction for its start that Flower applies."""

    def _squared(self, square: Values, squared_update: Values) -> Values:
        return self._beta_2 * square + (1 - self._beta_2) * squared_update

    def _correction(self, steps: int) -> float:
        # Kingma & Ba (2015), before section 2.1; Flower counts one step more than was taken, and so do we.
        return float(np.sqrt(1 - self._beta_2 ** (steps + 1)) / (1 - self._beta_1 ** (steps + 1)))


class FedYogi(_Adaptive):
    """Yogi: the square moves towards the new one by a step that does not depend on how far away it is."""

    def _squared(self, square: Values, squared_update: Values) -> Values:
        towards = np.sign(square - squared_update)
        return np.asarray(square - (1 - self._beta_2) * squared_update * towards)


class FedAdagrad(_Adaptive):
    """Adagrad: the sum of all squares, so that steps only become shorter; no momentum."""

    def __init__(self, *, rate: float, tau: float) -> None:
        super().__init__(rate=rate, beta_1=0.0, beta_2=0.0, tau=tau)

    def _squared(self, square: Values, squared_update: Values) -> Values:
        return square + squared_update


def _moved(update: Arrays, values: Callable[[Piece], Values]) -> Arrays:
    return fitted(update, values, what="the new weights", into=update)


def _double(at: Piece, arrays: Arrays) -> Values:
    return at.of(arrays).astype(np.float64)


def _zeros(like: Arrays) -> Arrays:
    return {name: np.zeros(value.shape, dtype=np.float32) for name, value in like.items()}
