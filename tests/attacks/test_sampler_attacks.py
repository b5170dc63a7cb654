"""Who joined each step of the training path, read off its releases, against what the accountant assumes.

Planted samplers must fail the checks that the real one passes. A right sampler fails a check with probability
below 1e-6 for a seed drawn anew; the seeds are fixed besides.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from client import training
from privacy.sampling import poisson_sample
from tests.attacks.probe import BOUND, ProbePart, Watched, mechanism, releases

PATIENTS, RATE, STEPS = 20, 0.1, 400
# A deviation that chance exceeds with probability 3e-10; there are fewer than a thousand.
RARE, SIGMAS = 3e-10, 6.3
SILENT = 1e-6  # noise far below one patient, so that a release shows who is in it

Draw = Callable[..., NDArray[np.intp]]


def presence(
    pairs_of: Sequence[int] = range(PATIENTS), patients: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """How often each patient was in each step, shape (STEPS, PATIENTS).

    Args:
        pairs_of: Whom each pair belongs to.
        patients: Whom the training is told it belongs to.
    """
    found = releases(
        pairs_of,
        patients=pairs_of if patients is None else patients,
        of=mechanism(noise_multiplier=SILENT, sample_rate=RATE, steps=STEPS),
        part=ProbePart(layers=1, rows=PATIENTS),
        noise=Watched(layers=1),
    )
    assert len(found) == STEPS  # an empty draw is a step like any other
    joined = -found[:, 0]
    assert np.abs(joined - joined.round()).max() < 1e-4
    return joined.round()


def presence_by(draw: Draw) -> NDArray[np.float64]:
    """The same of a sampler by itself."""
    generator, present = np.random.default_rng(0), np.zeros((STEPS, PATIENTS))
    for step in present:
        step[draw(generator, population=PATIENTS, sample_rate=RATE)] = 1
    return present


def suspicious(present: NDArray[np.float64]) -> set[str]:
    """What lies further from independent coins than chance explains."""
    variance = RATE * (1 - RATE)
    one = math.sqrt(STEPS * variance)  # standard deviation of one patient's number of steps
    centred = present - RATE
    together, following = centred.T @ centred, centred[1:].T @ centred[:-1]
    np.fill_diagonal(together, 0)
    sizes, of_size = present.sum(axis=1), PATIENTS * variance
    spread = of_size * (1 + 3 * (PATIENTS - 2) * variance) - of_size**2  # of a squared binomial deviation
    empty, nobody = float((sizes == 0).sum()), (1 - RATE) ** PATIENTS
    found = {
        "frequency": ((centred.sum(axis=0) / one) ** 2).sum() > chi2.isf(RARE, PATIENTS),
        "rate": abs(centred.sum()) > SIGMAS * one * math.sqrt(PATIENTS),
        "together": np.abs(together).max() > SIGMAS * math.sqrt(STEPS) * variance,
        "next step": np.abs(following).max() > SIGMAS * math.sqrt(STEPS) * variance,
        "size": abs(((sizes - PATIENTS * RATE) ** 2 - of_size).sum()) > SIGMAS * math.sqrt(STEPS * spread),
        "empty": abs(empty - STEPS * nobody) > SIGMAS * math.sqrt(STEPS * nobody * (1 - nobody)),
    }
    return {sign for sign, seen in found.items() if seen}


def shuffled() -> Draw:
    """A loader: every patient once an epoch, in batches of equal size."""
    size = round(PATIENTS * RATE)

    def epochs(generator: np.random.Generator) -> "itertools.chain[NDArray[np.intp]]":
        return itertools.chain.from_iterable(
            generator.permutation(PATIENTS).reshape(-1, size) for _ in itertools.count()
        )

    loader: list[itertools.chain[NDArray[np.intp]]] = []

    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        if not loader:
            loader.append(epochs(generator))
        return np.sort(next(loader[0]))

    return draw


def fixed_size() -> Draw:
    """Right on average, never empty."""

    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        return np.sort(generator.choice(population, round(population * sample_rate), replace=False))

    return draw


def another_rate(factor: float) -> Callable[[], Draw]:
    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        return poisson_sample(generator, population=population, sample_rate=factor * sample_rate)

    return lambda: draw


def weighted() -> Draw:
    """Some patients more often than others, as rare findings are sometimes drawn."""

    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        rates = sample_rate * np.where(np.arange(population) < population // 2, 0.5, 1.5)
        return np.flatnonzero(generator.random(population) < rates)

    return draw


def one_coin_for_all() -> Draw:
    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        return np.arange(population if generator.random() < sample_rate else 0)

    return draw


def seeded_anew_every_step() -> Draw:
    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        return poisson_sample(np.random.default_rng(3), population=population, sample_rate=sample_rate)

    return draw


def redrawn_when_empty() -> Draw:
    def draw(generator: np.random.Generator, *, population: int, sample_rate: float) -> NDArray[np.intp]:
        while not len(drawn := poisson_sample(generator, population=population, sample_rate=sample_rate)):
            pass
        return drawn

    return draw


def test_patients_join_by_coins_of_their_own_at_the_rate_of_the_claim() -> None:
    assert suspicious(presence()) == set()


def test_a_patient_with_many_pairs_joins_no_more_often_and_counts_once() -> None:
    present = presence(list(range(PATIENTS)) * 2 + [0] * 5)
    assert present.max() == 1
    assert suspicious(present) == set()


@pytest.mark.parametrize(
    ("mistake", "signs"),
    [
        (shuffled, {"size", "empty"}),
        (fixed_size, {"size", "empty"}),
        (another_rate(2 / 3), {"rate", "frequency"}),
        (another_rate(3 / 2), {"rate", "frequency"}),
        (weighted, {"frequency"}),
        (one_coin_for_all, {"together", "size", "empty"}),
        (seeded_anew_every_step, {"frequency", "together", "next step"}),
        (redrawn_when_empty, {"empty"}),
    ],
)
def test_a_sampler_that_is_not_poisson_is_found(mistake: Callable[[], Draw], signs: set[str]) -> None:
    assert suspicious(presence_by(mistake())) >= signs
    assert suspicious(presence_by(poisson_sample)) == set()


def test_a_shuffled_loader_in_the_training_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "poisson_sample", shuffled())
    assert suspicious(presence()) >= {"size", "empty"}


def test_coins_for_pairs_instead_of_patients_are_found() -> None:
    pairs_of = list(range(PATIENTS)) * 2
    present = presence(pairs_of, patients=range(2 * PATIENTS))
    assert present.max() == 2
    assert suspicious(present) >= {"rate", "frequency"}


@pytest.mark.parametrize("spoiled", [[0], [0, 1, 2]])
def test_a_patient_whose_gradient_is_not_a_number_is_as_good_as_absent(spoiled: list[int]) -> None:
    of = mechanism(sample_rate=1.0, steps=2)
    part = ProbePart(layers=1, rows=5)
    found = releases(range(3), of=of, part=part, noise=Watched(layers=1), spoiled=spoiled)
    absent = releases(range(len(spoiled), 3), of=of, part=part, noise=Watched(layers=1))
    assert np.isfinite(found).all()
    assert found == pytest.approx(absent, abs=1e-5 * BOUND)
