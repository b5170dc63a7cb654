"""A public subspace: nothing is stretched, lengths come back on average, and lifting undoes what it can."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.projection import Projection


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_the_basis_is_orthonormal_and_lifting_undoes_what_lies_in_it(
    width: int, share: float, seed: int
) -> None:
    dimension = max(1, round(share * width))
    rng = np.random.default_rng(seed)
    for made in (
        Projection.random(width=width, dimension=dimension, seed=seed),
        Projection.principal(rng.standard_normal((width + 3, width)), dimension=dimension),
    ):
        np.testing.assert_allclose(made.basis @ made.basis.T, np.eye(dimension), atol=1e-10)
        low = rng.standard_normal((2, 3, dimension))
        np.testing.assert_allclose(made.apply(made.lift(low)), low, atol=1e-10)


def test_one_seed_is_one_subspace() -> None:
    bases = [Projection.random(width=20, dimension=5, seed=seed).basis for seed in (1, 1, 2)]
    assert np.array_equal(bases[0], bases[1])
    assert not np.allclose(bases[0], bases[2])


def test_in_full_width_it_is_a_rotation() -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 16))
    rotation = Projection.random(width=16, dimension=16, seed=3)
    np.testing.assert_allclose(rotation.lift(rotation.apply(vectors)), vectors, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(rotation.apply(vectors), axis=1), np.linalg.norm(vectors, axis=1)
    )


def test_a_random_subspace_keeps_length_and_cosine_about() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 512))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    low = Projection.random(width=512, dimension=128, seed=0).apply(vectors)
    assert np.mean(np.square(low).sum(1)) == pytest.approx(1, abs=0.03)
    error = low @ low.T - vectors @ vectors.T
    assert np.std(error) == pytest.approx(np.sqrt((1 - 128 / 512) / 128), rel=0.1)


def test_the_principal_subspace_of_public_vectors_holds_more_of_their_like_than_a_random_one() -> None:
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1, 65)

    def embeddings(rows: int) -> NDArray[np.float64]:
        vectors = rng.standard_normal((rows, 64)) * spectrum
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    private = embeddings(100)
    kept = []
    for made in (
        Projection.principal(embeddings(200), dimension=16),
        Projection.random(width=64, dimension=16, seed=1),
    ):
        lifted = made.lift(made.apply(private))
        kept.append(np.mean((lifted * private).sum(1) / np.linalg.norm(lifted, axis=1)))
        assert 0.5 < np.mean(np.square(made.apply(private)).sum(1)) < 2
    assert kept[0] > 0.95
    assert kept[1] < 0.65


@pytest.mark.parametrize("dimension", [0, 9])
def test_a_subspace_outside_the_width_is_refused(dimension: int) -> None:
    with pytest.raises(PrivacyError, match=rf"expected dimension={dimension} in \[1, 8\]"):
        Projection.random(width=8, dimension=dimension, seed=0)
    with pytest.raises(PrivacyError, match=rf"expected dimension={dimension} in \[1, 8\]"):
        Projection.principal(np.eye(20, 8), dimension=dimension)


def test_more_directions_than_public_vectors_span_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"expected dimension=5 in \[1, 3\]"):
        Projection.principal(np.eye(3, 8), dimension=5)
