"""Golden rows that no wrong epsilon passes: every planted accountant misses at least one of them.

A row is never taken from the code under test: closed forms, and rows on which two libraries agreed, Google's
privacy-loss distributions at a grid of 1e-4 and Opacus' PRV accountant within the error that it states.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import GaussianAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from privacy import accounting
from privacy.accounting import PoissonGaussian, epsilon
from privacy.errors import AccountantDisagreement

Accountant = Callable[[list[PoissonGaussian], float], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was run, and the epsilon it has: at least ``least`` and at most ``most``."""

    events: tuple[PoissonGaussian, ...]
    delta: float
    least: float
    most: float


def of(sample_rate: float, noise_multiplier: float, steps: int) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


def published(*events: PoissonGaussian, value: float, delta: float = 1e-5) -> Row:
    return Row(events=events, delta=delta, least=value * (1 - 2e-3), most=value * (1 + 2e-3))


def closed_form(*events: PoissonGaussian, delta: float) -> Row:
    """Gaussians without sampling compose to one: exact, so epsilon may not be below it at all.

    Source:
        Balle and Wang (2018), arXiv:1805.06530, theorem 8.
    """
    mu = math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in events))

    def excess(value: float) -> float:
        return float(ndtr(mu / 2 - value / mu) - math.exp(value + log_ndtr(-mu / 2 - value / mu))) - delta

    exact = float(brentq(excess, 0, 500))
    return Row(events=events, delta=delta, least=exact, most=exact * 1.001)


TRAINING = of(0.02, 0.9, 2_000)
ROWS = (
    closed_form(of(1.0, 1.0, 1), delta=1e-5),
    closed_form(of(1.0, 2.0, 2), delta=1e-6),
    closed_form(of(1.0, 5.0, 100), delta=1e-8),
    closed_form(of(1.0, 1.0, 1), of(1.0, 2.0, 1), of(1.0, 1.0, 1), delta=1e-5),
    published(of(0.01, 0.6, 1_000), value=7.434),
    published(of(0.01, 0.8, 1_000), value=3.141),
    published(of(0.01, 0.8, 1_000), value=3.706, delta=1e-6),
    published(of(0.01, 1.0, 2_000), value=2.584),
    published(of(0.05, 1.2, 1_000), value=7.891),
    published(of(0.01, 1.0, 1_000), of(0.05, 1.0, 100), value=3.926),  # one noise at two rates
    published(of(0.01, 1.0, 1_000), of(0.01, 2.0, 4_000), value=2.286),  # one rate at two noises
    published(TRAINING, of(1.0, 20.0, 50), value=7.191),
    published(TRAINING, *[of(1.0, 10.0, 1)] * 10, value=7.148),
    published(of(0.02, 0.9, 1_500), of(0.02, 0.9, 500), of(1.0, 10.0, 50), value=7.817),
)


def missed(accountant: Accountant) -> list[Row]:
    """The rows that an accountant gets wrong, up to the first."""
    for row in ROWS:
        if not row.least <= accountant(list(row.events), row.delta) <= row.most:
            return [row]
    return []


def ours(events: Iterable[PoissonGaussian], delta: float) -> float:
    return epsilon(events, delta=delta)


@pytest.mark.parametrize("row", ROWS)
def test_every_golden_row_is_met(row: Row) -> None:
    assert row.least <= ours(row.events, row.delta) <= row.most


# --- planted accountants ------------------------------------------------------------------------------------


def changing(**how: Callable[[PoissonGaussian], float]) -> Accountant:
    """Ours, told something else than what was run."""

    def accountant(events: list[PoissonGaussian], delta: float) -> float:
        told = [
            replace(event, **{name: value(event) for name, value in how.items()})  # type: ignore[arg-type]
            for event in events
        ]
        return ours(told, delta)

    return accountant


def at_delta(wrong: Callable[[float], float]) -> Accountant:
    return lambda events, delta: ours(events, wrong(delta))


def gdp(events: list[PoissonGaussian], delta: float) -> float:
    """The central limit theorem's approximation, which is no bound."""
    if len(events) > 1:
        return ours(events, delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus says so itself
        accountant = GaussianAccountant()
    (event,) = events
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps)]
    return float(accountant.get_epsilon(delta))


def renyi(events: list[PoissonGaussian], delta: float) -> float:
    """A bound, and 7 to 17 percent too large."""
    return accounting._opacus_rdp_epsilon(tuple(events), delta)


def replace_one(events: list[PoissonGaussian], delta: float) -> float:
    """For neighbours of equal size: another promise."""
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        sampled = PoissonSampledDpEvent(event.sample_rate, gaussian)
        accountant.compose(gaussian if event.sample_rate == 1 else sampled, event.steps)
    return float(accountant.get_epsilon(delta))


