"""Book-keeping clipping in a plain Opacus script, by changing two lines; no federation needed.

::

    from privacy.opacus_swap import BookKeepingPrivacyEngine as PrivacyEngine            # 1
    ...
    model, optimizer, criterion, loader = PrivacyEngine().make_private(                  # 2
        module=model, optimizer=optimizer, criterion=criterion, data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0)

The loop stays as it is. Opacus' optimizer adds the noise, its sampler draws the batches and its accountant
counts the steps, so the same settings give the same epsilon. The unit of privacy is a row of the batch, as in
Opacus.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privacy.bookkeeping import BookKeepingEngine
from privacy.contributions import Contribution
from privacy.engine import refuse_batch_statistics
from privacy.errors import UnsoundTraining
from privacy.interception import Interception
from privacy.probes import TOLERANCE


class BookKeepingPrivacyEngine(PrivacyEngine):  # type: ignore[misc]  # Opacus has no types
    """`opacus.PrivacyEngine` whose clipping is `privacy.bookkeeping.BookKeepingEngine`'s.

    Guarantees:
        Gradients are those of Opacus' ghost and hooks modes, up to rounding; the noise, the sampler and the
        accountant are Opacus' own. The loss must go through the criterion that `make_private` returns: its
        first batch of two rows or more is probed, and a loss or a module by which rows see each other, such
        as in-batch InfoNCE, is refused.

    Noise:
        Without ``noise_generator`` Opacus draws noise, and the Poisson sample, from torch's global generator,
        which ``torch.manual_seed`` makes reproducible: whoever knows the training seed can subtract the
        noise, and two sites with one seed add the same. Here both come from generators of their own, seeded
        by the operating system. A ``noise_generator``, or the loader's ``generator``, is used as it is given.
    """

    def make_private(self, *, grad_sample_mode: str = "hooks", **settings: Any) -> Any:
        """As `opacus.PrivacyEngine.make_private` in its ghost mode, with the same arguments.

        Args:
            grad_sample_mode: Accepted so that a script need not change; the clipping is book-keeping.
            settings: Opacus' own.

        Returns:
            Module, optimizer, criterion and loader. The criterion returns a tensor of the loss as always.

        Raises:
            UnsoundTraining: something only Opacus does (a distributed module, ``batch_first=False``,
                ``wrap_model=False``, another clipping than "flat"), or a layer that mixes rows.
        """
        if grad_sample_mode.endswith(("fsdp", "tp")):
            raise UnsoundTraining(f"{grad_sample_mode=} is distributed: use Opacus itself for it")
        return super().make_private(grad_sample_mode="ghost", **settings)

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        wrap_model: bool = True,
        **_: Any,
    ) -> "RecordedModule":
        if not batch_first or not wrap_model:
            raise UnsoundTraining(f"expected batch_first and wrap_model, got {batch_first=}, {wrap_model=}")
        return RecordedModule(module, loss_reduction=loss_reduction)

    def _prepare_optimizer(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "ghost",
        **settings: Any,
    ) -> "ClippedSumOptimizer":
        if distributed or clipping != "flat":
            raise UnsoundTraining(f"expected one device and flat clipping, got {distributed=}, {clipping=}")
        original = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        device = original.param_groups[0]["params"][0].device
        return ClippedSumOptimizer(
            optimizer=original,
            generator=self.secure_rng or noise_generator or _os_seeded(device),
            secure_mode=self.secure_mode,
            **settings,
        )

    def _prepare_data_loader(self, data_loader: Any, **settings: Any) -> Any:
        prepared = super()._prepare_data_loader(data_loader, **settings)
        if isinstance(prepared, DPDataLoader) and prepared.batch_sampler.generator is None:
            prepared.batch_sampler.generator = _os_seeded(torch.device("cpu"))
        return prepared

    def _prepare_criterion(
        self, *, module: "RecordedModule", optimizer: "ClippedSumOptimizer", criterion: Any, **_: Any
    ) -> "RowLosses":
        optimizer.module = module
        return RowLosses(module, criterion)


def _os_seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(secrets.randbits(63))  # as many bits as a torch seed holds


class ClippedSumOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus' noise on the sums of a `RecordedModule`.

    Attributes:
        module: Whose sums a step takes, each once.
    """

    module: "RecordedModule"

    def accumulate(self) -> None:
        """Add the clipped sum of the backward pass since the last step, which may be of a physical batch."""
        sums = self.module.clipped_sums(max_grad_norm=self.max_grad_norm)
        for value in self.params:
            value.summed_grad = (
                sums[value] if value.summed_grad is None else value.summed_grad.add_(sums[value])
            )


