"""Packed images to what the image tower sees; its identity travels with the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from encoders.errors import EncoderError

CHANNELS = 3
GREY_DIMENSIONS = 3  # of a stack of images: (N, S, S)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize a square image and normalise it, in CLIP's way.

    An image is grey, (S, S), and then the same in every channel of the input; or it brings the channels,
    (S, S, 3), as CT windows are packed.

    Guarantees:
        Equal to what the exported model's ``CLIPProcessor`` does to the same image.

    Attributes:
        image_size: Pixels of the square input.
        mean: Subtracted per channel, after scaling to [0, 1].
        std: Divided by, per channel.
        resample: Pillow's number of the filter (3: bicubic, antialiased when shrinking).
    """

    image_size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    resample: int = 3

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise EncoderError(f"expected image_size={self.image_size} >= 1")
        if len(self.mean) != CHANNELS or len(self.std) != CHANNELS or not all(std > 0 for std in self.std):
            raise EncoderError(
                f"expected {CHANNELS} means and positive deviations: {self.mean=}, {self.std=}"
            )

    @classmethod
    def parse(cls, description: dict[str, Any]) -> Self:
        """The preprocessing that `describe` described."""
        return cls(
            image_size=int(description["image_size"]),
            mean=tuple(description["mean"]),
            std=tuple(description["std"]),
            resample=int(description["resample"]),
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready settings."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """Identity of the settings."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def resize(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Square images, uint8 (N, S, S) or (N, S, S, 3), at the model's size, (N, H, H) or (N, H, H, 3)."""
        size, channels = self.image_size, images.shape[3:]
        if images.ndim < 3 or images.shape[1] != images.shape[2] or channels not in ((), (CHANNELS,)):
            raise EncoderError(
                f"expected square images of shape (N, S, S) or (N, S, S, {CHANNELS}), got {images.shape}"
            )
        if images.shape[1] == size:
            return np.array(images)
        resized = np.empty((len(images), size, size, *channels), dtype=np.uint8)
        for row, image in enumerate(images):
            scaled = Image.fromarray(image).resize((size, size), Image.Resampling(self.resample))
            resized[row] = np.asarray(scaled)
        return resized

    def normalise(self, images: Tensor) -> Tensor:
        """Resized images, uint8 (B, H, H) or (B, H, H, 3), as float32 pixel values (B, 3, H, H)."""
        channels = images.unsqueeze(-3) if images.ndim == GREY_DIMENSIONS else images.movedim(-1, -3)
        # Contiguous: Opacus' convolution reads memory as channels first, whatever the strides say.
        scaled = channels.contiguous().to(torch.float32).div(255)
        shape = (CHANNELS, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (scaled - mean) / std

    def processor(self) -> CLIPImageProcessorPil:
        """The same steps as a Hugging Face image processor."""
        size = {"height": self.image_size, "width": self.image_size}
        return CLIPImageProcessorPil(
            size=size,
            crop_size=size,
            resample=self.resample,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )

    @classmethod
    def from_processor(cls, settings: dict[str, Any]) -> Self:
        """Read a Hugging Face ``preprocessor_config.json``; what it leaves out has the library's default.

        Where the file resizes to more than it then crops, the whole image is resized to the crop: findings
        lie at the border too.

        Raises:
            EncoderError: a step of CLIP's preprocessing is switched off.
        """
        processor = CLIPImageProcessorPil(**settings)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(processor, step):
                raise EncoderError(f"the image processor has {step} = false; only CLIP's own steps are known")
        size = processor.crop_size if processor.do_center_crop else processor.size
        return cls(
            image_size=int(size["height"] or size["shortest_edge"]),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            resample=int(processor.resample),
        )


def with_channels(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, S, S) or (N, S, S, 3) as (N, S, S, 3), which the tower sees alike: grey is repeated."""
    return images if images.ndim > GREY_DIMENSIONS else np.repeat(images[..., None], CHANNELS, axis=-1)


def alike(stacks: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Stacks of images, all with channels where one of them has, else all grey."""
    mixed = any(images.ndim > GREY_DIMENSIONS for images in stacks)
    return [with_channels(images) if mixed else images for images in stacks]
