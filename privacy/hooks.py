"""Per-patient gradients by Opacus' hooks: slow, hungry, and written by other people, hence an oracle."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from privacy.engine import Batch, PatientLosses, clip_factors, raw_norms, refuse_batch_statistics
from privacy.errors import UnsoundTraining

# Rows may miss autograd's sum by rounding: relative to the parameter's own rows, and, where a gradient is
# zero but for rounding (a key's bias, which softmax ignores), to the rows of all parameters.
OWN_ROUNDING, WHOLE_ROUNDING = 1e-3, 1e-6


class HooksEngine:
    """Per-row gradients of each layer by Opacus, the rows of a patient summed before clipping.

    The module must take rows first in every layer, as Opacus does. What Opacus would get wrong in silence is
    checked: rows must add up to autograd's gradient, and on the first batch of two patients or more, the loss
    of the first and of the last alone must leave all other rows at zero.

    Source:
        Yousefpour et al. (2021), arXiv:2109.12298, section 3.
    """

    def __init__(
        self, module: nn.Module, patient_losses: PatientLosses, *, physical_batch: int | None = None
    ) -> None:
        """Prepare ``module``, whose parameters with ``requires_grad`` are trained; it stays as it is.

        Args:
            module: Called by the loss.
            patient_losses: See `privacy.engine.PatientLosses`; each of its calls has the same number of rows.
            physical_batch: Patients differentiated at a time, default all; bounds memory, not results.

        Raises:
            UnsoundTraining: a layer mixes the rows it is given, nothing is trainable, or Opacus has no
                per-row gradient of a parameter.
        """
        refuse_batch_statistics(module)
        if physical_batch is not None and physical_batch < 1:
            raise UnsoundTraining(f"expected {physical_batch=} >= 1")
        self._module = module
        self._patient_losses = patient_losses
        self._physical_batch = physical_batch
        self._rows_known_apart = False
        _, trained = repaired_copy(module)
        if not trained:
            raise UnsoundTraining("nothing to train: no parameter of the module requires a gradient")

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        """See `privacy.engine.ClippingEngine.clipped_sum`.

        Raises:
            UnsoundTraining: Opacus' rows are not those of the patients; the text names the parameter.
        """
        if not max_grad_norm > 0:
            raise UnsoundTraining(f"expected {max_grad_norm=} > 0")
        trained = {name: value for name, value in self._module.named_parameters() if value.requires_grad}
        total = {name: torch.zeros_like(value) for name, value in trained.items()}
        patients = len(next(iter(batch.values())))
        chunk = self._physical_batch or max(1, patients)
        for start in range(0, patients, chunk):
            records = {name: value[start : start + chunk] for name, value in batch.items()}
            if not self._rows_known_apart and len(next(iter(records.values()))) > 1:
                self._refuse_mixed_rows(records)
            raw_gradients = self._raw_gradients(records)
            factors = clip_factors(raw_norms(raw_gradients), max_grad_norm=max_grad_norm)
            for name, value in raw_gradients.items():
                kept = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
                total[name] += torch.tensordot(factors.to(kept.dtype), kept, dims=1)
        return total

    def _refuse_mixed_rows(self, records: Batch) -> None:
        """From both ends: a patient in whose rows all gradients land shows nothing by their own loss."""
        last = len(next(iter(records.values()))) - 1
        own_seen = []
        for patient in (0, last):
            own = torch.arange(last + 1) == patient
            raw_gradients = self._raw_gradients(records, patient=patient)
            for name, value in raw_gradients.items():
                if _says_something(value[~own]):
                    raise UnsoundTraining(
                        f"parameter {name!r}: the loss of one patient has gradient in the rows of others; "
                        "use a loss that decomposes over patients, and layers that take the rows first"
                    )
            own_seen.append(any(_says_something(value[own]) for value in raw_gradients.values()))
        self._rows_known_apart = all(own_seen)

    def _raw_gradients(self, records: Batch, *, patient: int | None = None) -> dict[str, Tensor]:
        """Of each patient's loss, or of one patient's alone: rows (P, ...) by parameter name."""
        patients = len(next(iter(records.values())))
        twin, parameters = repaired_copy(self._module)
        hooked = GradSampleModule(twin, loss_reduction="sum")
        rows: set[int] = set()

        def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            rows.update(len(each) for each in inputs)
            outputs: tuple[Tensor, Tensor] = hooked(*inputs)
            return outputs

        try:
            with warnings.catch_warnings():
                # A layer whose input needs no gradient: what Opacus' hooks read there is right.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                losses = self._patient_losses(call, records)
                if losses.shape != (patients,):
                    raise UnsoundTraining(f"expected one loss a patient, ({patients},), got {losses.shape}")
                torch.autograd.backward(losses.sum() if patient is None else losses[patient])
            if len(rows) != 1 or min(rows) % patients:
                raise UnsoundTraining(
                    f"expected every call to have the same number of rows, a multiple of the {patients} "
                    f"patients, got {sorted(rows)}"
                )
            shapes = {name: value.shape for name, value in self._module.named_parameters()}
            return {
                name: value.view(patients, -1, *shapes[name]).sum(1)
                for name, value in _rows_of(parameters, min(rows)).items()
            }
        finally:
            hooked.cleanup()  # the hooks are a reference cycle, and would keep the gradients with them


def _says_something(gradients: Tensor) -> bool:
    """Whether there are finite numbers other than zero."""
    return bool(gradients.nan_to_num(posinf=0, neginf=0).any())


def repaired_copy(module: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy that shares the weights of ``module`` and that Opacus differentiates row by row.

    Guarantees:
        Outputs are those of ``module``, dropout and all, and ``module`` is not changed, hooks included. A
        weight changed in place later changes in both.

    Returns:
        The copy, and its trained parameters by the names they have in ``module``. A class embedding (D,)
        is (1, D) in the copy.

    Raises:
        UnsoundTraining: a parameter has no per-row gradient in Opacus even so, such as a trained logit scale.

    Source:
        Opacus 1.6 sees a layer as a module with parameters of its own and inputs with the rows first, which
        Hugging Face's class embedding and position ids, shape (1, L), are not.
    """
    twins = {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in module.parameters()}
    shared = {id(value): value for value in module.buffers()}
    copied = copy.deepcopy(module, {**twins, **shared})
    parameters = {name: twins[id(value)] for name, value in module.named_parameters() if value.requires_grad}
    pass_ = _Pass()
    copied.register_forward_pre_hook(pass_.note_rows)
    for prefix, layer in list(copied.named_modules()):
        token = layer._parameters.get("class_embedding")
        if token is not None and token.requires_grad and token.ndim == 1:
            name = f"{prefix}.class_embedding".lstrip(".")
            parameters[name] = pass_.give_token(layer, token)
        elif isinstance(layer, nn.Embedding):
            layer.register_forward_pre_hook(pass_.spread_ids)
    for prefix, layer in copied.named_modules():
        own = [name for name, value in layer.named_parameters(recurse=False) if value.requires_grad]
        # Opacus records layers in training mode alone; only they are put there, so dropout stays as it was.
        layer.training = layer.training or bool(own)
        if own and any(True for _ in layer.buffers()):
            raise UnsoundTraining(
                f"parameter {f'{prefix}.{own[0]}'.lstrip('.')!r} stands directly in a {type(layer).__name__} "
                "with buffers, where Opacus has no per-row gradient; freeze it, or give it a layer of its own"
            )
    return copied, parameters


