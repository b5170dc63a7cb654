import secrets
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.secure_sum.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, split


@st.composite
def dealings(draw: Any) -> tuple[bytes, list[int], int, list[int]]:
    secret = draw(
        st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES) | st.sampled_from([bytes(32), b"\xff" * 32])
    )
    points = draw(st.lists(st.integers(1, 60) | st.just(PRIME - 1), min_size=1, max_size=9, unique=True))
    threshold = draw(st.integers(1, len(points)))
    return secret, points, threshold, draw(st.permutations(points))[:threshold]


@given(dealings())
def test_any_threshold_of_the_shares_is_the_secret(case: tuple[bytes, list[int], int, list[int]]) -> None:
    secret, points, threshold, chosen = case
    shares = split(secret, points=points, threshold=threshold)
    assert set(shares) == set(points)
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    assert combine({point: shares[point] for point in chosen}) == secret
    assert combine(shares) == secret


def test_shares_below_the_threshold_fit_every_secret() -> None:
    shares = split(b"a" * 32, points=range(1, 6), threshold=3)
    known = {1: shares[1], 4: shares[4]}
    for other in (bytes(32), b"z" * 32):
        # The polynomial through the two known shares and another secret gives a third share that fits it.
        values = {0: int.from_bytes(other, "big"), **{p: int.from_bytes(s, "big") for p, s in known.items()}}
        third = sum(
            value
            * _product(2 - q for q in values if q != p)
            * pow(_product(p - q for q in values if q != p), -1, PRIME)
            for p, value in values.items()
        )
        assert combine({**known, 2: (third % PRIME).to_bytes(SHARE_BYTES, "big")}) == other


def _product(factors: Any) -> int:
    total = 1
    for factor in factors:
        total = total * factor % PRIME
    return total


def test_too_few_shares_do_not_give_the_secret() -> None:
    for _ in range(20):
        secret = secrets.token_bytes(32)
        shares = split(secret, points=range(1, 6), threshold=3)
        with pytest.raises(ValueError, match="not enough shares of one secret"):
            combine({1: shares[1], 2: shares[2]})


def test_shares_are_drawn_anew_and_fill_the_whole_field() -> None:
    shares = [split(bytes(32), points=[1, 2], threshold=2)[1] for _ in range(64)]
    assert len(set(shares)) == len(shares)
    for bit in range(521):
        ones = sum(int.from_bytes(share, "big") >> bit & 1 for share in shares)
        assert 0 < ones < len(shares), bit


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret": b"short"}, "expected a secret of 32 bytes, got 5"),
        ({"points": [1, 1, 2]}, "distinct points"),
        ({"points": [0, 1, 2]}, "point 0 is the secret itself"),
        ({"points": [PRIME, 1, 2]}, "distinct points from 1"),
        ({"threshold": 0}, "expected threshold=0 from 1"),
        ({"threshold": 4}, "number of points, 3"),
    ],
)
def test_impossible_dealings_are_refused(changes: dict[str, Any], reason: str) -> None:
    facts: dict[str, Any] = {"secret": bytes(32), "points": [1, 2, 3], "threshold": 2} | changes
    with pytest.raises(ValueError, match=reason):
        split(facts["secret"], points=facts["points"], threshold=facts["threshold"])


@pytest.mark.parametrize("shares", [{}, {1: b"short"}, {1: b"\xff" * SHARE_BYTES}])
def test_what_is_no_share_is_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="expected shares of 66 bytes"):
        combine(shares)
