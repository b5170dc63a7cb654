"""Writing in the pixels."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from client.cohort.burned_in import has_text
from client.cohort.resizing import fit_square
from clipward.synthetic import hospitals
from clipward.synthetic.pairs import synthetic_pairs

NAME = "DOE JOHN 12.03.1956"


@pytest.fixture(scope="module")
def phantoms() -> NDArray[np.uint8]:
    """Synthetic radiographs with a side marker, at the size of packed images."""
    assert hospitals.PUBLIC_SCANNER.marker == "L"
    images, _ = synthetic_pairs(12, seed=3)
    return np.stack([fit_square(image.astype(np.float32) / 255, size=224) for image in images])


def written(image: NDArray[np.uint8], text: str, *, size: int, corner: int, grey: int) -> NDArray[np.uint8]:
    picture = Image.fromarray(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    right, bottom = picture.width - draw.textlength(text, font) - 4, picture.height - size - 6
    draw.text(((4, right)[corner % 2], (4, bottom)[corner // 2]), text, fill=grey, font=font)
    return np.asarray(picture)


def test_anatomy_devices_and_side_markers_are_no_text(phantoms: NDArray[np.uint8]) -> None:
    assert not any(has_text(image) for image in phantoms)


@pytest.mark.parametrize("size", [8, 10, 14])
@pytest.mark.parametrize("text", [NAME, "MRN 4711-08"])
def test_names_and_numbers_are_found(phantoms: NDArray[np.uint8], text: str, size: int) -> None:
    found = 0
    for number, image in enumerate(phantoms):
        corner = number % 4
        box = image[: size + 6] if corner < 2 else image[-size - 6 :]
        grey = 255 if box.mean() < 128 else 0
        found += has_text(written(image, text, size=size, corner=corner, grey=grey))
    assert found >= 10  # of 12


def test_a_line_that_one_window_shows_is_found(phantoms: NDArray[np.uint8]) -> None:
    image = np.stack([phantoms[0]] * 3, axis=-1)
    assert not has_text(image)
    for channel in range(3):
        shown = image.copy()
        shown[..., channel] = written(phantoms[0], NAME, size=14, corner=0, grey=255)
        assert has_text(shown)


def test_text_in_the_middle_is_not_looked_for() -> None:
    image = Image.new("L", (224, 224), 90)
    ImageDraw.Draw(image).text((60, 106), NAME, fill=255, font=ImageFont.load_default(10))
    assert not has_text(np.asarray(image))


@pytest.mark.parametrize("size", [16, 64])
def test_small_and_plain_images_have_none(size: int) -> None:
    assert not has_text(np.zeros((size, size), dtype=np.uint8))
    assert not has_text(np.eye(size, dtype=np.uint8) * 255)
