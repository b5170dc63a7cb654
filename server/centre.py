"""The centre of all sites' image features: a public one, and the way from it to theirs, found once a run."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import RunError
from server.sums import SiteSum
from strategies.files import write_bytes
from strategies.messages import CENTRE_SUM, CentrePlan

CENTRE_FILE = "centre.npy"


class CentreSum(SiteSum):
    """The sum of all sites' features less a public centre, and of their counts, and the mean in it.

    Args:
        plan: What the sites are asked for.
        public: That centre, float32 (d,).
        private: Whether the sites add noise.
    """

    def __init__(self, plan: CentrePlan, *, public: NDArray[np.float32], private: bool) -> None:
        self._plan, self._public, self._private = plan, public, private
        super().__init__({CENTRE_SUM: np.zeros(len(public) + 1, dtype=np.float32)})

    @property
    def noise(self) -> float:
        """Expected length of the noise in the mean of what was divided: a whole feature would be of length 1.

        The noise of k sites is sqrt(k) times that of one. Infinite where the noisy count is not positive.
        """
        count = self.total[-1] / self._plan.count_weight
        if not count > 0:
            return math.inf
        if not self._private:
            return 0.0
        one = self._plan.noise_multiplier * self._plan.max_norm
        return one * math.sqrt(self.sites * (len(self.total) - 1)) / float(count)

    @property
    def is_used(self) -> bool:
        """Whether the mean is longer than the noise in it can be expected to be."""
        noise = self.noise  # the mean that was found is of both
        return math.isfinite(noise) and float(np.square(self._mean).sum()) > 2 * noise**2

    def centre(self) -> NDArray[np.float32]:
        """The mean feature, float32 (d,); where noise drowns the way to it, the public centre."""
        if not self.is_used:
            return self._public
        moved: NDArray[np.float32] = (math.sqrt(len(self._public)) * self._mean).astype(np.float32)
        return self._public + moved

    @property
    def _mean(self) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = self.total[:-1] / (self.total[-1] / self._plan.count_weight)
        return mean

    def facts(self) -> Mapping[str, Any]:
        """What the run's events say; the sums are public once they are noised."""
        noise = self.noise
        return {
            "sites": self.sites,
            "used": self.is_used,
            "noise": noise if math.isfinite(noise) else None,
            "length": float(np.linalg.norm(self.centre())),
        }


def keep(centre: NDArray[np.float32], path: Path) -> None:
    """Write the centre whole or not at all."""
    content = io.BytesIO()
    np.save(content, centre, allow_pickle=False)
    write_bytes(path, content.getvalue())


def load(path: Path, *, width: int) -> NDArray[np.float32]:
    """The centre that `keep` wrote.

    Raises:
        RunError: the file is damaged, or of another model.
    """
    try:
        centre = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} cannot be read ({error}): begin the run anew in another folder") from error
    if centre.shape != (width,) or centre.dtype != np.float32 or not np.isfinite(centre).all():
        raise RunError(f"{path} is no centre of {width} numbers: begin the run anew in another folder")
    return np.asarray(centre)
