"""Prototypes of a site's training patients: sums of embeddings by concept, noised before they leave."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from client.batches import Rows, made_up_pairs
from encoders.fitting import Pairs
from encoders.parts import TrainablePart
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES, Modality
from privacy.probes import refuse_mixed_rows
from privacy.prototypes import PrototypeRelease, RawRows
from strategies.messages import PROTOTYPE_SUMS, Arrays
from tasks.concepts import Studies, members, named_concepts

EMBED_ROWS = 256
PROBE_ROWS = 6


def release_prototypes(
    part: TrainablePart,
    pairs: Pairs,
    *,
    patients: Rows,
    labels: Mapping[str, NDArray[np.float32]],
    texts: Sequence[str],
    modalities: tuple[Modality, ...] = MODALITIES,
    mechanism: PrototypeRelease,
    noise: GaussianNoise,
) -> Arrays:
    """Release sums and counts of all training patients, once.

    Guarantees:
        The result is one release of ``mechanism``: a patient's rows are embedded on their own, by weights
        that the coordinator knows or that noised steps made, and join concepts by their own labels and
        reports alone.

    Args:
        part: Has the round's weights in it.
        pairs: N training pairs.
        patients: Patient number of each pair, shape (N,).
        labels: By finding, 1 there, 0 ruled out, else unknown, shape (N,); findings may lack.
        texts: N reports.
        modalities: Those that the site has; of the other its release is noise alone.
        mechanism: Bound, noise and concepts.
        noise: Its source, of this release alone.

    Returns:
        One array, float32 (2, K, d + 1): see `privacy.prototypes.NoisySums`.

    Raises:
        UnsoundTraining: the module embeds a row by other rows too; no patient's pair was looked at.
    """
    part.module.eval()
    made_up = made_up_pairs(part, like=pairs, rows=PROBE_ROWS)
    refuse_mixed_rows(part.module, (made_up.images, part.trimmed(made_up.texts)))
    raw_sums = _raw_sums(part, pairs, patients, labels, texts, modalities, mechanism)
    return {PROTOTYPE_SUMS: mechanism.release(raw_sums, noise).values}


def raw_prototypes(
    part: TrainablePart,
    pairs: Pairs,
    *,
    patients: Rows,
    labels: Mapping[str, NDArray[np.float32]],
    texts: Sequence[str],
    modalities: tuple[Modality, ...] = MODALITIES,
    mechanism: PrototypeRelease,
) -> Arrays:
    """The same sums without noise, for runs without privacy: no guarantee of any kind."""
    raw_sums = _raw_sums(part, pairs, patients, labels, texts, modalities, mechanism)
    return {PROTOTYPE_SUMS: raw_sums.astype(np.float32)}


def _raw_sums(
    part: TrainablePart,
    pairs: Pairs,
    patients: Rows,
    labels: Mapping[str, NDArray[np.float32]],
    texts: Sequence[str],
    modalities: tuple[Modality, ...],
    mechanism: PrototypeRelease,
) -> NDArray[np.float64]:
    stated = members(named_concepts(mechanism.concepts), Studies(labels, texts))
    raw: dict[Modality, RawRows] = {
        modality: RawRows(
            patients=patients, embeddings=_raw_embeddings(part, pairs, modality), members=stated
        )
        for modality in modalities
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
