import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks import retrieval as module
from tasks.embeddings import EvaluationError
from tasks.retrieval import Recall, retrieval

Embeddings = NDArray[np.float32]


def unit_rows(rng: np.random.Generator, rows: int, width: int = 8) -> Embeddings:
    drawn = rng.standard_normal((rows, width)).astype(np.float32)
    rows_of_one: Embeddings = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return rows_of_one


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Embeddings, Embeddings, list[str]]:
    """Pairs on the axes of a small space: exact scores, many ties, many repeated texts."""
    n = draw(st.integers(1, 9))
    signed_axes = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    rows = st.lists(st.integers(0, 5), min_size=n, max_size=n)
    texts = draw(st.lists(st.sampled_from(["clear", "effusion", "nodule", "edema"]), min_size=n, max_size=n))
    return signed_axes[draw(rows)], signed_axes[draw(rows)], texts


def brute_force_ranks(images: Any, text_rows: Any, texts: list[str]) -> tuple[list[int], list[int]]:
    distinct = list(dict.fromkeys(texts))
    vectors = [text_rows[texts.index(text)] for text in distinct]
    image_ranks = []
    for image, own in zip(images, texts, strict=True):
        hit = image @ vectors[distinct.index(own)]
        image_ranks.append(sum(bool(image @ vector >= hit) for vector in vectors))
    text_ranks = []
    for text, vector in zip(distinct, vectors, strict=True):
        hit = max(image @ vector for image, own in zip(images, texts, strict=True) if own == text)
        wrong = [image @ vector for image, own in zip(images, texts, strict=True) if own != text]
        text_ranks.append(1 + sum(bool(score >= hit) for score in wrong))
    return image_ranks, text_ranks


@given(pairs())
def test_recall_and_rank_are_those_of_brute_force(case: tuple[Embeddings, Embeddings, list[str]]) -> None:
    found = retrieval(*case, ranks=(1, 2, 4))

    for direction, ranks in zip(
        (found.image_to_text, found.text_to_image), brute_force_ranks(*case), strict=True
    ):
        assert direction.n == len(ranks)
        assert direction.median_rank == np.median(ranks)
        for k, recall in direction.recall.items():
            assert recall == pytest.approx(np.mean([rank <= k for rank in ranks]))


@given(pairs())
def test_chance_is_the_average_over_every_draw_of_k(case: tuple[Embeddings, Embeddings, list[str]]) -> None:
    found = retrieval(*case, ranks=(1, 2, 3))
    texts = case[2]
    distinct = sorted(set(texts))

    for k in (1, 2, 3):
        assert found.image_to_text.chance[k] == pytest.approx(min(1, k / len(distinct)))
        draws = list(itertools.combinations(texts, min(k, len(texts))))
        hits = [text in draw for text in distinct for draw in draws]
        assert found.text_to_image.chance[k] == pytest.approx(np.mean(hits))


@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=12), st.integers(1, 13))
def test_a_collapsed_model_is_never_above_chance(texts: list[str], k: int) -> None:
    same = np.repeat(unit_rows(np.random.default_rng(0), 1), len(texts), axis=0)

    found = retrieval(same, same, texts, ranks=(k,))

    for direction in (found.image_to_text, found.text_to_image):
        assert direction.recall[k] <= direction.chance[k] + 1e-12


def test_a_model_collapsed_up_to_float32_rounding_has_recall_zero() -> None:
    rng = np.random.default_rng(1)
    images, text_rows = (
        np.repeat(row[None], 777, axis=0) + rng.uniform(-1e-7, 1e-7, (777, 64)).astype(np.float32)
        for row in unit_rows(rng, 2, width=64)
    )

    found = retrieval(images, text_rows, [f"report {i}" for i in range(777)])

    assert set(found.image_to_text.recall.values()) == {0.0}
    assert set(found.text_to_image.recall.values()) == {0.0}


@pytest.mark.parametrize("distinct", [1, 7, 40])
def test_a_perfect_model_scores_one_although_texts_repeat(distinct: int) -> None:
    texts = [f"report {i % distinct}" for i in range(40)]
    embeddings = unit_rows(np.random.default_rng(2), distinct)[np.arange(40) % distinct]

    found = retrieval(embeddings, embeddings, texts)

    for direction in (found.image_to_text, found.text_to_image):
        assert dict(direction.recall) == {1: 1.0, 5: 1.0, 10: 1.0}
        assert direction.median_rank == 1


