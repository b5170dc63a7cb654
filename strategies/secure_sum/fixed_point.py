"""Updates as integers modulo 2^32, so scaled that no sum of them can overflow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.secure_sum.errors import OutOfRange, TermsRefused

BLOCK = 2**16  # values converted at a time: the temporary arrays stay in the processor's cache
_LARGEST, _SMALLEST = 2.0**64, 2.0**-64


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """The grid that weighted updates are rounded to: multiples of ``2^-exponent``.

    Guarantees:
        No overflow. With W = ``total_weight``, n = ``sites``, R = ``value_range``, the exponent is the
        largest e with W·R·2^e <= 2^31 - 1 - n. A site's integer is at most w·R·2^e + 1/2 in magnitude
        (rounding to nearest; the product in float64 adds less than 2^-21), so any sum of sites is below 2^31
        and two's complement holds it.
        Error. A mean over sites of weight w in total is off by at most ``error(...)``, that is
        n·(1/2 + 2^-21) / (w·2^e) < 1.001·n·R·2^-31·(W / w), plus rounding to float32. With all of 8 sites and
        R = 1 it is below 3.8e-9, whatever the weights are.

    A value beyond the range is refused and never cut off: a cut update would bend the sum where nobody can
    see it, since nobody sees the update. A wide range is cheap: doubling it costs one bit of 31.

    Args:
        value_range: R, the largest magnitude of an update's values, in their units.
        sites: n, the number of sites that may take part.
        total_weight: W, the sum of all their weights.

    Raises:
        TermsRefused: a number is outside its bounds.
    """

    value_range: float
    sites: int
    total_weight: int

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.value_range <= _LARGEST:
            raise TermsRefused(f"expected value_range={self.value_range} from 2^-64 to 2^64")
        if not 1 <= self.sites < 2**20:
            raise TermsRefused(f"expected sites={self.sites} from 1 to 2^20 - 1")
        if not self.sites <= self.total_weight < 2**53:
            raise TermsRefused(
                f"expected total_weight={self.total_weight} at least 1 a site and below 2^53, where float64 "
                "holds every integer: declare sizes in larger units"
            )

    @cached_property
    def exponent(self) -> int:
        """Binary digits after the point of the weighted sum; negative where the grid is coarser than 1."""
        room = (2**31 - 1 - self.sites) / (self.total_weight * self.value_range)
        return math.frexp(room)[1] - 1  # frexp: room = m·2^k with m in [1/2, 1)

    def error(self, *, sites: int, weight: int) -> float:
        """The most that a mean over ``sites`` sites of ``weight`` in total differs from the exact one."""
        return math.ldexp(sites * (0.5 + 2.0**-21) / weight, -self.exponent)

    def check(self, name: str, values: NDArray[Any]) -> None:
        """Refuse an array that has no place on the grid.

        Raises:
            OutOfRange: it is not float32 or float64, or a value is beyond the range or not finite.
        """
        if values.dtype not in (np.float32, np.float64):
            raise OutOfRange(f"array {name!r}: expected float32 or float64, got {values.dtype}")
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if not (-self.value_range <= low and high <= self.value_range):  # also refuses NaN
            raise OutOfRange(
                f"array {name!r} holds values from {low:.3g} to {high:.3g}, beyond the agreed range of "
                f"±{self.value_range:g}: agree on a wider range (twice as wide costs one bit of 31) or train "
                "with a smaller learning rate; that of prototypes follows from the patients that are declared"
            )

    def encode(self, values: NDArray[Any], *, weight: int) -> NDArray[np.uint32]:
        """``weight`` times ``values`` as integers, same shape; ``check`` them first."""
        encoded = np.empty(values.size, dtype=np.uint32)
        flat = values.reshape(-1)
        for part in blocks(values.size):
            scaled = np.ldexp(np.multiply(flat[part], weight, dtype=np.float64), self.exponent)
            encoded[part] = np.rint(scaled).astype(np.int64).astype(np.uint32)
        return encoded.reshape(values.shape)

    def mean(self, total: NDArray[np.uint32], *, weight: int) -> NDArray[np.float32]:
        """The mean whose weighted sum over sites of ``weight`` in total is ``total``, same shape."""
        decoded = np.empty(total.size, dtype=np.float32)
        flat = total.reshape(-1)
        for part in blocks(total.size):
            exact = np.ldexp(flat[part].view(np.int32).astype(np.float64), -self.exponent)
            decoded[part] = exact / weight
        return decoded.reshape(total.shape)


def blocks(size: int) -> Iterator[slice]:
    """Consecutive slices of at most `BLOCK` that cover ``size`` values."""
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
