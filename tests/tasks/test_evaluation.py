import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.embeddings import EvaluationError
from tasks.evaluation import Embedder, evaluate

REPORTS = ["There is hernia.", "There is no hernia."]


AXES = np.eye(2, dtype=np.float32)


class Oracle:
    """Reads the finding off the first pixel; "no" points the other way."""

    def image_embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.take(AXES, images[:, 0, 0] // 255, axis=0)

    def text_embeddings(self, texts: Sequence[str]) -> NDArray[np.float32]:
        present = np.array(["no " not in text for text in texts])
        return np.take(AXES, present.astype(np.intp), axis=0)


class Diverged(Oracle):
    def image_embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(images), 2), np.nan, dtype=np.float32)


PRESENT = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
IMAGES = np.broadcast_to((PRESENT * 255)[:, None, None], (6, 4, 4)).astype(np.uint8)
TEXTS = [REPORTS[0] if present else REPORTS[1] for present in PRESENT]


def test_a_perfect_model_is_perfect_in_every_figure_and_the_result_is_strict_json() -> None:
    embedder: Embedder = Oracle()

    found = evaluate(
        embedder, images=IMAGES, texts=TEXTS, labels={"hernia": PRESENT, "mass": PRESENT * np.nan}
    )

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["retrieval"]["image_to_text"]["r1"] == 1
    assert found["retrieval"]["image_to_text"]["chance_r1"] == pytest.approx(0.5)
    assert found["retrieval"]["text_to_image"]["r1"] == 1
    assert found["retrieval"]["text_to_image"]["n"] == 2
    assert found["zero_shot"] == {
        "macro_auroc": 1.0,
        "chance": 0.5,
        "per_class": {"hernia": 1.0, "mass": None},
    }


def test_without_labels_there_is_no_zero_shot() -> None:
    found = evaluate(Oracle(), images=IMAGES, texts=TEXTS, labels={})

    assert set(found) == {"retrieval", "zero_shot"}
    assert found["zero_shot"] is None


def test_an_empty_set_is_an_error_before_the_model_runs() -> None:
    with pytest.raises(EvaluationError, match="the evaluation set is empty"):
        evaluate(Diverged(), images=IMAGES[:0], texts=[], labels={})


def test_a_text_too_few_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="6 images and 5 texts"):
        evaluate(Oracle(), images=IMAGES, texts=TEXTS[1:], labels={})


def test_a_diverged_model_is_an_error_that_says_so() -> None:
    with pytest.raises(EvaluationError, match="6 of 6 rows of image_embeddings are NaN"):
        evaluate(Diverged(), images=IMAGES, texts=TEXTS, labels={})
