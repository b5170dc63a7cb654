"""Random shift, contrast and brightness. No flips: left is not right."""

import numpy as np
import torch
from torch import Tensor

LARGEST_SHIFT = 1 / 12
CONTRAST = 0.2
BRIGHTNESS = 25


def augment(images: Tensor, *, rng: np.random.Generator) -> Tensor:
    """Each image moved by up to H/12 pixels and re-exposed, in a new tensor; uint8 (B, H, H) or (B, H, H, C).

    All channels of an image alike: they are aligned, and each is a window of the same values.
    """
    count, size = images.shape[:2]
    reach = max(1, round(size * LARGEST_SHIFT))
    shifts = torch.from_numpy(rng.integers(-reach, reach + 1, size=(count, 2, 1)))
    rows, columns = (torch.arange(size) + shifts).clamp(0, size - 1).to(images.device).unbind(1)
    each = torch.arange(count, device=images.device).view(-1, 1, 1)
    moved = images[each, rows.unsqueeze(2), columns.unsqueeze(1)].to(torch.float32)  # the border repeats
    each_once = (count, *[1] * (images.ndim - 1))
    contrast, brightness = (
        torch.from_numpy(rng.uniform(-spread, spread, size=each_once).astype(np.float32)).to(images.device)
        for spread in (CONTRAST, BRIGHTNESS)
    )
    exposed = (moved - 128) * (1 + contrast) + 128 + brightness
    return exposed.clamp(0, 255).round().to(torch.uint8)
