"""Arrays in a message: handed over as they are within a process, written only where they leave it."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

_STYPE = "numpy.ndarray"


class Unwritten(Array):  # type: ignore[misc]  # flwr is not annotated for us
    """Flower's array, of which the bytes are made when they are first asked for.

    Guarantees:
        What leaves the process is a plain `Array`: Flower's serialisation and pickling read ``data``, and
        neither makes one of these. So wherever one is met, it has been handed over and never copied.
        ``numpy`` gives the values where they lie, read-only; whoever made it must not change them later.
        The bytes cannot be replaced.

    Args:
        make: Gives the values, the same whenever it is called.
        dtype: Of the values.
        shape: Of the values.
    """

    def __init__(self, make: Callable[[], NDArray[Any]], *, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.stype = dtype, shape, _STYPE
        self._make = make

    @classmethod
    def of(cls, values: NDArray[Any]) -> Self:
        """Values that are there."""
        held = np.asarray(values, order="C").view()
        held.flags.writeable = False
        return cls(lambda: held, dtype=str(held.dtype), shape=held.shape)

    def again(self) -> Self:
        """Another one of the same values."""
        return type(self)(self._make, dtype=self.dtype, shape=self.shape)

    @property
    def written(self) -> Array:
        """Flower's own array of the values; made once."""
        if "_written" not in self.__dict__:
            self.__dict__["_written"] = Array(self._make())
        return self.__dict__["_written"]

    @property
    def data(self) -> bytes:
        """The values as NumPy writes them."""
        return bytes(self.written.data)

    @property
    def children(self) -> dict[str, Any]:
        """Of `written`: what Flower's wire knows."""
        return dict(self.written.children)

    def deflate(self) -> bytes:
        """`written` for Flower's wire, which goes by the name of the class."""
        return bytes(self.written.deflate())

    def numpy(self) -> NDArray[Any]:
        """The values, read-only."""
        return self._make()

    def __reduce__(self) -> tuple[type[Array], tuple[Any, ...]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and (self.dtype, self.shape, self.stype, self.data) == (
            other.dtype,
            other.shape,
            other.stype,
            other.data,
        )

    __hash__ = None  # type: ignore[assignment]  # as of every `Array`
