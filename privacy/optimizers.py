"""What is done with a noised gradient: SGD, AdamW, and an Adam that knows how much noise it is given.

All of it is post-processing of releases, so none of it costs privacy.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from privacy.errors import UnsoundTraining
from privacy.mechanism import Released

OptimizerName = Literal["sgd", "adamw", "dp-adambc"]


class DpAdamBC(Optimizer):
    """Adam whose second moment is freed of the noise's share of it.

    The mean of squared noised gradients is that of the clean ones plus the noise's variance Phi. Where the
    noise dominates, Adam divides every coordinate by the same sqrt(Phi) and is SGD with momentum. With

        step = -lr * m / sqrt(max(v - Phi, gamma))     (m, v corrected for their start at zero)

    coordinates with a small gradient move as far as Adam means them to.

    Every step must be told its noise by whoever added it (`take_step`). Phi is averaged over the steps as v
    is, so it is right for noise that changes between them. Weight decay is AdamW's.

    Args:
        parameters: What is trained.
        lr: Learning rate.
        weight_decay: Share of a weight that decays per step, times ``lr``.
        betas: Decay of the first and the second moment.
        floor: gamma as a share of Phi. The paper tunes gamma itself; but v strays around Phi by an amount
            that is proportional to Phi (by about Phi / 3 after 20 steps), and as a share one value serves
            every noise and batch.

    Raises:
        ValueError: ``floor`` is not in (0, 1].

    Source:
        Tang, Shpilevskiy and Lecuyer (2024), arXiv:2312.14334, algorithm 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
    ) -> None:
        if not 0 < floor <= 1:
            raise ValueError(f"expected {floor=} in (0, 1]")
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "floor": floor}
        super().__init__(parameters, {**settings, "steps": 0, "noise_variance": 0.0})
        self._noise_std: float | None = None

    def hear_noise(self, noise_std: float) -> None:
        """Say how large the noise is on the gradients of the next step, from whoever added it."""
        self._noise_std = noise_std

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step.

        Raises:
            UnsoundTraining: nobody said how much noise is in the gradients, or there is none.
        """
        if closure is not None:
            raise UnsoundTraining("dp-adambc takes its gradients from a release, so it calls no closure")
        if not self._noise_std:
            raise UnsoundTraining(
                f"dp-adambc heard of noise {self._noise_std}: tell it before each step, as take_step does; "
                "without noise use adamw"
            )
        for group in self.param_groups:
            (keep_first, keep_second), lr = group["betas"], group["lr"]
            group["steps"] += 1
            group["noise_variance"] = _mixed(group["noise_variance"], self._noise_std**2, keep_second)
            first_share, second_share = (1 - keep ** group["steps"] for keep in (keep_first, keep_second))
            noise_variance = group["noise_variance"] / second_share
            for value in group["params"]:
                if value.grad is None:
                    continue
                moments = self.state[value]
                if not moments:
                    moments["first"], moments["second"] = torch.zeros_like(value), torch.zeros_like(value)
                moments["first"].lerp_(value.grad, 1 - keep_first)
                moments["second"].lerp_(value.grad.square(), 1 - keep_second)
                clean = (moments["second"] / second_share - noise_variance).clamp_min(
                    group["floor"] * noise_variance
                )
                value.mul_(1 - lr * group["weight_decay"])
                value.addcdiv_(moments["first"], clean.sqrt(), value=-lr / first_share)
        self._noise_std = None


def _mixed(old: float, new: float, keep: float) -> float:
    return keep * old + (1 - keep) * new


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float
) -> Optimizer:
    """The named optimizer; SGD is plain, without momentum."""
    if name == "sgd":
        return SGD(parameters, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return DpAdamBC(parameters, lr=lr, weight_decay=weight_decay)


def take_step(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], released: Released) -> None:
    """One step along a release.

    Args:
        optimizer: Over ``parameters``; `DpAdamBC` hears how much noise the release has in it.
        parameters: By the names of ``released.arrays``.
        released: Noised sum over the public divisor.
    """
    for name, value in released.arrays.items():
        parameters[name].grad = value
    if isinstance(optimizer, DpAdamBC):
        optimizer.hear_noise(released.noise_std)
    optimizer.step()
