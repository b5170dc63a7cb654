from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from strategies.messages import Arrays, MessageError
from strategies.rules.mean import Mean
from strategies.rules.rule import CannotCombine
from strategies.rules.spill import Scratch
from tests.strategies.updates import Round, one, room, rounds


@given(rounds())
def test_the_result_is_numpy_s_weighted_average(case: Round) -> None:
    like, updates = case
    with room() as folder:
        mean = Mean(like, folder=folder)
        for update, weight in updates:
            mean.fold("site", update, weight)
        result = mean.result()
    for name, value in like.items():
        stack = np.stack([update[name].astype(np.float64) for update, _ in updates])
        expected = np.average(stack, axis=0, weights=[weight for _, weight in updates])
        scale = np.abs(stack).max(initial=1.0)
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, atol=1e-9 * scale)
        assert isinstance(result[name], np.ndarray)
        assert result[name].dtype == np.float32
        assert result[name].shape == value.shape


@given(rounds())
def test_the_same_order_gives_the_same_bits(case: Round) -> None:
    like, updates = case

    def once() -> list[bytes]:
        with room() as folder:
            mean = Mean(like, folder=folder)
            for update, weight in updates:
                mean.fold("site", update, weight)
            return [value.tobytes() for value in mean.result().values()]

    assert once() == once()


@given(rounds())
def test_sums_in_memory_and_on_disk_are_the_same_bits(case: Round) -> None:
    like, updates = case
    with room() as folder:
        scratch = Scratch(most_bytes=2**30)
        for _ in range(2):  # the second finds what the first left there
            on_disk, in_memory = Mean(like, folder=folder), Mean(like, folder=folder, scratch=scratch)
            for update, weight in updates:
                on_disk.fold("site", update, weight)
                in_memory.fold("site", update, weight)
            left, right = on_disk.result(), in_memory.result()
            assert {name: value.tobytes() for name, value in left.items()} == {
                name: value.tobytes() for name, value in right.items()
            }


@pytest.mark.parametrize(("most_bytes", "in_memory"), [(8 * 5, True), (8 * 5 - 1, False), (0, False)])
def test_sums_stay_in_memory_up_to_the_bytes_given(most_bytes: int, in_memory: bool) -> None:
    assert (Scratch(most_bytes=most_bytes).zeros(5) is not None) is in_memory


@given(rounds(fewest=2))
def test_the_mean_of_some_with_the_sum_of_their_weights_stands_for_them(case: Round) -> None:
    """What secure aggregation folds in."""
    like, updates = case
    with room() as folder:
        each, together = Mean(like, folder=folder), Mean(like, folder=folder)
        for update, weight in updates:
            each.fold("site", update, weight)
        together.fold("all", each.result(), sum(weight for _, weight in updates))
        for name, value in each.result().items():
            np.testing.assert_allclose(together.result()[name], value, rtol=1e-6)


def test_many_small_updates_are_not_lost_beside_a_large_one(tmp_path: Path) -> None:
    mean = Mean(one(0.0), folder=tmp_path)
    mean.fold("large", one(2.0**24), 1)
    for _ in range(1000):
        mean.fold("small", one(1.0), 1)  # float32 would absorb each of them: 2**24 + 1 == 2**24
    assert mean.result()["a"][0] == np.float32((2.0**24 + 1000) / 1001)


def test_arrays_longer_than_a_block_are_averaged_to_their_end(tmp_path: Path) -> None:
    like = {"b": np.arange(2**18 + 3, dtype=np.float32), "a": np.arange(5, dtype=np.float32)}
    mean = Mean(like, folder=tmp_path)
    mean.fold("x", like, 1)
    mean.fold("y", {name: 3 * value for name, value in like.items()}, 1)
    for name, value in mean.result().items():
        np.testing.assert_array_equal(value, 2 * like[name])


def test_a_transposed_update_is_averaged_by_its_places(tmp_path: Path) -> None:
    update = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    mean = Mean({"a": np.zeros((3, 2), np.float32)}, folder=tmp_path)
    mean.fold("x", update, 1)
    np.testing.assert_array_equal(mean.result()["a"], update["a"])


def test_updates_are_not_changed(tmp_path: Path) -> None:
    like, update = one(1.0), one(3.0)
    mean = Mean(like, folder=tmp_path)
    mean.fold("x", update, 2.0)
    mean.result()
    assert (like["a"][0], update["a"][0]) == (1.0, 3.0)


def test_the_folder_stays_empty(tmp_path: Path) -> None:
    mean = Mean(one(1.0), folder=tmp_path)
    mean.fold("x", one(1.0), 1)
    assert not list(tmp_path.iterdir())


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
def test_a_refused_update_leaves_no_trace(update: Arrays, rule: str, tmp_path: Path) -> None:
    mean = Mean(one(1.0), folder=tmp_path)
    mean.fold("x", one(1.0), 1)
    with pytest.raises(MessageError, match=rule):
        mean.fold("y", update, 1)
    assert mean.result()["a"] == 1.0


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float, tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="positive and finite"):
        Mean(one(1.0), folder=tmp_path).fold("x", one(1.0), weight)


def test_an_average_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="nothing to average"):
        Mean(one(1.0), folder=tmp_path).result()


def test_a_mean_beyond_float32_is_named_and_not_returned(tmp_path: Path) -> None:
    mean = Mean({"a": np.zeros(1, np.float64)}, folder=tmp_path)
    mean.fold("x", {"a": np.array([1e39])}, 1)
    with pytest.raises(CannotCombine, match="array 'a' of the combined update does not fit into float32"):
        mean.result()
