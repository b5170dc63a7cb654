"""What releases have cost together, as (epsilon, delta), and the noise that keeps them under a target."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from privacy.errors import AccountantDisagreement, NoiseOutOfRange

# Grids of the privacy-loss distribution. The first gives the reported number. Rounding losses up to a coarse
# grid is pessimistic, by more than RDP is when thousands of steps cost next to nothing each: then, and only
# then, the finer grids decide whether the accountants agree.
_GRID = 1e-3
_FINER_GRIDS = (1e-4, 1e-5, 1e-6, 1e-7)
# Slack of "PLD <= RDP": a real contradiction is far larger, rounding far smaller.
_RELATIVE_SLACK, _ABSOLUTE_SLACK = 1e-3, 1e-4
# Composition by Fourier transform misplaces a little probability mass by rounding: per step at most 3e-17 was
# seen against the exact Gaussian, 1.1e-16 against a finer grid. This much is kept off delta.
_LOST_MASS_PER_STEP = 1e-15
# Past this no guarantee is left to sharpen, while the grid would need gigabytes: RDP is reported instead.
_LARGEST_EPSILON_ON_A_GRID = 1e3
# Integer orders only: Google's fractional ones stop converging at large sample rates (and log each failure).
_GOOGLE_RDP_ORDERS = (*range(2, 65), *range(72, 257, 8), 320, 384, 512, 768, 1024)

_LEAST_NOISE, _MOST_NOISE = 0.1, 1000.0
_NOISE_PRECISION = 1e-3


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian:
    """Gaussian mechanism on a Poisson sample, repeated; neighbours differ by adding or removing one unit.

    What the unit is (a patient) is for the caller to make true: each unit joins a step independently, and
    moves the un-noised sum by at most the sensitivity.

    Attributes:
        sample_rate: Probability q in (0, 1] that a unit joins a step; 1 is the plain Gaussian mechanism.
        noise_multiplier: Standard deviation of the added noise divided by the sensitivity, > 0.
        steps: Number of repetitions, >= 1.

    Raises:
        ValueError: A value is out of its range, or not finite.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"expected sample_rate={self.sample_rate} in (0, 1]")
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"expected noise_multiplier={self.noise_multiplier} > 0 and finite")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"expected steps={self.steps!r} to be an integer >= 1")


def epsilon(events: Iterable[PoissonGaussian], *, delta: float) -> float:
    """Compose mechanisms run on one cohort and say what they cost together.

    Guarantees:
        The composition, adaptive and in any order, is (epsilon, delta)-DP under adding or removing one unit.
        The number is a pessimistic privacy-loss distribution (PLD) at grid 1e-3, checked on every computation
        against the Renyi accountants (RDP) of two libraries. Where that grid is too coarse and a finer one
        passes the check, it is the smaller RDP plus the check's slack, which the finer PLD proves. It never
        falls when an event is added. No events cost 0. Above 1000 it is the RDP itself, possibly infinity.

    Args:
        events: Mechanisms as executed. Equal ones are merged first: order and grouping are immaterial.
        delta: Failure probability in (0, 1), and at least 2e-15 per step: below, double precision is lost.

    Raises:
        ValueError: ``delta`` is out of its range.
        AccountantDisagreement: the privacy-loss distribution lies above a Renyi bound on every grid.

    Source:
        Privacy-loss distributions: Doroshenko et al. (2022), arXiv:2207.04380 (connect the dots).
        Renyi DP of the sampled Gaussian: Mironov et al. (2019), arXiv:1908.10530.
    """
    if not 0 < delta < 1:
        raise ValueError(f"expected {delta=} in (0, 1)")
    return _epsilon(_merge(events), delta)


