"""An augmented image is the same image moved a little, never mirrored."""

import numpy as np
import pytest
import torch

from encoders.augmentation import augment


def half_bright(count: int, size: int = 24) -> torch.Tensor:
    images = torch.zeros(count, size, size, dtype=torch.uint8)
    images[:, :, : size // 2] = 200
    return images


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("size", [1, 16, 24])
def test_shape_and_dtype_are_kept_and_the_images_left_alone(count: int, size: int) -> None:
    images = half_bright(count, size)
    before = images.clone()
    moved = augment(images, rng=np.random.default_rng(0))
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(images, before)


def test_left_stays_left() -> None:
    moved = augment(half_bright(200), rng=np.random.default_rng(0)).float()
    assert (moved[:, :, :10].mean((1, 2)) > moved[:, :, 14:].mean((1, 2)) + 50).all()


def test_images_move_by_at_most_a_twelfth_and_reach_it() -> None:
    image = torch.zeros(400, 24, 24, dtype=torch.uint8)
    image[:, 12, 12] = 255
    moved = augment(image, rng=np.random.default_rng(0)).flatten(1).argmax(1)
    rows, columns = moved // 24 - 12, moved % 24 - 12
    for shift in (rows, columns):
        assert (int(shift.min()), int(shift.max())) == (-2, 2)


def test_each_image_is_moved_on_its_own_and_again_alike_for_the_same_seed() -> None:
    first, second = (augment(half_bright(8), rng=np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 8


def test_channels_are_moved_and_exposed_as_one_image_is() -> None:
    grey = torch.from_numpy(np.random.default_rng(1).integers(0, 256, size=(6, 24, 24), dtype=np.uint8))
    channels = torch.stack([grey, 255 - grey, grey], dim=-1)
    alone, together = (augment(each, rng=np.random.default_rng(2)) for each in (grey, channels))
    assert torch.equal(together[..., 0], alone)
    assert torch.equal(together[..., 2], alone)
    inverse = augment(255 - grey, rng=np.random.default_rng(2))
    assert torch.equal(together[..., 1], inverse)
