"""Exact clipping of per-patient gradients: the bounded sum that a mechanism adds noise to.

An engine sees a loss *of one patient*. It differentiates that function for each patient on their own, so
no patient's gradient can depend on another's records, whatever the loss does.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privacy.errors import UnsoundTraining

# All tensors of a batch share the first axis, P patients.
Batch = Mapping[str, Tensor]
PatientLoss = Callable[[Callable[..., tuple[Tensor, Tensor]], Mapping[str, Tensor]], Tensor]


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


class VmapEngine:
    """Per-patient gradients of the whole model by ``vmap(grad)``, in chunks.

    It works for any module whose forward pass `torch.func` can trace, and isolates patients by construction.

    Source:
        PyTorch, "Per-sample-gradients" tutorial; DP-SGD of Abadi et al. (2016), algorithm 1.
    """

    def __init__(self, module: nn.Module, patient_loss: PatientLoss, *, chunk: int = 16) -> None:
        """Prepare ``module``, whose parameters with ``requires_grad`` are trained.

        Args:
            module: Called by the loss.
            patient_loss: ``patient_loss(call, record)``: the loss of one patient, a scalar, where
                ``call`` applies the module and ``record`` is one row of the batch.
            chunk: Patients differentiated at a time; bounds memory, not results.

        Raises:
            UnsoundTraining: a layer mixes the rows it is given, or nothing is trainable.
        """
        refuse_batch_statistics(module)
        self._parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        if not self._parameters:
            raise UnsoundTraining("nothing to train: no parameter of the module requires a gradient")
        frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
        self._frozen = {**frozen, **dict(module.named_buffers())}
        self._chunk = chunk

        def loss(parameters: dict[str, Tensor], record: Mapping[str, Tensor]) -> Tensor:
            def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                outputs: tuple[Tensor, Tensor] = functional_call(
                    module, {**self._frozen, **parameters}, inputs
                )
                return outputs

            return patient_loss(call, record)

        self._gradients = vmap(grad(loss), in_dims=(None, 0), randomness="error")

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        """See `ClippingEngine.clipped_sum`."""
        if not max_grad_norm > 0:
            raise UnsoundTraining(f"expected {max_grad_norm=} > 0")
        total = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        patients = len(next(iter(batch.values())))
        detached = {name: value.detach() for name, value in self._parameters.items()}
        for start in range(0, patients, self._chunk):
            records = {name: value[start : start + self._chunk] for name, value in batch.items()}
            raw_gradients = self._gradients(detached, records)
            factors = clip_factors(raw_norms(raw_gradients), max_grad_norm=max_grad_norm)
            for name, value in raw_gradients.items():
                kept = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
                total[name] += torch.tensordot(factors.to(kept.dtype), kept, dims=1)
        return total


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
