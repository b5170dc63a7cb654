"""Differential privacy for whole hospitals, added at the coordinator: a second layer with a unit of its own.

It hides from everyone who sees the global models whether a hospital took part at all. It does not hide a
hospital from the coordinator, it says nothing about a patient, and its epsilon is never mixed with theirs:
the patients' guarantee is the noise that every site adds before anything leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from privacy.accounting import PoissonGaussian, epsilon
from privacy.noise import GaussianNoise
from strategies.messages import Arrays, check_update
from strategies.rules.norm_bound import factor
from strategies.rules.rule import CannotCombine
from strategies.rules.spill import Piece, Sums, fitted, norm


@dataclass(frozen=True, kw_only=True)
class HospitalDp:
    """The Gaussian mechanism on the sum of the hospitals' clipped updates, once a round.

    Guarantees:
        If each hospital takes part in a round independently with probability ``sample_rate``, and adds to the
        sum one vector of norm at most ``max_update_norm``, then the models of ``rounds`` rounds are together
        ``event`` for federations that differ by adding or removing one hospital.

    Attributes:
        max_update_norm: C, the bound on a hospital's whole update, over all arrays together.
        noise_multiplier: Noise standard deviation divided by C.
        hospitals: How many are invited: public, and whoever answers, the sum is divided by this number times
            ``sample_rate``.
        rounds: Rounds of the whole run.
        sample_rate: Probability that a hospital takes part in a round; 1: all do. Only a draw by `drawn`
            earns less than 1: a public or repeatable one amplifies nothing.

    Raises:
        CannotCombine: ``max_update_norm`` or ``hospitals`` is out of its range.
        ValueError: another attribute is out of its range (see `PoissonGaussian`).
    """

    max_update_norm: float
    noise_multiplier: float
    hospitals: int
    rounds: int
    sample_rate: float = 1.0

    kind: ClassVar[str] = "hospital-dp"
    unit: ClassVar[str] = "hospital"
    adjacency: ClassVar[str] = "add_remove"
    sampler: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        if not 0 < self.max_update_norm < float("inf"):
            raise CannotCombine(f"expected max_update_norm={self.max_update_norm} positive and finite")
        if self.hospitals < 1:
            raise CannotCombine(f"expected hospitals={self.hospitals} >= 1")
        _ = self.event  # checks the other three

    @property
    def sensitivity(self) -> float:
        """How far one hospital moves the sum of a round, in L2 norm."""
        return self.max_update_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def divisor(self) -> float:
        """What makes a mean of the sum; public."""
        return self.sample_rate * self.hospitals

    @property
    def event(self) -> PoissonGaussian:
        """What the accountant is told."""
        return PoissonGaussian(
            sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=self.rounds
        )

    def epsilon(self, *, delta: float) -> float:
        """What all rounds cost together, per hospital; with few hospitals, any delta below 1 / hospitals."""
        return epsilon([self.event], delta=delta)

    def drawn(self, sites: Sequence[str], sampling: np.random.Generator) -> list[str]:
        """The sites of a round: each joins independently; perhaps none does.

        Args:
            sites: All that are invited, each once.
            sampling: Seeded by the operating system (`privacy.noise.os_generator`); never stored.
        """
        return [site for site in sites if sampling.random() < self.sample_rate]


class HospitalMean:
    """The noised sum of clipped updates over a public divisor: a rule for `strategies.strategy.Strategy`.

    Guarantees:
        Each site moves the sum by at most ``mechanism.sensitivity``: one update a round, clipped over all
        arrays together, its weight unused. The sum is released once, with fresh noise on every coordinate,
        also when nobody answered. Sums lie in a file, as for `strategies.rules.mean.Mean`.

    Args:
        like: Names and shapes, as of the global weights; float32.
        folder: Has room for twice the model while the round lasts.
        mechanism: Bound, noise and divisor.
        noise: Its source.

    Source:
        McMahan et al. (2018), arXiv:1710.06963, algorithm 1, with the fixed-denominator estimator.
    """

    sums = False

    def __init__(self, like: Arrays, *, folder: Path, mechanism: HospitalDp, noise: GaussianNoise) -> None:
        self._like, self._mechanism, self._noise = like, mechanism, noise
        self._sums: Sums | None = Sums(like, folder)
        self._sites: set[str] = set()

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one clipped update; the weight is not used.

        Raises:
            MessageError: another name, shape or dtype than the model, or a value that is not finite.
            CannotCombine: a second update of one site, or one after the release.
        """
        if site in self._sites:
            raise CannotCombine(f"two updates of site {site!r} in one round would double its influence")
        check_update(update, self._like)
        self._unreleased.add(update, factor(norm(update), self._mechanism.max_update_norm))
        self._sites.add(site)

    def result(self) -> Arrays:
        """The noised mean; a second one would let the noise be averaged away.

        Raises:
            CannotCombine: it was released before, or a value does not fit into float32.
        """
        total, self._sums = self._unreleased, None

        def released(at: Piece) -> NDArray[np.float64]:
            noise = self._noise.draw((at.size,), stddev=self._mechanism.noise_std).numpy()
            return np.asarray((total.at(at) + noise) / self._mechanism.divisor)

        return fitted(self._like, released, what="the noised mean")

    @property
    def _unreleased(self) -> Sums:
        if self._sums is None:
            raise CannotCombine("the round's sum was released: begin the next round")
        return self._sums
