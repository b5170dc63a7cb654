"""Optimizers of noised gradients: the noise's share is known to whoever should know it, and to the letter."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import nn

from privacy.errors import UnsoundTraining
from privacy.mechanism import AnchoredDpSgd, Released
from privacy.noise import GaussianNoise
from privacy.optimizers import DpAdamBC, OptimizerName, make_optimizer, take_step

NAMES: tuple[OptimizerName, ...] = ("sgd", "adamw", "dp-adambc")


def releases(count: int, *, noise_std: float, seed: int = 0) -> list[Released]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Released(arrays={"a": 1e-3 + noise_std * torch.randn(50, generator=generator)}, noise_std=noise_std)
        for _ in range(count)
    ]


def weights_after(
    optimizer_name: OptimizerName, given: Iterable[Released], *, decay: float = 0.0
) -> nn.Parameter:
    weights = nn.Parameter(torch.ones(50))
    optimizer = make_optimizer(optimizer_name, [weights], lr=0.01, weight_decay=decay)
    for released in given:
        take_step(optimizer, {"a": weights}, released)
    return weights


def test_dp_adambc_is_the_papers_algorithm() -> None:
    """Tang et al. (2024), algorithm 1, in float64, with gamma = 0.1 Phi and AdamW's decay."""
    given = releases(6, noise_std=0.02)
    value, first, second = np.ones(50), np.zeros(50), np.zeros(50)
    for step, released in enumerate(given, start=1):
        gradient = released.arrays["a"].double().numpy()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        phi = 0.02**2
        clean = np.maximum(second / (1 - 0.999**step) - phi, 0.1 * phi)
        value = (1 - 0.01 * 0.5) * value - 0.01 * first / (1 - 0.9**step) / np.sqrt(clean)
    found = weights_after("dp-adambc", given, decay=0.5).detach().numpy()
    assert found == pytest.approx(value, abs=1e-5)


def test_noise_that_changes_between_steps_is_averaged_as_the_second_moment_is() -> None:
    steps = [*releases(1, noise_std=0.5), *releases(1, noise_std=0.1, seed=1)]
    weights = nn.Parameter(torch.ones(50))
    optimizer = DpAdamBC([weights], lr=0.01)
    for released in steps:
        take_step(optimizer, {"a": weights}, released)
    (group,) = optimizer.param_groups
    expected = 0.999 * 0.001 * 0.5**2 + 0.001 * 0.1**2
    assert group["noise_variance"] == pytest.approx(expected)


def test_a_coordinate_of_large_gradient_moves_as_adam_moves_it_and_noise_alone_no_faster_than_the_floor() -> (
    None
):
    """After many steps: Adam would move a clean coordinate by the learning rate a step, whatever its size."""
    noise = GaussianNoise(insecure_seed=1)
    mechanism = AnchoredDpSgd(max_grad_norm=1.0, noise_multiplier=1.0, sample_rate=0.5, steps=1)
    moved = {}
    for name in ("adamw", "dp-adambc"):
        weights = nn.Parameter(torch.zeros(400))
        optimizer = make_optimizer(name, [weights], lr=1.0, weight_decay=0.0)
        clean = torch.cat([torch.full((200,), 1.0), torch.zeros(200)])
        for _ in range(300):
            take_step(optimizer, {"a": weights}, mechanism.release({"a": clean}, noise).over(10.0))
        moved[name] = -weights.detach() / 300
    assert float(moved["dp-adambc"][:200].mean()) == pytest.approx(1.0, abs=0.15)
    assert float(moved["adamw"][:200].mean()) == pytest.approx(1 / math.sqrt(2), abs=0.05)  # Phi hides half
    assert float(moved["dp-adambc"][200:].abs().max()) < 1


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_another_noise_scale_than_the_one_added_would_have_shown(wrong: float) -> None:
    told = [
        Released(arrays=each.arrays, noise_std=wrong * each.noise_std) for each in releases(20, noise_std=0.1)
    ]
    right = weights_after("dp-adambc", releases(20, noise_std=0.1))
    assert not torch.allclose(right, weights_after("dp-adambc", told), rtol=1e-2)


def test_noise_must_be_told_before_every_step() -> None:
    weights = nn.Parameter(torch.ones(50))
    optimizer = DpAdamBC([weights], lr=0.01)
    with pytest.raises(UnsoundTraining, match="heard of noise None: tell it before each step"):
        optimizer.step()
    take_step(optimizer, {"a": weights}, releases(1, noise_std=0.1)[0])
    with pytest.raises(UnsoundTraining, match="heard of noise None"):
        optimizer.step()
    with pytest.raises(UnsoundTraining, match=r"heard of noise 0\.0.*without noise use adamw"):
        take_step(optimizer, {"a": weights}, releases(1, noise_std=0.0)[0])
    with pytest.raises(UnsoundTraining, match="calls no closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("floor", [0.0, -1.0, 1.5, math.nan])
def test_a_floor_that_is_no_share_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"expected floor=.* in \(0, 1\]"):
        DpAdamBC([nn.Parameter(torch.ones(1))], lr=0.01, floor=floor)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_down_and_decays(name: OptimizerName) -> None:
    given = releases(5, noise_std=1e-5)
    kept, decayed = weights_after(name, given), weights_after(name, given, decay=0.5)
    assert bool((kept < 1).all())
    assert bool((decayed < kept).all())


def test_sgd_is_the_plain_step() -> None:
    (given,) = releases(1, noise_std=0.1)
    assert torch.allclose(weights_after("sgd", [given]), 1 - 0.01 * given.arrays["a"])


def test_a_parameter_without_a_gradient_stays() -> None:
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(50))
    take_step(DpAdamBC([still, moved], lr=0.01), {"a": moved}, releases(1, noise_std=0.1)[0])
    assert torch.equal(still, torch.ones(2))