def test_a_random_model_is_at_chance() -> None:
    rng = np.random.default_rng(3)
    n, repeats = 300, 20
    texts = [f"report {rng.integers(60)}" for _ in range(n)]
    runs = [retrieval(unit_rows(rng, n), unit_rows(rng, n), texts) for _ in range(repeats)]

    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            recalls = [getattr(run, direction).recall[k] for run in runs]
            chance = getattr(runs[0], direction).chance[k]
            error = np.std(recalls, ddof=1) / np.sqrt(repeats)
            assert abs(np.mean(recalls) - chance) < 3.5 * error
            assert error < chance / 4  # otherwise the line above could not fail


def test_inverted_embeddings_are_below_chance() -> None:
    embeddings = unit_rows(np.random.default_rng(4), 50)

    found = retrieval(embeddings, -embeddings, [str(i) for i in range(50)])

    assert found.image_to_text.recall[10] == 0
    assert found.image_to_text.median_rank == 50


def test_texts_that_differ_in_case_and_white_space_are_one_embedded_as_the_first() -> None:
    images = np.eye(3, dtype=np.float32)
    text_rows = images[[0, 2, 2]]

    found = retrieval(images, text_rows, ["No effusion.", " no\n EFFUSION. ", "Nodule."], ranks=(1,))

    assert found.image_to_text.chance[1] == pytest.approx(1 / 2)
    assert found.image_to_text.n == 3
    assert found.text_to_image.n == 2
    assert found.text_to_image.recall[1] == 1  # with the second occurrence both texts would tie
    assert found.image_to_text.recall[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("scores", [1, 7, 64, 10**6])
def test_the_block_size_changes_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    case = unit_rows(rng, 30), unit_rows(rng, 30), [f"report {i % 11}" for i in range(30)]
    whole = retrieval(*case)

    monkeypatch.setattr(module, "BLOCK_SCORES", scores)

    assert retrieval(*case) == whole


def test_one_pair_is_certain_and_so_is_its_chance() -> None:
    one = unit_rows(np.random.default_rng(6), 1)

    found = retrieval(one, one, ["clear"]).as_dict()

    assert found["image_to_text"] == found["text_to_image"]
    assert set(found["image_to_text"].values()) == {1.0}


def test_the_dictionary_has_the_agreed_keys() -> None:
    recall = Recall(recall={1: 0.5, 5: 0.75, 10: 1.0}, chance={1: 0.1, 5: 0.5, 10: 1.0}, n=4, median_rank=1.5)

    assert recall.as_dict() == {
        "r1": 0.5,
        "r5": 0.75,
        "r10": 1.0,
        "chance_r1": 0.1,
        "chance_r5": 0.5,
        "chance_r10": 1.0,
        "n": 4,
        "median_rank": 1.5,
    }


def test_nan_embeddings_are_an_error_that_names_their_tower() -> None:
    good = unit_rows(np.random.default_rng(7), 3)
    bad = np.where(np.eye(3, 8) > 0, np.nan, good)

    with pytest.raises(EvaluationError, match="3 of 3 rows of image_embeddings are NaN"):
        retrieval(bad, good, ["a", "b", "c"])
    with pytest.raises(EvaluationError, match="3 of 3 rows of text_embeddings are NaN"):
        retrieval(good, bad, ["a", "b", "c"])


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="at least one image-text pair"):
        retrieval(np.empty((0, 8)), np.empty((0, 8)), [])


def test_a_text_too_few_is_an_error() -> None:
    rows = unit_rows(np.random.default_rng(8), 3)

    with pytest.raises(EvaluationError, match=r"image_embeddings of shape \(2, D\), got \(3, 8\)"):
        retrieval(rows, rows, ["a", "b"])


def test_towers_of_two_widths_are_an_error() -> None:
    rng = np.random.default_rng(9)

    with pytest.raises(EvaluationError, match="expected one width"):
        retrieval(unit_rows(rng, 2, width=8), unit_rows(rng, 2, width=4), ["a", "b"])


@pytest.mark.parametrize("ranks", [(), (0,), (1, -5)])
def test_a_rank_below_one_is_an_error(ranks: tuple[int, ...]) -> None:
    one = unit_rows(np.random.default_rng(10), 1)

    with pytest.raises(EvaluationError, match="each at least 1"):
        retrieval(one, one, ["a"], ranks=ranks)
