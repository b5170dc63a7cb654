"""A bank takes its sources in turn, holds no text twice, and gives no side more rows than the other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.banks import PublicAnchors, anchor_bank, label_prompts, noise_images
from tasks.prompts import PROMPTS

NOISE = noise_images(8, size=16)


@pytest.mark.parametrize("size", [1, 16, 30, 33])
def test_noise_images_have_the_asked_size_and_are_always_the_same(size: int) -> None:
    images = noise_images(5, size=size).images
    assert images.shape == (5, size, size)
    assert images.dtype == np.uint8
    assert np.array_equal(noise_images(5, size=size).images, images)
    assert len({image.tobytes() for image in noise_images(50, size=16).images}) == 50


def test_label_prompts_hold_both_sides_of_every_finding() -> None:
    texts = set(label_prompts().texts)
    for pair in PROMPTS.values():
        assert {*pair.positive, *pair.negative} <= texts


def test_sources_take_turns_until_they_run_out() -> None:
    own = np.full((2, 16, 16), 7, dtype=np.uint8)
    one, two = PublicAnchors(texts=("a", "b", "c")), PublicAnchors(texts=("A", "d"), images=own)
    bank = anchor_bank([one, two, NOISE], count=10)
    assert bank.texts == ("a", "b", "d", "c")
    assert np.array_equal(bank.images, [own[0], NOISE.images[0], own[1], NOISE.images[1]])


@given(
    texts=st.lists(st.lists(st.text("abAB", min_size=1, max_size=2), max_size=6), min_size=1, max_size=3),
    images=st.integers(1, 8),
    count=st.integers(1, 10),
)
def test_a_bank_is_even_distinct_and_a_prefix_of_a_larger_one(
    texts: list[list[str]], images: int, count: int
) -> None:
    sources = [*(PublicAnchors(texts=tuple(each)) for each in texts), noise_images(images, size=4)]
    everything = {text.lower() for each in texts for text in each}
    if not everything:
        return
    bank = anchor_bank(sources, count=count)
    assert len(bank.texts) == len(bank.images) == min(count, images, len(everything))
    assert len({text.lower() for text in bank.texts}) == len(bank.texts)
    larger = anchor_bank(sources, count=count + 1)
    assert larger.texts[: len(bank.texts)] == bank.texts
    assert np.array_equal(larger.images[: len(bank.images)], bank.images)
