"""What the image tower sees is what the exported processor makes, and its identity is exact."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoders.errors import EncoderError
from encoders.preprocessing import Preprocessing, alike, with_channels
from tests.encoders.micro import random_colours, random_images

ROOT = Path(__file__).resolve().parents[2]
OURS = Preprocessing(image_size=32)


@settings(max_examples=30, deadline=None)
@given(
    packed=st.integers(8, 80),
    size=st.sampled_from([16, 32, 48]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.05, 1)] * 3),
    resample=st.sampled_from([0, 2, 3]),
    coloured=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pixel_values_are_those_of_the_hugging_face_processor(
    packed: int,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resample: int,
    coloured: bool,
    seed: int,
) -> None:
    ours = Preprocessing(image_size=size, mean=mean, std=std, resample=resample)
    images = (random_colours if coloured else random_images)(2, size=packed, seed=seed)
    pixels = ours.normalise(torch.from_numpy(ours.resize(images)))
    theirs = ours.processor()(
        [Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt"
    )
    torch.testing.assert_close(pixels, theirs["pixel_values"], rtol=1e-5, atol=1e-5)


def test_an_image_of_the_right_size_is_left_alone_in_a_copy() -> None:
    images = random_images(2)
    resized = OURS.resize(images)
    assert np.array_equal(resized, images)
    assert not np.shares_memory(resized, images)


def test_no_images_are_no_images() -> None:
    assert OURS.resize(random_images(0, size=40)).shape == (0, 32, 32)


def test_grey_images_are_seen_as_three_equal_channels() -> None:
    grey = random_images(2, size=40)
    packed = OURS.resize(grey), OURS.resize(with_channels(grey))
    assert [each.shape for each in packed] == [(2, 32, 32), (2, 32, 32, 3)]
    seen, as_channels = (OURS.normalise(torch.from_numpy(each)) for each in packed)
    assert torch.equal(seen, as_channels)


def test_stacks_are_made_alike_only_where_they_have_to_be() -> None:
    grey, colour = random_images(2), random_colours(1)
    assert [each.shape for each in alike([grey, grey])] == [grey.shape] * 2
    first, second = alike([grey, colour])
    assert first.shape == (2, 32, 32, 3)
    assert np.array_equal(second, colour)
    assert np.array_equal(OURS.normalise(torch.from_numpy(first)), OURS.normalise(torch.from_numpy(grey)))


@pytest.mark.parametrize("shape", [(32, 32), (2, 32, 40), (2, 32, 32, 2), (2, 3, 32, 32), (2, 32, 32, 3, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"square images of shape \(N, S, S\) or .*, got"):
        OURS.resize(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"image_size": 0}, "expected image_size=0 >= 1"),
        ({"mean": (0.5,)}, "3 means and positive deviations"),
        ({"std": (1.0, 0.0, 1.0)}, "3 means and positive deviations"),
        ({"std": (1.0, 1.0, float("nan"))}, "3 means and positive deviations"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(EncoderError, match=text):
        Preprocessing(**{"image_size": 32, **wrong})


def test_the_digest_knows_every_setting() -> None:
    others = [
        replace(OURS, image_size=48),
        replace(OURS, mean=(0.5, 0.5, 0.4)),
        replace(OURS, std=(0.25, 0.25, 0.26)),
        replace(OURS, resample=2),
    ]
    assert len({each.digest for each in (OURS, *others)}) == 5
    assert Preprocessing.parse(OURS.describe()) == OURS


def test_the_digest_is_the_same_in_another_process() -> None:
    script = "from encoders.preprocessing import Preprocessing as P; print(P(image_size=32).digest)"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert other.stdout.strip() == OURS.digest


@pytest.mark.parametrize(
    ("settings_read", "size"),
    [
        ({"size": 48, "crop_size": 48}, 48),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}}, 48),
        ({"size": {"height": 64, "width": 64}, "do_center_crop": False}, 64),
        ({"size": {"shortest_edge": 64}, "do_center_crop": False}, 64),
        ({}, 224),
    ],
)
def test_every_spelling_of_the_size_is_understood(settings_read: dict[str, Any], size: int) -> None:
    assert Preprocessing.from_processor(settings_read).image_size == size


def test_what_a_processor_leaves_out_has_its_own_default_not_ours() -> None:
    read = Preprocessing.from_processor({"size": 48, "crop_size": 48})
    assert read.mean == (0.48145466, 0.4578275, 0.40821073)
    assert read.std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_with_a_step_switched_off_is_refused(step: str) -> None:
    with pytest.raises(EncoderError, match=f"the image processor has {step} = false"):
        Preprocessing.from_processor({"size": 48, step: False})
