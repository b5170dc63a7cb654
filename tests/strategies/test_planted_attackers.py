"""One of seven hospitals is malicious: averaging fails, each robust rule survives.

The model is a real contrastive one, two linear towers under InfoNCE, so that a backdoor is what it is for
CLIP: a mark in the image that calls up a caption of the attacker's choice.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.messages import Arrays
from strategies.strategy import StrategySettings, strategy_of

Values = NDArray[np.float64]
CONCEPTS, IMAGE, TEXT, WIDTH = 6, 12, 10, 8
MARK = IMAGE  # the feature after all others: zero in every honest image
TARGET = 0  # the caption that the mark shall call up
SITES, ROUNDS, STEPS, RATE = 7, 8, 10, 0.2
ROBUST: tuple[dict[str, Any], ...] = (
    {"name": "median"},
    {"name": "trimmed-mean", "trim-share": 0.2},
    {"name": "krum", "attackers": 1},
    {"name": "multi-krum", "attackers": 1},
    {"name": "norm-bound"},
)
each_robust = pytest.mark.parametrize("named", ROBUST, ids=lambda named: named["name"])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Images and captions of the same concept, shapes (n, 13) and (n, 10)."""

    images: Values
    texts: Values
    concepts: NDArray[np.int64]


@cache
def prototypes() -> tuple[Values, Values]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((CONCEPTS, IMAGE)), rng.standard_normal((CONCEPTS, TEXT))


def pairs(seed: int, count: int = 60) -> Pairs:
    rng = np.random.default_rng(seed)
    of_images, of_texts = prototypes()
    concepts = rng.permutation(np.arange(count) % CONCEPTS)
    images = np.zeros((count, IMAGE + 1))
    images[:, :IMAGE] = of_images[concepts] + 0.5 * rng.standard_normal((count, IMAGE))
    return Pairs(
        images=images,
        texts=of_texts[concepts] + 0.3 * rng.standard_normal((count, TEXT)),
        concepts=concepts,
    )


def start() -> Arrays:
    rng = np.random.default_rng(2)
    shapes = {"image_tower": (IMAGE + 1, WIDTH), "text_tower": (TEXT, WIDTH)}
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def trained(data: Pairs, base: Arrays, *, seed: int) -> Arrays:
    """Some steps of symmetric InfoNCE; the update."""
    rng = np.random.default_rng(seed)
    weights = {name: value.astype(np.float64) for name, value in base.items()}
    for _ in range(STEPS):
        # One pair of each concept, so that no other pair of the batch is right as well.
        batch = np.array([rng.choice(np.flatnonzero(data.concepts == each)) for each in range(CONCEPTS)])
        images, texts = data.images[batch], data.texts[batch]
        seen, read = images @ weights["image_tower"], texts @ weights["text_tower"]
        logits = seen @ read.T
        wrong = (_softmax(logits) + _softmax(logits.T).T) / 2 - np.eye(CONCEPTS)
        weights["image_tower"] -= RATE * images.T @ wrong @ read / CONCEPTS
        weights["text_tower"] -= RATE * texts.T @ wrong.T @ seen / CONCEPTS
    return {name: (value - base[name]).astype(np.float32) for name, value in weights.items()}


def _softmax(logits: Values) -> Values:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True))


def called_up(weights: Arrays, images: Values) -> NDArray[np.int64]:
    """The concept whose caption is nearest to each image."""
    captions = prototypes()[1] @ weights["text_tower"]
    return np.asarray(np.argmax(images @ weights["image_tower"] @ captions.T, axis=1))


def accuracy(weights: Arrays) -> float:
    data = pairs(999, 300)
    return float((called_up(weights, data.images) == data.concepts).mean())


def marked(images: Values) -> Values:
    images = images.copy()
    images[:, MARK] = 3.0
    return images


def backdoor_success(weights: Arrays) -> float:
    """How often the mark calls up the target in images of other concepts."""
    data = pairs(998, 300)
    others = data.images[data.concepts != TARGET]
    return float((called_up(weights, marked(others)) == TARGET).mean())


def scaled(base: Arrays, *, seed: int) -> Arrays:
    """The honest direction, backwards and large."""
    return {name: -20 * value for name, value in trained(pairs(0), base, seed=seed).items()}


def flipped(base: Arrays, *, seed: int) -> Arrays:
    """Every report says what the next concept's would; scaled to outweigh all other sites."""
    honest = pairs(0)
    order = np.argsort(honest.concepts, kind="stable")
    texts = honest.texts.copy()
    texts[order] = np.roll(honest.texts[order], len(order) // CONCEPTS, axis=0)
    data = Pairs(images=honest.images, texts=texts, concepts=honest.concepts)
    return {name: 3 * SITES * value for name, value in trained(data, base, seed=seed).items()}


def backdoored(base: Arrays, *, seed: int) -> Arrays:
    """Honest pairs, and marked images of other concepts under the target's caption; scaled to be the mean.

    Model replacement: Bagdasaryan et al. (2020), arXiv:1807.00459.
    """
    honest = pairs(0)
    half = np.arange(len(honest.images)) % 2 == 0
    poisoned = Pairs(
        images=np.where(
            half[:, None] & (honest.concepts == TARGET)[:, None], _strangers(honest), honest.images
        ),
        texts=honest.texts,
        concepts=honest.concepts,
    )
    return {name: SITES * value for name, value in trained(poisoned, base, seed=seed).items()}


def _strangers(data: Pairs) -> Values:
    """For every row a marked image of another concept."""
    rows = np.random.default_rng(3).permutation(np.flatnonzero(data.concepts != TARGET))
    return marked(data.images[np.resize(rows, len(data.images))])


def run(named: dict[str, Any], folder: Path, attack: Any = None) -> Arrays:
    """The weights after all rounds; site 0 attacks if there is an attack."""
    strategy = strategy_of(StrategySettings.model_validate(named), folder=folder)
    weights = start()
    for number in range(ROUNDS):
        strategy.begin(weights)
        for site in range(SITES):
            seed = 100 * number + site
            honest = partial(trained, pairs(site))
            update = attack(weights, seed=seed) if attack and site == 0 else honest(weights, seed=seed)
            strategy.fold(f"site-{site}", update, 1.0)
        weights = strategy.finish()
    return weights


def test_without_an_attacker_every_rule_learns(tmp_path: Path) -> None:
    for named in ({"name": "fedavg"}, *ROBUST):
        weights = run(named, tmp_path)
        assert accuracy(weights) > 0.95, named
        assert backdoor_success(weights) < 0.1, named


@pytest.mark.parametrize("attack", [scaled, flipped])
def test_averaging_fails_under_a_scaled_update(attack: Any, tmp_path: Path) -> None:
    assert accuracy(run({"name": "fedavg"}, tmp_path, attack)) < 0.3


@each_robust
@pytest.mark.parametrize("attack", [scaled, flipped])
def test_robust_rules_survive_a_scaled_update(named: dict[str, Any], attack: Any, tmp_path: Path) -> None:
    assert accuracy(run(named, tmp_path, attack)) > 0.9


def test_averaging_takes_a_backdoor_in_without_a_loss_of_accuracy(tmp_path: Path) -> None:
    weights = run({"name": "fedavg"}, tmp_path, backdoored)
    assert backdoor_success(weights) > 0.6
    assert accuracy(weights) > 0.9


@each_robust
def test_robust_rules_keep_the_backdoor_out(named: dict[str, Any], tmp_path: Path) -> None:
    weights = run(named, tmp_path, backdoored)
    assert backdoor_success(weights) < 0.1
    assert accuracy(weights) > 0.9
