"""Frozen towers: what they make of a row is worked out before any engine sees it, so they are probed too."""

import numpy as np
import torch
from torch import Tensor, nn

from encoders.parts import TrainablePart
from privacy.probes import refuse_mixed_rows

PROBE_ROWS = 6


def refuse_mixed_inputs(part: TrainablePart) -> None:
    """Refuse a part whose frozen towers make of a row what other rows say.

    The probes of losses and embeddings begin at the part's module. What lies before it would couple patients
    unseen: in the centre, in prototypes, and in every step of training.

    Raises:
        UnsoundTraining: naming the first layer that mixes made-up rows; no patient's file was opened.
    """
    refuse_mixed_rows(_FrozenSides(part), (torch.arange(PROBE_ROWS),))


class _FrozenSides(nn.Module):
    """Numbers of made-up rows to what frozen towers make of these; pixels and token ids are left out."""

    def __init__(self, part: TrainablePart) -> None:
        super().__init__()
        rng, size = np.random.default_rng(0), part.encoder.preprocessing.image_size
        self.model = part.encoder.model  # its layers are seen, so that one can be named
        self._part = part
        self._images = rng.integers(0, 256, size=(PROBE_ROWS, size, size), dtype=np.uint8)
        # The longest text is in both halves of the rows, so that layers are as long in each.
        words = (6, 6, 1, 2, 3, 4)
        self._texts = [" ".join(map(str, (np.arange(count) + count) % 10)) for count in words]

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        picked = rows.tolist()
        inputs = self._part.inputs(self._images[picked], [self._texts[row] for row in picked])
        return tuple(side for side in inputs if side.is_floating_point())
