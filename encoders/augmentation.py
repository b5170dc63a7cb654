"""Random shift, contrast and brightness. No flips: left is not right."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_SHIFT = 1 / 12
CONTRAST = 0.2
BRIGHTNESS = 25


def augment(images: Tensor, *, rng: np.random.Generator) -> Tensor:
    """Each image, uint8 (B, H, H), moved by up to H/12 pixels and re-exposed, in a new tensor."""
    count, size, _ = images.shape
    reach = max(1, round(size * LARGEST_SHIFT))
    padded = F.pad(images.to(torch.float32).unsqueeze(1), (reach,) * 4, mode="replicate").squeeze(1)
    shifts = rng.integers(0, 2 * reach + 1, size=(count, 2))
    moved = torch.stack(
        [
            image[top : top + size, left : left + size]
            for image, (top, left) in zip(padded, shifts, strict=True)
        ]
    )
    contrast, brightness = (
        torch.from_numpy(rng.uniform(-spread, spread, size=(count, 1, 1)).astype(np.float32)).to(
            images.device
        )
        for spread in (CONTRAST, BRIGHTNESS)
    )
    exposed = (moved - 128) * (1 + contrast) + 128 + brightness
    return exposed.clamp(0, 255).round().to(torch.uint8)
