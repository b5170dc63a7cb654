"""The sum of image features less a public centre, by which the centre of all sites is found: once a run."""

import math

import numpy as np
from numpy.typing import NDArray

from client.batches import Rows
from encoders.fitting import Pairs
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES
from privacy.prototypes import PrototypeRelease, RawRows
from strategies.messages import CENTRE_SUM, Arrays

_IMAGE = MODALITIES.index("image")


def release_centre(
    pairs: Pairs,
    *,
    patients: Rows,
    public: NDArray[np.float32],
    mechanism: PrototypeRelease,
    noise: GaussianNoise,
) -> Arrays:
    """Release the sum over all training patients, once.

    Guarantees:
        The result is a part of one release of ``mechanism``: a patient adds the mean of their own images'
        features less ``public``, divided by the root of their length, and one to the count, bounded together.

    Args:
        pairs: N training pairs; the images are features of a frozen tower.
        patients: Patient number of each pair, shape (N,).
        public: What is public of the centre, shape (d,): what is left is short, and so is its bound.
        mechanism: Bound and noise, of one concept that every image states.
        noise: Its source, of this release alone.

    Returns:
        One array, float32 (d + 1,): the sum of the divided features and, last, the weight of the count.
    """
    raw_sum = _raw_sums(pairs, patients, public, mechanism)
    return {CENTRE_SUM: mechanism.release(raw_sum, noise).values[_IMAGE, 0]}


def raw_centre(
    pairs: Pairs, *, patients: Rows, public: NDArray[np.float32], mechanism: PrototypeRelease
) -> Arrays:
    """The same sum without noise, for runs without privacy: no guarantee of any kind."""
    return {CENTRE_SUM: _raw_sums(pairs, patients, public, mechanism)[_IMAGE, 0].astype(np.float32)}


def _raw_sums(
    pairs: Pairs, patients: Rows, public: NDArray[np.float32], mechanism: PrototypeRelease
) -> NDArray[np.float64]:
    raw_features = (pairs.images.cpu().numpy() - public) / math.sqrt(mechanism.dimension)
    rows = RawRows(
        patients=patients, embeddings=raw_features, members=np.ones((len(pairs), 1), dtype=np.float32)
    )
    return mechanism.clipped_sum({"image": rows})
