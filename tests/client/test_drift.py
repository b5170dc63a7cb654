"""Terms that keep a site near the others are added to gradients, exactly and before every step."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from client.drift import correct_drift
from encoders.errors import EncoderError
from privacy.optimizers import DpAdamBC, OptimizerName, make_optimizer

RATE = 0.1


def steps(*gradients: float, correction: float | None = None, proximal: float = 0.0) -> list[float]:
    """The weight after each step of SGD along ``gradients`` from 1."""
    weight = nn.Parameter(torch.ones(1))
    optimizer: Optimizer = SGD([weight], lr=RATE)
    term = {} if correction is None else {"w": np.array([correction], dtype=np.float32)}
    correct_drift(optimizer, {"w": weight}, correction=term, proximal=proximal)
    found = []
    for gradient in gradients:
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        found.append(weight.item())
    return found


def test_without_terms_a_step_is_as_it_was() -> None:
    assert steps(1.0, 2.0) == pytest.approx([0.9, 0.7])


def test_a_correction_is_added_to_every_gradient() -> None:
    assert steps(1.0, 2.0, correction=0.5) == pytest.approx([0.85, 0.6])


def test_the_proximal_term_pulls_back_to_where_the_round_began() -> None:
    first = 1.0 - RATE * 1.0
    assert steps(1.0, 0.0, proximal=2.0) == pytest.approx([first, first - RATE * 2.0 * (first - 1.0)])


def test_both_together_are_their_sum() -> None:
    first = 1.0 - RATE * (1.0 + 0.5)
    assert steps(1.0, 0.0, correction=0.5, proximal=2.0) == pytest.approx(
        [first, first - RATE * (0.5 + 2.0 * (first - 1.0))]
    )


def test_the_given_gradient_is_not_changed_in_place() -> None:
    weight, gradient = nn.Parameter(torch.ones(1)), torch.ones(1)
    optimizer = SGD([weight], lr=RATE)
    correct_drift(optimizer, {"w": weight}, correction={"w": np.ones(1, dtype=np.float32)}, proximal=1.0)
    weight.grad = gradient
    optimizer.step()
    assert gradient.item() == 1.0


def test_what_has_no_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=RATE)
    correct_drift(optimizer, {"w": weight}, correction={"w": np.ones(1, dtype=np.float32)}, proximal=1.0)
    optimizer.step()
    assert weight.item() == 1.0


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimizer_sees_the_corrected_gradient(name: OptimizerName) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(name, [weight], lr=RATE, weight_decay=0.0)
    correct_drift(optimizer, {"w": weight}, correction={"w": np.full(1, -3.0, np.float32)}, proximal=0.0)
    weight.grad = torch.ones(1)
    if isinstance(optimizer, DpAdamBC):
        optimizer.hear_noise(1e-6)
    optimizer.step()
    assert weight.item() > 1.0  # uphill of the gradient alone


def test_a_correction_of_another_shape_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(EncoderError, match=r"correction of 'w' has shape \(1,\), not \(2,\)"):
        correct_drift(
            SGD([weight], lr=1), {"w": weight}, correction={"w": np.ones(1, np.float32)}, proximal=0
        )
