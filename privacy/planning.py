"""What a private run would promise and cost, from public constants alone, before anyone trains."""

import math
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

from privacy.accounting import (
    PoissonGaussian,
    default_delta,
    epsilon,
    noise_multiplier_for,
    renyi_epsilons,
)
from privacy.errors import ImpossiblePlan, NoiseOutOfRange
from privacy.mechanism import MECHANISMS, AnchoredDpSgd, Kind, MicrobatchDpSgd
from privacy.regime import share_of_lift

# Past these a plan is told what to reconsider. Rules of thumb, all of them.
WEAK_EPSILON = 8.0
FEW_PATIENTS = 500
LARGE_SAMPLE_RATE = 0.5  # what a site refuses, unless its policy says otherwise
DROWNED = 2.0  # the demo learns at 0.7; the departments of vqamed2019, with both heads at 2.4 to 6.9, do not

# A comparison's grid follows its cost, which keeps rounding below one percent of it; and past this much there
# is nothing left to compare.
_FINEST_GRID, _GRID_SHARE = 1e-3, 0.02
_NO_PROTECTION = 1e3


@dataclass(frozen=True, kw_only=True)
class Concern:
    """Something to reconsider before a plan is run.

    Attributes:
        about: Which figure of the plan.
        text: What is wrong with it, its value, and the remedy.
    """

    about: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One hospital's part in a private run; every attribute is a public constant.

    Guarantees:
        A plan that was built has a price: ``epsilon`` is what `privacy.accounting.epsilon` says of its
        steps, for adding or removing one patient with everything that belongs to them.

    Attributes:
        patients_declared: Public size of the cohort, N.
        batch: Expected patients per step, in (0, N].
        steps: Steps of the whole run, over all its rounds.
        noise_multiplier: Noise standard deviation divided by the sensitivity.
        delta: Failure probability.
        mechanism: ``anchored`` (a patient moves a step by C) or ``microbatch`` (by 2C).
        max_grad_norm: C, the bound on each clipped gradient.
        groups: Groups of one step, for ``microbatch`` alone; without it there is no ``noise_to_signal``.
        parameters: Trained weights; without them there is no ``noise_to_signal``.
        sites: Hospitals of this size whose updates are averaged.

    Raises:
        ImpossiblePlan: A value is out of its range, or does not go with the others.
    """

    patients_declared: int
    batch: float
    steps: int
    noise_multiplier: float
    delta: float
    mechanism: Kind = "anchored"
    max_grad_norm: float = 1.0
    groups: int | None = None
    parameters: int | None = None
    sites: int = 1

    def __post_init__(self) -> None:
        for name in ("patients_declared", "sites", "groups", "parameters"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ImpossiblePlan(f"expected {name}={value} >= 1")
        _check_batch(self.batch, self.patients_declared)
        if self.mechanism not in MECHANISMS:
            raise ImpossiblePlan(f"expected mechanism={self.mechanism!r} to be one of {list(MECHANISMS)}")
        if self.mechanism == "anchored" and self.groups is not None:
            raise ImpossiblePlan(f"groups={self.groups} belongs to mechanism='microbatch': leave it out")
        try:
            _ = self._dp_sgd, self.epsilon
        except ValueError as error:
            raise ImpossiblePlan(str(error)) from error

    @property
    def _dp_sgd(self) -> AnchoredDpSgd | MicrobatchDpSgd:
        return MECHANISMS[self.mechanism](
            max_grad_norm=self.max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
        )

    @property
    def sample_rate(self) -> float:
        """Probability q that a patient joins a step."""
        return self.batch / self.patients_declared

    @property
    def epochs(self) -> float:
        """How many steps a patient joins on average."""
        return self.steps * self.sample_rate

    @property
    def sensitivity(self) -> float:
        """How far one patient moves a step's sum of clipped gradients, in L2 norm."""
        return self._dp_sgd.sensitivity

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of that sum."""
        return self._dp_sgd.noise_std

    @property
    def epsilon(self) -> float:
        """What every patient is promised."""
        return epsilon([self._dp_sgd.event], delta=self.delta)

    @property
    def renyi_epsilons(self) -> dict[str, float]:
        """What two accountants that are looser say of the same run."""
        return renyi_epsilons([self._dp_sgd.event], delta=self.delta)

    @property
    def epsilon_by_mechanism(self) -> dict[str, float]:
        """What each mechanism would cost if it added this plan's ``noise_std``.

        The plan's own is its epsilon. Reading one off for the other is the mistake of taking 2C for C.
        """
        return {kind: self._epsilon_at_this_noise(kind) for kind in MECHANISMS}

    def _epsilon_at_this_noise(self, kind: str) -> float:
        if kind == self.mechanism:
            return self.epsilon
        halved_or_doubled = MECHANISMS[self.mechanism].bounds_moved / MECHANISMS[kind].bounds_moved
        event = PoissonGaussian(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier * halved_or_doubled,
            steps=self.steps,
        )
        return epsilon([event], delta=self.delta)

    @property
    def epsilon_replace_one(self) -> float:
        """The cost if neighbours differed by exchanging a patient for another, N being known; an upper bound.

        Infinity where ``epsilon`` itself is above 1000.
        """
        if self.epsilon > _NO_PROTECTION:
            return math.inf
        return max(self.epsilon, _replace_one_epsilon(self._dp_sgd.event, self.delta))

    def epsilon_if_studies_were_drawn(self, studies: int) -> float:
        """The cost for a patient with so many studies, had every step drawn, and bounded, studies alone.

        The number that such a run states is this plan's ``epsilon``: it is a study's. A patient's studies
        are drawn independently and may all push the same way.

        Returns:
            An upper bound within one percent; infinity where ``epsilon`` itself is above 1000.

        Raises:
            ImpossiblePlan: ``studies`` is not positive.

        Source:
            Ganesh (2024), arXiv:2401.10294: group privacy by mixtures of Gaussians.
        """
        if not studies >= 1:
            raise ImpossiblePlan(f"expected {studies=} >= 1")
        if self.epsilon > _NO_PROTECTION:
            return math.inf
        if studies == 1:
            return self.epsilon
        return max(self.epsilon, _study_epsilon(self._dp_sgd.event, studies, self.delta, self.epsilon))

    @property
    def noise_to_signal(self) -> float | None:
        """Expected norm of one step's noise over the largest possible norm of its gradient.

        Both of the average over ``sites``: noise averages out, and all clipped gradients may point the same
        way. Real ones do not, so the true ratio is larger. None where it cannot be known.
        """
        vectors = self.batch if self.mechanism == "anchored" else self.groups
        if self.parameters is None or vectors is None:
            return None
        largest = self.max_grad_norm * min(vectors, self.batch)  # an empty group has no gradient
        return self.noise_std * math.sqrt(self.parameters / self.sites) / largest

    @property
    def share_of_lift(self) -> float | None:
        """What is expected to be left of the lift that the same training has without privacy.

        Read from the runs of `privacy.regime`, over a public start and with the anchored loss. None where
        ``noise_to_signal`` cannot be known.
        """
        if self.parameters is None or self.noise_to_signal is None:
            return None
        return share_of_lift(parameters=self.parameters, noise_to_signal=self.noise_to_signal)

    @property
    def concerns(self) -> tuple[Concern, ...]:
        """What to reconsider, worst first."""
        n = self.patients_declared
        found = {
            "delta": (
                self.delta > 1 / (10 * n) * (1 + 1e-9),
                f"delta = {self.delta:g} is above 1/(10 x {n:,}): a mechanism that now and then publishes a "
                f"whole patient could keep it; take {default_delta(n):g} or less",
            ),
            "epsilon": (
                self.epsilon > WEAK_EPSILON,
                f"epsilon = {self.epsilon:.4g} is weak: it bounds how much surer an attacker gets only by a "
                f"factor of {_power_of_e(self.epsilon)}; take {WEAK_EPSILON:g} or less, by more noise or "
                "fewer steps",
            ),
            "noise": (
                self._too_much_noise is not None,
                self._too_much_noise or "",
            ),
            "patients": (
                n < FEW_PATIENTS,
                f"{n:,} patients are few: the same epsilon costs them more noise than a large cohort; bring "
                "hospitals together, start from a public model, or train the heads alone",
            ),
            "sample_rate": (
                self.sample_rate > LARGE_SAMPLE_RATE,
                f"a step draws {self.sample_rate:.0%} of all patients, so hardly any privacy comes from not "
                f"knowing who was drawn, and sites refuse more than {LARGE_SAMPLE_RATE:.0%} by default: "
                "lower the batch",
            ),
            "batch": (
                self.batch < 1,
                f"a step expects {self.batch:.3g} patients: most steps release noise alone; raise the batch "
                "and take fewer steps",
            ),
        }
        return tuple(Concern(about=about, text=text) for about, (holds, text) in found.items() if holds)

    @property
    def _too_much_noise(self) -> str | None:
        """What a hospital is told whose cohort is too small for what it asks, and what would be enough."""
        ratio, kept = self.noise_to_signal, self.share_of_lift
        if self.parameters is None or ratio is None or kept is None:
            return None
        over = ratio / DROWNED
        if over <= 1:
            return None
        patients, sites = over * self.patients_declared, over**2 * self.sites
        return (
            f"{self.patients_declared:,} patients are too few for this epsilon: the noise of a step is "
            f"{ratio:.1f} times the largest gradient there can be. From a public start expect at most "
            f"{kept:.0%} of what training adds without privacy, from no start nothing (docs/results.md). It "
            f"would be {DROWNED:g} times with about {_rounded_up(patients):,} patients, drawn in the same "
            f"share, or {math.ceil(sites):,} such hospitals together. Or train fewer weights (heads, LoRA), "
            "take fewer steps, or promise a larger epsilon"
        )


def make_plan(
    *,
    patients_declared: int,
    batch: float,
    steps: int | None = None,
    epochs: float | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
    mechanism: Kind = "anchored",
    max_grad_norm: float = 1.0,
    groups: int | None = None,
    parameters: int | None = None,
    sites: int = 1,
) -> Plan:
    """The plan that follows from ``steps`` or ``epochs``, and from ``epsilon`` or ``noise_multiplier``.

    Guarantees:
        From ``epsilon``, the noise is the least that keeps it: the plan costs at most ``epsilon``, and 0.1 %
        less noise would cost more (unless it is 0.1 already, see `noise_multiplier_for`).

    Args:
        patients_declared: See `Plan`, as for everything that is not listed here.
        batch: Expected patients per step.
        steps: Of the whole run.
        epochs: Expected passes over the cohort, in place of ``steps``; rounded to whole steps, at least one.
        epsilon: Target for every patient.
        noise_multiplier: In place of ``epsilon``, which then follows.
        delta: By default 1 / (10 N) rounded down to a power of ten.
        mechanism: See `Plan`.
        max_grad_norm: See `Plan`.
        groups: See `Plan`.
        parameters: See `Plan`.
        sites: See `Plan`.

    Raises:
        ImpossiblePlan: A value is out of its range, missing, or one too many.
        NoiseOutOfRange: No noise that is offered keeps ``epsilon``.
    """
    if not patients_declared >= 1:
        raise ImpossiblePlan(f"expected {patients_declared=} >= 1")
    _check_batch(batch, patients_declared)
    sample_rate = batch / patients_declared
    delta = default_delta(patients_declared) if delta is None else delta
    steps = _steps(steps, epochs, sample_rate)
    noise_multiplier = _noise_multiplier(noise_multiplier, epsilon, delta, sample_rate, steps)
    return Plan(
        patients_declared=patients_declared,
        batch=batch,
        steps=steps,
        noise_multiplier=noise_multiplier,
        delta=delta,
        mechanism=mechanism,
        max_grad_norm=max_grad_norm,
        groups=groups,
        parameters=parameters,
        sites=sites,
    )


def _check_batch(batch: float, patients_declared: int) -> None:
    if not 0 < batch <= patients_declared:
        raise ImpossiblePlan(
            f"expected {batch=} patients a step in (0, {patients_declared}], the declared patients"
        )


def _steps(steps: int | None, epochs: float | None, sample_rate: float) -> int:
    if steps is not None and epochs is None:
        return steps
    if steps is not None or epochs is None:
        raise ImpossiblePlan(f"expected either {steps=} or {epochs=}: the other follows from it")
    if not 0 < epochs < math.inf:
        raise ImpossiblePlan(f"expected {epochs=} > 0 and finite")
    return max(1, round(epochs / sample_rate))


def _noise_multiplier(
    noise_multiplier: float | None, epsilon: float | None, delta: float, sample_rate: float, steps: int
) -> float:
    if noise_multiplier is not None and epsilon is None:
        return noise_multiplier
    if noise_multiplier is not None or epsilon is None:
        raise ImpossiblePlan(f"expected either {epsilon=} or {noise_multiplier=}: the other follows from it")
    try:
        return noise_multiplier_for(epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps)
    except NoiseOutOfRange:
        raise
    except ValueError as error:
        raise ImpossiblePlan(str(error)) from error


@lru_cache(maxsize=256)
def _replace_one_epsilon(event: PoissonGaussian, delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=_FINEST_GRID)
    gaussian = GaussianDpEvent(event.noise_multiplier)
    accountant.compose(PoissonSampledDpEvent(event.sample_rate, gaussian), event.steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _study_epsilon(event: PoissonGaussian, studies: int, delta: float, cost: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=_grid(event.steps, studies * cost))
    drawn = range(studies + 1)
    q = event.sample_rate
    mixture = MixtureOfGaussiansDpEvent(
        standard_deviation=event.noise_multiplier,
        sensitivities=[float(count) for count in drawn],
        sampling_probs=[math.comb(studies, n) * q**n * (1 - q) ** (studies - n) for n in drawn],
    )
    accountant.compose(mixture, event.steps)
    return float(accountant.get_epsilon(delta))


def _grid(steps: int, cost: float) -> float:
    """Rounding to a grid h adds about steps * h^2 / 8 to epsilon (connect the dots)."""
    return max(_FINEST_GRID, math.sqrt(_GRID_SHARE * cost / steps))


def _rounded_up(count: float) -> int:
    """To two digits: a third one would claim more than is known."""
    unit = 10.0 ** max(0, math.floor(math.log10(count)) - 1)
    return round(math.ceil(count / unit) * unit)


def _power_of_e(exponent: float) -> str:
    return f"{math.exp(exponent):,.0f}" if exponent < 20 else f"e^{exponent:.0f}"
