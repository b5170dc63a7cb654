"""Mean losses that sites released with noise, for strategies that weigh sites by them."""

import numpy as np

from strategies.messages import MEAN_LOSS, Arrays, check_update

LIKE: Arrays = {MEAN_LOSS: np.zeros(1, dtype=np.float32)}


class MeanLosses:
    """Collects them; in an exchange it stands where a strategy stands."""

    def __init__(self) -> None:
        self.by_site: dict[str, float] = {}

    def begin(self, base: Arrays) -> None:
        """Start from nothing."""
        self.by_site = {}

    def correction_for(self, site: str) -> Arrays | None:
        """Nothing: no gradient is computed."""
        return None

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Keep a site's.

        Raises:
            MessageError: it is no single finite number.
        """
        check_update(update, LIKE)
        self.by_site[site] = float(update[MEAN_LOSS][0])
