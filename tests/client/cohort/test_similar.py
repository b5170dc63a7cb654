"""Images and texts that are nearly the same."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from client.cohort import similar
from client.cohort.similar import near_images, near_texts, perceptual_hashes

SIZE = 64
NORMAL = "the heart size is normal and the lungs are clear without effusion or pneumothorax or fracture today"


def picture(seed: int) -> NDArray[np.uint8]:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(SIZE, SIZE)), 6)
    return np.asarray(np.interp(noise, (noise.min(), noise.max()), (20, 220)), dtype=np.uint8)


def jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


def groups(found: list[NDArray[np.intp]]) -> list[list[int]]:
    return [group.tolist() for group in found]


def test_changed_copies_are_found_and_other_pictures_are_not() -> None:
    images = np.stack([picture(seed) for seed in range(20)])
    brighter = np.clip(images[3].astype(int) + 12, 0, 255).astype(np.uint8)
    whole = np.concatenate([images, images[7:8], jpeg(images[2])[None], brighter[None], jpeg(brighter)[None]])
    assert groups(near_images(whole)) == [[2, 21], [3, 22, 23], [7, 20]]


def test_a_grey_image_is_the_same_with_and_without_channels() -> None:
    images = np.stack([picture(seed) for seed in (1, 2, 1)])
    channels = np.stack([images] * 3, axis=-1)
    np.testing.assert_array_equal(perceptual_hashes(channels), perceptual_hashes(images))
    assert groups(near_images(channels)) == [[0, 2]]


def test_none_and_one_image_have_no_neighbour() -> None:
    assert near_images(np.zeros((0, SIZE, SIZE), dtype=np.uint8)) == []
    assert near_images(picture(0)[None]) == []


def test_equal_hashes_of_other_pictures_do_not_convict() -> None:
    images = np.stack([picture(1), picture(2)])
    assert near_images(images, np.array([5, 5], dtype=np.uint64)) == []
    assert near_images(images, np.array([5, 6], dtype=np.uint64)) == []


@given(arrays.arrays(np.uint64, st.integers(1, 30), elements=st.integers(0, 2**63 - 1)), st.data())
def test_every_pair_within_three_bits_is_a_suspect(hashes: NDArray[np.uint64], data: st.DataObject) -> None:
    bits = data.draw(st.sets(st.integers(0, 62), min_size=1, max_size=3))
    near = hashes[:1] ^ np.uint64(sum(1 << bit for bit in bits))
    distinct = np.unique(np.concatenate([hashes, near]))
    found = set(similar._near_hashes(distinct))
    for one in range(len(distinct)):
        for other in range(one + 1, len(distinct)):
            is_near = bin(int(distinct[one]) ^ int(distinct[other])).count("1") <= 3
            assert ((one, other) in found) == is_near


@pytest.mark.parametrize("size", [16, 32, 50, 224])
def test_every_size_has_a_hash(size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, size, size), dtype=np.uint8)
    hashes = perceptual_hashes(image)
    assert len(set(hashes.tolist())) == 3
    assert int(hashes.max()) < 2**63


def test_texts_with_few_other_words_are_found() -> None:
    texts = [
        NORMAL,
        "No acute disease.",
        NORMAL.replace("fracture", "mass") + ".",
        " ".join(NORMAL.split()[::-1]),
        "No acute disease.",
        NORMAL.upper(),
    ]
    assert groups(near_texts(texts)) == [[0, 5]]
    similar_ones = [f"{NORMAL} {NORMAL} seen by {number}" for number in ("one", "two")]
    assert groups(near_texts([*texts, *similar_ones])) == [[0, 5], [6, 7]]


def test_no_texts_have_no_neighbours() -> None:
    assert near_texts([]) == near_texts([""]) == near_texts(["", "a b c"]) == []
