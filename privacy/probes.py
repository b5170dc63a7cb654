"""Whether a loss decomposes over the rows an engine clips: asked of the real loss and module, at run time.

An engine clips what it is handed, and an accountant believes it: neither notices a loss whose rows see each
other. The probes do, on made-up inputs, so they cost no privacy and touch no patient.

What they cannot show: a coupling that only some inputs set off. They catch mistakes, not malice.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privacy.engine import Batch, PatientLosses, refuse_batch_statistics
from privacy.errors import UnsoundTraining

# A row alone and the same row in a batch differ by about 1e-6 in float32, for sums run in another order.
TOLERANCE = 1e-4


def refuse_coupling(module: nn.Module, patient_losses: PatientLosses, made_up: Batch) -> None:
    """Refuse a loss or a module by which one row of a batch reaches another.

    Guarantees:
        On the inputs given: no layer of the module mixes rows (value probe, to 1e-4); the loss is a function
        of its arguments that keeps nothing between calls (to the bit); element p of it has no gradient to
        other rows' embeddings (exactly 0), nor past the embeddings to weights; and it stays the same when all
        other rows leave (to 1e-4), which alone sees other rows' embeddings that were detached.

    Args:
        module: As it will be trained, in its mode.
        patient_losses: As the engine will get it.
        made_up: A batch of the right shapes and at least 2 rows, of random values; never a patient's.

    Raises:
        UnsoundTraining: naming what couples the rows, and the remedy; or the module computes no numbers.
        ValueError: ``made_up`` has fewer than 2 rows.
    """
    rows = len(next(iter(made_up.values())))
    if rows < 2:
        raise ValueError(f"expected made_up to have at least 2 rows to probe, got {rows}")
    refuse_batch_statistics(module)
    inputs = _inputs_of_module(module, patient_losses, made_up)
    with torch.no_grad():
        outputs = module(*inputs)
    if not all(value.isfinite().all() for value in outputs):
        raise UnsoundTraining(
            "the module's embeddings of made-up inputs are not finite: the weights it was given are broken"
        )
    refuse_mixed_rows(module, inputs)
    each = len(inputs[0]) // rows
    probe = _LossProbe(patient_losses, made_up, _made_up_embeddings(outputs, rows=rows, each=each))
    probe.refuse_memory()
    probe.refuse_weights([value for value in module.parameters() if value.requires_grad])
    probe.refuse_gradients()
    probe.refuse_values()


def refuse_mixed_rows(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse a module whose outputs for a row depend on the other rows: batch statistics, a shared maximum.

    Raises:
        UnsoundTraining: naming the first layer whose output changed when every second row left.
    """
    with torch.no_grad(), _exact_convolutions():
        together = _outputs_by_layer(module, inputs)
        for first in (0, 1):
            fewer = _outputs_by_layer(module, tuple(value[first::2] for value in inputs))
            if _same(together[""], fewer[""], first=first, rows=len(inputs[0])):
                continue
            changed = (
                name or type(module).__name__
                for name, outputs in together.items()
                if not _same(outputs, fewer.get(name, []), first=first, rows=len(inputs[0]))
            )
            raise UnsoundTraining(
                f"outputs of layer {next(changed)!r} for a row changed when other rows left the batch: it "
                "mixes patients or is random; use GroupNorm or LayerNorm, and no dropout"
            )


