"""SCAFFOLD, FedDyn and FedProx against their papers' own form, on quadratics whose optimum is known."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.messages import Arrays
from strategies.rules.rule import CannotCombine
from strategies.strategy import Strategy, StrategySettings, strategy_of

Vector = NDArray[np.float64]
RATE, STEPS = 0.05, 20
SITES = ("north", "south", "east")
# f_i(w) = 0.5 (w - target_i)' diag(curve_i) (w - target_i): sites that pull to different places, unevenly.
CURVES = np.array([[1.0, 4.0], [3.0, 0.5], [0.2, 2.0]])
TARGETS = np.array([[1.0, 0.0], [-2.0, 3.0], [5.0, 5.0]])
WEIGHTS = (1.0, 2.0, 3.0)


def optimum() -> Vector:
    shares = np.array(WEIGHTS)[:, None] * CURVES
    return np.asarray((shares * TARGETS).sum(axis=0) / shares.sum(axis=0))


def trained(strategy: Strategy, site: int, start: Vector) -> Vector:
    """What a site does: plain steps on its gradient, plus what the coordinator sent."""
    correction = strategy.correction_for(SITES[site])
    extra = np.zeros(2) if correction is None else correction["w"].astype(np.float64)
    weights = start.copy()
    for _ in range(STEPS):
        gradient = CURVES[site] * (weights - TARGETS[site])
        weights -= RATE * (gradient + extra + strategy.proximal * (weights - start))
    return weights - start


def rounds(strategy: Strategy, count: int, asked: Callable[[int], tuple[int, ...]]) -> Iterator[Vector]:
    """The global weights after each round."""
    base: Arrays = {"w": np.zeros(2, np.float32)}
    for number in range(count):
        strategy.begin(base)
        start = base["w"].astype(np.float64)
        for site in asked(number):
            update = {"w": trained(strategy, site, start).astype(np.float32)}
            strategy.fold(SITES[site], update, WEIGHTS[site])
        base = strategy.finish()
        yield base["w"].astype(np.float64)


def everyone(_: int) -> tuple[int, ...]:
    return (0, 1, 2)


def last(named: dict[str, object], folder: Path, count: int = 40) -> Vector:
    strategy = strategy_of(StrategySettings.model_validate(named), folder=folder, step_length=RATE * STEPS)
    return list(rounds(strategy, count, everyone))[-1]


def test_averaging_alone_ends_beside_the_optimum(tmp_path: Path) -> None:
    assert np.linalg.norm(last({"name": "fedavg"}, tmp_path) - optimum()) > 0.2


@pytest.mark.parametrize("named", [{"name": "scaffold"}, {"name": "feddyn", "alpha": 1.0}])
def test_corrected_sites_end_at_the_optimum_of_all(named: dict[str, object], tmp_path: Path) -> None:
    np.testing.assert_allclose(last(named, tmp_path), optimum(), atol=1e-3)


def test_fedprox_ends_nearer_than_averaging_alone(tmp_path: Path) -> None:
    drift = np.linalg.norm(last({"name": "fedavg"}, tmp_path) - optimum())
    assert np.linalg.norm(last({"name": "fedprox", "proximal-mu": 5.0}, tmp_path) - optimum()) < drift / 2


def scaffold(folder: Path) -> Strategy:
    return strategy_of(StrategySettings(name="scaffold"), folder=folder, step_length=RATE * STEPS)


def test_scaffold_is_the_paper_s_algorithm_1_with_weights(tmp_path: Path) -> None:
    """Independent of ours: variates in plain arrays, sites that come and go after the first round."""

    def asked(number: int) -> tuple[int, ...]:
        return everyone(number) if number == 0 else ((0, 1), (1, 2), (0, 2))[number % 3]

    weights = np.zeros(2)
    own = np.zeros((3, 2))
    expected = []
    for number in range(12):
        mean = np.average(own, axis=0, weights=WEIGHTS)
        updates, new = {}, own.copy()
        for site in asked(number):
            local = weights.copy()
            for _ in range(STEPS):
                local -= RATE * (CURVES[site] * (local - TARGETS[site]) - own[site] + mean)
            updates[site] = local - weights
            new[site] = own[site] - mean - updates[site] / (RATE * STEPS)
        weights = weights + np.average(list(updates.values()), axis=0, weights=[WEIGHTS[i] for i in updates])
        own = new
        expected.append(weights)
    found = list(rounds(scaffold(tmp_path), 12, asked))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_feddyn_is_the_paper_s_algorithm_1_with_weights(tmp_path: Path) -> None:
    alpha, weights, own, expected = 0.7, np.zeros(2), np.zeros((3, 2)), []
    for _ in range(12):
        updates = []
        for site in range(3):
            local = weights.copy()
            for _ in range(STEPS):
                bent = CURVES[site] * (local - TARGETS[site]) - own[site] + alpha * (local - weights)
                local -= RATE * bent
            updates.append(local - weights)
        own -= alpha * np.array(updates)
        weights = weights + np.average(updates, axis=0, weights=WEIGHTS)
        weights = weights - np.average(own, axis=0, weights=WEIGHTS) / alpha
        expected.append(weights)
    strategy = strategy_of(StrategySettings(name="feddyn", alpha=alpha), folder=tmp_path)
    np.testing.assert_allclose(list(rounds(strategy, 12, everyone)), expected, rtol=1e-4)


def test_the_corrections_of_all_sites_cancel_in_the_weighted_mean(tmp_path: Path) -> None:
    strategy = scaffold(tmp_path)
    list(rounds(strategy, 3, everyone))
    strategy.begin({"w": np.zeros(2, np.float32)})
    corrections = [strategy.correction_for(site) for site in SITES]
    total = sum(w * each["w"] for w, each in zip(WEIGHTS, corrections, strict=True) if each is not None)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    assert all(np.abs(each["w"]).max() > 0.1 for each in corrections if each is not None)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_site_not_heard_of_is_not_corrected(name: str, tmp_path: Path) -> None:
    settings = StrategySettings.model_validate({"name": name})
    strategy = strategy_of(settings, folder=tmp_path, step_length=1.0)
    assert [list(rounds(strategy, 2, lambda _: (0, 1))), strategy.correction_for("east")][1] is None


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_second_update_of_a_site_in_one_round_is_refused_without_a_trace(name: str, tmp_path: Path) -> None:
    settings = StrategySettings.model_validate({"name": name})
    strategy = strategy_of(settings, folder=tmp_path, step_length=1.0)
    strategy.begin({"w": np.zeros(2, np.float32)})
    strategy.fold("north", {"w": np.ones(2, np.float32)}, 1.0)
    with pytest.raises(CannotCombine, match="two updates of site 'north' in one round"):
        strategy.fold("north", {"w": np.full(2, 9, np.float32)}, 1.0)
    factor = 1.0 if name == "scaffold" else 2.0  # the first mean h is minus alpha times the first mean update
    np.testing.assert_allclose(strategy.finish()["w"], factor, rtol=1e-6)


@pytest.mark.parametrize("step_length", [0.0, -1.0, np.nan, np.inf])
def test_scaffold_refuses_a_step_length_that_is_none(step_length: float, tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="step_length"):
        strategy_of(StrategySettings(name="scaffold"), folder=tmp_path, step_length=step_length)
