"""What the mechanism states is what it does: this unit, this bound, this noise on every coordinate."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from privacy.accounting import PoissonGaussian
from privacy.errors import UnsoundTraining
from privacy.mechanism import MECHANISMS, AnchoredDpSgd, Kind, Mechanism, MicrobatchDpSgd, Released
from privacy.noise import GaussianNoise

COUNT = 20_000
FIVE_SIGMA = 5 / math.sqrt(COUNT)
CLEAN = {"a": torch.full((COUNT,), 3.0), "b": torch.zeros(100, 200), "c": torch.ones(2, COUNT // 2)}


SETTINGS: dict[str, Any] = {"max_grad_norm": 0.5, "noise_multiplier": 1.2, "sample_rate": 0.1, "steps": 7}


def mechanism(**changes: Any) -> AnchoredDpSgd:
    return AnchoredDpSgd(**{**SETTINGS, **changes})


def noise_in(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (value - CLEAN[name]).flatten() for name, value in released.items()}


def fits(released: Mapping[str, Tensor], stddev: float) -> list[bool]:
    """Whether each array's noise looks normal with this deviation."""
    return [
        bool(kstest(each.numpy(), "norm", args=(0, stddev)).pvalue > 1e-3)
        for each in noise_in(released).values()
    ]


@pytest.mark.parametrize("kind", [AnchoredDpSgd, MicrobatchDpSgd])
def test_it_says_what_it_protects_from_what(kind: type[AnchoredDpSgd] | type[MicrobatchDpSgd]) -> None:
    stated: Mechanism = kind(max_grad_norm=0.5, noise_multiplier=1.2, sample_rate=0.1, steps=7)
    assert (stated.unit, stated.adjacency, stated.sampler) == ("patient", "add_remove", "poisson")


@pytest.mark.parametrize(
    ("kind", "name", "bounds"), [(AnchoredDpSgd, "anchored", 1), (MicrobatchDpSgd, "microbatch", 2)]
)
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_the_noise_follows_from_what_a_patient_can_move(
    kind: type[AnchoredDpSgd] | type[MicrobatchDpSgd], name: str, bounds: int, bound: float
) -> None:
    stated = kind(max_grad_norm=bound, noise_multiplier=1.2, sample_rate=0.1, steps=7)
    assert stated.kind == name
    assert stated.sensitivity == bounds * bound
    assert stated.noise_std == pytest.approx(1.2 * bounds * bound)
    released = stated.release({"a": torch.zeros(COUNT)}, GaussianNoise(insecure_seed=5))
    assert released.noise_std == stated.noise_std
    assert kstest(released.arrays["a"].numpy(), "norm", args=(0, 1.2 * bounds * bound)).pvalue > 1e-3


def test_equal_noise_multipliers_cost_the_same_whatever_a_patient_can_move() -> None:
    assert mechanism().event == MicrobatchDpSgd(**SETTINGS).event


def test_a_divisor_takes_arrays_and_noise_along() -> None:
    released = Released(arrays={"a": torch.full((3,), 4.0)}, noise_std=2.0).over(8.0)
    assert torch.equal(released.arrays["a"], torch.full((3,), 0.5))
    assert released.noise_std == 0.25


def test_the_accountant_hears_the_same_numbers() -> None:
    assert mechanism().event == PoissonGaussian(sample_rate=0.1, noise_multiplier=1.2, steps=7)


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_every_array_has_noise_of_the_stated_deviation_and_no_other(claimed: float, accepted: bool) -> None:
    released = mechanism().release(CLEAN, GaussianNoise(insecure_seed=1)).arrays
    assert released.keys() == CLEAN.keys()
    assert fits(released, claimed * 0.6) == [accepted] * 3


def test_an_array_without_noise_would_be_seen() -> None:
    released = mechanism().release(CLEAN, GaussianNoise(insecure_seed=1)).arrays
    assert fits({**released, "b": CLEAN["b"]}, 0.6) == [True, False, True]


def largest_correlation(noises: list[Tensor]) -> float:
    pairs = itertools.combinations(noises, 2)
    return max(abs(float(np.corrcoef(first, second)[0, 1])) for first, second in pairs)


def test_noise_is_uncorrelated_between_arrays_and_between_steps() -> None:
    source = GaussianNoise(insecure_seed=2)
    steps = [mechanism().release(CLEAN, source).arrays for _ in range(3)]
    assert largest_correlation([each for step in steps for each in noise_in(step).values()]) < FIVE_SIGMA


def test_repeated_noise_would_be_seen() -> None:
    steps = [mechanism().release(CLEAN, GaussianNoise(insecure_seed=2)).arrays for _ in range(2)]
    assert largest_correlation([each for step in steps for each in noise_in(step).values()]) > 0.99


def test_a_release_leaves_the_sum_as_it_was() -> None:
    before = {name: value.clone() for name, value in CLEAN.items()}
    released = mechanism().release(CLEAN, GaussianNoise(insecure_seed=3)).arrays
    for name, value in CLEAN.items():
        assert torch.equal(value, before[name])
        assert released[name].shape == value.shape


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, 1e-45, 1e13])
def test_a_bound_outside_what_float32_can_keep_is_refused(bound: float) -> None:
    with pytest.raises(UnsoundTraining, match=r"expected max_grad_norm=.* in \[1e-12, 1000000000000\.0\]"):
        mechanism(max_grad_norm=bound)


@pytest.mark.parametrize("bound", [1e-12, 1e12])
def test_at_the_edges_of_the_range_the_noise_still_has_its_scale(bound: float) -> None:
    edge = mechanism(max_grad_norm=bound)
    noise = edge.release({"a": torch.zeros(COUNT)}, GaussianNoise(insecure_seed=4)).arrays["a"]
    assert kstest(noise.double().numpy() / bound, "norm", args=(0, 1.2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"noise_multiplier": 0.0}, "expected noise_multiplier=0.0 > 0"),
        ({"noise_multiplier": math.inf}, "expected noise_multiplier=inf > 0 and finite"),
        ({"sample_rate": 0.0}, "expected sample_rate=0.0 in"),
        ({"sample_rate": 1.1}, "expected sample_rate=1.1 in"),
        ({"steps": 0}, "expected steps=0 to be an integer >= 1"),
    ],
)
def test_what_the_accountant_cannot_account_is_refused_when_built(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mechanism(**wrong)


def test_every_kind_has_one_mechanism_of_that_name() -> None:
    assert list(MECHANISMS) == list(get_args(Kind))
    assert {"anchored": AnchoredDpSgd, "microbatch": MicrobatchDpSgd} == MECHANISMS
