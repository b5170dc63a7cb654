"""DP-SGD on patients: what one step releases, how far one patient can move it, what noise hides that.

Bounding is the engine's part (`privacy.engine`), noising is the mechanism's: neither trusts the other's
tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from privacy.accounting import PoissonGaussian
from privacy.errors import UnsoundTraining
from privacy.noise import GaussianNoise

Kind = Literal["anchored", "microbatch"]

# Far beyond any useful bound, far within what float32 resolves: outside, a coordinator could ask for noise
# that rounds to nothing or to infinity.
LEAST_NORM, LARGEST_NORM = 1e-12, 1e12


@dataclass(frozen=True, kw_only=True)
class Released:
    """Noised arrays that may leave, and how much noise is in them: told by whoever added it.

    Attributes:
        arrays: By name, float32.
        noise_std: Standard deviation of the noise on every coordinate, in the units of ``arrays``.
    """

    arrays: Mapping[str, Tensor]
    noise_std: float

    def over(self, divisor: float) -> "Released":
        """Arrays and noise divided alike by a public constant."""
        arrays = {name: value / divisor for name, value in self.arrays.items()}
        return Released(arrays=arrays, noise_std=self.noise_std / divisor)


class Mechanism(Protocol):
    """What training, ledger and accountant need to know of a mechanism."""

    @property
    def kind(self) -> str:
        """Its name in the ledger."""

    @property
    def unit(self) -> str:
        """What is protected."""

    @property
    def adjacency(self) -> str:
        """How neighbouring cohorts differ."""

    @property
    def sampler(self) -> str:
        """How units join a step."""

    @property
    def sample_rate(self) -> float:
        """Probability that a unit joins a step."""

    @property
    def steps(self) -> int:
        """Releases in one round."""

    @property
    def max_grad_norm(self) -> float:
        """C, the bound on each clipped vector of the sum."""

    @property
    def sensitivity(self) -> float:
        """How far one unit moves the sum of clipped vectors, in L2 norm."""

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation divided by the sensitivity."""

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum."""

    @property
    def event(self) -> PoissonGaussian:
        """What the accountant is told."""

    def release(self, clipped_sum: Mapping[str, Tensor], noise: GaussianNoise) -> Released:
        """The sum with fresh noise on every coordinate of every array."""


@dataclass(frozen=True, kw_only=True)
class _DpSgd:
    """The Gaussian mechanism on a Poisson sample of patients, ``steps`` times.

    Guarantees:
        If one patient moves a sum of clipped vectors by at most ``sensitivity``, then ``steps`` successive
        results of `release` are together ``event`` for neighbours that differ by adding or removing one
        patient.

    Attributes:
        max_grad_norm: C, the bound on each clipped vector, in [1e-12, 1e12].
        noise_multiplier: Noise standard deviation divided by the sensitivity.
        sample_rate: Probability that a patient joins a step; a public constant.
        steps: Number of steps; a public constant.

    Raises:
        UnsoundTraining: ``max_grad_norm`` is out of its range, or not a number.
        ValueError: another attribute is out of its range (see `PoissonGaussian`).
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    steps: int

    unit: ClassVar[str] = "patient"
    adjacency: ClassVar[str] = "add_remove"
    sampler: ClassVar[str] = "poisson"
    bounds_moved: ClassVar[int]

    def __post_init__(self) -> None:
        if not LEAST_NORM <= self.max_grad_norm <= LARGEST_NORM:
            raise UnsoundTraining(
                f"expected max_grad_norm={self.max_grad_norm} in [{LEAST_NORM}, {LARGEST_NORM}]: "
                "float32 would round the bound and its noise"
            )
        _ = self.event  # checks the other three

    @property
    def sensitivity(self) -> float:
        """How far one patient moves the sum of clipped vectors, in L2 norm."""
        return self.bounds_moved * self.max_grad_norm

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

    def release(self, clipped_sum: Mapping[str, Tensor], noise: GaussianNoise) -> Released:
        """The clipped sum with fresh noise on every coordinate of every array."""
        stddev = self.noise_std
        arrays = {name: noise.add_to(value, stddev=stddev) for name, value in clipped_sum.items()}
        return Released(arrays=arrays, noise_std=stddev)


@dataclass(frozen=True, kw_only=True)
class AnchoredDpSgd(_DpSgd):
    """One clipped gradient a patient, whose loss sees no other patient: sensitivity C.

    Source:
        Abadi et al. (2016), arXiv:1607.00133, algorithm 1, with patients as the unit.
    """

    kind: ClassVar[str] = "anchored"
    bounds_moved: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class MicrobatchDpSgd(_DpSgd):
    """One clipped gradient a group of patients that see each other: sensitivity 2C.

    A patient who comes turns their group's clipped gradient g into g', both of norm at most C and of any
    direction, so the sum moves by up to 2C. That is all it moves only because each patient's group is drawn
    uniformly and independently of everything (`privacy.sampling.uniform_groups`): the other groups stay as
    they were. Given the group, this is the sampled Gaussian mechanism of sensitivity 2C; not knowing the
    group helps nobody, since the divergence is jointly convex.

    Source:
        Group clipping for contrastive losses: Huang et al. (2023), arXiv:2306.08173; its bound as above.
    """

    kind: ClassVar[str] = "microbatch"
    bounds_moved: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class WholeCohort(ABC):
    """The Gaussian mechanism on a sum over all patients, once; what is summed is for the children to say.

    Attributes:
        noise_multiplier: Noise standard deviation divided by the sensitivity.

    Source:
        Dwork and Roth (2014), appendix A.
    """

    noise_multiplier: float

    unit: ClassVar[str] = "patient"
    adjacency: ClassVar[str] = "add_remove"
    sampler: ClassVar[str] = "none"
    sample_rate: ClassVar[float] = 1.0
    steps: ClassVar[int] = 1

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """How far one patient moves the sum, in L2 norm."""

    @property
    def max_grad_norm(self) -> float:
        """The bound on a contribution, by the name that ledger and releases have for it."""
        return self.sensitivity

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


# By kind, which is also the name of the objective whose sensitivity it knows: no other claims an epsilon.
MECHANISMS: dict[str, type[AnchoredDpSgd | MicrobatchDpSgd]] = {
    mechanism.kind: mechanism for mechanism in (AnchoredDpSgd, MicrobatchDpSgd)
}
