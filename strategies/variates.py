"""One vector per site on the coordinator's disk, and their mean: what SCAFFOLD and FedDyn remember.

A file is written once, under the number of its round, and never again: a crash leaves the vectors of the last
checkpoint as they were. A checkpoint names the files that hold; the round's mean is computed from them anew.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from strategies.files import sync
from strategies.messages import Arrays
from strategies.rules.spill import Piece, fitted, pieces

Values = NDArray[np.float64]

_NAME = re.compile(r"([0-9a-f]{16})-(\d{6,})\.f32")
_ROUND, _SITES, _WEIGHTS = "round", "site/", "weight/"
_BYTES = 4  # of a float32


class VariatesLost(RuntimeError):
    """A checkpoint names a site's vector that is not in the folder."""


class _Held(NamedTuple):
    generation: int
    weight: float


class Variates:
    """Vectors by site, shaped as the model.

    Guarantees:
        At most one vector and their mean are in memory. What was replaced since `begin` holds only after
        `finish`; until then, and after `restore`, everything is as at the last `finish`. The states after the
        last two `finish` can be restored, with the same bits from there on. The disk holds at most three
        vectors per site.

    Args:
        folder: Nobody else's; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, _Held] = {}
        self._replaced: dict[str, _Held] = {}
        self._generation = 0
        self._like: Arrays = {}
        self._mean: Arrays | None = None

    def __contains__(self, site: str) -> bool:
        return site in self._held

    @property
    def mean(self) -> Arrays:
        """Mean of all vectors by their sites' weights, float32; zero while there are none."""
        if self._mean is None:
            self._mean = self._mean_of_held()
        return self._mean

    def begin(self, base: Arrays) -> None:
        """Start a round over vectors shaped as ``base``.

        Raises:
            VariatesLost: a vector of the restored state is not there.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._like, self._replaced = base, {}
        size = _BYTES * sum(value.size for value in base.values())
        for site, held in self._held.items():
            path = self._path(site, held.generation)
            if not path.is_file() or path.stat().st_size != size:
                raise VariatesLost(
                    f"the vector of site {site!r} from round {held.generation} is gone from the strategy's "
                    "folder: resume from a newer checkpoint, or start the run anew"
                )
        self._remove_what_nobody_names()

    def at(self, site: str, piece: Piece) -> Values:
        """Values of the vector of a site that has one."""
        with self._path(site, self._held[site].generation).open("rb") as file:
            file.seek(piece.start * _BYTES)
            return np.fromfile(file, dtype=np.float32, count=piece.size).astype(np.float64)

    def arrays(self, values: Callable[[Piece], Values]) -> Arrays:
        """New arrays shaped as the model, piece by piece."""
        return fitted(self._like, values, what="a correction")

    def replace(self, site: str, values: Callable[[Piece], Values], *, weight: float) -> None:
        """Write a site's next vector; the one in force stays as it is until `finish`."""
        generation = self._generation + 1
        with self._path(site, generation).open("wb") as file:
            for piece in pieces(self._like):
                file.write(values(piece).astype(np.float32).data)
            file.flush()
            os.fsync(file.fileno())
        self._replaced[site] = _Held(generation, weight)

    def finish(self) -> None:
        """Let the vectors replaced since `begin` hold."""
        sync(self._folder)
        self._generation += 1
        self._held |= self._replaced
        self._replaced, self._mean = {}, None

    def state(self) -> Arrays:
        """Which vectors hold, and with which weights; they themselves stay in their files."""
        return {
            _ROUND: np.array(self._generation),
            **{f"{_SITES}{site}": np.array(held.generation) for site, held in self._held.items()},
            **{f"{_WEIGHTS}{site}": np.array(held.weight) for site, held in self._held.items()},
        }

    def restore(self, state: Arrays) -> None:
        """Go on from a `state`; empty: from the start."""
        self._generation = int(state.get(_ROUND, 0))
        sites = [name.removeprefix(_SITES) for name in state if name.startswith(_SITES)]
        self._held = {
            site: _Held(int(state[f"{_SITES}{site}"]), float(state[f"{_WEIGHTS}{site}"])) for site in sites
        }
        self._replaced, self._mean = {}, None

    def _mean_of_held(self) -> Arrays:
        held = sorted(self._held.items())  # the same bits in whatever order the sites first came
        total = sum(one.weight for _, one in held)

        def values(piece: Piece) -> Values:
            scaled = (one.weight / total * self.at(site, piece) for site, one in held)
            return np.asarray(sum(scaled, np.zeros(piece.size)))

        return fitted(self._like, values, what="the mean correction")

    def _remove_what_nobody_names(self) -> None:
        """Keep the files of the last `finish` and of the one before it."""
        generations: dict[str, list[int]] = {}
        for path in self._folder.glob("*.f32"):
            if match := _NAME.fullmatch(path.name):
                generations.setdefault(match[1], []).append(int(match[2]))
        for key, found in generations.items():
            before = max((each for each in found if each < self._generation), default=0)
            for each in found:
                if not before <= each <= self._generation:
                    (self._folder / f"{key}-{each:06d}.f32").unlink()

    def _path(self, site: str, generation: int) -> Path:
        key = hashlib.sha256(site.encode()).hexdigest()[:16]  # a site's name need not be a file's
        return self._folder / f"{key}-{generation:06d}.f32"
