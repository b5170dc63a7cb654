"""The smallest CLIP with everything in it, for tests: two towers of width 16, 32-pixel images."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel

from encoders.clip import ClipEncoder
from encoders.preprocessing import Preprocessing
from encoders.tokenizer import TextTokenizer, train_vocabulary

IMAGE_SIZE, MAX_TOKENS, EMBEDDING = 32, 12, 8
TEXTS = (
    "clear lungs",
    "small left pleural effusion",
    "large heart",
    "",
    "no pneumothorax, no effusion and no consolidation in either of the lungs today",
    "Überprüft: 肺 🫁",
)


@functools.cache
def micro_tokenizer() -> TextTokenizer:
    return TextTokenizer.parse({**train_vocabulary(TEXTS * 2, size=560), "max_tokens": MAX_TOKENS})


def micro_encoder(*, seed: int = 0, spread: float = 0.2, image_size: int = IMAGE_SIZE) -> ClipEncoder:
    """Weights are moved far from their start, so that no bias is zero and no two inputs embed alike."""
    tokenizer = micro_tokenizer()
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": EMBEDDING,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": tokenizer.vocabulary_size,
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.hugging_face.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": 16},
        projection_dim=EMBEDDING,
    )
    model = CLIPModel._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(spread * torch.randn(value.shape, generator=generator) + (value.ndim == 1))
        model.logit_scale.fill_(2.0)
    return ClipEncoder(model=model, tokenizer=tokenizer, preprocessing=Preprocessing(image_size=image_size))


def random_images(count: int, *, size: int = IMAGE_SIZE, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size), dtype=np.uint8)


def random_colours(count: int, *, size: int = IMAGE_SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Images with three channels, as CT windows are packed."""
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)
