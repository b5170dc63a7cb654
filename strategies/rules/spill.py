"""Updates on disk: all that a rule holds of a round lies in an unnamed file and is worked on in blocks.

So the coordinator's memory holds the model, one reply and some blocks, however many sites there are; and,
where there is room for them, sums.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from strategies.messages import Arrays
from strategies.rules.rule import CannotCombine

BLOCK = 2**15  # values of one piece: 256 KiB of float64, of which a core's own cache holds some
_MATRIX = 2**22  # values of one block of all updates together: 16 MiB of float32


class Piece(NamedTuple):
    """A part of one array, and of the vector of all arrays one after the other.

    Attributes:
        name: The array.
        within: Its values, once it is flattened.
        start: Where they begin in the vector.
    """

    name: str
    within: slice
    start: int

    @property
    def size(self) -> int:
        """How many values."""
        return int(self.within.stop - self.within.start)

    def of(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """These values; a view where the array is contiguous."""
        return arrays[self.name].reshape(-1)[self.within]


def pieces(like: Mapping[str, NDArray[Any]], *, at_most: int = BLOCK) -> Iterator[Piece]:
    """Parts of at most so many values that cover every array once, by sorted name."""
    start = 0
    for name in sorted(like):
        for begin in range(0, like[name].size, at_most):
            piece = Piece(name, slice(begin, min(begin + at_most, like[name].size)), start)
            yield piece
            start += piece.size


def fitted(
    like: Mapping[str, NDArray[Any]],
    values: Callable[[Piece], NDArray[np.float64]],
    *,
    what: str,
    at_most: int = BLOCK,
    into: Arrays | None = None,
) -> Arrays:
    """Fill float32 arrays shaped as ``like``, piece by piece, each value rounded once.

    Args:
        like: Names and shapes.
        values: The values of a piece.
        what: Names the arrays in the error.
        at_most: Values of one piece.
        into: Arrays to fill; ``values`` may read from the same place in them. Without them new ones are made.

    Raises:
        CannotCombine: a value does not fit into float32, or is not a number.
    """
    arrays = into or {name: np.empty(value.shape, dtype=np.float32) for name, value in like.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # found and named below
        for piece in pieces(like, at_most=at_most):
            rounded = piece.of(arrays)
            rounded[:] = values(piece)
            if not np.isfinite(rounded).all():
                raise CannotCombine(
                    f"array {piece.name!r} of {what} does not fit into float32: an update is too large"
                )
    return arrays


class VectorFile:
    """Values of one dtype in a file, read and written by their position."""

    def __init__(self, file: IO[bytes], dtype: DTypeLike) -> None:
        self._file, self._dtype = file, np.dtype(dtype)
        weakref.finalize(self, file.close)

    @classmethod
    def unnamed(cls, folder: Path, dtype: DTypeLike, *, count: int = 0) -> "VectorFile":
        """A file of ``count`` zeros without a name: gone with this object or process, however that ends."""
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when this object goes
        file.truncate(count * np.dtype(dtype).itemsize)
        return cls(file, dtype)

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Replace the values from ``start`` on."""
        self._file.seek(start * self._dtype.itemsize)
        self._file.write(np.asarray(values, dtype=self._dtype, order="C").reshape(-1).data.cast("B"))

    def read(self, start: int, count: int) -> NDArray[Any]:
        """So many values from ``start`` on; read-only."""
        self._file.seek(start * self._dtype.itemsize)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), dtype=self._dtype)

    def add(self, start: int, values: NDArray[Any]) -> None:
        """Add to the values from ``start`` on."""
        self.write(start, self.read(start, values.size) + values)


class Scratch:
    """Memory for the sum of one round after the other: what the kernel has cleared once, it clears only once.

    Args:
        most_bytes: A sum that takes more has no place in it.
    """

    def __init__(self, *, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._values = np.empty(0)

    def zeros(self, count: int) -> NDArray[np.float64] | None:
        """So many zeros, in the place of those given before; null: they have none."""
        if count * self._values.itemsize > self._most_bytes:
            return None
        if self._values.size < count:
            self._values = np.empty(count)
        values = self._values[:count]
        values.fill(0)
        return values


class VectorInMemory:
    """Values in memory, read and added to by their position."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    def read(self, start: int, count: int) -> NDArray[Any]:
        """So many values from ``start`` on; a view."""
        return self._values[start : start + count]

    def add(self, start: int, values: NDArray[Any]) -> None:
        """Add to the values from ``start`` on."""
        total = self.read(start, values.size)
        np.add(total, values, out=total)


class Sums:
    """A running sum of scaled updates, in float64.

    Args:
        like: Names and shapes.
        folder: Where the sum lies, in an unnamed file.
        scratch: Where it lies instead, if it has a place there.
    """

    def __init__(
        self, like: Mapping[str, NDArray[Any]], folder: Path, *, scratch: Scratch | None = None
    ) -> None:
        self._like = like
        count = sum(value.size for value in like.values())
        zeros = None if scratch is None else scratch.zeros(count)
        self._total: VectorFile | VectorInMemory = (
            VectorFile.unnamed(folder, np.float64, count=count) if zeros is None else VectorInMemory(zeros)
        )

    def add(self, update: Mapping[str, NDArray[Any]], factor: float) -> None:
        """Add ``factor`` times the update."""
        block = np.empty(BLOCK)
        for piece in pieces(self._like):
            scaled = block[: piece.size]
            np.multiply(piece.of(update), factor, out=scaled, dtype=np.float64)
            self._total.add(piece.start, scaled)

    def at(self, piece: Piece) -> NDArray[np.float64]:
        """Values of the sum; not to be changed."""
        return self._total.read(piece.start, piece.size)

    def over(self, divisor: float) -> Arrays:
        """The sum divided, rounded once to float32.

        Raises:
            CannotCombine: a value does not fit into float32.
        """
        return fitted(self._like, lambda piece: self.at(piece) / divisor, what="the combined update")


class Rows:
    """The updates of a round, one after the other."""

    def __init__(self, like: Mapping[str, NDArray[Any]], folder: Path) -> None:
        self._like = like
        self._size = sum(value.size for value in like.values())
        self._file = VectorFile.unnamed(folder, np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, update: Mapping[str, NDArray[Any]]) -> None:
        """Keep one more update."""
        for piece in pieces(self._like):
            self._file.write(self._count * self._size + piece.start, piece.of(update))
        self._count += 1

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All updates in vertical strips, each of shape (updates, values)."""
        for piece in pieces(self._like, at_most=self._width()):
            yield self._strip(piece)

    def combined(self, combine: Callable[[NDArray[np.float32]], NDArray[np.float64]]) -> Arrays:
        """One value for every column; ``combine`` takes shape (updates, values) to (values,).

        Raises:
            CannotCombine: a value does not fit into float32.
        """

        def column_values(piece: Piece) -> NDArray[np.float64]:
            return combine(self._strip(piece))

        return fitted(self._like, column_values, what="the combined update", at_most=self._width())

    def _width(self) -> int:
        return max(1, min(BLOCK, _MATRIX // max(1, self._count)))

    def _strip(self, piece: Piece) -> NDArray[np.float32]:
        rows = range(self._count)
        return np.stack([self._file.read(row * self._size + piece.start, piece.size) for row in rows])


def norm(update: Mapping[str, NDArray[Any]]) -> float:
    """L2 norm of the vector of all arrays, in float64."""
    squares = (np.square(piece.of(update), dtype=np.float64).sum() for piece in pieces(update))
    return float(np.sqrt(sum(squares)))