def renyi_epsilons(events: Iterable[PoissonGaussian], *, delta: float) -> dict[str, float]:
    """The same composition as the Renyi accountants of two libraries see it: looser, for comparison.

    Returns:
        By accountant; infinity where its orders do not reach.

    Raises:
        ValueError: ``delta`` is out of its range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"expected {delta=} in (0, 1)")
    merged = _merge(events)
    return _renyi_epsilons(merged, delta) if merged else {"Google RDP": 0.0, "Opacus RDP": 0.0}


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    besides: Iterable[PoissonGaussian] = (),
) -> float:
    """Find the smallest noise that keeps ``steps`` steps, and what is released besides, within a target.

    Guarantees:
        The mechanism with the returned noise multiplier and ``besides`` cost at most ``epsilon`` together, as
        `epsilon` counts it, and one 0.1 % smaller would cost more (unless the result is 0.1, the least noise
        that is offered).

    Args:
        epsilon: Target > 0.
        delta: As for `epsilon`.
        sample_rate: Poisson probability in (0, 1].
        steps: Steps of the whole run, over all its rounds.
        besides: Other releases of the same run.

    Returns:
        Noise standard deviation divided by sensitivity, in [0.1, 1000].

    Raises:
        ValueError: A value is out of its range.
        NoiseOutOfRange: not even a noise multiplier of 1000 is enough.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"expected {epsilon=} > 0 and finite")
    others = tuple(besides)

    def affordable(noise_multiplier: float) -> bool:
        event = PoissonGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)
        return _cost([event, *others], delta=delta) <= epsilon

    too_little = enough = _LEAST_NOISE
    while not affordable(enough):
        if enough == _MOST_NOISE:
            raise NoiseOutOfRange(
                f"no noise multiplier up to {enough} keeps {steps=}, {sample_rate=} in {epsilon=}, {delta=}: "
                "take fewer steps, a lower sample rate or a larger epsilon"
                + (", or more noise on what is released besides" if others else "")
            )
        too_little, enough = enough, min(2 * enough, _MOST_NOISE)
    while enough > too_little * (1 + _NOISE_PRECISION):
        middle = math.sqrt(too_little * enough)
        if affordable(middle):
            enough = middle
        else:
            too_little = middle
    return enough


_cost = epsilon  # inside noise_multiplier_for the name is the target's


def default_delta(patients_declared: int) -> float:
    """Failure probability for a cohort of public, declared size N: 1 / (10 N) rounded down to a power of ten.

    Raises:
        ValueError: ``patients_declared`` is not positive.
    """
    if patients_declared < 1:
        raise ValueError(f"expected {patients_declared=} >= 1")
    exponent = len(str(10 * patients_declared - 1))  # the least k with 10^k >= 10 N, in exact arithmetic
    return float(f"1e-{exponent}")


def _merge(events: Iterable[PoissonGaussian]) -> tuple[PoissonGaussian, ...]:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    return tuple(
        PoissonGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=count)
        for (sample_rate, noise_multiplier), count in sorted(steps.items())
    )


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[PoissonGaussian, ...], delta: float) -> float:
    if not merged:
        return 0.0
    steps = sum(event.steps for event in merged)
    usable_delta = delta - steps * _LOST_MASS_PER_STEP
    if usable_delta < delta / 2:
        raise ValueError(f"expected {delta=} >= {2 * steps * _LOST_MASS_PER_STEP}: too small for {steps=}")
    renyi = _renyi_epsilons(merged, usable_delta)
    if not all(map(math.isfinite, renyi.values())):
        return math.inf
    bound = min(renyi.values())
    if bound > _LARGEST_EPSILON_ON_A_GRID:
        return bound
    reported = _pld_epsilon(merged, usable_delta, grid=_GRID)
    agreed = bound * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK
    if not (
        reported <= agreed or any(_pld_epsilon(merged, usable_delta, grid=g) <= agreed for g in _FINER_GRIDS)
    ):
        raise AccountantDisagreement(
            f"privacy-loss distributions say epsilon={reported}, above {renyi}, for {merged} at {delta=}: "
            "no epsilon can be claimed; check the installed dp-accounting and opacus against the constraints"
        )
    # Sound without trusting RDP, whose rounding can reach 0: a pessimistic distribution lies below either.
    return min(reported, agreed)


def _renyi_epsilons(merged: tuple[PoissonGaussian, ...], delta: float) -> dict[str, float]:
    return {
        "Google RDP": _google_rdp_epsilon(merged, delta),
        "Opacus RDP": _opacus_rdp_epsilon(merged, delta),
    }


def _pld_epsilon(merged: tuple[PoissonGaussian, ...], delta: float, *, grid: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=grid)
    for event in merged:
        accountant.compose(_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def _google_rdp_epsilon(merged: tuple[PoissonGaussian, ...], delta: float) -> float:
    accountant = RdpAccountant(orders=_GOOGLE_RDP_ORDERS)
    for event in merged:
        accountant.compose(_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def _opacus_rdp_epsilon(merged: tuple[PoissonGaussian, ...], delta: float) -> float:
    # Imported here: it brings torch, and who only reads a hospital's files opens the ledger too.
    from opacus.accountants import RDPAccountant as OpacusRdpAccountant

    accountant = OpacusRdpAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in merged]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimal order is the largest alpha": only makes this bound looser
        return float(accountant.get_epsilon(delta))


def _dp_event(event: PoissonGaussian) -> DpEvent:
    gaussian = GaussianDpEvent(event.noise_multiplier)
    return gaussian if event.sample_rate == 1 else PoissonSampledDpEvent(event.sample_rate, gaussian)
