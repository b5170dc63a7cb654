"""Exact clipping in one forward and one backward pass: book-keeping ghost clipping, the default engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from privacy.contributions import Contribution, norms, wide
from privacy.engine import Batch, PatientLosses, clip_factors, refuse_batch_statistics
from privacy.errors import UnsoundTraining
from privacy.interception import Interception


class BookKeepingEngine:
    """Clipped sums of patients' gradients at about the cost of a step without privacy.

    The backward pass computes gradients of activations alone. At every use of a parameter it keeps what the
    parameter's gradient of each patient follows from; the patients' norms are computed from that, and then
    one weighted product a parameter. A patient's own gradient is held only where it is the smaller form.

    Guarantees:
        As `ClippingEngine.clipped_sum`. Whatever uses a trainable parameter in a way that has no known
        gradient per patient is refused by name, never skipped. Nothing stays behind on the module.

    Dropout in training mode is drawn for each row on its own, so it keeps patients apart. Activation
    checkpointing works. A module of `torch.compile` runs uncompiled: nothing in a compiled graph can be seen.

    Source:
        Bu et al. (2023), "Differentially private optimization on large model at small cost",
        arXiv:2210.00038, algorithm 1, with patients of several rows as the unit.
    """

    def __init__(
        self,
        module: nn.Module,
        patient_losses: PatientLosses,
        *,
        physical_batch: int | None = None,
        autocast: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Prepare ``module``, whose parameters with ``requires_grad`` are trained.

        Args:
            module: Called by the loss.
            patient_losses: Sees all patients of a physical batch at once.
            physical_batch: Patients differentiated at a time; bounds memory, not results. None: all.
            autocast: Precision of the forward and backward pass, ``torch.bfloat16`` or ``torch.float16``;
                norms and sums are at least float32. None: the module's own.
            loss_scale: Constant that keeps small gradients of float16 from vanishing; divided out again. A
                patient whose scaled gradient overflows counts as zero.

        Raises:
            UnsoundTraining: a layer mixes the rows it is given, nothing is trainable, or an argument is out
                of its range.
        """
        refuse_batch_statistics(module)
        if physical_batch is not None and physical_batch < 1:
            raise UnsoundTraining(f"expected {physical_batch=} >= 1, or None for all at once")
        if not 0 < loss_scale < float("inf"):
            raise UnsoundTraining(f"expected {loss_scale=} > 0 and finite")
        self._module = module
        self._patient_losses = patient_losses
        self._physical_batch = physical_batch
        self._autocast = autocast
        self._loss_scale = loss_scale
        self._isolation_seen = False
        self._trained()

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        """See `ClippingEngine.clipped_sum`.

        Raises:
            UnsoundTraining: ``max_grad_norm`` is not positive; a trainable parameter is used in a way without
                a known gradient per patient; the module or the loss mixes patients, or does not keep their
                rows together on the first axis.
        """
        if not max_grad_norm > 0:
            raise UnsoundTraining(f"expected {max_grad_norm=} > 0")
        trained = self._trained()
        total: dict[str, Tensor] = {}
        for _, raw_contributions in self._parts(trained, batch):
            with _full_precision():
                self._add_clipped(total, raw_contributions, max_grad_norm=max_grad_norm)
        return {
            name: total[name] if name in total else torch.zeros_like(wide(value.detach()))
            for name, value in trained.items()
        }

    def raw_norms(self, batch: Batch) -> Tensor:
        """L2 norm of each patient's gradient, float64, shape (P,). Private: it never leaves the site.

        Guarantees:
            At most 1e-6 of itself too small; not finite where such a gradient counts as zero.
        """
        found = [torch.empty(0, dtype=torch.float64)]
        for patients, raw_contributions in self._parts(self._trained(), batch):
            if not raw_contributions:
                found.append(torch.zeros(patients, dtype=torch.float64))
                continue
            with _full_precision():
                found.append(norms(raw_contributions.values()).cpu() / self._loss_scale)
        return torch.cat(found)

    def _parts(
        self, trained: Mapping[str, nn.Parameter], batch: Batch
    ) -> Iterator[tuple[int, dict[str, Contribution]]]:
        """Patients and contributions of one physical batch after the other; unused parameters are absent."""
        patients = _patients(batch)
        step = self._physical_batch or max(1, patients)
        for start in range(0, patients, step):
            part = {name: value[start : start + step] for name, value in batch.items()}
            self._check_isolation(trained, part)
            yield _patients(part), self._contributions(trained, part)

    def _trained(self) -> dict[str, nn.Parameter]:
        trained = {name: value for name, value in self._module.named_parameters() if value.requires_grad}
        if not trained:
            raise UnsoundTraining("nothing to train: no parameter of the module requires a gradient")
        return trained

    def _contributions(
        self, trained: Mapping[str, nn.Parameter], batch: Batch, *, of: int | None = None
    ) -> dict[str, Contribution]:
        """One forward and one backward pass, from all patients' losses or from patient ``of``'s alone."""
        patients = _patients(batch)
        seen = Interception(trained, patients=patients)

        def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            seen.rows = _rows(inputs, patients)
            outputs: tuple[Tensor, Tensor] = self._module(*inputs)
            return outputs

        kind = next(iter(trained.values())).device.type
        precision = torch.autocast(kind, self._autocast) if self._autocast else nullcontext()
        with torch.enable_grad(), _own_gradients(trained):
            with seen, precision, torch.compiler.set_stance("force_eager"):
                losses = self._patient_losses(call, batch)
            if losses.shape != (patients,):
                raise UnsoundTraining(
                    f"expected one loss a patient, shape ({patients},), got {tuple(losses.shape)}"
                )
            loss = (losses if of is None else losses[of]).sum() * self._loss_scale
            return seen.contributions(loss) if loss.requires_grad else {}

    def _add_clipped(
        self, total: dict[str, Tensor], raw_contributions: dict[str, Contribution], *, max_grad_norm: float
    ) -> None:
        """Add to ``total`` in place. ``raw_contributions`` is emptied on the way, which frees memory."""
        if not raw_contributions:
            return
        raw_norms = norms(raw_contributions.values())
        factors = clip_factors(raw_norms, max_grad_norm=max_grad_norm * self._loss_scale)
        kept = factors > 0  # zero times a number that is not finite would be none either
        everyone, factors = bool(kept.all()), factors[kept]
        for name in list(raw_contributions):
            contribution = raw_contributions.pop(name)
            if not everyone:
                contribution = contribution.only(kept)
            clipped = contribution.weighted_sum(factors)
            if self._loss_scale != 1:
                clipped /= self._loss_scale
            total[name] = total[name].add_(clipped) if name in total else clipped

    def _check_isolation(self, trained: Mapping[str, nn.Parameter], batch: Batch) -> None:
        """Once: of two patients, the loss of each alone must give the other no gradient.

        It does if the module or the loss mixes patients, and if a module moves the batch away from the first
        axis, so that the rows counted as one patient's are not.
        """
        if self._isolation_seen or _patients(batch) < 2:
            return
        pair = {name: value[:2] for name, value in batch.items()}
        own_seen = []
        for patient in range(2):
            own = torch.arange(2, device=next(iter(trained.values())).device) == patient
            found = self._contributions(trained, pair, of=patient)
            for name, contribution in found.items():
                if _says_something(contribution.only(~own)):
                    raise UnsoundTraining(
                        f"one patient's loss gives another patient a gradient in {name!r}: the loss or the "
                        "module mixes patients, or moves the batch away from the first axis"
                    )
            own_seen.append(any(_says_something(each.only(own)) for each in found.values()))
        self._isolation_seen = all(own_seen)


def _patients(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _says_something(gradient: Contribution) -> bool:
    """Whether one patient's gradient has finite numbers other than zero."""
    value = gradient.dense()
    return bool(value.nan_to_num(posinf=0, neginf=0).any())


def _rows(inputs: tuple[Tensor, ...], patients: int) -> int:
    """Rows given to the module: the same in all inputs, equally many of each patient."""
    counts = {len(value) for value in inputs if isinstance(value, Tensor)}
    if len(counts) != 1 or min(counts) % patients:
        raise UnsoundTraining(
            f"expected inputs of equally many rows for each of {patients} patients, got {sorted(counts)} rows"
        )
    return counts.pop()


@contextmanager
def _own_gradients(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Lend the parameters' ``.grad`` to a backward pass that must leave them untouched."""
    kept = {name: value.grad for name, value in trained.items()}
    try:
        for value in trained.values():
            value.grad = None
        yield
        reached = [name for name, value in trained.items() if value.grad is not None]
    finally:
        for name, value in trained.items():
            value.grad = kept[name]
    if reached:
        raise UnsoundTraining(
            f"parameter {reached[0]!r} got a gradient of the whole batch: it is used where no operation can "
            "be seen (a scripted module, an assignment into a tensor); freeze it, or use another engine"
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
