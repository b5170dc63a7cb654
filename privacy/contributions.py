"""One parameter's gradient, patient by patient, in whichever form is cheapest to hold, measure and sum.

Axes: P patients, T places where a patient's rows meet the parameter (tokens, patches, studies), d inputs and
p outputs of a product, V rows of an embedding. Everything here is private: nothing of it leaves the site.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol, Self

import torch
from torch import Tensor

BLOCK, SMALL = 256, 2**16


class Contribution(Protocol):
    """Gradient of the patients' losses in one parameter, a gradient per patient."""

    def squared_norms(self, at_least: torch.dtype = torch.float32) -> Tensor:
        """Squared L2 norm of each patient's gradient, float64, shape (P,).

        Guarantees:
            Too small by at most 2e-6 of itself, whatever cancels in it: where `weighted_sum` and the norm
            itself round, a bound on the rounding is added. Not finite where it is out of range.

        Args:
            at_least: float64 widens the range.
        """

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Sum over patients of factor times gradient, at least float32, in the parameter's shape."""

    def dense(self) -> Tensor:
        """Each patient's gradient, shape (P, *parameter)."""

    def only(self, kept: Tensor) -> Self:
        """The same of the patients where ``kept``, boolean (P,), is true."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """A gradient a patient, as it is: biases, scales, factors of low rank.

    Attributes:
        values: Shape (P, *parameter).
    """

    values: Tensor

    def squared_norms(self, at_least: torch.dtype = torch.float32) -> Tensor:
        """See `Contribution`."""
        return _squares(wide(self.values, at_least).unsqueeze(1).flatten(1))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """See `Contribution`."""
        values = wide(self.values)
        return (factors.to(values.dtype) @ values.unsqueeze(1).flatten(1)).view(values.shape[1:])

    def dense(self) -> Tensor:
        """See `Contribution`."""
        return wide(self.values)

    def only(self, kept: Tensor) -> Self:
        """See `Contribution`."""
        return replace(self, values=self.values[kept])


@dataclass(frozen=True, kw_only=True, eq=False)
class Outer:
    """Gradients sum_t g_t a_t^T of a matrix product that are never multiplied out: a wide matrix, few places.

    Attributes:
        inputs: a, shape (P, T, d).
        gradients: g, gradients of the loss in the product's outputs, shape (P, T, p).
        places: How many there were before those without a gradient were left out, at least T.
        shape: The parameter's, with p * d elements.

    Source:
        Gram form of the norm: Li et al. (2022), arXiv:2110.05679, section 4; keeping both factors for one
        weighted product instead of a second backward pass: Bu et al. (2023), arXiv:2210.00038.
    """

    inputs: Tensor
    gradients: Tensor
    places: int
    shape: torch.Size

    def squared_norms(self, at_least: torch.dtype = torch.float32, a_gram: Tensor | None = None) -> Tensor:
        """See `Contribution`. ``a_gram`` is that of the inputs, shape (P, T, T), where it is known."""
        a, g = wide(self.inputs, at_least), wide(self.gradients, at_least)
        a_gram, g_gram = a @ a.mT if a_gram is None else a_gram, g @ g.mT
        a_squares, g_squares = (gram.diagonal(dim1=1, dim2=2) for gram in (a_gram, g_gram))
        squares = (a_gram * g_gram).sum((1, 2))
        squares += _rounding(a_squares, g_squares, d=a.shape[2], p=g.shape[2], of=wide(self.inputs).dtype)
        return squares.to(torch.float64)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """See `Contribution`."""
        a, g = wide(self.inputs), wide(self.gradients)
        weights = factors.to(a.dtype)[:, None, None]
        if a.shape[2] < g.shape[2]:
            a = a * weights
        else:
            g = g * weights
        return (g.flatten(0, 1).mT @ a.flatten(0, 1)).view(self.shape)

    def dense(self) -> Tensor:
        """See `Contribution`."""
        return (wide(self.gradients).mT @ wide(self.inputs)).view(len(self.inputs), *self.shape)

    def only(self, kept: Tensor) -> Self:
        """See `Contribution`."""
        return replace(self, inputs=self.inputs[kept], gradients=self.gradients[kept])


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The few rows of an embedding that each patient used.

    Attributes:
        owners: Patient of each used row, int64, shape (M,); a patient and row occur together at most once.
        ids: Which row of the embedding, int64, shape (M,).
        values: Its gradient, shape (M, D).
        patients: P.
        shape: The parameter's, (V, D).
    """

    owners: Tensor
    ids: Tensor
    values: Tensor
    patients: int
    shape: torch.Size

    @classmethod
    def of(cls, owners: Tensor, ids: Tensor, values: Tensor, *, patients: int, shape: torch.Size) -> Self:
        """Rows whose (owner, id) may repeat, added up."""
        keys, places = torch.unique(owners * shape[0] + ids, return_inverse=True)
        values = wide(values)
        if len(keys) < len(places):
            values = values.new_zeros(len(keys), values.shape[1]).index_add_(0, places, values)
        else:
            values = values[places.argsort()]
        return cls(
            owners=keys // shape[0], ids=keys % shape[0], values=values, patients=patients, shape=shape
        )

    def squared_norms(self, at_least: torch.dtype = torch.float32) -> Tensor:
        """See `Contribution`."""
        squares = _squares(wide(self.values, at_least))
        return squares.new_zeros(self.patients).index_add_(0, self.owners, squares)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """See `Contribution`."""
        weighted = self.values * factors.to(self.values.dtype)[self.owners, None]
        return weighted.new_zeros(self.shape).index_add_(0, self.ids, weighted)

    def dense(self) -> Tensor:
        """See `Contribution`."""
        found = self.values.new_zeros(self.patients, *self.shape)
        found[self.owners, self.ids] = self.values
        return found

    def only(self, kept: Tensor) -> Self:
        """See `Contribution`."""
        rows = kept[self.owners]
        renumbered = kept.cumsum(0) - 1
        return replace(
            self,
            owners=renumbered[self.owners[rows]],
            ids=self.ids[rows],
            values=self.values[rows],
            patients=int(kept.sum()),
        )