class _LossProbe:
    """The loss as a function of made-up embeddings, one leaf tensor an output of the module."""

    def __init__(self, patient_losses: PatientLosses, batch: Batch, leaves: list[Tensor]) -> None:
        self._patient_losses = patient_losses
        self._batch = batch
        self._leaves = leaves  # (rows, each, D)
        self._rows = len(leaves[0])
        self._whole = self._losses(range(self._rows))

    def _losses(self, rows: range) -> Tensor:
        picked = list(rows)
        image_embeddings, text_embeddings = (leaf[picked].flatten(0, 1) for leaf in self._leaves)
        batch = {name: value[picked] for name, value in self._batch.items()}
        losses = self._patient_losses(lambda *_: (image_embeddings, text_embeddings), batch)
        if losses.shape != (len(picked),) or not losses.isfinite().all():
            raise UnsoundTraining(
                f"expected {len(picked)} finite losses of {len(picked)} made-up rows, one each, got shape "
                f"{tuple(losses.shape)}: return a loss a row, not their sum or mean"
            )
        return losses

    def refuse_memory(self) -> None:
        self._losses(range(self._rows - 1, -1, -1))
        if not torch.equal(self._losses(range(self._rows)), self._whole):
            raise UnsoundTraining(
                "the loss of the same rows changed after other rows were seen: a queue of earlier records "
                "(as of MoCo) or another memory couples patients over time; use public anchors instead"
            )

    def refuse_weights(self, weights: list[nn.Parameter]) -> None:
        reached = torch.autograd.grad(self._whole.sum(), weights, retain_graph=True, allow_unused=True)
        if any(value is not None for value in reached):
            raise UnsoundTraining(
                "the loss has a gradient to weights that does not pass through the rows' embeddings: a bank "
                "of anchors with gradient leaks into every row; encode the anchors under torch.no_grad()"
            )

    def refuse_gradients(self) -> None:
        for row, loss in enumerate(self._whole):
            reached = torch.autograd.grad(loss, self._leaves, retain_graph=True, materialize_grads=True)
            others = torch.arange(self._rows) != row
            if any(value[others.to(value.device)].any() for value in reached):
                raise UnsoundTraining(
                    "the loss of a row has a gradient to other rows' embeddings: in-batch negatives, as of "
                    "InfoNCE and SigLIP, couple patients, so no epsilon can be claimed; use the anchored "
                    "objective, or microbatch with its sensitivity of 2C"
                )

    def refuse_values(self) -> None:
        alone = torch.cat([self._losses(range(row, row + 1)) for row in range(self._rows)])
        if not torch.allclose(alone, self._whole, rtol=TOLERANCE, atol=TOLERANCE):
            raise UnsoundTraining(
                "the loss of a row changed when other rows left the batch, though it has no gradient to "
                "them: detached in-batch negatives, or a mean over the batch, couple patients; use the "
                "anchored objective, and the loss of each row undivided"
            )


def _inputs_of_module(module: nn.Module, patient_losses: PatientLosses, batch: Batch) -> tuple[Tensor, ...]:
    rows = len(next(iter(batch.values())))
    calls: list[tuple[Tensor, ...]] = []

    def recorded(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        outputs: tuple[Tensor, Tensor] = module(*inputs)
        return outputs

    with torch.no_grad():
        patient_losses(recorded, batch)
    if len(calls) != 1 or len(calls[0][0]) % rows:
        given = [len(inputs[0]) for inputs in calls]
        raise UnsoundTraining(
            f"expected the loss to apply the module once, to equally many inputs of each of the {rows} rows, "
            f"got {given} inputs: anchors encoded beside the rows are a bank with gradient; encode them "
            "before, under torch.no_grad()"
        )
    return calls[0]


def _made_up_embeddings(outputs: tuple[Tensor, Tensor], *, rows: int, each: int) -> list[Tensor]:
    """Unit vectors that are alike enough for every row to weigh in a softmax, whatever the temperature."""
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for output in outputs:
        size = output.shape[-1]
        common = torch.randn(size, generator=generator)
        spread = 0.1 * torch.randn(rows, each, size, generator=generator)
        leaves.append(F.normalize(common + spread, dim=-1).to(output).requires_grad_())
    return leaves


def _outputs_by_layer(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """Tensors that each layer returned last, in the order in which layers finish; the module itself is ''."""
    found: dict[str, list[Tensor]] = {}

    def remember(name: str, output: object) -> None:
        candidates = output if isinstance(output, tuple | list) else [output]
        found[name] = [value for value in candidates if isinstance(value, Tensor)]

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: remember(name, output))
        for name, layer in module.named_modules()
    ]
    try:
        module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(together: list[Tensor], fewer: list[Tensor], *, first: int, rows: int) -> bool:
    """Whether outputs for the rows that stayed are the same; what has no row axis is not compared."""
    pairs = [(whole[first::2], few) for whole, few in zip(together, fewer, strict=True) if len(whole) == rows]
    return all(
        torch.allclose(whole.float(), few.float(), rtol=TOLERANCE, atol=TOLERANCE) for whole, few in pairs
    )


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Full float32: some GPU convolutions round inputs to 10 bits for one batch size and not for another."""
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False
    ):
        yield
