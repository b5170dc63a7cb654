"""DP-SGD on patients: what one step releases, how far one patient can move it, what noise hides that."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from privacy.accounting import PoissonGaussian
from privacy.errors import UnsoundTraining
from privacy.noise import GaussianNoise

# Far beyond any useful bound, far within what float32 resolves: outside, a coordinator could ask for noise
# that rounds to nothing or to infinity.
LEAST_NORM, LARGEST_NORM = 1e-12, 1e12


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """The Gaussian mechanism on a Poisson sample of patients, ``steps`` times.

    Guarantees:
        If every patient's contribution to a sum has L2 norm at most ``max_grad_norm``, then ``steps``
        successive results of `release` are together a `PoissonGaussian` event for neighbours that differ by
        adding or removing one patient.

    Attributes:
        max_grad_norm: C, the bound on a patient's gradient, in [1e-12, 1e12].
        noise_multiplier: Noise standard deviation divided by the sensitivity.
        sample_rate: Probability that a patient joins a step; a public constant.
        steps: Number of steps; a public constant.

    Raises:
        UnsoundTraining: ``max_grad_norm`` is out of its range, or not a number.
        ValueError: another attribute is out of its range (see `PoissonGaussian`).

    Source:
        Abadi et al. (2016), algorithm 1, with patients as the unit.
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    steps: int

    unit = "patient"
    adjacency = "add_remove"
    sampler = "poisson"

    def __post_init__(self) -> None:
        if not LEAST_NORM <= self.max_grad_norm <= LARGEST_NORM:
            raise UnsoundTraining(
                f"expected max_grad_norm={self.max_grad_norm} in [{LEAST_NORM}, {LARGEST_NORM}]: "
                "float32 would round the bound and its noise"
            )
        _ = self.event  # checks the other three

    @property
    def sensitivity(self) -> float:
        """How far one patient moves the clipped sum, in L2 norm."""
        return self.max_grad_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def event(self) -> PoissonGaussian:
        """What the accountant is told."""
        return PoissonGaussian(
            sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=self.steps
        )

    def release(self, clipped_sum: Mapping[str, Tensor], noise: GaussianNoise) -> dict[str, Tensor]:
        """The clipped sum with fresh noise on every coordinate of every array."""
        return {name: noise.add_to(value, stddev=self.noise_std) for name, value in clipped_sum.items()}
