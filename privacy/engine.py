"""Exact clipping of per-patient gradients: the bounded sum that a mechanism adds noise to.

The protocol and what its engines share. Three engines keep it: `privacy.bookkeeping` (the fast one),
`privacy.hooks` (Opacus) and `privacy.vmap` (every patient differentiated alone); each checks the others.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from privacy.errors import UnsoundTraining

# All tensors of a batch share the first axis, P patients.
Batch = Mapping[str, Tensor]
# ``losses(call, batch)``: the loss of each patient, shape (P,), where ``call`` applies the module to rows of
# inputs. Element p depends on row p of the batch alone, and rows given to ``call`` are P equal, consecutive
# groups: all of patient 0, all of patient 1, and so on.
PatientLosses = Callable[[Callable[..., tuple[Tensor, Tensor]], Batch], Tensor]


class ClippingEngine(Protocol):
    """What the private training loop needs of an engine."""

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        """Sum over patients of their gradient, each shrunk to L2 norm at most ``max_grad_norm``.

        Guarantees:
            Adding or removing one patient changes the result by at most ``max_grad_norm`` in L2 norm over
            all arrays together (up to float32 rounding). A non-finite gradient counts as zero.

        Args:
            batch: Tensors of P rows, a row a patient; P = 0 is answered without a forward pass.
            max_grad_norm: C > 0.

        Returns:
            One tensor per trainable parameter, by name.
        """


def raw_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm over all arrays of each row, float64, shape (P,). Private: it never leaves the site.

    Sums of squares in float64: ``Tensor.norm`` in float32 under-estimates long vectors.
    """
    squares = [value.flatten(1).to(torch.float64).pow(2).sum(1) for value in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """min(1, C / norm) of each row, or 0. Shape (P,).

    It is 0 where the norm is not finite, and where float32 would round the factor by more than its last bit
    (below 1.2e-38, its smallest normal number), which could take the clipped row past C.
    """
    factors = (max_grad_norm / norms.clamp_min(1e-300)).clamp(max=1.0)
    return torch.where(factors >= torch.finfo(torch.float32).tiny, factors, 0.0)  # false for NaN too


def refuse_batch_statistics(module: nn.Module) -> None:
    """Refuse layers that mix the rows of a batch.

    Raises:
        UnsoundTraining: naming the layer and the remedy.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UnsoundTraining(
                f"layer {name!r} is {type(layer).__name__}: its statistics mix patients even when its "
                "weights are frozen; replace it with GroupNorm or LayerNorm"
            )