def product(inputs: Tensor, gradients: Tensor, shape: torch.Size) -> Outer | Dense:
    """Gradients of a matrix from inputs (P, T, d) and output gradients (P, T, p), in the cheaper form."""
    places = inputs.shape[1]
    inputs, gradients = _felt(inputs, gradients)
    return _cheaper(Outer(inputs=inputs, gradients=gradients, places=places, shape=shape))


def _cheaper(found: Outer) -> Outer | Dense:
    """As it is or multiplied out, whichever costs less if no place is left out.

    In memory they change sides at T (d + p) = d p, which is what the factors hold and what they make. In time
    they were measured to at half of it (Gram matrices cost as much as half the multiplying out). In between,
    and whatever was left out: the forms overflow at different numbers, and which it is must not be for other
    patients to say.
    """
    d, p = found.inputs.shape[2], found.gradients.shape[2]
    return found if 3 * found.places * (d + p) < 2 * d * p else Dense(values=found.dense())


def _felt(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """As many places as the patient has whose loss feels most of them: (P, T, ...) to (P, T', ...).

    A tower that is pooled at one token has no gradient at the others in its last layer, and a causal one none
    at the padding. A gradient of zero adds nothing, unless its input is not finite: such a patient counts as
    zero here too, or the places of one patient would decide whether another counts.
    """
    places = gradients.shape[1]
    empty = not (inputs.numel() and gradients.numel())
    if empty or places < 2 or not gradients.is_cpu:  # to look is to wait for a GPU
        return inputs, gradients
    if gradients[0, :: places - 1].any(1).all():  # no need to look further
        return inputs, gradients
    felt = _not_zero(gradients)
    places = max(1, int(felt.sum(1).max()))
    if 4 * places > 3 * gradients.shape[1]:
        return inputs, gradients
    kept = felt.to(torch.int8).argsort(dim=1, descending=True)[:, :places]
    rows = torch.arange(len(kept))[:, None]
    not_a_number = 0 * inputs.amax((1, 2)) + 0 * inputs.amin((1, 2))  # or zero
    return inputs[rows, kept], gradients[rows, kept] + not_a_number[:, None, None]


def _not_zero(gradients: Tensor) -> Tensor:
    """Where a place (P, T) has a gradient, NaN included; its square could round to zero."""
    return (gradients.amax(2) != 0) | (gradients.amin(2) != 0)


def together(uses: Sequence[Contribution]) -> Contribution:
    """Several uses of one parameter as one gradient: a patient's norm is that of the sum."""
    return reduce(_joined, uses)


def norms(contributions: Collection[Contribution]) -> Tensor:
    """L2 norm of each patient's gradient in all parameters together, float64, shape (P,).

    Guarantees:
        At most 1e-6 of itself too small. Not finite only where a gradient itself is not.
    """
    squares = _summed_squares(contributions, torch.float32)
    odd = ~squares.isfinite()
    if odd.any():
        squares[odd] = _summed_squares([each.only(odd) for each in contributions], torch.float64)
    return squares.sqrt()


def _summed_squares(contributions: Collection[Contribution], at_least: torch.dtype) -> Tensor:
    squares, small, products = [], [], []
    for each in contributions:
        if isinstance(each, Outer):
            products.append(each)
        elif isinstance(each, Dense) and each.values.numel() < SMALL:
            small.append(each.values.unsqueeze(1).flatten(1))  # dozens of biases: one pass over all
        else:
            squares.append(each.squared_norms(at_least))
    if small:
        squares.append(_squares(wide(torch.cat(small, dim=1), at_least)))
    squares.extend(_squares_of_products(products, at_least))
    return torch.stack(squares).sum(0)


def _squares_of_products(products: Sequence[Outer], at_least: torch.dtype) -> Iterator[Tensor]:
    """Squared norms of each; queries, keys and values come one after the other and share their inputs."""
    inputs = a_gram = None
    for each in products:
        if inputs is None or not each.inputs.is_set_to(inputs):
            inputs, a = each.inputs, wide(each.inputs, at_least)
            a_gram = a @ a.mT
        yield each.squared_norms(at_least, a_gram)


def _joined(first: Contribution, second: Contribution) -> Contribution:
    match first, second:
        case Outer(), Outer():
            return _cheaper(
                Outer(
                    inputs=torch.cat([first.inputs, second.inputs], dim=1),
                    gradients=torch.cat([first.gradients, second.gradients], dim=1),
                    places=first.places + second.places,
                    shape=first.shape,
                )
            )
        case Rows(), Rows():
            return Rows.of(
                torch.cat([first.owners, second.owners]),
                torch.cat([first.ids, second.ids]),
                torch.cat([first.values, second.values]),
                patients=first.patients,
                shape=first.shape,
            )
    return Dense(values=first.dense() + second.dense())


def wide(value: Tensor, at_least: torch.dtype = torch.float32) -> Tensor:
    """The same in ``at_least`` that precision; products of half precision are exact in float32."""
    return value if value.dtype in (at_least, torch.float64) else value.to(at_least)


def _squares(rows: Tensor) -> Tensor:
    """Sum of squares of each row, float64, at most 1e-6 of itself too small. Shape (N, n) to (N,).

    In blocks: `torch.linalg.vector_norm` makes no copy, but loses 1e-2 of 1e8 numbers (2e-7 of 256).
    """
    count = rows.shape[1]
    hidden = count * torch.finfo(rows.dtype).tiny
    if rows.numel() < SMALL:
        return rows.to(torch.float64).square().sum(1) + hidden
    whole = count - count % BLOCK
    blocks = rows[:, :whole].reshape(len(rows), whole // BLOCK, BLOCK)
    squares: Tensor = torch.linalg.vector_norm(blocks, dim=2).to(torch.float64).square().sum(1)
    return squares + rows[:, whole:].to(torch.float64).square().sum(1) + hidden


def _rounding(a_squares: Tensor, g_squares: Tensor, *, d: int, p: int, of: torch.dtype) -> Tensor:
    """What rounding in ``of`` may hide of |sum_t g_t a_t^T|^2, from |a_t|^2 and |g_t|^2 of shape (P, T).

    All errors are below a multiple of eps (sum_t |a_t| |g_t|)^2, however much cancels: those of the norm, and
    those of the weighted product that is released. The multiple is set by the worst found, products of equal
    numbers, whose sum of d is up to eps d / 45 too small: in one place, where others that round exactly take
    the gradient back, nearly all of the norm could hide there. Squares below the smallest normal number are
    lost.
    """
    limits, places = torch.finfo(of), a_squares.shape[1]
    reach = (a_squares * g_squares).sqrt().sum(1).square()
    hidden: Tensor = limits.eps * (2 + (d + p) / 32) * reach + limits.tiny * places**2
    hidden.add_(a_squares.sum(1), alpha=limits.tiny * places * p)
    return hidden.add_(g_squares.sum(1), alpha=limits.tiny * places * d)
