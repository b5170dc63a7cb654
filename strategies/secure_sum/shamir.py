"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer give nothing."""

import secrets
from collections.abc import Iterable, Mapping

PRIME = 2**521 - 1  # a Mersenne prime above 256 bits
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, *, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Shares of ``secret``, one for each of ``points``.

    Guarantees:
        ``combine`` of any ``threshold`` shares is the secret. Any ``threshold - 1`` of them are uniformly
        distributed whatever the secret is. Every call draws anew from the system's generator.

    Args:
        secret: 32 bytes.
        points: Where the polynomial is evaluated: distinct, from 1 to PRIME - 1.
        threshold: Number of coefficients.

    Raises:
        ValueError: an argument is outside these bounds, or there are fewer points than ``threshold``.

    Source:
        Shamir (1979), How to Share a Secret, over GF(2^521 - 1).
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, got {len(secret)}")
    wanted = list(points)
    if len(set(wanted)) != len(wanted) or not all(0 < point < PRIME for point in wanted):
        raise ValueError("expected distinct points from 1 to 2^521 - 2: point 0 is the secret itself")
    if not 1 <= threshold <= len(wanted):
        raise ValueError(f"expected {threshold=} from 1 to the number of points, {len(wanted)}")
    drawn = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *drawn]
    return {point: _evaluate(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in wanted}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret that ``shares`` (by point) were split from, by Lagrange's formula at 0.

    Raises:
        ValueError: a share is no share, there is none, or they are not shares of one secret and that shows;
            what does not show gives other bytes, so a caller compares them with something it knows.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    if not values or any(
        len(share) != SHARE_BYTES or values[point] >= PRIME for point, share in shares.items()
    ):
        raise ValueError(f"expected shares of {SHARE_BYTES} bytes, below 2^521 - 1, and at least one")
    total = 0
    for point, value in values.items():
        above, below = 1, 1
        for other in values:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        total += value * above * pow(below, -1, PRIME)
    secret = total % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("these are not enough shares of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _evaluate(coefficients: list[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value
