"""What keeps sites with different patients from drifting apart: terms that a site adds to its own gradient.

A site adds ``correction + proximal · (weights - weights at the start of the round)`` to its gradient, after
the noise. That is all it knows. What a correction is made of is derived at the coordinator from updates that
left the sites with noise, so it is post-processing: no release of its own, no budget, and a site keeps
nothing between rounds.

==========  =============================  =========
method      correction of site i           proximal
==========  =============================  =========
FedProx     none                           mu
SCAFFOLD    mean of all c  -  c_i          0
FedDyn      -h_i                           alpha
==========  =============================  =========
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.messages import Arrays
from strategies.rules.rule import CannotCombine
from strategies.rules.spill import Piece, fitted
from strategies.variates import Variates

Values = NDArray[np.float64]


class Correction(Protocol):
    """Keeps what the next corrections are made of."""

    @property
    def proximal(self) -> float:
        """What pulls a site's weights back to those of the round's start."""

    @property
    def per_site(self) -> bool:
        """Whether it learns from every site's own update: of this round, and once."""

    def begin(self, base: Arrays) -> None:
        """Start a round, or start it again: what was taken in without `finish` is forgotten."""

    def of(self, site: str) -> Arrays | None:
        """What the site adds to its gradient; null: nothing."""

    def take(self, site: str, update: Arrays, weight: float) -> None:
        """Learn from a site's update; one that was refused by the rule does not come here."""

    def finish(self, update: Arrays) -> Arrays:
        """End the round: the combined update as it shall move the weights; it may lie in the one given."""

    def state(self) -> Arrays:
        """What a checkpoint needs beside the correction's folder."""

    def restore(self, state: Arrays) -> None:
        """Go on from a checkpoint; before `begin`."""


class Proximal:
    """FedProx: only the pull back to the start of the round; at 0 it is no correction at all.

    Source:
        Li et al. (2020), arXiv:1812.06127, algorithm 2.
    """

    per_site = False

    def __init__(self, proximal: float = 0.0) -> None:
        self.proximal = proximal

    def begin(self, base: Arrays) -> None:
        """Nothing."""

    def of(self, site: str) -> None:
        """Nothing."""

    def take(self, site: str, update: Arrays, weight: float) -> None:
        """Nothing to learn."""

    def finish(self, update: Arrays) -> Arrays:
        """The update as it is."""
        return update

    def state(self) -> Arrays:
        """Nothing."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to go on with."""


class Scaffold:
    """SCAFFOLD: each site's gradient is corrected by how it differed from the others' before.

    ``c_i`` is the mean gradient that site i reported last, by option II of the paper:
    ``c_i - c - update_i / step_length``. c is their mean by the sites' weights, so that the corrections
    of all sites together do not move the weighted mean. A site not heard of yet is not corrected (the paper
    starts its ``c_i`` at zero, so that c would count fully beside the site's own gradient).

    Args:
        folder: Keeps one file per site, and the last but one of each.
        step_length: Learning rate times steps of a round at a site: public, and equal at all of them.

    Raises:
        CannotCombine: ``step_length`` is not positive and finite.

    Source:
        Karimireddy et al. (2020), arXiv:1910.06378, algorithm 1.
    """

    proximal = 0.0
    per_site = True

    def __init__(self, *, folder: Path, step_length: float) -> None:
        if not 0 < step_length < math.inf:
            raise CannotCombine(
                f"scaffold expects {step_length=} (learning rate times steps) positive and finite"
            )
        self._variates, self._step_length = Variates(folder), step_length

    def begin(self, base: Arrays) -> None:
        """Start a round."""
        self._variates.begin(base)

    def of(self, site: str) -> Arrays | None:
        """The mean of all control variates minus the site's own."""
        if site not in self._variates:
            return None
        mean, variates = self._variates.mean, self._variates
        return variates.arrays(lambda at: at.of(mean) - variates.at(site, at))

    def take(self, site: str, update: Arrays, weight: float) -> None:
        """Replace the site's control variate."""
        known, mean = site in self._variates, self._variates.mean

        def values(at: Piece) -> Values:
            reported = at.of(update).astype(np.float64) / -self._step_length
            return reported + self._variates.at(site, at) - at.of(mean) if known else reported

        self._variates.replace(site, values, weight=weight)

    def finish(self, update: Arrays) -> Arrays:
        """The update as it is; the new control variates hold from now on."""
        self._variates.finish()
        return update

    def state(self) -> Arrays:
        """Which files hold, with their weights."""
        return self._variates.state()

    def restore(self, state: Arrays) -> None:
        """Go on with these files."""
        self._variates.restore(state)


class FedDyn:
    """FedDyn: each site's objective is bent so that its optimum is that of all.

    ``h_i`` falls by ``alpha · update_i`` each time; a site adds ``-h_i + alpha · (weights - start)``, and the
    coordinator moves the weights by the mean update minus ``h / alpha``, h being the mean of all ``h_i``
    heard of by the sites' weights (the paper's is the plain mean over all sites there are).

    Args:
        folder: Keeps one file per site, and the last but one of each.
        alpha: Strength, > 0; also the proximal term.

    Source:
        Acar et al. (2021), arXiv:2111.04263, algorithm 1.
    """

    per_site = True

    def __init__(self, *, folder: Path, alpha: float) -> None:
        self._variates, self.proximal = Variates(folder), alpha

    def begin(self, base: Arrays) -> None:
        """Start a round."""
        self._variates.begin(base)

    def of(self, site: str) -> Arrays | None:
        """The negative of the site's ``h_i``."""
        if site not in self._variates:
            return None
        return self._variates.arrays(lambda at: -self._variates.at(site, at))

    def take(self, site: str, update: Arrays, weight: float) -> None:
        """Lower the site's ``h_i``."""
        known = site in self._variates

        def values(at: Piece) -> Values:
            change = -self.proximal * at.of(update).astype(np.float64)
            return change + self._variates.at(site, at) if known else change

        self._variates.replace(site, values, weight=weight)

    def finish(self, update: Arrays) -> Arrays:
        """The mean update minus ``h / alpha``."""
        self._variates.finish()
        mean = self._variates.mean
        return fitted(
            update,
            lambda at: at.of(update).astype(np.float64) - at.of(mean).astype(np.float64) / self.proximal,
            what="the update of FedDyn",
            into=update,
        )

    def state(self) -> Arrays:
        """Which files hold, with their weights."""
        return self._variates.state()

    def restore(self, state: Arrays) -> None:
        """Go on with these files."""
        self._variates.restore(state)
