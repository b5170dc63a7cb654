import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.parts import trainable_part
from server.evaluation import EvaluationSet, evaluator
from tests.encoders.micro import TEXTS, micro_encoder, random_images


def data(count: int = len(TEXTS), **labels: list[float]) -> EvaluationSet:
    return EvaluationSet(
        images=random_images(count),
        texts=TEXTS[:count],
        labels={name: np.array(values, dtype=np.float32) for name, values in labels.items()},
    )


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=4),
    finding=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
def test_what_is_saved_is_loaded(
    texts: list[str], finding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("set") / "set.npz"
    values = np.array([0.0, 1.0, math.nan, 1.0][: len(texts)], dtype=np.float32)
    kept = EvaluationSet(images=random_images(len(texts)), texts=tuple(texts), labels={finding: values})
    kept.save(path)
    loaded = EvaluationSet.load(path)
    assert loaded.texts == kept.texts
    assert np.array_equal(loaded.images, kept.images)
    assert list(loaded.labels) == [finding]
    assert np.array_equal(loaded.labels[finding], values, equal_nan=True)


def test_the_given_weights_are_measured_and_not_what_was_loaded_before() -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    greys = np.linspace(0, 255, len(TEXTS)).astype(np.uint8)
    images = np.repeat(greys, 32 * 32).reshape(-1, 32, 32)
    labels = {"effusion": np.array([0, 0, 0, 1, 1, 1], dtype=np.float32)}
    measure = evaluator(part, EvaluationSet(images=images, texts=TEXTS, labels=labels))
    start = part.arrays()
    first = measure(start)
    turned_round = {**start, "visual_projection.weight": -start["visual_projection.weight"]}
    assert measure(turned_round) != first
    assert measure(start) == first


def test_without_labels_there_are_no_zero_shot_figures() -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    arrays = part.arrays()
    plain = evaluator(part, data())(arrays)
    assert plain["retrieval"]["image_to_text"]["n"] == len(TEXTS)
    assert plain.get("zero_shot") is None
    labelled = evaluator(part, data(pleural_effusion=[0, 1, 0, 0, 0, math.nan]))(arrays)
    assert labelled["retrieval"] == plain["retrieval"]
