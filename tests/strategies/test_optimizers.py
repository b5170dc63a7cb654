from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.messages import Arrays
from strategies.optimizers import FedAdagrad, FedAdam, FedYogi, Momentum, Plain, ServerOptimizer
from strategies.rules.rule import CannotCombine
from tests.strategies.updates import drawn, one

MAKERS: dict[str, Callable[[], ServerOptimizer]] = {
    "plain": lambda: Plain(rate=0.7),
    "momentum": lambda: Momentum(rate=0.5, momentum=0.9),
    "adam": lambda: FedAdam(rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
    "yogi": lambda: FedYogi(rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
    "adagrad": lambda: FedAdagrad(rate=0.1, tau=1e-3),
}
each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def walked(optimizer: ServerOptimizer, base: Arrays, updates: list[Arrays]) -> Arrays:
    for update in updates:  # each is used up
        base = optimizer.step(base, {name: value.copy() for name, value in update.items()})
    return base


def test_at_rate_one_the_plain_step_adds_the_update() -> None:
    assert Plain().step(one(2.0), one(0.5))["a"] == 2.5


def test_momentum_s_two_steps_by_hand() -> None:
    # v1 = 1, w1 = 0.5; v2 = 0.9 + 2 = 2.9, w2 = 0.5 + 1.45
    assert walked(MAKERS["momentum"](), one(0.0), [one(1.0), one(2.0)])["a"] == pytest.approx(1.95)


def test_adam_s_first_step_by_hand() -> None:
    # m = 0.2, v = 0.04; Flower's correction of one step more: sqrt(1 - 0.99^2) / (1 - 0.9^2)
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    expected = 1.0 + rate * 0.2 / (0.2 + 1e-3)
    assert MAKERS["adam"]().step(one(1.0), one(2.0))["a"] == pytest.approx(expected)


def test_yogi_s_two_steps_by_hand() -> None:
    # v1 = 0.01 * 4; then 0.04 > 0.01, so v2 = 0.04 - 0.01 * 0.01
    optimizer = MAKERS["yogi"]()
    walked(optimizer, one(0.0), [one(2.0), one(0.1)])
    assert optimizer.state()["square/a"] == pytest.approx(0.0399)


def test_adagrad_s_steps_only_become_shorter() -> None:
    optimizer, base = MAKERS["adagrad"](), one(0.0)
    lengths = []
    for _ in range(4):
        moved = optimizer.step(base, one(1.0))
        lengths.append(float(moved["a"][0] - base["a"][0]))
        base = moved
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(0.1, rel=1e-2)
    assert lengths[3] == pytest.approx(0.05, rel=1e-2)


@each_optimizer
def test_an_update_of_zero_moves_nothing(make: Callable[[], ServerOptimizer]) -> None:
    assert make().step(one(3.0), one(0.0))["a"] == 3.0


@each_optimizer
@given(seed=st.integers(0, 2**32), before=st.integers(0, 2))
def test_restored_it_goes_on_with_the_same_bits(
    make: Callable[[], ServerOptimizer], seed: int, before: int
) -> None:
    base, *updates = drawn(seed, 4)
    whole, first, second = walked(make(), base, updates), make(), make()
    halfway = walked(first, base, updates[:before])
    second.restore(first.state())
    for name, value in walked(second, halfway, updates[before:]).items():
        np.testing.assert_array_equal(value, whole[name])


@each_optimizer
def test_the_base_is_not_changed_and_the_result_is_float32(make: Callable[[], ServerOptimizer]) -> None:
    base, update = drawn(0, 2)
    copy = {name: value.copy() for name, value in base.items()}
    moved = make().step(base, update)
    for name in base:
        np.testing.assert_array_equal(base[name], copy[name])
        assert moved[name].dtype == np.float32
        assert moved[name].shape == base[name].shape


@each_optimizer
def test_before_the_first_step_there_is_no_state(make: Callable[[], ServerOptimizer]) -> None:
    assert make().state() == {}


def test_weights_beyond_float32_are_named_and_not_returned() -> None:
    with pytest.raises(CannotCombine, match="array 'a' of the new weights does not fit"):
        Plain().step(one(3e38), one(3e38))


def test_a_failed_step_leaves_an_adaptive_optimizer_as_it_was() -> None:
    optimizer = MAKERS["adam"]()
    optimizer.step(one(0.0), one(1.0))
    before = optimizer.state()
    with pytest.raises(CannotCombine, match="the optimizer's square does not fit"):
        optimizer.step(one(0.0), one(1e30))
    assert optimizer.state() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Momentum(rate=1.0, momentum=0.9),
        lambda: FedAdam(rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
        lambda: FedYogi(rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
        lambda: FedAdagrad(rate=0.1, tau=1e-3),
    ],
)
def test_arrays_that_move_by_turns_move_as_if_each_were_alone(make: Callable[[], ServerOptimizer]) -> None:
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(3).astype(np.float32) for name in "ab"}
    updates = [{"ab"[turn % 2]: rng.standard_normal(3).astype(np.float32)} for turn in range(6)]
    together, alone = make(), {name: make() for name in "ab"}
    for update in updates:
        (name,) = update
        expected = alone[name].step({name: base[name]}, {name: update[name].copy()})
        again = make()
        again.restore(together.state())
        together = again
        moved = together.step({name: base[name]}, {name: update[name].copy()})
        assert np.array_equal(moved[name], expected[name])
