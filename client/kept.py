"""A cache that is bounded in bytes: what is kept for many sites may not grow with their number."""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

logger = logging.getLogger(f"clipward.{__name__}")

P = ParamSpec("P")
R = TypeVar("R")


class CacheInfo(NamedTuple):
    """How often a cache was asked in vain and not, and what it holds."""

    hits: int
    misses: int
    held_bytes: int
    entries: int


class Kept(Generic[P, R]):
    """A function that remembers its results, the last used ones, up to a number of bytes.

    Guarantees:
        When a call returns, the results of earlier calls that are still kept hold at most ``most_bytes``. The
        newest is kept whatever its size. A result may grow after it was returned: it is measured when the
        next is asked for.

    Args:
        make: The function; its arguments are hashable.
        most_bytes: Of earlier results together.
        told: What is lost with a result that could not be made again; said once in the log. Empty: nothing.
    """

    def __init__(self, make: Callable[P, R], *, most_bytes: int, told: str = "") -> None:
        self.__wrapped__ = make
        self._most_bytes, self._told = most_bytes, told
        self._kept: OrderedDict[Hashable, tuple[R, int]] = OrderedDict()
        self._hits = self._misses = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result for these arguments, made or remembered."""
        key = (args, tuple(sorted(kwargs.items())))
        self._measure_newest()
        if key in self._kept:
            self._hits += 1
            self._kept.move_to_end(key)
        else:
            self._misses += 1
            self._kept[key] = self.__wrapped__(*args, **kwargs), 0
        self._forget_oldest()
        return self._kept[key][0]

    def cache_clear(self) -> None:
        """Forget everything, counts included."""
        self._kept.clear()
        self._hits = self._misses = 0

    def cache_info(self) -> CacheInfo:
        """Hits and misses since it was last cleared, and what is held now."""
        self._measure_newest()
        held = sum(size for _, size in self._kept.values())
        return CacheInfo(hits=self._hits, misses=self._misses, held_bytes=held, entries=len(self._kept))

    def _measure_newest(self) -> None:
        if self._kept:
            key, (result, _) = self._kept.popitem()
            self._kept[key] = result, held_bytes(result)

    def _forget_oldest(self) -> None:
        *earlier, _ = (size for _, size in self._kept.values())
        excess = sum(earlier) - self._most_bytes
        while excess > 0:
            _, (_, size) = self._kept.popitem(last=False)
            excess -= size
            if self._told:
                logger.warning("%s: those of all sites together pass %d bytes", self._told, self._most_bytes)
                self._told = ""


def kept(*, most_bytes: int, told: str = "") -> Callable[[Callable[P, R]], Kept[P, R]]:
    """Make a function a `Kept` one."""
    return lambda make: Kept(make, most_bytes=most_bytes, told=told)


def held_bytes(value: object) -> int:
    """Bytes of the tensors, arrays and texts in ``value``, through dataclasses, mappings and sequences."""
    match value:
        case Tensor() | np.ndarray():
            return int(value.nbytes)
        case str():
            return len(value)
        case Mapping():
            return sum(map(held_bytes, value.values()))
        case list() | tuple():
            return sum(map(held_bytes, value))
        case _ if dataclasses.is_dataclass(value):
            return sum(held_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
        case _:
            return 0
