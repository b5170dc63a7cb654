"""How much of what training brings survives a plan's noise: what bench/regime.py measured, read for plans.

The study trains parts of one small model from one public start at two synthetic hospitals of 300 to 10,000
patients. Each private arm keeps a share of the lift over that start which the same training reaches without
privacy. Other models, data and recipes keep other shares: this says where to be doubtful, and no more.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One private arm of the study.

    Attributes:
        parameters: Trained weights.
        noise_to_signal: See `privacy.planning.Plan.noise_to_signal`.
        share: Of the lift without privacy, in [0, 1].
    """

    parameters: int
    noise_to_signal: float
    share: float


# python bench/regime.py --no-train --measured
MEASURED: tuple[Measured, ...] = (
    Measured(parameters=65536, noise_to_signal=1.003, share=0.32),
    Measured(parameters=65536, noise_to_signal=1.924, share=0.31),
    Measured(parameters=65536, noise_to_signal=3.345, share=0.32),
    Measured(parameters=65536, noise_to_signal=4.636, share=0.17),
    Measured(parameters=65536, noise_to_signal=6.415, share=0.34),
    Measured(parameters=65536, noise_to_signal=15.45, share=0.34),
    Measured(parameters=7696896, noise_to_signal=14.56, share=0.49),
    Measured(parameters=7696896, noise_to_signal=27.84, share=0.42),
    Measured(parameters=7696896, noise_to_signal=64.14, share=0.3),
)


def share_of_lift(*, parameters: int, noise_to_signal: float) -> float:
    """The share of the lift without privacy that a plan is expected to keep.

    Guarantees:
        In [0, 1], and no larger for more noise. Outside of what was measured it is that of the nearest
        measurement: at most that much is kept with more noise, at least that much with less.

    Args:
        parameters: Trained weights; arms with the nearest number, by ratio, are read.
        noise_to_signal: Of a step, averaged over the hospitals, at least 0.
    """
    noises, shares = _curve(_nearest(parameters))
    return float(np.interp(math.log(max(noise_to_signal, noises[0])), np.log(noises), shares))


def _nearest(parameters: int) -> int:
    known = {one.parameters for one in MEASURED}
    return min(known, key=lambda count: abs(math.log(count / parameters)))


@cache
def _curve(parameters: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noises, rising, and of shares that never rise with them those that fit best: chance is evened out."""
    arms = sorted((one.noise_to_signal, one.share) for one in MEASURED if one.parameters == parameters)
    noises, shares = np.array(arms).T
    return noises, isotonic_regression(shares, increasing=False).x
