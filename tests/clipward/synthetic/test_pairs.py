import numpy as np

from clipward.synthetic.pairs import synthetic_pairs


def test_pairs_are_drawn_again_and_fewer_are_the_first_of_more() -> None:
    images, reports = synthetic_pairs(4, seed=3)
    assert images.shape == (4, 256, 256)
    assert images.dtype == np.uint8
    few_images, few_reports = synthetic_pairs(2, seed=3)
    assert np.array_equal(few_images, images[:2])
    assert few_reports == reports[:2]
    assert not np.array_equal(synthetic_pairs(2, seed=4)[0], few_images)


def test_images_use_the_whole_grey_scale_and_differ() -> None:
    images, reports = synthetic_pairs(3, seed=0)
    assert (images.min(axis=(1, 2)) < 20).all()
    assert (images.max(axis=(1, 2)) > 200).all()
    assert not np.array_equal(images[0], images[1])
    assert all(report.strip() for report in reports)


def test_no_pairs_are_no_pairs_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    assert synthetic_pairs(0, seed=0)[1] == ()
    synthetic_pairs(2, seed=0, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
