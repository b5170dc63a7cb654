import numpy as np
import pytest

from tasks.embeddings import EvaluationError, checked_embeddings


def test_unit_rows_pass_unchanged_as_float32() -> None:
    rows = np.eye(3, dtype=np.float64)

    checked = checked_embeddings("rows", rows, rows=3)

    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, rows)


def test_no_rows_are_no_error() -> None:
    assert checked_embeddings("rows", np.empty((0, 4)), rows=0).shape == (0, 4)


def test_half_precision_rounding_is_still_a_unit_row() -> None:
    checked_embeddings("rows", np.array([[0.6, 0.8]]) * (1 + 2**-8), rows=1)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_counted_and_named(broken: float) -> None:
    rows = np.eye(3)
    rows[1, 2] = broken

    with pytest.raises(EvaluationError, match="1 of 3 rows of image_embeddings are NaN or infinite"):
        checked_embeddings("image_embeddings", rows, rows=3)


@pytest.mark.parametrize("scale", [0.0, 0.9, 1.1, 14.3])
def test_rows_of_another_length_are_refused(scale: float) -> None:
    with pytest.raises(EvaluationError, match="expected L2-normalised rows in rows"):
        checked_embeddings("rows", np.eye(2) * np.array([[1.0], [scale]]), rows=2)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (4, 4), (3, 4, 1)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError, match=r"expected rows of shape \(3, D\)"):
        checked_embeddings("rows", np.ones(shape), rows=3)