class _Pass:
    """What the repairs need to know of the forward pass at hand: its rows."""

    def __init__(self) -> None:
        self._rows = 1

    def note_rows(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._rows = len(inputs[0])

    def spread_ids(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Ids (1, L) meant for every row become (B, L)."""
        (ids,) = inputs
        return (ids.repeat(self._rows, *(1 for _ in ids.shape[1:])) if len(ids) == 1 else ids,)

    def give_token(self, layer: nn.Module, token: Tensor) -> nn.Parameter:
        """The class embedding becomes an embedding of one row, asked for by each row of the pass."""
        del layer.class_embedding
        weight = nn.Parameter(token.detach()[None])
        lookup = nn.Embedding(1, len(token), _weight=weight)  # given, so torch draws none
        lookup.weight = weight
        layer.add_module("class_token", lookup)

        def look_up(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            ids = torch.zeros(self._rows, 1, dtype=torch.long, device=token.device)
            layer.class_embedding = lookup(ids)  # (B, 1, D), where the forward pass expands (D,) to it

        layer.register_forward_pre_hook(look_up)
        return weight


def _rows_of(parameters: Mapping[str, nn.Parameter], rows: int) -> dict[str, Tensor]:
    """Opacus' per-row gradients (rows, ...) by name, checked against autograd's."""
    found = {name: _recorded(name, value, rows) for name, value in parameters.items()}
    norms = {name: float(raw_norms({name: value}).sum()) for name, value in found.items()}
    whole = sum(norms.values())
    for name, value in found.items():
        autograd = parameters[name].grad
        if autograd is None:
            continue
        missed = float((value.to(torch.float64).sum(0) - autograd).pow(2).sum().sqrt())
        if missed > OWN_ROUNDING * norms[name] + WHOLE_ROUNDING * whole:  # false where a row is not finite
            raise UnsoundTraining(
                f"parameter {name!r}: the rows of Opacus do not add up to its gradient; it is also used "
                "outside the forward pass of its own layer, or the layer (padding_idx) changes its gradient"
            )
    return found


def _recorded(name: str, parameter: nn.Parameter, rows: int) -> Tensor:
    if parameter.grad is None:  # the pass did not use it
        return parameter.new_zeros(rows, *parameter.shape)
    found = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor) or len(found) != rows:
        raise UnsoundTraining(
            f"parameter {name!r}: Opacus has no gradient of each of the {rows} rows; it must be used by the "
            "forward pass of its own layer, on inputs with the rows first"
        )
    return found
