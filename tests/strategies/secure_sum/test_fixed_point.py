from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strategies.secure_sum.errors import OutOfRange, TermsRefused
from strategies.secure_sum.fixed_point import BLOCK, FixedPoint, blocks

ranges = st.floats(2.0**-64, 2.0**64)


@given(ranges, st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
@example(1.0, [2**31 - 2])
@example(2.0**64, [2**53 - 1])
@example(2.0**-64, [1])
def test_no_sum_overflows_at_the_end_of_the_range(value_range: float, weights: list[int]) -> None:
    grid = FixedPoint(value_range=value_range, sites=len(weights), total_weight=sum(weights))
    ends = np.array([value_range, -value_range])
    grid.check("a", ends)
    sums = [0, 0]
    for weight in weights:
        encoded = grid.encode(ends, weight=weight).view(np.int32)
        sums = [total + int(value) for total, value in zip(sums, encoded, strict=True)]
    assert max(map(abs, sums)) < 2**31
    assert sums[0] == -sums[1]
    # No bit is wasted: at twice the scale, the bound that the guarantee states would be passed.
    assert (
        2 * sum(weights) * Fraction(value_range) * Fraction(2) ** grid.exponent > 2**31 - 2 - len(weights) * 2
    )


@given(
    st.sampled_from([2.0**-30, 0.3, 1.0, 7.0, 2.0**40]),
    st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    st.integers(0, 2**32),
)
def test_a_mean_is_within_the_stated_error(value_range: float, weights: list[int], seed: int) -> None:
    grid = FixedPoint(value_range=value_range, sites=len(weights), total_weight=sum(weights))
    values = np.random.default_rng(seed).uniform(-value_range, value_range, (len(weights), 20))
    total = np.zeros(20, dtype=np.uint32)
    for row, weight in zip(values, weights, strict=True):
        total += grid.encode(row, weight=weight)
    mean = grid.mean(total, weight=sum(weights)).astype(np.float64)
    error = grid.error(sites=len(weights), weight=sum(weights))
    exact = np.average(values, axis=0, weights=weights)
    assert (np.abs(mean - exact) <= error + np.spacing(np.abs(mean).astype(np.float32)) / 2).all()
    assert error < 1.001 * len(weights) * value_range * 2.0**-31


def test_the_error_of_eight_sites_is_as_documented_whatever_their_weights() -> None:
    for weights in ([1] * 8, [10**9] + [1] * 7):
        grid = FixedPoint(value_range=1.0, sites=8, total_weight=sum(weights))
        assert grid.error(sites=8, weight=sum(weights)) < 3.8e-9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (BLOCK + 1,), (2, BLOCK)])
def test_shapes_are_kept_and_blocks_leave_nothing_out(shape: tuple[int, ...], dtype: Any) -> None:
    grid = FixedPoint(value_range=1.0, sites=1, total_weight=1)
    values = np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)
    grid.check("a", values)
    encoded = grid.encode(values, weight=1)
    assert encoded.dtype == np.uint32
    assert encoded.shape == shape
    mean = grid.mean(encoded, weight=1)
    assert mean.shape == shape
    np.testing.assert_allclose(mean, values, atol=1e-7)


def test_an_array_in_another_order_of_memory_is_encoded_by_its_indices() -> None:
    grid = FixedPoint(value_range=6.0, sites=1, total_weight=1)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(grid.encode(values.T, weight=1), grid.encode(values, weight=1).T)


@pytest.mark.parametrize("wrong", [1.0001, -1.0001, np.nan, np.inf, -np.inf])
def test_what_is_out_of_range_is_refused_by_name(wrong: float) -> None:
    grid = FixedPoint(value_range=1.0, sites=2, total_weight=2)
    with pytest.raises(OutOfRange, match=r"array 'tower\.weight' holds values from .* range of ±1: agree on"):
        grid.check("tower.weight", np.array([0.5, wrong], dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16])
def test_other_kinds_of_numbers_are_refused(dtype: Any) -> None:
    grid = FixedPoint(value_range=1.0, sites=2, total_weight=2)
    with pytest.raises(OutOfRange, match="array 'a': expected float32 or float64"):
        grid.check("a", np.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    ("value_range", "sites", "total_weight", "reason"),
    [
        (0.0, 1, 1, "value_range=0.0"),
        (-1.0, 1, 1, "value_range=-1.0"),
        (float("nan"), 1, 1, "value_range=nan"),
        (float("inf"), 1, 1, "value_range=inf"),
        (1.0, 0, 1, "sites=0"),
        (1.0, 2**20, 2**21, "sites=1048576"),
        (1.0, 2, 1, "total_weight=1 at least 1 a site"),
        (1.0, 2, 2**53, "declare sizes in larger units"),
    ],
)
def test_impossible_grids_are_refused(value_range: float, sites: int, total_weight: int, reason: str) -> None:
    with pytest.raises(TermsRefused, match=reason):
        FixedPoint(value_range=value_range, sites=sites, total_weight=total_weight)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blocks_cover_every_index_once(size: int) -> None:
    assert [i for part in blocks(size) for i in (part.start, part.stop - 1)][:1] == ([0] if size else [])
    assert sum(part.stop - part.start for part in blocks(size)) == size
