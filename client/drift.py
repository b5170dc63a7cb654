"""What keeps a site from drifting away from the others: terms on top of its noised gradients.

They are made of the coordinator's numbers and of the site's own released weights, so they cost nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from encoders.errors import EncoderError
from strategies.messages import Arrays


def correct_drift(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, correction: Arrays, proximal: float
) -> None:
    """Before every step from now on, add ``correction + proximal · (weights − weights now)`` to gradients.

    FedProx is a positive ``proximal`` alone, SCAFFOLD a correction alone, FedDyn both.

    Args:
        optimizer: Whose steps.
        parameters: The site's, by the names under which they travel.
        correction: By these names, float32; where there is none, it is zero.
        proximal: mu >= 0.

    Raises:
        EncoderError: a correction that is not of its parameter's shape.
    """
    if not correction and not proximal:
        return
    added: dict[nn.Parameter, tuple[Any, Any]] = {}
    for name, value in parameters.items():
        term = correction.get(name)
        if term is not None and term.shape != tuple(value.shape):
            raise EncoderError(f"the correction of {name!r} has shape {term.shape}, not {tuple(value.shape)}")
        anchor = value.detach().clone() if proximal else None
        added[value] = (None if term is None else torch.tensor(term).to(value), anchor)

    @torch.no_grad()
    def correct(*_: Any) -> None:
        for value, (term, anchor) in added.items():
            if value.grad is None:
                continue
            if term is not None:
                value.grad = value.grad + term
            if anchor is not None:
                value.grad = value.grad.add(value - anchor, alpha=proximal)

    optimizer.register_step_pre_hook(correct)
