import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array

from strategies.handover import Unwritten

CASES: list[np.ndarray] = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3, dtype=np.float32),
    np.zeros((0, 3), dtype=np.int64),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    np.arange(8, dtype=np.uint16)[::2],
]


def inflated(array: Array) -> Array:
    """As Flower's deployment engine sends it."""
    return Array.inflate(array.deflate(), children=array.children)


def unpickled(array: Array) -> Array:
    """As Ray sends it."""
    return pickle.loads(pickle.dumps(array))  # noqa: S301 - its own


@pytest.mark.parametrize("values", CASES)
def test_it_has_the_values_and_the_bytes_of_flower_s_own(values: np.ndarray) -> None:
    array, flowers = Unwritten.of(values), Array(np.asarray(values, order="C"))
    assert (array.numpy().dtype, array.numpy().shape) == (values.dtype, values.shape)
    assert np.array_equal(array.numpy(), values)
    assert array == flowers
    assert (array.dtype, array.shape, array.stype, array.data) == (
        (flowers.dtype, flowers.shape, flowers.stype, flowers.data)
    )
    assert array != Array(np.ones(7, dtype=np.float32))


@pytest.mark.parametrize("sent", [copy.deepcopy, inflated, unpickled])
def test_whatever_has_left_the_process_is_a_plain_array(sent: Callable[[Array], Array]) -> None:
    for values in CASES:
        arrived = sent(Unwritten.of(values))
        assert type(arrived) is Array
        assert arrived.object_id == Unwritten.of(values).object_id
        assert np.array_equal(arrived.numpy(), values)


def test_the_values_are_read_where_they_lie_and_cannot_be_changed() -> None:
    values = np.arange(5, dtype=np.float32)
    for array in (Unwritten.of(values), Unwritten.of(values).again()):
        assert np.shares_memory(array.numpy(), values)
        with pytest.raises(ValueError, match="read-only"):
            array.numpy()[0] = 1
    assert values.flags.writeable


def test_bytes_are_written_when_they_are_asked_for_and_once() -> None:
    asked: list[int] = []

    def make() -> np.ndarray:
        asked.append(1)
        return np.zeros(3, dtype=np.uint8)

    array = Unwritten(make, dtype="uint8", shape=(3,))
    assert array.again().shape == (3,)
    assert asked == []
    assert array.data is array.data
    assert asked == [1]


def test_bytes_cannot_be_replaced() -> None:
    """Else what is read here would be something else than what was handed over."""
    with pytest.raises(AttributeError):
        Unwritten.of(np.zeros(3)).data = b""  # type: ignore[misc]
