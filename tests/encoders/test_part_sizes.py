"""What a part of ViT-B/16 weighs on the way: LoRA at most a hundredth of it, prompts next to nothing."""

import numpy as np
import pytest

from encoders.clip import ClipEncoder, build
from encoders.parts import PartName, trainable_part
from strategies.messages import PROTOTYPE_SUMS
from strategies.share import trained
from strategies.wire import size_of
from tasks.prompts import PROMPTS
from tests.small_hospitals import plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return build("vit-b-16", image_size=224, max_tokens=77, seed=0, inverse_temperature=14.3)


def sent(encoder: ClipEncoder, part: PartName, **changes: object) -> int:
    asked = plan(part=part, lora_rank=4, **changes)
    arrays = trainable_part(encoder, part, lora_rank=4).arrays()
    names = trained(arrays, asked, 1)
    return size_of({name: arrays[name] for name in names}, asked.wire)


def test_lora_is_at_most_a_hundredth_and_the_others_as_documented(encoder: ClipEncoder) -> None:
    whole = 4 * sum(value.numel() for value in encoder.model.parameters())
    lora, heads, prompts = (sent(encoder, part) for part in ("lora", "heads", "prompts"))
    assert lora <= whole / 100
    assert (heads, prompts) == (4 * (768 * 512 + 512 * 512), 4 * 16 * 512)
    assert sent(encoder, "lora", wire="int8") < lora / 3
    assert sent(encoder, "lora", wire="bf16") == lora / 2


def test_prototypes_are_at_most_100_kilobytes() -> None:
    like = {PROTOTYPE_SUMS: np.zeros((2, 2 * len(PROMPTS), 512 + 1), dtype=np.float32)}
    assert size_of(like, "bf16") <= 100_000
