"""One hospital, several processes: each clips its share of the patients, and noise is added once."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from privacy.engine import Batch, ClippingEngine
from privacy.errors import UnsoundTraining
from privacy.mechanism import Mechanism, Released
from privacy.noise import GaussianNoise


class DistributedEngine:
    """The clipped sum over all processes of a group, each of which holds a disjoint share of the patients.

    Guarantees:
        As `ClippingEngine.clipped_sum`, for all shares together: a patient is in one share and is clipped
        there, so adding or removing one still moves the sum by at most ``max_grad_norm``. Every process
        gets the same sum. A process whose share is empty takes part, without a forward pass.

    Every process must call it as often as the others. One that fails leaves the others waiting until the
    group's time limit: give the group a short one.
    """

    def __init__(self, engine: ClippingEngine, group: dist.ProcessGroup | None = None) -> None:
        """Sum ``engine``'s results over ``group``.

        Args:
            engine: This process's, of the same module with the same weights as the others'.
            group: None: all processes.
        """
        self._engine = engine
        self._group = group

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        """See the class.

        Args:
            batch: This process's share, perhaps of no patients.
            max_grad_norm: The same in all processes.

        Raises:
            UnsoundTraining: the processes disagree on ``max_grad_norm`` or on how many numbers are trained.
        """
        raw_total = self._engine.clipped_sum(batch, max_grad_norm=max_grad_norm)
        device = next(iter(raw_total.values())).device
        count = sum(value.numel() for value in raw_total.values())
        mine = torch.tensor([max_grad_norm, count], dtype=torch.float64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, mine, group=self._group)
        if any(not torch.equal(each, mine) for each in everyone):
            found = [tuple(each.tolist()) for each in everyone]
            raise UnsoundTraining(
                f"expected the same max_grad_norm and trained numbers in all processes, got {found}"
            )
        for value in raw_total.values():
            dist.all_reduce(value, group=self._group)
        return raw_total


def release_together(
    mechanism: Mechanism,
    clipped_sum: Mapping[str, Tensor],
    noise: GaussianNoise | None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Released:
    """The noised sum, the same in all processes: the group's first one draws the noise, once.

    Noise of every process would be added several times, and equal seeds would be worse: noise that can be
    subtracted.

    Args:
        mechanism: Says how much noise.
        clipped_sum: Of `DistributedEngine`, the same in all processes.
        noise: A source in the group's first process, None in the others.
        group: None: all processes.

    Raises:
        UnsoundTraining: the first process has no source, or another one has.
    """
    draws = dist.get_rank(group) == 0
    if draws != (noise is not None):
        raise UnsoundTraining(
            f"expected a noise source in the first process of the group alone, got {noise!r} in process "
            f"{dist.get_rank(group)}"
        )
    released = Released(
        arrays={name: torch.empty_like(value) for name, value in clipped_sum.items()},
        noise_std=mechanism.noise_std,
    )
    if noise is not None:
        released = mechanism.release(clipped_sum, noise)
    for value in released.arrays.values():
        dist.broadcast(value, group=group, group_src=0)
    return released
