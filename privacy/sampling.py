"""Who takes part in a step, and in which group: independent coins, as the accountant assumes."""

import numpy as np
from numpy.typing import NDArray


def poisson_sample(
    generator: np.random.Generator, *, population: int, sample_rate: float
) -> NDArray[np.intp]:
    """Draw the members of one step.

    Guarantees:
        Each of the ``population`` indices is drawn with probability ``sample_rate``, independently of all
        others and of earlier draws. It may be empty; the step is then still taken, noised and accounted. Its
        size depends on the true population and is private.

    Args:
        generator: Source of the coins. Amplification by sampling holds only against those who cannot predict
            them: seed it from the operating system (`privacy.noise.os_generator`) in every run with a claim.
        population: Number of patients, >= 0.
        sample_rate: Probability q in (0, 1], a public constant.

    Returns:
        Indices in increasing order, shape (n,), 0 <= n <= population.

    Raises:
        ValueError: ``population`` or ``sample_rate`` is out of its range.
    """
    if population < 0:
        raise ValueError(f"expected {population=} >= 0")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"expected {sample_rate=} in (0, 1]")
    return np.flatnonzero(generator.random(population) < sample_rate)


def uniform_groups(generator: np.random.Generator, *, members: int, groups: int) -> NDArray[np.intp]:
    """Draw the group of each member of one step.

    Guarantees:
        Each member's group is uniform and independent of all others, of their number and of earlier draws: a
        member who leaves changes nobody else's. (A shuffled batch cut into chunks has no such property: who
        leaves displaces others, and two groups change.)

    Args:
        generator: Source of the draws.
        members: Number of drawn patients, >= 0.
        groups: M >= 1, a public constant.

    Returns:
        A group in [0, M) for each member, shape (members,).

    Raises:
        ValueError: ``members`` or ``groups`` is out of its range.
    """
    if members < 0:
        raise ValueError(f"expected {members=} >= 0")
    if groups < 1:
        raise ValueError(f"expected {groups=} >= 1")
    return generator.integers(0, groups, size=members, dtype=np.intp)
