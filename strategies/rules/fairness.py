"""Weights that keep the worst hospital from being forgotten, from losses released with noise.

A site's loss is a function of its patients. What comes in here must be a release of its own, charged to the
site's budget; nothing here protects it. Noise can make a loss negative: that counts as zero.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from strategies.messages import Arrays
from strategies.rules.rule import CannotCombine


class Fairness(Protocol):
    """Turns a site's weight into a fair one."""

    def hear(self, losses: Mapping[str, float]) -> None:
        """Take the noised losses of sites; they hold until the next ones.

        Raises:
            CannotCombine: a loss is not finite.
        """

    def weight(self, site: str, weight: float) -> float:
        """What ``weight`` becomes; only ratios between sites mean anything."""

    def state(self) -> Arrays:
        """What a checkpoint needs."""

    def restore(self, state: Arrays) -> None:
        """Go on from a checkpoint."""


class LossPower:
    """Weights times ``max(loss, 0) ** power``: at 0 the plain mean, at a large power the worst site alone.

    The gradient of the q-fair objective is exactly the sum of gradients so weighted. The paper also
    scales the step by an estimate of its curvature; here the weights are normalised instead, so the step
    stays that of a mean. A site whose loss is not known counts with the mean of those known; while all are
    zero or none is known, every weight stays as it is.

    Args:
        power: q >= 0.

    Source:
        Li et al. (2020), arXiv:1905.10497, section 3.2.
    """

    def __init__(self, power: float) -> None:
        if not 0 <= power < math.inf:
            raise CannotCombine(f"expected {power=} >= 0 and finite")
        self._power = power
        self._losses: dict[str, float] = {}

    def hear(self, losses: Mapping[str, float]) -> None:
        """Take the noised losses of sites; they hold until the next ones."""
        self._losses |= _finite(losses)

    def weight(self, site: str, weight: float) -> float:
        """The weight times the loss's power, the largest loss being 1."""
        positive = {name: max(loss, 0.0) for name, loss in self._losses.items()}
        largest = max(positive.values(), default=0.0)
        if not largest:
            return weight
        loss = positive.get(site, sum(positive.values()) / len(positive))
        return weight * max(math.pow(loss / largest, self._power), _LEAST)

    def state(self) -> Arrays:
        """The losses heard of."""
        return {site: np.array(loss) for site, loss in self._losses.items()}

    def restore(self, state: Arrays) -> None:
        """Go on with these losses."""
        self._losses = _numbers(state)


class WorstFirst:
    """Weights that grow exponentially with the losses so far: the mixture of sites the model does worst on.

    After each hearing ``λᵢ ∝ λᵢ exp(rate · lossᵢ)``; then a share ``floor`` of all weight is spread evenly,
    so that no site is ever out of reach. Declared sizes play no part. A site not heard of counts as the mean.

    Args:
        rate: Step of the exponentiated gradient, > 0.
        floor: Share in [0, 1] that is spread evenly.

    Source:
        Mohri et al. (2019), arXiv:1902.00146 (agnostic federated learning), with exponentiated-gradient steps
        in place of projected ones, as in Sagawa et al. (2020), arXiv:1911.08731, algorithm 1.
    """

    def __init__(self, *, rate: float, floor: float) -> None:
        if not 0 < rate < math.inf or not 0 <= floor <= 1:
            raise CannotCombine(f"expected {rate=} positive and finite, {floor=} in [0, 1]")
        self._rate, self._floor = rate, floor
        self._shares: dict[str, float] = {}

    def hear(self, losses: Mapping[str, float]) -> None:
        """Move weight towards the sites with the largest losses."""
        if not losses:
            return
        heard = {site: max(loss, 0.0) for site, loss in _finite(losses).items()}
        average, largest = sum(heard.values()) / len(heard), max(heard.values())
        known = {**dict.fromkeys(heard, self._newcomer()), **self._shares}
        grown = {
            site: share * math.exp(self._rate * (heard.get(site, average) - largest))
            for site, share in known.items()
        }
        total = sum(grown.values())
        even = self._floor / len(grown)
        self._shares = {site: (1 - self._floor) * share / total + even for site, share in grown.items()}

    def weight(self, site: str, weight: float) -> float:
        """The site's share; ``weight`` is not used."""
        return max(self._shares.get(site, self._newcomer()), _LEAST)

    def state(self) -> Arrays:
        """The shares."""
        return {site: np.array(share) for site, share in self._shares.items()}

    def restore(self, state: Arrays) -> None:
        """Go on with these shares."""
        self._shares = _numbers(state)

    def _newcomer(self) -> float:
        return 1 / len(self._shares) if self._shares else 1.0


_LEAST = 1e-12  # a weight of zero is refused by every rule: this one is none in float32


def _finite(losses: Mapping[str, float]) -> dict[str, float]:
    for site, loss in losses.items():
        if not math.isfinite(loss):
            raise CannotCombine(f"the loss {loss} released by site {site!r} is not finite")
    return dict(losses)


def _numbers(state: Arrays) -> dict[str, float]:
    return {site: float(value) for site, value in state.items()}
