"""Prototypes of a site's training patients: sums of embeddings by concept, noised before they leave."""

import numpy as np
import torch
from numpy.typing import NDArray

from client.batches import made_up_pairs
from client.workbench import TrainingPairs
from encoders.fitting import Pairs
from encoders.parts import TrainablePart
from privacy.noise import GaussianNoise
from privacy.noisy_sums import Modality
from privacy.probes import refuse_mixed_rows
from privacy.prototypes import PrototypeRelease, RawRows
from strategies.messages import PROTOTYPE_SUMS, Arrays
from tasks.concepts import Studies, members, named_concepts

EMBED_ROWS = 256
PROBE_ROWS = 6


def release_prototypes(
    part: TrainablePart, known: TrainingPairs, *, mechanism: PrototypeRelease, noise: GaussianNoise
) -> Arrays:
    """Release sums and counts of all training patients, once.

    Guarantees:
        The result is one release of ``mechanism``: a patient's rows are embedded on their own, by weights
        that the coordinator knows or that noised steps made, and join concepts by their own labels and
        reports alone.

    Args:
        part: Has the round's weights in it.
        known: The site's training pairs; of a side that is not there the release is noise alone.
        mechanism: Bound, noise and concepts.
        noise: Its source, of this release alone.

    Returns:
        One array, float32 (2, K, d + 1): see `privacy.prototypes.NoisySums`.

    Raises:
        UnsoundTraining: the module embeds a row by other rows too; no patient's pair was looked at.
    """
    part.module.eval()
    made_up = made_up_pairs(part, like=known.pairs, rows=PROBE_ROWS)
    refuse_mixed_rows(part.module, (made_up.images, part.trimmed(made_up.texts)))
    return {PROTOTYPE_SUMS: mechanism.release(_raw_sums(part, known, mechanism), noise).values}


def raw_prototypes(part: TrainablePart, known: TrainingPairs, *, mechanism: PrototypeRelease) -> Arrays:
    """The same sums without noise, for runs without privacy: no guarantee of any kind."""
    return {PROTOTYPE_SUMS: _raw_sums(part, known, mechanism).astype(np.float32)}


def _raw_sums(part: TrainablePart, known: TrainingPairs, mechanism: PrototypeRelease) -> NDArray[np.float64]:
    stated = members(named_concepts(mechanism.concepts), Studies(known.labels, known.texts))
    raw: dict[Modality, RawRows] = {
        modality: RawRows(
            patients=known.patients,
            embeddings=_raw_embeddings(part, known.pairs, modality),
            members=stated,
        )
        for modality in known.modalities
    }
    return mechanism.clipped_sum(raw)


@torch.no_grad()
def _raw_embeddings(part: TrainablePart, pairs: Pairs, modality: Modality) -> NDArray[np.float32]:
    """Unit vectors (N, d) of one side of the pairs."""
    if modality == "image":
        raw = [part.module.embed_images(rows).cpu() for rows in torch.split(pairs.images, EMBED_ROWS)]
    else:
        raw = [
            part.module.embed_texts(part.trimmed(rows)).cpu() for rows in torch.split(pairs.texts, EMBED_ROWS)
        ]
    return torch.cat(raw).numpy()
