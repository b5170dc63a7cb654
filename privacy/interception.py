"""Trainable parameters seen in use: what meets them on the way forward, and the gradient on the way back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from privacy.contributions import Contribution, Dense, Rows, product, together, wide
from privacy.errors import UnsoundTraining

# What a tap saved beside the output (None if nothing), and the output's gradient, to what is kept of them.
Maker = tuple[Tensor | None, Callable[[Any, Tensor], Contribution]]
Sizes = int | Sequence[int]


class _Tap(torch.autograd.Function):
    """Gives ``output`` back as it is; its backward hands the gradient, with ``beside``, to ``keep``.

    ``root`` is a leaf that needs a gradient and gets none: the backward pass comes by even where nothing
    before needs a gradient. ``beside`` is saved the ordinary way, so activation checkpointing can drop it.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, output: Tensor, beside: Tensor | None, keep: Any) -> Tensor:
        ctx.save_for_backward(beside)
        ctx.keep = keep
        if output._is_view():
            return output.view_as(output)
        ctx.mark_dirty(output)  # itself rather than a view of it, which could not be changed in place
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (beside,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()  # once, for what is kept and for the operation's own backward
        with torch._C.DisableTorchFunction():  # nothing trainable here, and a mode costs time
            ctx.keep(beside, gradient)
        return None, gradient if ctx.needs_input_grad[1] else None, None, None


class Interception(TorchFunctionMode):
    """While it is entered, every operation on a trainable parameter is a known one, or refused.

    The parameter itself stays out of the autograd graph: the operation runs on its detached value, and a tap
    on the output keeps what the parameter's gradient of every patient follows from. So the backward pass
    computes gradients of activations alone. It works by operation, not by module: tied weights, a module used
    twice and functional use need nothing of their own.

    Attributes:
        rows: Rows in the present call of the module, None before the first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, patients: int) -> None:
        """Watch ``parameters``, used on rows of ``patients`` equal, consecutive groups."""
        super().__init__()
        self.rows: int | None = None
        self._names = {id(value): name for name, value in parameters.items()}
        self._patients = patients
        self._uses: dict[str, list[Contribution]] = {}
        self._keeping = False
        device = next(iter(parameters.values())).device
        self._root = torch.zeros((), requires_grad=True, device=device)

    def contributions(self, loss: Tensor) -> dict[str, Contribution]:
        """What the gradient of ``loss``, just computed, consists of, by parameter; unused ones are absent.

        Raises:
            UnsoundTraining: on the way back an operation turns out not to be known.
        """
        self.expect_backward()
        with self, torch.autograd.set_multithreading_enabled(False):  # in this thread, where the mode is
            # What `torch.autograd.backward` calls. That function would leave the mode, as any function does
            # that a mode sees, and what checkpointing computes again on the way back would not be seen.
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,),
                (torch.ones_like(loss),),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        return self.kept()

    def expect_backward(self) -> None:
        """From now on a backward pass is that of the loss: its gradients are kept."""
        self._keeping = True

    def kept(self) -> dict[str, Contribution]:
        """What backward passes kept since the last time, by parameter; unused ones are absent."""
        uses, self._uses = self._uses, {}
        return {name: together(found) for name, found in uses.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        met = self._met(args) or (kwargs and self._met(kwargs.values()))
        if not met or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if (known := _KNOWN.get(func)) is not None:
            return known(self, *args, **kwargs)
        if func in _ELEMENTWISE and not (func in _IN_PLACE and self._is_trained(args[0])):
            return self._elementwise(func, args, kwargs)
        if func in _EXPANDING and self._is_trained(args[0]):
            return self._expand(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if any(value.requires_grad and not self._is_trained(value) for value in _tensors_in(result)):
            raise UnsoundTraining(
                f"parameter {met!r} is used by {_name(func)}, for which no gradient per patient is known "
                "here: freeze it, or use another engine"
            )
        return result  # a shape, a dtype, the parameter itself

    def _met(self, values: Iterable[Any]) -> str | None:
        """The name of a trainable parameter among ``values``."""
        names = self._names
        for value in values:
            if id(value) in names:
                return names[id(value)]
            if value.__class__ in _LISTS and (name := self._met(value)) is not None:
                return name
        return None

    def _is_trained(self, value: Any) -> bool:
        return id(value) in self._names

    # --- what is kept ---------------------------------------------------------------------------------------

    def _tap(self, output: Tensor, beside: Tensor | None, *makers: Maker) -> Tensor:
        """``output``, with what each of ``makers`` makes of its gradient kept for its parameter."""
        watched = [
            (self._names[id(parameter)], make) for parameter, make in makers if self._is_trained(parameter)
        ]

        def keep(beside: Tensor, gradient: Tensor) -> None:
            if not self._keeping:
                raise UnsoundTraining(
                    "the loss differentiates the module itself: gradients of gradients are not known here; "
                    "use another engine"
                )
            for name, make in watched:
                self._uses.setdefault(name, []).append(make(beside, gradient))

        if beside is not None:
            beside = beside.detach()
        tapped: Tensor = _Tap.apply(self._root, output, beside, keep)  # type: ignore[no-untyped-call]
        return tapped

    def _check(self, func: Any, rows: int, *, data: Tensor, weights: Sequence[Tensor | None]) -> None:
        """Refuse ``func`` on ``data`` of ``rows`` rows if a gradient would be lost or patients confused."""
        name = self._met(weights) or self._met([data])
        if self._is_trained(data):
            raise UnsoundTraining(
                f"parameter {name!r} is the input of {_name(func)}: expand it to the rows of the batch first"
            )
        if any(w is not None and w.requires_grad and not self._is_trained(w) for w in weights):
            raise UnsoundTraining(
                f"{_name(func)} uses parameter {name!r} beside a weight that is computed, whose gradient "
                "would be lost: freeze what it is computed from, or use another engine"
            )
        self._check_rows(func, name, rows)

    def _check_rows(self, func: Any, name: str | None, rows: int) -> None:
        if self.rows is None:
            raise UnsoundTraining(
                f"parameter {name!r} is used outside of the module's call, by {_name(func)}"
            )
        if rows % self.rows:
            raise UnsoundTraining(
                f"parameter {name!r} meets {rows} rows in {_name(func)}, which is no multiple of the "
                f"{self.rows} rows of the batch: let the batch be the first axis"
            )

    def _grouped(self, value: Tensor, *last: int) -> Tensor:
        """Rows of the batch as (P, all a patient's places, *last)."""
        return value.reshape(self._patients, -1, *last)

    def _added(self, gradient: Tensor, shape: torch.Size) -> Dense:
        """A parameter added to the last axes of every place."""
        places = self._grouped(wide(gradient), shape.numel())
        summed = places.new_ones(places.shape[1]) @ places  # twice as fast as places.sum(1)
        return Dense(values=summed.view(-1, *shape))

    # --- operations -----------------------------------------------------------------------------------------

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._check(F.linear, len(input) if input.ndim > 1 else 1, data=input, weights=(weight, bias))
        places = _as_autocast(input).flatten(0, -2)  # the product of a matrix is no view, which a tap prefers
        d, p = weight.shape[1], weight.shape[0]
        output = self._tap(
            F.linear(places, weight.detach(), _constant(bias)),
            places if self._is_trained(weight) else None,
            (weight, lambda a, g: product(self._grouped(a, d), self._grouped(g, p), weight.shape)),
            (bias, lambda _, g: self._added(g, g.shape[-1:])),
        )
        return output.view(*input.shape[:-1], p)

    def _convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        batched = input.ndim == weight.ndim
        self._check(func, len(input) if batched else 1, data=input, weights=(weight, bias))
        input = _as_autocast(input)

        def of_weight(a: Tensor, g: Tensor) -> Contribution:
            patches = _patches(a, weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
            return self._of_convolution(patches, g, weight.shape, groups)

        def of_bias(_: Tensor, g: Tensor) -> Contribution:
            return self._added(_channels_last(g), g.shape[1:2])

        return self._tap(
            func(input, weight.detach(), _constant(bias), stride, padding, dilation, groups),
            input if self._is_trained(weight) else None,
            (weight, of_weight),
            (bias, of_bias),
        )

    def _of_convolution(self, patches: Tensor, g: Tensor, shape: torch.Size, groups: int) -> Contribution:
        """From patches (B, L, C, K) and output gradients (B, p, ...)."""
        g = _channels_last(g)  # (B, L, p)
        if groups == 1:
            return product(self._grouped(patches, shape[1:].numel()), self._grouped(g, shape[0]), shape)
        a = wide(self._grouped(patches, groups, shape[1:].numel()))  # (P, rL, G, d)
        g = wide(self._grouped(g, groups, shape[0] // groups))  # (P, rL, G, p)
        values = torch.einsum("nlgp,nlgd->ngpd", g, a)
        return Dense(values=values.reshape(self._patients, *shape))

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if max_norm is not None or scale_grad_by_freq:
            raise UnsoundTraining(
                f"embedding {self._met([weight])!r} mixes the rows of the batch: unset max_norm and "
                "scale_grad_by_freq"
            )
        if len(input) == 1 and self.rows is not None:  # position ids, the same for all rows
            input = input.expand(self.rows, *input.shape[1:])
        self._check(F.embedding, len(input), data=input, weights=(weight,))

        def of_weight(ids: Tensor, g: Tensor) -> Contribution:
            owners = torch.arange(self._patients, device=ids.device).repeat_interleave(
                len(ids) // self._patients
            )
            if padding_idx is not None:
                kept = ids != padding_idx % len(weight)
                owners, ids, g = owners[kept], ids[kept], g[kept]
            return Rows.of(owners, ids, g, patients=self._patients, shape=weight.shape)

        ids = input.flatten()
        output = self._tap(F.embedding(ids, weight.detach()), ids, (weight, of_weight))
        return output.view(*input.shape, weight.shape[1])

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        self._check(F.layer_norm, len(input), data=input, weights=(weight, bias))
        shape = torch.Size(normalized_shape)
        return self._tap(
            F.layer_norm(input, shape, _constant(weight), _constant(bias), eps),
            input if self._is_trained(weight) else None,
            (weight, lambda x, g: self._added(F.layer_norm(wide(x), shape, eps=eps).mul_(g), shape)),
            (bias, lambda _, g: self._added(g, shape)),
        )

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        self._check(F.rms_norm, len(input), data=input, weights=(weight,))
        shape = torch.Size(normalized_shape)
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return self._tap(
            F.rms_norm(input, shape, _constant(weight), eps),
            input,
            (weight, lambda x, g: self._added(F.rms_norm(wide(x), shape, eps=eps).mul_(g), shape)),
        )

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        self._check(F.group_norm, len(input), data=input, weights=(weight, bias))

        def of_weight(x: Tensor, g: Tensor) -> Contribution:
            scaled = F.group_norm(wide(x), num_groups, eps=eps).mul_(g)
            return self._added(_channels_last(scaled), scaled.shape[1:2])

        def of_bias(_: Tensor | None, g: Tensor) -> Contribution:
            return self._added(_channels_last(g), g.shape[1:2])

        return self._tap(
            F.group_norm(input, num_groups, _constant(weight), _constant(bias), eps),
            input if self._is_trained(weight) else None,
            (weight, of_weight),
            (bias, of_bias),
        )

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Sums and products of a parameter with rows: each row gets its own view of the parameter."""
        values = (*args, *kwargs.values())
        others = [v.shape for v in values if isinstance(v, Tensor) and not self._is_trained(v)]
        shape = torch.broadcast_shapes(*others)  # type: ignore[no-untyped-call]
        if not shape:
            raise UnsoundTraining(
                f"parameter {self._met(values)!r} is used by {_name(func)}, where no rows of the batch meet "
                "it: let it meet them first"
            )

        def spread(value: Any) -> Any:
            return self._expand(Tensor.expand, value, shape) if self._is_trained(value) else value

        return func(*map(spread, args), **{key: spread(value) for key, value in kwargs.items()})

    def _expand(self, func: Any, parameter: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A parameter copied to every row."""
        name = self._names[id(parameter)]
        output: Tensor = func(parameter.detach(), *args, **kwargs)
        aligned = (1,) * (output.ndim - parameter.ndim) + tuple(parameter.shape)
        if not aligned or aligned[0] != 1:
            raise UnsoundTraining(
                f"parameter {name!r} has no axis for the rows of the batch in {_name(func)}"
            )
        self._check_rows(func, name, len(output))

        def of_parameter(_: Tensor | None, g: Tensor) -> Contribution:
            summed = wide(g).sum_to_size(len(g), *aligned[1:])
            return self._added(summed, parameter.shape)

        return self._tap(output, None, (parameter, of_parameter))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`torch.nn.functional.multi_head_attention_forward` from the operations above."""
        unknown = (bias_k, bias_v, static_k, static_v, q_proj_weight)
        if query.ndim != 3 or add_zero_attn or in_proj_weight is None or any(v is not None for v in unknown):
            name = self._met([in_proj_weight, q_proj_weight, bias_k, in_proj_bias, out_proj_weight])
            raise UnsoundTraining(
                f"parameter {name!r} is used by a form of multi-head attention that is not known here: use "
                "separate linear layers"
            )
        # (L, B, E) to (B, L, E); the packed product gives queries, keys and values of everything it is given.
        packed: dict[int, Tensor] = {}
        for rows in (query, key, value):
            if id(rows) not in packed:
                packed[id(rows)] = self._projected(rows.transpose(0, 1), in_proj_weight, in_proj_bias)
        heads = [
            _heads(packed[id(rows)].chunk(3, dim=-1)[part], num_heads)
            for part, rows in enumerate((query, key, value))
        ]  # each (B, H, L, E / H)
        scores = heads[0] @ heads[1].mT * heads[0].shape[-1] ** -0.5
        if attn_mask is not None:
            per_head = attn_mask.ndim == 3
            scores = _masked(
                scores, attn_mask.view(-1, num_heads, *attn_mask.shape[1:]) if per_head else attn_mask
            )
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None])
        weights = F.dropout(scores.softmax(-1), dropout_p, training)
        joined = (weights @ heads[2]).transpose(1, 2).flatten(2)
        output = self._projected(joined, out_proj_weight, out_proj_bias).transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _projected(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trained = self._is_trained(weight) or self._is_trained(bias)
        return self._linear(rows, weight, bias) if trained else F.linear(rows, weight, bias)


_KNOWN: dict[Any, Callable[..., Any]] = {
    F.linear: Interception._linear,
    F.embedding: Interception._embedding,
    F.layer_norm: Interception._layer_norm,
    F.rms_norm: Interception._rms_norm,
    F.group_norm: Interception._group_norm,
    F.multi_head_attention_forward: Interception._attention,
    **{
        func: (lambda self, *args, func=func, **kwargs: self._convolution(func, *args, **kwargs))
        for func in (torch.conv1d, torch.conv2d, torch.conv3d)
    },
}
_LISTS = (list, tuple)
_IN_PLACE = {Tensor.add_, Tensor.sub_, Tensor.mul_}
_ELEMENTWISE = {Tensor.add, Tensor.sub, Tensor.mul, torch.add, torch.sub, torch.mul, *_IN_PLACE}
_EXPANDING = {Tensor.expand, Tensor.expand_as, Tensor.repeat}


def _constant(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _as_autocast(value: Tensor) -> Tensor:
    """What autocast gives to a matrix product."""
    kind = value.device.type
    if torch.is_autocast_enabled(kind) and value.dtype is not torch.float64:
        return value.to(torch.get_autocast_dtype(kind))
    return value


def _channels_last(value: Tensor) -> Tensor:
    """(B, C, ...) to (B, L, C)."""
    return value.reshape(*value.shape[:2], -1).mT


def _patches(
    images: Tensor, kernel: torch.Size, *, stride: Sizes, padding: Sizes | str, dilation: Sizes
) -> Tensor:
    """What each output place of a convolution sees of (B, C, ...): shape (B, L, C, K)."""
    axes = len(kernel)
    steps, spread = _sizes(stride, axes), _sizes(dilation, axes)
    if padding == "same":
        total = [s * (k - 1) for s, k in zip(spread, kernel, strict=True)]
        margins = [(t // 2, t - t // 2) for t in total]
    else:
        margins = [(size, size) for size in _sizes(0 if isinstance(padding, str) else padding, axes)]
    images = F.pad(images, [size for margin in reversed(margins) for size in margin])
    for axis, (size, step, gap) in enumerate(zip(kernel, steps, spread, strict=True)):
        images = images.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    # (B, C, *places, *kernel)
    return images.flatten(2, 1 + axes).flatten(3).transpose(1, 2)


def _sizes(value: Sizes, axes: int) -> Sequence[int]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes // len(value))


def _heads(rows: Tensor, count: int) -> Tensor:
    """(B, L, E) to (B, H, L, E / H)."""
    return rows.view(*rows.shape[:2], count, -1).transpose(1, 2)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype is torch.bool else scores + mask


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))
