"""Per-patient gradients of the whole model by ``vmap``: slow, and isolating by construction."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privacy.engine import Batch, PatientLosses, clip_factors, raw_norms, refuse_batch_statistics
from privacy.errors import UnsoundTraining


class VmapEngine:
    """Per-patient gradients of the whole model by ``vmap(grad)``, in chunks.

    It works for any module whose forward pass `torch.func` can trace, and isolates patients by construction.

    Source:
        PyTorch, "Per-sample-gradients" tutorial; DP-SGD of Abadi et al. (2016), algorithm 1.
    """

    def __init__(self, module: nn.Module, patient_losses: PatientLosses, *, chunk: int = 16) -> None:
        """Prepare ``module``, whose parameters with ``requires_grad`` are trained.

        Args:
            module: Called by the loss.
            patient_losses: Sees a batch of one patient at a time.
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

            alone = {name: value[None] for name, value in record.items()}
            return patient_losses(call, alone)[0]

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