class RecordedModule(AbstractGradSampleModule):  # type: ignore[misc]
    """A module whose forward passes keep, for each row, what its clipped gradient follows from.

    ``loss.backward()`` computes gradients of activations alone and leaves every ``.grad`` empty;
    `clipped_sums` does the rest. Forward passes under ``torch.no_grad`` are the module's own.
    """

    def __init__(self, module: nn.Module, *, loss_reduction: str) -> None:
        """Wrap ``module``, which stays unchanged and is `to_standard_module` again.

        Raises:
            UnsoundTraining: a layer mixes the rows it is given, or nothing is trainable.
        """
        super().__init__(module, batch_first=True, loss_reduction=loss_reduction)
        refuse_batch_statistics(module)
        self._clipper = _Clipper(module)
        self._passes: list[Interception] = []  # since the last step
        self._scored: Interception | None = None
        self._probed = False

    @property
    def rows(self) -> int | None:
        """Rows of the latest recorded forward pass, None if there was none since the last step."""
        return self._passes[-1].rows if self._passes else None

    def remove_hooks(self) -> None:
        """Nothing to remove: no hook is ever set."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs; of no rows, outputs of no rows, whatever the module makes of them."""
        if not torch.is_grad_enabled():
            return self._module(*args, **kwargs)
        rows = next(len(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        if rows > 1 and not self._probed:
            self._refuse_mixing_module(args, kwargs)
        seen = Interception(self._clipper.trained, patients=max(1, rows))
        seen.rows = rows
        seen.expect_backward()  # the script's own
        self._passes.append(seen)
        if not rows:
            return self._outputs_of_nobody(args, kwargs)
        for value in self._clipper.trained.values():
            value.grad = None
        with seen, torch.compiler.set_stance("force_eager"):
            return self._module(*args, **kwargs)

    def clipped_sums(self, *, max_grad_norm: float) -> dict[nn.Parameter, Tensor]:
        """Of the one backward pass since the last call: the rows' gradients, each clipped, added up.

        Raises:
            UnsoundTraining: no backward pass, or two forward passes with one, through which a row would count
                twice; a parameter got a gradient past the recording.
        """
        passes, self._passes = self._passes, []
        raw_contributions = [found for seen in passes if (found := seen.kept())]
        if len(raw_contributions) > 1 or not passes:
            raise UnsoundTraining(
                f"expected one forward and backward pass a step, got {len(raw_contributions)}: join the "
                "batches, or use Opacus' BatchMemoryManager"
            )
        self._refuse_bypass()
        if passes[-1].rows and (not raw_contributions or self._scored is not passes[-1]):
            raise UnsoundTraining(
                "optimizer.step() needs loss.backward() of a loss that make_private's criterion returned"
            )
        return self._clipper.clipped(*raw_contributions, max_grad_norm=max_grad_norm)

    def score(self, losses: Tensor, alone: Callable[[int], Tensor]) -> None:
        """Take ``losses`` as the latest forward pass's; until all is seen, refuse rows that see each other.

        Looked at are the first and the last row: each by itself may be the one that all gradients land in.

        Args:
            losses: With its graph, shape (rows,).
            alone: Computes the loss of one row without the others, shape (1,).

        Raises:
            UnsoundTraining: a row's loss has a gradient in another row, or changes when others leave.
        """
        self._scored = self._passes[-1]
        if self._probed or not losses.requires_grad or len(losses) < 2:
            return
        own_seen = [self._refuse_reaching_row(losses, row) for row in (0, len(losses) - 1)]
        self._refuse_bypass()
        with torch.no_grad():
            if not all(_alike(losses[row][None], alone(row)) for row in (0, len(losses) - 1)):
                raise UnsoundTraining(
                    "the loss of a row changed when other rows left the batch: detached in-batch negatives, "
                    "or a mean over the batch, couple rows; use a loss that decomposes over rows"
                )
        self._probed = all(own_seen)

    def _refuse_reaching_row(self, losses: Tensor, row: int) -> bool:
        """Refuse a gradient of the row's loss in other rows; whether it has one in its own."""
        torch.autograd.backward(losses[row], retain_graph=True)
        own = torch.arange(len(losses), device=losses.device) == row
        found = self._passes[-1].kept()
        for name, contribution in found.items():
            if _reaches(contribution, ~own):
                raise UnsoundTraining(
                    f"the loss of one row gives other rows a gradient in {name!r}: in-batch negatives, as "
                    "of InfoNCE, couple rows, so no epsilon can be claimed; use a loss that decomposes over "
                    "rows (public anchors), and layers that take the rows first"
                )
        return any(_reaches(contribution, own) for contribution in found.values())

    def _refuse_bypass(self) -> None:
        for name, value in self._clipper.trained.items():
            if value.grad is not None:
                raise UnsoundTraining(
                    f"parameter {name!r} got a gradient that was not recorded: it is used outside the "
                    "module's forward pass (weight decay in the loss, activation checkpointing); freeze it, "
                    "or use the optimizer's weight decay"
                )

    @torch.no_grad()
    def _outputs_of_nobody(self, args: Any, kwargs: Any) -> Any:
        """Many modules fail on no rows: a made-up one has outputs of the right shapes."""

        def none_of(value: Tensor) -> Tensor:
            return value[:0].requires_grad_(value.is_floating_point())  # as a loss to go back from has

        args, kwargs = pytree.tree_map_only(Tensor, _made_up_row, (args, kwargs))
        with _evaluating(self._module):
            return pytree.tree_map_only(Tensor, none_of, self._module(*args, **kwargs))

    @torch.no_grad()
    def _refuse_mixing_module(self, args: Any, kwargs: Any) -> None:
        def outputs(rows: slice) -> list[Any]:
            own, named = _rows_of((args, kwargs), rows)
            return pytree.tree_leaves(self._module(*own, **named))

        first, second = slice(0, 1), slice(1, 2)
        with _evaluating(self._module):
            together, *alone = (outputs(rows) for rows in (slice(2), first, second))
        for whole, *singles in zip(together, *alone, strict=True):
            if not isinstance(whole, Tensor) or whole.shape[:1] != (2,):
                continue
            if not all(map(_alike, (whole[first], whole[second]), singles)):
                raise UnsoundTraining(
                    "the module's outputs for a row changed when another row left the batch: it mixes rows; "
                    "use GroupNorm or LayerNorm"
                )


class RowLosses:
    """A criterion that keeps the rows' losses apart until they are probed, then returns their mean or sum.

    In the backward pass each row's loss counts once, undivided, as in Opacus' ghost mode.
    """

    def __init__(self, module: RecordedModule, criterion: Any) -> None:
        """Wrap ``criterion``.

        Args:
            module: Whose outputs it is given.
            criterion: Has a ``reduction`` as torch's own, or returns a loss a row.

        Raises:
            UnsoundTraining: the criterion's reduction is not that of `make_private`.
        """
        self.reduction: str = module.loss_reduction
        found = getattr(criterion, "reduction", self.reduction)
        if found not in (self.reduction, "none"):
            raise UnsoundTraining(
                f"expected criterion.reduction={self.reduction!r} as loss_reduction, got {found!r}"
            )
        self._module = module
        self._criterion = criterion

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Mean or sum of the rows' losses, with the graph that ``backward`` needs.

        Raises:
            UnsoundTraining: there is not one loss a row, or rows see each other.
        """
        losses = self._losses(args, kwargs)
        rows = self._module.rows
        if torch.is_grad_enabled() and rows is not None:
            if losses.shape != (rows,):
                raise UnsoundTraining(
                    f"expected a loss for each of the {rows} rows, got shape {tuple(losses.shape)}: let the "
                    "criterion return one a row, and keep the rows on the first axis"
                )

            def alone(row: int) -> Tensor:
                return self._losses(*_rows_of((args, kwargs), slice(row, row + 1), of=rows))

            self._module.score(losses, alone)
        reduced: Tensor = _Reduced.apply(losses, self.reduction)  # type: ignore[no-untyped-call]
        return reduced

    def _losses(self, args: Any, kwargs: Any) -> Tensor:
        with _undivided(self._criterion):
            losses: Tensor = self._criterion(*args, **kwargs)
        if losses.ndim < 2:
            return losses
        return losses.flatten(1).mean(1) if self.reduction == "mean" else losses.flatten(1).sum(1)


class _Reduced(torch.autograd.Function):
    """Mean or sum whose gradient to every loss is the one it is given."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, reduction: str) -> Tensor:
        ctx.shape = losses.shape
        return losses.sum() / max(1, losses.numel()) if reduction == "mean" else losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].expand(ctx.shape), None


class _Clipper(BookKeepingEngine):
    """The engine's arithmetic, with the forward and the backward pass left to the script."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, patient_losses=lambda call, batch: call(*batch.values())[0])

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return self._trained()

    def clipped(
        self, *raw_contributions: dict[str, Contribution], max_grad_norm: float
    ) -> dict[nn.Parameter, Tensor]:
        total: dict[str, Tensor] = {}
        for found in raw_contributions:
            self._add_clipped(total, found, max_grad_norm=max_grad_norm)
        return {
            value: total[name].to(value.dtype) if name in total else torch.zeros_like(value)
            for name, value in self.trained.items()
        }


def _made_up_row(value: Tensor) -> Tensor:
    return value.new_zeros(1, *value.shape[1:])


def _rows_of(tree: Any, rows: slice, *, of: int | None = None) -> Any:
    """``rows`` of all tensors, or of those that have ``of`` rows."""

    def picked(value: Tensor) -> Tensor:
        return value[rows] if value.ndim and of in (None, len(value)) else value

    return pytree.tree_map_only(Tensor, picked, tree)


def _reaches(found: Contribution, rows: Tensor) -> bool:
    """Whether ``rows``, a mask, have a gradient; one that is not finite would count as zero."""
    counted = rows & found.squared_norms().isfinite()
    ones = torch.ones(int(counted.sum()), device=rows.device)
    return bool(found.only(counted).weighted_sum(ones).any())


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(
        first.float(), second.float(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
    )


@contextmanager
def _undivided(criterion: Any) -> Iterator[None]:
    """``reduction="none"`` where the criterion has one, for as long as it is called."""
    before = getattr(criterion, "reduction", None)
    if before is None:
        yield
        return
    criterion.reduction = "none"
    try:
        yield
    finally:
        criterion.reduction = before


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
