"""One run of the real training loop, canaries in or out by a coin: does it contradict the claim?

Each canary is a patient whose gradient points along a coordinate of their own, the sharpest there can be. Two
scores are looked at: the sum over steps, the best there is against independent noise, and the differences of
successive steps, which alone see noise that is used twice. For seeds drawn anew, right noise is contradicted
with probability below 1 in 20 in each form, and below 1e-6 where the confidence is `SURE`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from privacy.accounting import epsilon
from privacy.audit import Form, audit_by_layer, audit_one_run
from privacy.mechanism import AnchoredDpSgd
from tests.attacks.probe import (
    HalvedNoise,
    NoiseOfAMean,
    NoiseOnHalfTheLayers,
    ProbePart,
    SameNoiseEveryStep,
    Watched,
    mechanism,
    releases,
)

MakeNoise = Callable[..., Watched]
LAYERS, CANARIES = 4, 500
DELTA = 1e-5
SURE = 1 - 1e-6
EVERYONE = mechanism(sample_rate=1.0, noise_multiplier=2.0, steps=4)  # epsilon 4.38
SAMPLED = mechanism(sample_rate=0.25, noise_multiplier=2.0, steps=12)  # epsilon 2.20


@dataclass(frozen=True, kw_only=True)
class Game:
    """What the attacker has, and what they want to know.

    Attributes:
        seen: The releases, shape (steps, canaries).
        included: The coins.
        claimed: Epsilon, as the accountant has it.
    """

    seen: NDArray[np.float64]
    included: NDArray[np.bool_]
    claimed: float

    @property
    def sums(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = self.seen.sum(axis=0)
        return -total

    @property
    def differences(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.square(np.diff(self.seen, axis=0)).sum(axis=0)
        return total


@functools.cache
def played(noise: MakeNoise, of: AnchoredDpSgd) -> Game:
    included = np.random.default_rng(1).random(LAYERS * CANARIES) < 0.5
    part = ProbePart(layers=LAYERS, rows=CANARIES)
    found = releases(np.flatnonzero(included).tolist(), of=of, part=part, noise=noise(layers=LAYERS))
    return Game(seen=found.reshape(of.steps, -1), included=included, claimed=epsilon([of.event], delta=DELTA))


def contradicted(scores: NDArray[np.float64], game: Game, *, confidence: float = 0.95) -> set[Form]:
    audit = audit_one_run(scores, game.included, delta=DELTA, confidence=confidence)
    return set(audit.contradicts(game.claimed))


def contradicted_layers(game: Game) -> dict[str, set[Form]]:
    layers = np.repeat([f"layer {layer}" for layer in range(LAYERS)], CANARIES).tolist()
    audits = audit_by_layer(game.sums, game.included, layers, delta=DELTA)
    return {layer: set(audit.contradicts(game.claimed)) for layer, audit in audits.items()}


@pytest.mark.parametrize("of", [EVERYONE, SAMPLED])
def test_the_right_mechanism_is_never_contradicted(of: AnchoredDpSgd) -> None:
    game = played(Watched, of)
    for scores in (game.sums, game.differences):
        assert contradicted(scores, game) == set()
    assert all(not forms for forms in contradicted_layers(game).values())


def test_and_the_audit_comes_near_it_so_that_its_silence_says_something() -> None:
    game = played(Watched, EVERYONE)
    bounds = audit_one_run(game.sums, game.included, delta=DELTA).bounds
    least = {Form.EPSILON_DELTA: 0.3, Form.F_DP: 0.45, Form.GAUSSIAN: 0.75}
    assert all(bounds[form] > share * game.claimed for form, share in least.items())


def test_a_smaller_claim_is_contradicted() -> None:
    game = played(Watched, EVERYONE)
    audit = audit_one_run(game.sums, game.included, delta=DELTA)
    assert set(audit.contradicts(0.3 * game.claimed)) == set(Form)


@pytest.mark.parametrize(
    ("mistake", "forms"),
    [
        (HalvedNoise, {Form.F_DP, Form.GAUSSIAN}),  # 2C accounted as C: true epsilon 10
        (NoiseOfAMean, set(Form)),
        (NoiseOnHalfTheLayers, {Form.GAUSSIAN}),
    ],
)
def test_too_little_noise_is_caught(mistake: MakeNoise, forms: set[Form]) -> None:
    game = played(mistake, EVERYONE)
    assert contradicted(game.sums, game) == forms
    assert contradicted(game.sums, game, confidence=SURE) >= {Form.GAUSSIAN}


def test_layers_without_noise_are_named() -> None:
    found = contradicted_layers(played(NoiseOnHalfTheLayers, EVERYONE))
    assert found["layer 0"] == found["layer 2"] == set()
    assert found["layer 1"] == found["layer 3"] == {Form.F_DP, Form.GAUSSIAN}


def test_noise_used_in_every_step_escapes_the_sum_and_is_caught_by_the_differences() -> None:
    game = played(SameNoiseEveryStep, SAMPLED)
    assert contradicted(game.sums, game) == set()
    assert contradicted(game.differences, game) == set(Form)
    assert contradicted(game.differences, game, confidence=SURE) >= {Form.GAUSSIAN}
