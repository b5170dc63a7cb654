"""What Flower has too comes out as in Flower, on random updates: its own classes are the oracle."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from strategies.flower_compat import act_as_coordinator
from strategies.messages import Arrays
from strategies.strategy import StrategySettings, strategy_of
from tests.strategies.updates import drawn, room

OURS = StrategySettings.model_validate
ROUNDS = 3


class Nodes:
    """All of a grid that Flower's strategies ask for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self._count + 1))


def flower_s(theirs: Any, base: Arrays, updates: list[list[Arrays]], weights: list[float]) -> Arrays:
    """The weights that Flower's strategy arrives at when each site returns its weights plus its update."""
    act_as_coordinator(1)
    arrays = dict(base)
    for server_round, of_sites in enumerate(updates, start=1):
        config = ConfigRecord()
        theirs.configure_train(server_round, _record(arrays), config, Nodes(len(of_sites)))
        replies = [
            _reply({name: arrays[name] + update[name] for name in arrays}, weight)
            for update, weight in zip(of_sites, weights, strict=True)
        ]
        result, _ = theirs.aggregate_train(server_round, replies)
        arrays = {name: np.asarray(value.numpy(), dtype=np.float32) for name, value in result.items()}
    return arrays


def _reply(arrays: Arrays, weight: float) -> Message:
    metrics = MetricRecord({"num-examples": weight})
    return Message(RecordDict({"arrays": _record(arrays), "metrics": metrics}), 1, "train")


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def ours(named: dict[str, Any], base: Arrays, updates: list[list[Arrays]], weights: list[float]) -> Arrays:
    with room() as folder:
        strategy = strategy_of(OURS(named), folder=folder)
        arrays = base
        for of_sites in updates:
            strategy.begin(arrays)
            for number, (update, weight) in enumerate(zip(of_sites, weights, strict=True)):
                strategy.fold(f"site-{number}", update, weight)
            arrays = strategy.finish()
    return arrays


def same(left: Arrays, right: Arrays, base: Arrays, *, roundings: int) -> None:
    """Equal but for so many float32 roundings of a value of the base's size."""
    assert set(left) == set(right) == set(base)
    for name in base:
        size = max(np.abs(array[name]).max(initial=1.0) for array in (base, left, right))
        allowed = roundings * np.finfo(np.float32).eps * size
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=allowed)


def played(seed: int, sites: int, rounds: int = ROUNDS) -> tuple[Arrays, list[list[Arrays]], list[float]]:
    """A model, the updates of some rounds of about a tenth of it, and declared sizes."""
    rng = np.random.default_rng(seed)
    updates = [drawn(seed + 1 + each, sites, scale=0.1) for each in range(rounds)]
    return drawn(seed, 1)[0], updates, [float(size) for size in rng.integers(1, 1000, sites)]


CASES: dict[str, tuple[dict[str, Any], Any, int]] = {
    "fedavg": ({"name": "fedavg"}, lambda: flower.FedAvg(), 8),
    "fedprox": ({"name": "fedprox", "proximal-mu": 0.3}, lambda: flower.FedProx(proximal_mu=0.3), 8),
    "fedavgm": (
        {"name": "fedavgm", "server-learning-rate": 0.5, "server-momentum": 0.9},
        lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
        16,
    ),
    # An adaptive step divides by the update's own size, so rounding of the base weighs more: by rate / tau.
    "fedadam": ({"name": "fedadam", "tau": 0.1}, lambda: flower.FedAdam(tau=0.1), 64),
    "fedyogi": ({"name": "fedyogi", "tau": 0.1}, lambda: flower.FedYogi(tau=0.1), 64),
    "fedadagrad": ({"name": "fedadagrad", "tau": 0.1}, lambda: flower.FedAdagrad(tau=0.1), 64),
    "median": ({"name": "median"}, lambda: flower.FedMedian(), 8),
    "trimmed-mean": ({"name": "trimmed-mean"}, lambda: flower.FedTrimmedAvg(beta=0.2), 8),
}


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32), sites=st.integers(5, 9))
@settings(max_examples=25, deadline=None)
def test_ours_equals_flower_s(name: str, seed: int, sites: int) -> None:
    named, theirs, roundings = CASES[name]
    base, updates, weights = played(seed, sites)
    same(
        ours(named, base, updates, weights),
        flower_s(theirs(), base, updates, weights),
        base,
        roundings=roundings,
    )


def clear(updates: Iterable[Arrays], attackers: int) -> bool:
    """No two scores lie so close that float32 could order them otherwise."""
    flat = np.stack([np.append(update["a"], update["b"]) for update in updates]).astype(np.float64)
    squares = np.sort(((flat[:, None] - flat[None, :]) ** 2).sum(axis=2), axis=1)
    scores = np.sort(squares[:, 1 : len(flat) - attackers - 1].sum(axis=1))
    return bool((np.diff(scores) > 1e-3 * scores[-1]).all())


@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(0, 3), st.data())
@settings(max_examples=50, deadline=None)
def test_krum_and_multi_krum_equal_flower_s(
    seed: int, attackers: int, more: int, data: st.DataObject
) -> None:
    sites = 2 * attackers + 3 + more
    selected = data.draw(st.integers(1, sites))
    base, updates, weights = played(seed, sites, rounds=1)
    assume(clear(updates[0], attackers))
    theirs = flower.MultiKrum(num_malicious_nodes=attackers, num_nodes_to_select=selected)
    named = {"name": "multi-krum", "attackers": attackers, "selected": selected}
    same(ours(named, base, updates, weights), flower_s(theirs, base, updates, weights), base, roundings=8)
    named, theirs = {"name": "krum", "attackers": attackers}, flower.Krum(num_malicious_nodes=attackers)
    same(ours(named, base, updates, weights), flower_s(theirs, base, updates, weights), base, roundings=8)
