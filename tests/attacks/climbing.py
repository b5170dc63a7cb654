"""A search for the neighbouring cohorts and the parameters that move a sum farthest."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# What the search may change: weights and records, float tensors by name.
Case = dict[str, Tensor]
_SCALES = (1.0, 0.3, 0.1)


def farthest(moved: Callable[[Case], float], starts: Iterable[Case], *, tries: int, seed: int = 0) -> float:
    """The largest value of ``moved`` that hill climbing finds from any of the starts.

    Every try moves all tensors of the case or one of them, by random steps of one of three sizes, and is kept
    if it moved the sum farther.
    """
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for case in starts:
        here = moved(case)
        for turn in range(tries):
            other = _near(case, generator, turn=turn)
            if (value := moved(other)) > here:
                here, case = value, other
        best = max(best, here)
    return best


def _near(case: Case, generator: torch.Generator, *, turn: int) -> Case:
    names = list(case)
    changed = names if turn % 4 == 3 else [names[turn % len(names)]]
    scale = _SCALES[turn % len(_SCALES)]
    steps = {
        name: scale * torch.randn(case[name].shape, generator=generator, dtype=case[name].dtype)
        for name in changed
    }
    return {name: value + steps[name] if name in steps else value for name, value in case.items()}
