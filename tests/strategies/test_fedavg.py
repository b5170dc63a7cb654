from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from strategies.fedavg import FedAvg
from strategies.messages import Arrays, MessageError

values = st.floats(-1e6, 1e6, width=32)
weights = st.floats(1e-3, 1e6)


@st.composite
def rounds(draw: Any) -> tuple[Arrays, list[tuple[Arrays, float]]]:
    shapes = draw(st.dictionaries(st.sampled_from("abc"), array_shapes(min_dims=0, max_dims=3, max_side=3)))

    def model() -> Arrays:
        return {name: draw(arrays(np.float32, shape, elements=values)) for name, shape in shapes.items()}

    return model(), [(model(), draw(weights)) for _ in range(draw(st.integers(1, 5)))]


@given(rounds())
def test_the_result_is_numpy_s_weighted_average_on_top_of_the_base(
    case: tuple[Arrays, list[tuple[Arrays, float]]],
) -> None:
    base, updates = case
    average = FedAvg(base)
    for update, weight in updates:
        average.fold(update, weight)
    result = average.result()
    for name, value in base.items():
        stack = np.stack([update[name].astype(np.float64) for update, _ in updates])
        expected = value + np.average(stack, axis=0, weights=[weight for _, weight in updates])
        scale = np.abs(stack).max(initial=1.0)
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, atol=1e-9 * scale)
        assert isinstance(result[name], np.ndarray)
        assert result[name].dtype == np.float32
        assert result[name].shape == value.shape


@given(rounds())
def test_the_same_order_gives_the_same_bits(case: tuple[Arrays, list[tuple[Arrays, float]]]) -> None:
    base, updates = case

    def once() -> list[bytes]:
        average = FedAvg(base)
        for update, weight in updates:
            average.fold(update, weight)
        return [value.tobytes() for value in average.result().values()]

    assert once() == once()


def one(value: float) -> Arrays:
    return {"a": np.array([value], dtype=np.float32)}


def test_one_site_moves_the_base_by_its_update() -> None:
    average = FedAvg(one(2.0))
    average.fold(one(0.5), 17)
    assert average.result()["a"] == 2.5


def test_many_small_updates_are_not_lost_beside_a_large_one() -> None:
    average = FedAvg(one(0.0))
    average.fold(one(2.0**24), 1)
    for _ in range(1000):
        average.fold(one(1.0), 1)  # float32 would absorb each of them: 2**24 + 1 == 2**24
    assert average.result()["a"][0] == np.float32((2.0**24 + 1000) / 1001)


def test_neither_base_nor_updates_are_changed() -> None:
    base, update = one(1.0), one(3.0)
    average = FedAvg(base)
    average.fold(update, 2.0)
    average.result()
    assert (base["a"][0], update["a"][0]) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("update", "rule"),
    [
        (one(np.nan), "array 'a' is not finite"),
        (one(np.inf), "array 'a' is not finite"),
        ({"a": np.zeros(2, dtype=np.float32)}, "expected float32"),
        ({"a": np.zeros(1, dtype=np.float64)}, "expected float32"),
        ({"b": np.zeros(1, dtype=np.float32)}, "differ in 2 names, first 'a'"),
        ({}, "differ in 1 names"),
    ],
)
def test_a_refused_update_leaves_no_trace(update: Arrays, rule: str) -> None:
    average = FedAvg(one(1.0))
    average.fold(one(1.0), 1)
    with pytest.raises(MessageError, match=rule):
        average.fold(update, 1)
    assert average.result()["a"] == 2.0


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        FedAvg(one(1.0)).fold(one(1.0), weight)


def test_an_average_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        FedAvg(one(1.0)).result()


def test_an_average_beyond_float32_is_named_and_not_returned() -> None:
    average = FedAvg(one(3e38))
    average.fold(one(3e38), 1)
    with pytest.raises(ValueError, match="array 'a' does not fit into float32"):
        average.result()
