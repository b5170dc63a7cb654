"""Every name of the federation file, through the interface that the round loop uses."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from strategies.messages import Arrays, MessageError
from strategies.rules.rule import CannotCombine
from strategies.settings import Settings, SettingsError
from strategies.strategy import Strategy, StrategyName, StrategySettings, strategy_of
from tests.strategies.updates import drawn, one

NAMES = get_args(StrategyName)
each_name = pytest.mark.parametrize("name", NAMES)
each_without_noise = pytest.mark.parametrize("name", [name for name in NAMES if name != "hospital-dp"])
REQUIRED = {"hospital-dp": {"update-norm": 9.0, "noise-multiplier": 1e-6, "hospitals": 6}}
SITES = 6


def settings_of(name: str, **changes: Any) -> StrategySettings:
    return StrategySettings.model_validate({"name": name, **REQUIRED.get(name, {}), **changes})


def named(name: str, folder: Path) -> Strategy:
    return strategy_of(settings_of(name), folder=folder, step_length=0.5)


def played(strategy: Strategy, base: Arrays, server_round: int) -> Arrays:
    if strategy.fair:
        strategy.hear({f"site-{number}": number + server_round for number in range(SITES)})
    strategy.begin(base)
    for number, update in enumerate(drawn(100 + server_round, SITES)):
        strategy.correction_for(f"site-{number}")
        strategy.fold(f"site-{number}", update, number + 1.0)
    return strategy.finish()


def bits(arrays: Arrays) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in arrays.items()}


@each_without_noise
def test_interrupted_anywhere_a_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    base = drawn(0, 1)[0]
    whole = named(name, tmp_path / "whole")
    straight = [base]
    for server_round in range(4):
        straight.append(played(whole, straight[-1], server_round))
    arrays, state = base, dict[str, Any]()
    for server_round in range(4):
        killed = named(name, tmp_path / "resumed")
        killed.restore(state)
        killed.begin(arrays)
        for number, update in enumerate(drawn(7, SITES)):
            killed.fold(f"site-{number}", update, 1.0)  # a round that never ended
        del killed
        resumed = named(name, tmp_path / "resumed")
        resumed.restore(state)
        arrays = played(resumed, arrays, server_round)
        save_file(resumed.state() or {"none": np.zeros(1)}, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors") if resumed.state() else {}
        assert bits(arrays) == bits(straight[server_round + 1])


@each_without_noise
def test_a_round_that_is_begun_again_forgets_what_it_took_in(name: str, tmp_path: Path) -> None:
    base = drawn(0, 1)[0]
    once, twice = named(name, tmp_path / "once"), named(name, tmp_path / "twice")
    first = played(once, base, 0), played(twice, base, 0)
    twice.begin(first[1])
    for number, update in enumerate(drawn(7, SITES, scale=100.0)):
        twice.fold(f"site-{number}", update, 5.0)
    assert bits(played(once, first[0], 1)) == bits(played(twice, first[1], 1))


@each_without_noise
def test_a_refused_update_leaves_no_trace(name: str, tmp_path: Path) -> None:
    base = drawn(0, 1)[0]
    with_it, without = named(name, tmp_path / "with"), named(name, tmp_path / "without")
    for strategy in (with_it, without):
        strategy.begin(base)
        for number, update in enumerate(drawn(3, SITES)):
            if strategy is with_it:
                broken = {**update, "a": np.full_like(update["a"], np.nan)}
                with pytest.raises(MessageError, match="array 'a' is not finite"):
                    strategy.fold(f"site-{number}", broken, 1.0)
            strategy.fold(f"site-{number}", update, 1.0)
    assert bits(with_it.finish()) == bits(without.finish())


@each_name
def test_what_the_settings_say_of_a_strategy_is_what_it_is(name: str, tmp_path: Path) -> None:
    settings, strategy = settings_of(name), named(name, tmp_path)
    assert strategy.is_sum == settings.is_sum
    assert strategy.fair == settings.needs_losses


@each_name
def test_the_fewest_sites_are_enough_and_one_fewer_is_refused_where_it_must_be(
    name: str, tmp_path: Path
) -> None:
    fewest = settings_of(name).fewest_sites
    strategy = named(name, tmp_path)
    strategy.begin(one(0.0))
    for number in range(fewest):
        strategy.fold(f"site-{number}", one(1.0), 1.0)
    assert strategy.finish()["a"] > 0
    strategy.begin(one(0.0))
    for number in range(fewest - 1):
        strategy.fold(f"site-{number}", one(1.0), 1.0)
    if name not in ("median", "hospital-dp"):  # the median of two protects nobody, noise alone all; both are
        with pytest.raises(CannotCombine):
            strategy.finish()


@each_name
def test_a_site_has_one_vote_where_votes_are_counted(name: str, tmp_path: Path) -> None:
    strategy = named(name, tmp_path)
    strategy.begin(one(0.0))
    strategy.fold("x", one(1.0), 1.0)
    if not strategy.is_sum:
        with pytest.raises(CannotCombine, match="two updates of site 'x'"):
            strategy.fold("x", one(1.0), 1.0)
    else:
        strategy.fold("x", one(1.0), 1.0)


@each_name
def test_only_fedprox_and_feddyn_pull_sites_back(name: str, tmp_path: Path) -> None:
    pull = {"fedprox": 0.01, "feddyn": 0.01}.get(name, 0.0)
    assert settings_of(name).proximal == named(name, tmp_path).proximal == pull


def test_fair_weights_move_the_mean_to_the_site_with_the_larger_loss(tmp_path: Path) -> None:
    for name in ("q-ffl", "afl"):
        strategy = named(name, tmp_path)
        for _ in range(20):
            strategy.hear({"good": 0.1, "bad": 3.0})
        strategy.begin(one(0.0))
        strategy.fold("good", one(0.0), 1.0)
        strategy.fold("bad", one(1.0), 1.0)
        assert strategy.finish()["a"] > 0.8


def test_a_strategy_without_losses_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="uses no losses"):
        named("fedavg", tmp_path).hear({"a": 1.0})


@pytest.mark.parametrize("call", ["fold", "finish"])
def test_before_a_round_has_begun_nothing_is_combined(call: str, tmp_path: Path) -> None:
    strategy = named("fedavg", tmp_path)
    with pytest.raises(CannotCombine, match="no round has begun"):
        strategy.finish() if call == "finish" else strategy.fold("x", one(1.0), 1.0)


def test_a_finished_round_cannot_be_finished_again(tmp_path: Path) -> None:
    strategy = named("fedavg", tmp_path)
    strategy.begin(one(0.0))
    strategy.fold("x", one(1.0), 1.0)
    strategy.finish()
    with pytest.raises(CannotCombine, match="no round has begun"):
        strategy.finish()


def test_another_strategy_s_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="state 'fairness/a' is not of this strategy"):
        named("fedavg", tmp_path).restore({"fairness/a": np.array(1.0)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fedavg", "tau": 0.1}, r"strategy 'fedavg' has no tau: remove the key \(it has none\)"),
        ({"name": "krum", "selected": 2}, r"strategy 'krum' has no selected.*it has attackers"),
        ({"name": "fedadam", "server-momentum": 0.5}, "strategy 'fedadam' has no server-momentum"),
        ({"name": "fedprox", "proximal-mu": -1}, "proximal-mu"),
        ({"name": "trimmed-mean", "trim-share": 0.5}, "trim-share"),
        ({"name": "bulyan"}, "name"),
        ({"name": "hospital-dp", "hospitals": 5}, "no default for update-norm, noise-multiplier: set it"),
        ({"name": "krum", "atackers": 1}, "did you mean 'attackers'"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        StrategySettings.parse(settings, source="file")


@each_name
def test_every_hyper_parameter_can_be_given_and_counts(name: str) -> None:
    for key, default in StrategySettings.DEFAULTS.get(name, {}).items():
        value = 0.25 if isinstance(default, float) else 3
        settings = settings_of(name, **{key.replace("_", "-"): value})
        assert settings.parameters[key] == value


def test_the_settings_can_stand_in_a_larger_table() -> None:
    class Table(StrategySettings):
        min_sites: int = 2

    table = Table.parse({"name": "fedadam", "tau": 0.5, "min-sites": 3}, source="file")
    assert (table.parameters["tau"], table.min_sites) == (0.5, 3)
    assert issubclass(Table, Settings)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer": "adamw", "schedule": "constant", "epochs": None}, "optimizer 'adamw'.*set 'sgd'"),
        ({"optimizer": "sgd", "schedule": "cosine", "epochs": None}, "schedule 'cosine'.*set 'constant'"),
        ({"optimizer": "sgd", "schedule": "constant", "epochs": 1}, "epochs.*set training.steps"),
    ],
)
def test_scaffold_refuses_training_it_cannot_read_gradients_off(training: Any, message: str) -> None:
    StrategySettings(name="fedadam").require_training(**training)
    StrategySettings(name="scaffold").require_training(optimizer="sgd", schedule="constant", epochs=None)
    with pytest.raises(ValueError, match=message):
        StrategySettings(name="scaffold").require_training(**training)


def test_hospital_dp_says_what_its_rounds_cost(tmp_path: Path) -> None:
    settings = settings_of("hospital-dp", **{"noise-multiplier": 3.0})
    mechanism = settings.hospital_dp(rounds=20)
    assert (mechanism.unit, mechanism.rounds, mechanism.noise_std) == ("hospital", 20, 27.0)
    with pytest.raises(CannotCombine, match="'fedavg' makes no claim about hospitals"):
        settings_of("fedavg").hospital_dp(rounds=20)


def test_a_model_of_no_arrays_stays_one(tmp_path: Path) -> None:
    strategy = named("fedavg", tmp_path)
    strategy.begin({})
    strategy.fold("x", {}, 1.0)
    assert strategy.finish() == {}
