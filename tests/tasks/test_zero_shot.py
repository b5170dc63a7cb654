from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.embeddings import EvaluationError
from tasks.prompts import prompts_for
from tasks.zero_shot import CHANCE, presence_probability, zero_shot

NAN = float("nan")


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    """Put every sentence against a finding on the first axis, every one for it on the second."""
    against = np.array(["no " in text.casefold() for text in texts])
    return np.where(against[:, None], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]).astype(np.float32)


def embed_from(known: Mapping[str, NDArray[np.float64]], texts: Sequence[str]) -> NDArray[np.float64]:
    return np.array([known[text] for text in texts])


def images_at(angles: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float32]:
    """Turn from "absent" (0) to "present" (1)."""
    turn = np.asarray(angles) * np.pi / 2
    return np.stack([np.cos(turn), np.sin(turn), np.zeros_like(turn)], axis=1).astype(np.float32)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), st.sampled_from([0.0, 1.0, NAN])),
        min_size=1,
        max_size=20,
    )
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(cases: list[tuple[float, float]]) -> None:
    angles, labels = (np.array(column) for column in zip(*cases, strict=True))

    found = zero_shot(images_at(angles), encode, {"hernia": labels}).per_class["hernia"]

    present, absent = angles[labels == 1], angles[labels == 0]
    if min(len(present), len(absent)) < 2:
        assert found is None
    else:
        order = np.sign(present[:, None] - absent[None, :])
        assert found == pytest.approx(np.mean((order + 1) / 2))


def test_a_perfect_model_scores_one_and_an_inverted_one_zero() -> None:
    labels = np.array([0.0, 0.0, 0.0, 1.0, 1.0])
    images = images_at([0.0, 0.1, 0.2, 0.8, 0.9])

    found = zero_shot(images, encode, {"hernia": labels, "absence of hernia": 1 - labels})

    assert found.per_class == {"hernia": 1.0, "absence of hernia": 0.0}
    assert found.macro_auroc == 0.5


def test_a_random_model_is_at_chance_and_not_always() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(200) % 4 == 0).astype(np.float64)
    aurocs = [
        zero_shot(images_at(rng.random(200)), encode, {"hernia": labels}).macro_auroc for _ in range(30)
    ]

    error = np.std(np.array(aurocs, dtype=np.float64), ddof=1) / np.sqrt(len(aurocs))
    assert abs(np.mean(np.array(aurocs, dtype=np.float64)) - CHANCE) < 3.5 * error
    assert 0 < error < 0.02


def test_a_collapsed_model_is_exactly_at_chance_although_blas_rounds_equal_rows_apart() -> None:
    labels = (np.arange(301) > 150).astype(np.float64)
    for seed in range(30):
        drawn = np.random.default_rng(seed).standard_normal((3, 64))
        unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        sentences = dict(zip(("There is hernia.", "There is no hernia."), unit[1:], strict=True))

        found = zero_shot(np.tile(unit[0], (301, 1)), partial(embed_from, sentences), {"hernia": labels})

        assert found.macro_auroc == CHANCE


def test_an_unknown_label_leaves_its_image_out_of_that_finding_alone() -> None:
    images = images_at([0.0, 0.1, 0.8, 0.9, 1.0])

    found = zero_shot(
        images,
        encode,
        {"hernia": np.array([0.0, 0.0, 1.0, 1.0, NAN]), "mass": np.array([0.0, 0.0, 1.0, 1.0, 0.0])},
    )

    assert found.per_class == {"hernia": 1.0, "mass": pytest.approx(4 / 6)}


@pytest.mark.parametrize(
    "labels",
    [
        [NAN] * 5,
        [1.0] * 5,
        [0.0] * 5,
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 1.0, 1.0, 1.0],
        [1.0, 1.0, 0.0, NAN, NAN],
    ],
)
def test_a_class_with_too_few_of_a_side_has_no_auroc_and_no_share_in_the_mean(labels: list[float]) -> None:
    images = images_at([0.0, 0.1, 0.2, 0.8, 0.9])
    few = np.array(labels)

    assert zero_shot(images, encode, {"mass": few}).macro_auroc is None

    found = zero_shot(images, encode, {"mass": few, "hernia": np.array([0.0, 0.0, 0.0, 1.0, 1.0])})
    assert found.per_class == {"mass": None, "hernia": 1.0}
    assert found.macro_auroc == 1.0


def test_no_labels_have_no_mean() -> None:
    found = zero_shot(images_at([0.5]), encode, {})

    assert found.as_dict() == {"macro_auroc": None, "chance": 0.5, "per_class": {}}


def test_the_score_is_the_softmax_of_raw_cosines_with_the_normalised_mean_of_the_prompts() -> None:
    rng = np.random.default_rng(2)
    drawn = rng.standard_normal((12, 5))
    images, sentences = np.split(
        (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32), [4]
    )
    prompts = prompts_for("effusion")
    assert len(prompts.positive) == len(prompts.negative) == 4

    found = presence_probability(images, lambda texts: sentences, finding="effusion")

    for image, probability in zip(images.astype(np.float64), found, strict=True):
        cosines = [
            image @ side.mean(axis=0) / np.linalg.norm(side.mean(axis=0))
            for side in np.split(sentences.astype(np.float64), 2)
        ]
        assert probability == pytest.approx(np.exp(cosines[0]) / sum(np.exp(cosines)), rel=1e-6)


def test_an_uncertain_label_of_minus_one_is_an_error_with_the_remedy() -> None:
    labels = np.array([0.0, 1.0, -1.0])

    with pytest.raises(EvaluationError, match=r"'mass' in \{0, 1, NaN\}, got -1.0: write uncertain as NaN"):
        zero_shot(images_at([0.1, 0.2, 0.3]), encode, {"mass": labels})


def test_a_label_too_many_is_an_error() -> None:
    with pytest.raises(EvaluationError, match=r"labels of 'mass' of shape \(1,\), got \(2,\)"):
        zero_shot(images_at([0.1]), encode, {"mass": np.zeros(2)})


def test_prompts_that_embed_to_nan_are_an_error_that_names_the_finding() -> None:
    with pytest.raises(EvaluationError, match="rows of prompts for 'mass' are NaN"):
        zero_shot(images_at([0.1]), lambda texts: np.full((len(texts), 3), NAN), {"mass": np.zeros(1)})


def test_prompts_of_another_width_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="expected one width"):
        zero_shot(images_at([0.1]), lambda texts: np.eye(4)[: len(texts)], {"mass": np.zeros(1)})
