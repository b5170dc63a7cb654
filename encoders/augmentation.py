"""Random shift, contrast and brightness. No flips: left is not right."""

import numpy as np
import torch
from torch import Tensor

LARGEST_SHIFT = 1 / 12
CONTRAST = 0.2
BRIGHTNESS = 25


def augment(images: Tensor, *, rng: np.random.Generator) -> Tensor:
    """Each image, uint8 (B, H, H), moved by up to H/12 pixels and re-exposed, in a new tensor."""
    count, size, _ = images.shape
    reach = max(1, round(size * LARGEST_SHIFT))
    shifts = torch.from_numpy(rng.integers(-reach, reach + 1, size=(count, 2, 1)))
    rows, columns = (torch.arange(size) + shifts).clamp(0, size - 1).to(images.device).unbind(1)
    each = torch.arange(count, device=images.device).view(-1, 1, 1)
    moved = images[each, rows.unsqueeze(2), columns.unsqueeze(1)].to(torch.float32)  # the border repeats
    contrast, brightness = (
        torch.from_numpy(rng.uniform(-spread, spread, size=(count, 1, 1)).astype(np.float32)).to(
            images.device
        )
        for spread in (CONTRAST, BRIGHTNESS)
    )
    exposed = (moved - 128) * (1 + contrast) + 128 + brightness
    return exposed.clamp(0, 255).round().to(torch.uint8)
