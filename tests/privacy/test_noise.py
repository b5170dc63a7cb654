"""Noise of the stated scale, independent of everything, that no second source repeats."""

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from privacy.errors import NoiseCopied
from privacy.noise import GaussianNoise, os_generator

STDDEV = 1.7
COUNT = 20_000
FIVE_SIGMA = 5 / math.sqrt(COUNT)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(np.corrcoef(first.numpy(), second.numpy())[0, 1])


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_the_distribution_is_normal_at_the_asked_scale_and_at_no_other(
    claimed: float, accepted: bool
) -> None:
    values = GaussianNoise(insecure_seed=1).draw((COUNT,), stddev=STDDEV).numpy()
    assert bool(kstest(values, "norm", args=(0, claimed * STDDEV)).pvalue > 1e-3) is accepted


def test_the_noise_in_a_sum_has_the_asked_scale() -> None:
    total = torch.full((COUNT,), 3.0)
    noised = GaussianNoise(insecure_seed=2).add_to(total, stddev=STDDEV)
    assert kstest((noised - total).numpy(), "norm", args=(0, STDDEV)).pvalue > 1e-3


def test_successive_layers_are_uncorrelated_and_so_are_neighbouring_values() -> None:
    source = GaussianNoise(insecure_seed=3)
    first, second = (source.draw((COUNT,), stddev=STDDEV) for _ in range(2))
    assert abs(correlation(first, second)) < FIVE_SIGMA
    assert abs(correlation(first[1:], first[:-1])) < FIVE_SIGMA


def test_two_sources_are_uncorrelated() -> None:
    first, second = (GaussianNoise().draw((COUNT,), stddev=STDDEV) for _ in range(2))
    assert abs(correlation(first, second)) < FIVE_SIGMA


def test_a_training_seed_has_no_say() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        draws.append(GaussianNoise().draw((8,), stddev=1.0))
    assert not torch.equal(*draws)


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    GaussianNoise().draw((8,), stddev=1.0)
    assert torch.equal(torch.rand(3), expected)


def test_a_fixed_seed_repeats_itself_and_says_so() -> None:
    first, second = (GaussianNoise(insecure_seed=5) for _ in range(2))
    assert torch.equal(first.draw((9,), stddev=1.0), second.draw((9,), stddev=1.0))
    assert first.insecure_seed
    assert GaussianNoise(insecure_seed=0).insecure_seed
    assert not GaussianNoise().insecure_seed


def test_os_generators_hold_the_whole_entropy() -> None:
    states = {tuple(os_generator().bit_generator.state["state"]["key"]) for _ in range(64)}
    assert len(states) == 64


def test_a_sum_is_left_as_it_was_and_keeps_its_shape() -> None:
    total = torch.zeros(3, 4)
    noised = GaussianNoise().add_to(total, stddev=1.0)
    assert noised.shape == (3, 4)
    assert noised.dtype == torch.float32
    assert torch.equal(total, torch.zeros(3, 4))
    assert noised.ne(0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_noise_is_never_rounded_below_single_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert GaussianNoise().add_to(torch.ones(2, dtype=dtype), stddev=1.0).dtype == expected


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)])
def test_any_shape_can_be_drawn(shape: tuple[int, ...]) -> None:
    drawn = GaussianNoise().draw(shape, stddev=1.0)
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32


def test_no_scale_means_no_noise() -> None:
    assert torch.equal(GaussianNoise().add_to(torch.ones(5), stddev=0.0), torch.ones(5))


@pytest.mark.parametrize("stddev", [-1.0, math.nan, math.inf])
def test_a_scale_that_is_no_scale_is_refused(stddev: float) -> None:
    with pytest.raises(ValueError, match=r"expected stddev=.* >= 0 and finite"):
        GaussianNoise().draw((2,), stddev=stddev)


def test_integers_cannot_be_noised() -> None:
    with pytest.raises(ValueError, match=r"floating point tensor, got torch\.int64"):
        GaussianNoise().add_to(torch.ones(2, dtype=torch.int64), stddev=1.0)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_is_never_duplicated(duplicate: "copy._Copier") -> None:  # type: ignore[name-defined]
    with pytest.raises(NoiseCopied, match="make a new one"):
        duplicate(GaussianNoise())


def test_a_source_is_refused_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GaussianNoise()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(NoiseCopied, match="parent process"):
        source.draw((1,), stddev=1.0)
