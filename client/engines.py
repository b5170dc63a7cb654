"""Which engine clips at a site: the hospital's choice, as all of them give the same sums."""

from collections.abc import Callable

import torch
from torch import nn

from client.site import EngineName, Precision
from privacy.bookkeeping import BookKeepingEngine
from privacy.engine import ClippingEngine, PatientLosses
from privacy.hooks import HooksEngine
from privacy.vmap import VmapEngine

MakeEngine = Callable[[nn.Module, PatientLosses], ClippingEngine]

VMAP_ROWS = 16  # vmap holds every parameter's gradient once a row


def engine_maker(
    name: EngineName = "book-keeping", *, physical_batch: int = 64, precision: Precision = "float32"
) -> MakeEngine:
    """What makes the named engine for a module and its losses.

    Args:
        name: ``book-keeping`` is the fast one; the others check it.
        physical_batch: Rows differentiated at a time; bounds memory, not results.
        precision: Of the towers' products; norms, sums and noise are float32 or better. Of book-keeping only.
    """

    def make(module: nn.Module, losses: PatientLosses) -> ClippingEngine:
        if name == "hooks":
            return HooksEngine(module, losses, physical_batch=physical_batch)
        if name == "vmap":
            return VmapEngine(module, losses, chunk=min(physical_batch, VMAP_ROWS))
        autocast = torch.bfloat16 if precision == "bfloat16" else None
        return BookKeepingEngine(module, losses, physical_batch=physical_batch, autocast=autocast)

    return make
