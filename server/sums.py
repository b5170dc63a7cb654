"""What sites release beside updates, added up: the sum of an array, and of how many sites it is."""

import numpy as np

from strategies.messages import Arrays, check_update


class SiteSum:
    """Adds releases up, one at a time; in an exchange it stands where a strategy stands.

    Every site's noise is of one size, so the noise of k sites is sqrt(k) times that: of those in the sum, and
    not of those that were asked. No site is weighed, since a sum over patients is weighed by its patients
    already; a weight of k says that k sites stand behind an update, which is their mean (a secure sum).

    Args:
        like: The one array of a release, for its name and shape.

    Attributes:
        like: The same.
        total: The sum.
        sites: Those in it.
    """

    def __init__(self, like: Arrays) -> None:
        self.like = like
        (self._name,) = like
        self.begin(like)

    def begin(self, base: Arrays) -> None:
        """Start from nothing."""
        self.total = np.zeros(base[self._name].shape)
        self.sites = 0

    def correction_for(self, site: str) -> Arrays | None:
        """Nothing: no gradient is computed."""
        return None

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add a release, or the mean of ``weight`` of them.

        Raises:
            MessageError: it is none of this plan, or not finite.
        """
        check_update(update, self.like)
        self.total += weight * update[self._name].astype(np.float64)
        self.sites += round(weight)