def merged_by(key: Callable[[PoissonGaussian], object]) -> Accountant:
    """Events that only look alike are taken for the same."""

    def accountant(events: list[PoissonGaussian], delta: float) -> float:
        first: dict[object, PoissonGaussian] = {}
        steps: Counter[object] = Counter()
        for event in events:
            first.setdefault(key(event), event)
            steps[key(event)] += event.steps
        return ours([replace(first[name], steps=count) for name, count in steps.items()], delta)

    return accountant


def each_event_once(events: list[PoissonGaussian], delta: float) -> float:
    return ours(dict.fromkeys(events), delta)


def equal_mechanisms_once(events: list[PoissonGaussian], delta: float) -> float:
    return ours({(event.sample_rate, event.noise_multiplier): event for event in events}.values(), delta)


def sum_over_events(events: list[PoissonGaussian], delta: float) -> float:
    return sum(ours([event], delta / len(events)) for event in events)


def largest_of_events(events: list[PoissonGaussian], delta: float) -> float:
    return max(ours([event], delta) for event in events)


MISTAKES: dict[str, Accountant] = {
    "nothing costs anything": lambda events, delta: 0.0,
    "everything costs everything": lambda events, delta: math.inf,
    "no sampling": changing(sample_rate=lambda event: 1.0),
    "sampled twice": changing(sample_rate=lambda event: event.sample_rate**2),
    "a rate of half": changing(sample_rate=lambda event: event.sample_rate / 2),
    "everything is sampled": changing(sample_rate=lambda event: min(event.sample_rate, 0.5)),
    "half of the steps": changing(steps=lambda event: max(1, event.steps // 2)),
    "twice the steps": changing(steps=lambda event: 2 * event.steps),
    "one step fewer": changing(steps=lambda event: max(1, event.steps - 1)),
    "one step more": changing(steps=lambda event: event.steps + 1),
    "steps that grow as their root": changing(steps=lambda event: math.isqrt(event.steps)),
    "2C taken as C": changing(noise_multiplier=lambda event: 2 * event.noise_multiplier),
    "C taken as 2C": changing(noise_multiplier=lambda event: event.noise_multiplier / 2),
    "variance taken as deviation": changing(noise_multiplier=lambda event: event.noise_multiplier**2),
    "one percent too much noise": changing(noise_multiplier=lambda event: 1.01 * event.noise_multiplier),
    "ten times delta": at_delta(lambda delta: 10 * delta),
    "twice delta": at_delta(lambda delta: 2 * delta),
    "half of delta": at_delta(lambda delta: delta / 2),
    "always the same delta": at_delta(lambda delta: 1e-5),
    "central limit": gdp,
    "Renyi": renyi,
    "replacing instead of adding or removing": replace_one,
    "merged by noise alone": merged_by(lambda event: event.noise_multiplier),
    "merged by rate alone": merged_by(lambda event: event.sample_rate),
    "merged all": merged_by(lambda event: None),
    "equal events counted once": each_event_once,
    "equal mechanisms counted once": equal_mechanisms_once,
    "the first event alone": lambda events, delta: ours(events[:1], delta),
    "the last event alone": lambda events, delta: ours(events[-1:], delta),
    "costs added up": sum_over_events,
    "the largest cost alone": largest_of_events,
    "a thousandth too little": lambda events, delta: 0.999 * ours(events, delta),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_accountant_misses_a_golden_row(mistake: str) -> None:
    assert missed(MISTAKES[mistake])


# --- mutations of our own code ------------------------------------------------------------------------------


@pytest.fixture
def _fresh() -> Iterator[None]:
    accounting._epsilon.cache_clear()
    yield
    accounting._epsilon.cache_clear()


def sampled_only(event: PoissonGaussian) -> PoissonSampledDpEvent:
    return PoissonSampledDpEvent(min(event.sample_rate, 0.5), GaussianDpEvent(event.noise_multiplier))


def last_wins(events: Iterable[PoissonGaussian]) -> tuple[PoissonGaussian, ...]:
    return tuple({(event.sample_rate, event.noise_multiplier): event for event in events}.values())


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_dp_event", sampled_only),
        ("_merge", last_wins),
        ("_GRID", 0.05),
        ("_pld_epsilon", lambda merged, delta, *, grid: 0.9 * renyi(list(merged), delta)),
    ],
)
def test_a_mutation_of_the_accountant_is_refused_by_its_own_check_or_misses_a_golden_row(
    name: str, mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, name, mutant)
    monkeypatch.setattr(accounting, "_FINER_GRIDS", ())  # they only take time where the answer is no

    def refusing(events: list[PoissonGaussian], delta: float) -> float:
        try:
            return ours(events, delta)
        except AccountantDisagreement:
            return math.nan

    assert missed(refusing)
