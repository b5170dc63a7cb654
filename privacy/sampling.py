"""Who takes part in a step: every patient by an independent coin, as the accountant assumes."""

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
