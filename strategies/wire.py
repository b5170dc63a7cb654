"""How an update travels: as float32, as bfloat16, or as whole numbers of 8 bits.

What is shortened here is noised already under privacy, so nothing of this costs a budget. The rounding of
bfloat16 is to the nearest; that of int8 is random and right on average, so the errors of many sites cancel.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.messages import Arrays, MessageError, Wire, check_update

SCALE = "/scale"  # ends the name of an array that holds another's scales; no parameter's name has a slash
_LARGEST = 127
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def pack(update: Arrays, wire: Wire, *, rng: np.random.Generator) -> Arrays:
    """The arrays that travel in place of ``update``.

    Guarantees:
        `unpack` makes float32 arrays of them. These are equal for ``fp32``; within 2⁻⁸ of each value,
        relative, for ``bf16``; for ``int8`` equal to each value on average over ``rng``, and nowhere farther
        from it than a 127th of the largest magnitude in its row, which is all with one index on the first
        axis, and the whole array where there is no second.

    Args:
        update: Finite float32 arrays.
        wire: The form.
        rng: Draws the roundings of ``int8``. It protects nobody, so it may be seeded.

    Raises:
        MessageError: a value is too large for bfloat16.
    """
    if wire == "fp32":
        return update
    if wire == "bf16":
        return {name: _to_bf16(name, value) for name, value in update.items()}
    packed: Arrays = {}
    for name, value in update.items():
        packed[name], packed[name + SCALE] = _to_int8(value, rng)
    return packed


def unpack(packed: Mapping[str, NDArray[Any]], wire: Wire, *, like: Mapping[str, NDArray[Any]]) -> Arrays:
    """The update that `pack` shortened, float32 arrays of the names and shapes of ``like``.

    Raises:
        MessageError: another name, shape or dtype than ``like`` has in this form, or a value that is not
            finite.
    """
    if wire == "fp32":
        update = dict(packed)
    else:
        _check_form(packed, wire, like)
        if wire == "bf16":
            update = {name: _from_bf16(value) for name, value in packed.items()}
        else:
            update = {name: _from_int8(packed[name], packed[name + SCALE]) for name in like}
    check_update(update, like)
    return update


def size_of(like: Mapping[str, NDArray[Any]], wire: Wire) -> int:
    """Bytes of an update with the names and shapes of ``like`` in this form, without the envelope."""
    values = sum(_BYTES[wire] * value.size for value in like.values())
    return values + (sum(4 * _rows(value.shape) for value in like.values()) if wire == "int8" else 0)


def _check_form(packed: Mapping[str, NDArray[Any]], wire: Wire, like: Mapping[str, NDArray[Any]]) -> None:
    dtype = np.dtype(np.uint16 if wire == "bf16" else np.int8)
    form = {name: (value.shape, dtype) for name, value in like.items()}
    if wire == "int8":
        scales = {name + SCALE: ((_rows(value.shape),), np.dtype(np.float32)) for name, value in like.items()}
        form |= scales
    found = {name: (value.shape, value.dtype) for name, value in packed.items()}
    if odd := sorted(name for name in {*form, *found} if form.get(name) != found.get(name)):
        expected, got = (
            "nothing" if one is None else f"{one[1]}{one[0]}" for one in (form.get(odd[0]), found.get(odd[0]))
        )
        raise MessageError(f"array {odd[0]!r}: expected {expected} in form {wire}, got {got}")


def _to_bf16(name: str, value: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.asarray(value, order="C").view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
    if not np.isfinite(_from_bf16(rounded.astype(np.uint16))).all():
        raise MessageError(f"array {name!r}: a value is too large for bf16")
    return rounded.astype(np.uint16)


def _from_bf16(value: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (value.astype(np.uint32) << 16).view(np.float32)


def _to_int8(
    value: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    rows = _in_rows(value)
    exact = np.abs(rows).max(axis=1, initial=0).astype(np.float64) / _LARGEST
    scales = exact.astype(np.float32)
    scales = np.where(
        scales < exact, np.nextafter(scales, np.float32(np.inf)), scales
    )  # so that 127 is enough
    quotients = rows / np.where(scales > 0, scales, 1).astype(np.float64)[:, None]
    rounded = np.floor(quotients + rng.random(rows.shape, dtype=np.float32))
    return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int8).reshape(value.shape), scales


def _from_int8(value: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # found and named by the caller
        return (_in_rows(value) * scales[:, None]).reshape(value.shape)


def _in_rows(value: NDArray[Any]) -> NDArray[Any]:
    count = _rows(value.shape)
    return value.reshape(count, value.size // max(1, count))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1
