"""No patient moves the release past its bound, everything in it is noised, and enough signal is left."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest
from torch.nn import functional as F

from privacy.accounting import PoissonGaussian, epsilon
from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError
from privacy.noise import GaussianNoise
from privacy.noisy_sums import MODALITIES, Modality, NoisySums, add_up
from privacy.projection import Projection
from privacy.prototypes import PrototypeRelease, RawRows, append_prototypes

Cohort = Mapping[Modality, RawRows]
Sum = Callable[[PrototypeRelease, Cohort], NDArray[np.float64]]
CONCEPTS = ("effusion present", "effusion absent", "cardiomegaly present")
WORDINGS = (("pleural effusion", "fluid in the pleura"), ("no effusion",), ("large heart",))
WIDTH, NEIGHBOUR = 6, 99
SIZES = [0.0, 1e-30, 0.5, 1.0, 1.001, 3.0, 1e6, 1e200, math.nan, math.inf]


def release_of(**changes: Any) -> PrototypeRelease:
    facts: dict[str, Any] = {
        "concepts": CONCEPTS,
        "dimension": WIDTH,
        "max_norm": 1.5,
        "noise_multiplier": 4.0,
        "count_weight": 0.5,
    }
    return PrototypeRelease(**{**facts, **changes})


def rows(
    patients: list[int], embeddings: NDArray[np.float64], members: NDArray[np.float64] | None = None
) -> RawRows:
    first = np.tile(np.eye(1, len(CONCEPTS)), (len(patients), 1))
    return RawRows(
        patients=np.array(patients, dtype=np.int64),
        embeddings=embeddings,
        members=first if members is None else members,
    )


def drawn(rng: np.random.Generator, patients: list[int], size: float) -> RawRows:
    """Rows of several labels each, their vectors of one length, one of them aligned with an axis."""
    vectors = rng.standard_normal((len(patients), WIDTH))
    vectors[::2] = np.eye(WIDTH)[0]
    with np.errstate(invalid="ignore"):  # infinity times zero
        vectors *= size / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return rows(patients, vectors, rng.integers(0, 2, (len(patients), len(CONCEPTS))).astype(float))


def without(cohort: Cohort, patient: int) -> Cohort:
    return {
        modality: RawRows(
            patients=raw.patients[raw.patients != patient],
            embeddings=raw.embeddings[raw.patients != patient],
            members=raw.members[raw.patients != patient],
        )
        for modality, raw in cohort.items()
    }


def neighbours(
    seed: int, *, others: int, studies: int, size: float, missing: Modality | None = None
) -> Cohort:
    """A cohort of ordinary patients, and one who may be anything, in no order."""
    rng = np.random.default_rng(seed)
    cohort: dict[Modality, RawRows] = {}
    for modality in MODALITIES:
        ordinary = drawn(rng, [int(p) for p in rng.integers(0, 5, others)], 1.0)
        odd = drawn(rng, [NEIGHBOUR] * (0 if modality == missing else studies), size)
        order = rng.permutation(others + len(odd.patients))
        cohort[modality] = RawRows(
            patients=np.concatenate([ordinary.patients, odd.patients])[order],
            embeddings=np.concatenate([ordinary.embeddings, odd.embeddings])[order],
            members=np.concatenate([ordinary.members, odd.members])[order],
        )
    return cohort


def moved(total: Sum, release: PrototypeRelease, cohort: Cohort) -> float:
    return float(np.linalg.norm(total(release, cohort) - total(release, without(cohort, NEIGHBOUR))))


def honest(release: PrototypeRelease, cohort: Cohort) -> NDArray[np.float64]:
    return release.clipped_sum(cohort)


COHORTS = st.builds(
    neighbours,
    st.integers(0, 10**6),
    others=st.integers(0, 12),
    studies=st.integers(0, 4),
    size=st.sampled_from(SIZES),
    missing=st.sampled_from([None, *MODALITIES]),
)


@settings(max_examples=200, deadline=None)
@given(cohort=COHORTS, max_norm=st.sampled_from([1e-12, 0.3, 1.5, 2.0, 1e12]))
def test_no_patient_moves_the_sum_past_the_bound(cohort: Cohort, max_norm: float) -> None:
    release = release_of(max_norm=max_norm)
    assert np.isfinite(release.clipped_sum(cohort)).all()
    assert moved(honest, release, cohort) <= release.sensitivity * (1 + 1e-12)


@pytest.mark.parametrize("patients", [1, 1000])
def test_the_bound_is_reached_whatever_the_others_have(patients: int) -> None:
    """A thousand others make the sum long; its rounding must not make one patient longer."""
    rng = np.random.default_rng(0)
    cohort: dict[Modality, RawRows] = {
        modality: drawn(rng, [*range(patients), NEIGHBOUR], 1e3) for modality in MODALITIES
    }
    found = moved(honest, release_of(), cohort)
    assert 0.99999 * release_of().sensitivity <= found <= release_of().sensitivity * (1 + 1e-12)


def clipped_by_concept(release: PrototypeRelease, cohort: Cohort) -> NDArray[np.float64]:
    """Planted mistake: every concept and modality of a patient is clipped on its own."""
    total = np.zeros((2, len(release.concepts), release.dimension + 1))
    for modality, raw in cohort.items():
        for column in range(len(release.concepts)):
            members = np.zeros_like(raw.members)
            members[:, column] = raw.members[:, column]
            total += release.clipped_sum({modality: replace(raw, members=members)})
    return total


def clipped_by_row(release: PrototypeRelease, cohort: Cohort) -> NDArray[np.float64]:
    """Planted mistake: the study is the unit, so that a patient of many studies moves more."""
    total = np.zeros((2, len(release.concepts), release.dimension + 1))
    for modality, raw in cohort.items():
        total += release.clipped_sum({modality: replace(raw, patients=np.arange(len(raw.patients)))})
    return total


def mean_by_exact_counts(release: PrototypeRelease, cohort: Cohort) -> NDArray[np.float64]:
    """Planted mistake: the mean of each concept, with the true count, in place of the sum."""
    total = release.clipped_sum(cohort)
    counts = np.maximum(np.round(total[..., -1:] / release.count_weight, 6), 1e-6)
    return np.concatenate([total[..., :-1] / counts, total[..., -1:]], axis=-1)


def exact_counts_and_threshold(release: PrototypeRelease, cohort: Cohort) -> NDArray[np.float64]:
    """Planted mistake: a concept that too few patients have is left out, by the true count."""
    total = release.clipped_sum(cohort)
    present = np.count_nonzero(total[..., -1:] > 0, axis=-1, keepdims=True)
    states = sum(((raw.members > 0).sum(0) for raw in cohort.values()), np.zeros(len(CONCEPTS)))
    return np.where((states >= 4)[None, :, None] & (present > 0), total, 0)


@pytest.mark.parametrize(
    "mistake", [clipped_by_concept, clipped_by_row, mean_by_exact_counts, exact_counts_and_threshold]
)
def test_the_same_search_breaks_the_planted_mistakes(mistake: Sum) -> None:
    release = release_of(max_norm=0.8)
    worst = {honest: 0.0, mistake: 0.0}
    for seed in range(150):
        size = SIZES[seed % len(SIZES)]
        cohort = neighbours(seed, others=seed % 9, studies=seed % 5, size=size)
        for total in worst:
            worst[total] = max(worst[total], moved(total, release, cohort))
    assert worst[honest] <= release.sensitivity * (1 + 1e-12)
    assert worst[mistake] > 1.2 * release.sensitivity


def test_a_contribution_is_the_mean_over_studies_of_member_times_embedding_and_weight() -> None:
    vectors = np.eye(2, WIDTH)
    members = np.array([[1.0, 0.0, 0.0], [0.5, 0.0, 1.0]])
    release = release_of(max_norm=10.0)
    total = release.clipped_sum({"image": rows([7, 7], vectors, members), "text": rows([7], vectors[:1])})
    expected = np.zeros((2, 3, WIDTH + 1))
    expected[0, 0, :2], expected[0, 0, -1] = [0.5, 0.25], 0.75 * 0.5
    expected[0, 2, 1], expected[0, 2, -1] = 0.5, 0.5 * 0.5
    expected[1, 0, 0], expected[1, 0, -1] = 1.0, 0.5
    np.testing.assert_allclose(total, expected, atol=1e-6)
    shrunk = replace(release, max_norm=0.1).clipped_sum(
        {"image": rows([7, 7], vectors, members), "text": rows([7], vectors[:1])}
    )
    np.testing.assert_allclose(shrunk, expected * 0.1 / np.linalg.norm(expected), atol=1e-7)


def test_one_patient_of_one_concept_passes_unclipped_at_the_bound_of_the_docstring() -> None:
    unit = np.eye(1, WIDTH)
    release = release_of(max_norm=math.sqrt(2 * (1 + 0.5**2)))
    total = release.clipped_sum({"image": rows([0], unit), "text": rows([0], unit)})
    np.testing.assert_allclose(total[:, 0, [0, -1]], [[1, 0.5], [1, 0.5]], atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_a_patient_who_is_not_finite_counts_as_zero_and_the_others_count_on(bad: float) -> None:
    good = np.eye(1, WIDTH)
    vectors = np.concatenate([good, np.full((1, WIDTH), bad), good])
    total = release_of().clipped_sum({"image": rows([0, 1, 1], vectors)})
    assert np.array_equal(total, release_of().clipped_sum({"image": rows([0], good)}))
    members = np.array([[math.nan, 0, 0]])
    assert not release_of().clipped_sum({"text": rows([0], good, members)}).any()


@pytest.mark.parametrize("cohort", [{}, {"image": rows([], np.zeros((0, WIDTH)), np.zeros((0, 3)))}])
def test_without_patients_the_release_is_noise_alone(cohort: Cohort) -> None:
    release = release_of()
    assert not release.clipped_sum(cohort).any()
    noised = release.release(release.clipped_sum(cohort), GaussianNoise(insecure_seed=0))
    assert (noised.values != 0).all()


def test_the_order_and_numbering_of_patients_change_nothing() -> None:
    cohort = neighbours(3, others=10, studies=2, size=1.0)
    turned: Cohort = {
        modality: RawRows(
            patients=1000 - raw.patients[::-1], embeddings=raw.embeddings[::-1], members=raw.members[::-1]
        )
        for modality, raw in cohort.items()
    }
    np.testing.assert_allclose(release_of().clipped_sum(turned), release_of().clipped_sum(cohort), atol=1e-6)


def noised_parts(
    release: PrototypeRelease, clean: NDArray[np.float64], *, seed: int
) -> dict[str, NDArray[np.float64]]:
    noise = release.release(clean, GaussianNoise(insecure_seed=seed)).values - clean
    return {
        "image sums": noise[0, :, :-1].ravel(),
        "text sums": noise[1, :, :-1].ravel(),
        "image counts": noise[0, :, -1].ravel(),
        "text counts": noise[1, :, -1].ravel(),
    }


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_sums_and_counts_all_have_noise_of_the_stated_deviation(claimed: float, accepted: bool) -> None:
    many = tuple(f"concept {number}" for number in range(2000))
    release = release_of(concepts=many, dimension=2)
    clean = np.full((2, 2000, 3), 3.0)
    parts = noised_parts(release, clean, seed=1)
    fits = [
        kstest(part, "norm", args=(0, claimed * release.noise_std)).pvalue > 1e-3 for part in parts.values()
    ]
    assert fits == [accepted] * 4


def test_the_search_for_noise_finds_counts_without_any() -> None:
    """Planted mistake: the counts leave as they are."""

    class Careless(PrototypeRelease):
        def release(self, clipped_sum: NDArray[np.float64], noise: GaussianNoise) -> NoisySums:
            noised = super().release(clipped_sum, noise)
            values = noised.values.copy()
            values[..., -1] = clipped_sum[..., -1]
            return replace(noised, values=values)

    release = Careless(
        concepts=CONCEPTS, dimension=WIDTH, max_norm=1.5, noise_multiplier=4.0, count_weight=0.5
    )
    parts = noised_parts(release, np.zeros((2, len(CONCEPTS), WIDTH + 1)), seed=0)
    assert [name for name, part in parts.items() if not part.all()] == ["image counts", "text counts"]


def test_a_threshold_sees_noisy_counts_only() -> None:
    """The bank is a function of what was released: equal releases of different cohorts give equal banks."""
    noised = release_of().release(np.zeros((2, 3, WIDTH + 1)), GaussianNoise(insecure_seed=2))
    assert vars(noised).keys() == {"concepts", "values", "noise_std", "count_weight"}
    assert np.array_equal(noised.counts, noised.values[..., -1] / np.float32(0.5))


def test_the_digits_of_the_sum_below_the_noise_do_not_leave() -> None:
    """Whatever the sum's digits, what leaves is a whole number of grid steps, rounded to float32."""
    release = release_of(max_norm=1.0, noise_multiplier=0.5)
    clean = release.clipped_sum(neighbours(0, others=5, studies=2, size=1.0))
    steps = release.release(clean, GaussianNoise(insecure_seed=0)).values.astype(np.float64) * 2**24
    assert np.array_equal(steps, np.rint(steps))


def test_it_says_what_it_protects_from_what() -> None:
    release = release_of()
    assert (release.kind, release.unit, release.adjacency, release.sampler) == (
        "prototypes", "patient", "add_remove", "none",
    )  # fmt: skip
    assert (release.sample_rate, release.steps, release.sensitivity) == (1, 1, 1.5)
    assert release.noise_std == 6.0
    assert release.event == PoissonGaussian(sample_rate=1, noise_multiplier=4.0, steps=1)


def test_beside_a_training_run_prototypes_are_nearly_free() -> None:
    training = PoissonGaussian(sample_rate=0.02, noise_multiplier=0.9, steps=2000)
    ten = [release_of(noise_multiplier=20.0).event] * 10
    assert epsilon([training], delta=1e-5) == pytest.approx(6.977, abs=2e-3)
    assert epsilon([training, *ten], delta=1e-5) == pytest.approx(7.020, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"concepts": ()}, r"expected concepts=\(\) to be at least one"),
        ({"concepts": ("a", "a")}, r"expected concepts=\('a', 'a'\) to be at least one, each once"),
        ({"dimension": 0}, "expected dimension=0 >= 1"),
        ({"max_norm": 0.0}, r"expected max_norm=0.0 in \[1e-12, 1e\+?12\]|expected max_norm=0.0"),
        ({"max_norm": math.nan}, "expected max_norm=nan"),
        ({"max_norm": math.inf}, "expected max_norm=inf"),
        ({"count_weight": 0.0}, "expected count_weight=0.0 > 0 and finite"),
        ({"count_weight": math.inf}, "expected count_weight=inf > 0 and finite"),
        ({"noise_multiplier": 0.0}, "expected noise_multiplier=0.0 > 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        release_of(**changes)


@pytest.mark.parametrize(
    "raw",
    [
        rows([0], np.zeros((1, WIDTH + 1))),
        rows([0], np.zeros((1, WIDTH)), np.zeros((1, 2))),
        rows([0, 1], np.zeros((2, WIDTH)), np.zeros((1, 3))),
        replace(rows([0], np.zeros((1, WIDTH))), patients=np.zeros(2, dtype=np.int64)),
    ],
)
def test_rows_that_do_not_fit_are_refused_without_a_value(raw: RawRows) -> None:
    with pytest.raises(PrivacyError, match="expected image rows of width 6 and 3 concepts, as many of each"):
        release_of().clipped_sum({"image": raw})


def test_an_unknown_modality_is_refused() -> None:
    sound: Any = "sound"
    with pytest.raises(PrivacyError, match=r"expected modality='sound' to be one of \('image', 'text'\)"):
        release_of().clipped_sum({sound: rows([0], np.zeros((1, WIDTH)))})


def test_a_sum_of_another_shape_is_never_released() -> None:
    with pytest.raises(PrivacyError, match=r"expected a sum of shape \(2, 3, 7\), got \(3, 7\)"):
        release_of().release(np.zeros((3, 7)), GaussianNoise(insecure_seed=0))


def cosine_after(
    count: int, *, sigma: float, dimension: int = 512, hospitals: int = 1, seeds: int = 6, rho: float = 0.47
) -> float:
    """Mean cosine of a released direction and the true one; one concept, one modality, length rho."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        mean = rng.standard_normal(dimension)
        mean *= rho / np.linalg.norm(mean)
        releases, true = [], np.zeros(dimension)
        for hospital in range(hospitals):
            spread = rng.standard_normal((count, dimension)) * math.sqrt((1 - rho**2) / dimension)
            vectors = mean + spread
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            release = release_of(
                concepts=("one",),
                dimension=dimension,
                max_norm=1.005,
                noise_multiplier=sigma,
                count_weight=0.1,
            )
            raw = rows(list(range(count)), vectors, np.ones((count, 1)))
            total = release.clipped_sum({"image": raw})
            releases.append(release.release(total, GaussianNoise(insecure_seed=100 * seed + hospital)))
            true += total[0, 0, :-1]
        direction = add_up(releases).bank(np.eye(1, dimension), least_count=-math.inf).image[0]
        found.append(float(direction @ true / np.linalg.norm(true)))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("count", "sigma", "expected"),
    [(2000, 5, 0.99), (2000, 20, 0.89), (500, 5, 0.90), (100, 5, 0.42), (100, 20, 0.06), (20, 5, 0.09)],
)
def test_the_direction_survives_as_measured_before(count: int, sigma: float, expected: float) -> None:
    assert cosine_after(count, sigma=sigma) == pytest.approx(expected, abs=0.06)


def test_the_direction_survives_as_the_docstring_says() -> None:
    for count, sigma, dimension in ((500, 5.0, 512), (500, 20.0, 128), (100, 5.0, 64)):
        length, noise = count * 0.47, sigma * 1.005 * math.sqrt(dimension)
        expected = length / math.hypot(length, noise)
        assert cosine_after(count, sigma=sigma, dimension=dimension) == pytest.approx(expected, abs=0.05)


def test_hospitals_together_see_farther_than_each() -> None:
    alone, together = cosine_after(300, sigma=10.0), cosine_after(300, sigma=10.0, hospitals=9)
    assert alone == pytest.approx(0.53, abs=0.06)
    assert together == pytest.approx(0.88, abs=0.06)  # nine times the signal, three times the noise


def test_sums_of_hospitals_add_and_their_noise_by_the_square_root() -> None:
    releases = [
        release_of(noise_multiplier=sigma).release(np.full((2, 3, 7), value), GaussianNoise(insecure_seed=0))
        for value, sigma in ((1.0, 4.0), (2.0, 4.0), (0.0, 2.0))
    ]
    together = add_up(releases)
    np.testing.assert_allclose(together.values, sum(each.values for each in releases), rtol=1e-6)
    assert together.noise_std == pytest.approx(1.5 * math.sqrt(4**2 + 4**2 + 2**2))
    assert add_up(releases[:1]).noise_std == releases[0].noise_std


def test_releases_that_mean_different_things_are_not_added() -> None:
    with pytest.raises(PrivacyError, match="at least one release"):
        add_up([])
    noise = GaussianNoise(insecure_seed=0)
    first = release_of().release(np.zeros((2, 3, 7)), noise)
    for other in (
        replace(first, concepts=("a", "b", "c")),
        replace(first, values=first.values[..., 1:]),
        replace(first, count_weight=1.0),
    ):
        with pytest.raises(PrivacyError, match="equal concepts, dimension and count weight"):
            add_up([first, other])


def known_sums(counts: list[float]) -> NoisySums:
    """Image and text sums along the first and the second axis, with these image counts and text counts 0."""
    values = np.zeros((2, 3, WIDTH + 1), dtype=np.float32)
    values[0, :, 0] = values[1, :, 1] = -4.0
    values[0, :, -1] = np.array(counts) * 0.5
    return NoisySums(concepts=CONCEPTS, values=values, noise_std=1.0, count_weight=0.5)


def test_a_prototype_with_too_low_a_noisy_count_is_its_prompt() -> None:
    prompts = np.eye(3, WIDTH, k=2)
    bank = known_sums([50.0, 49.0, -3.0]).bank(prompts, least_count=49.5)
    assert bank.concepts == CONCEPTS
    assert bank.wordings == tuple((name,) for name in CONCEPTS)
    assert known_sums([0.0] * 3).bank(prompts, least_count=1.0, wordings=WORDINGS).wordings == WORDINGS
    np.testing.assert_allclose(bank.image[0], -np.eye(1, WIDTH)[0])
    np.testing.assert_allclose(bank.image[1:], prompts[1:])
    np.testing.assert_allclose(bank.text, prompts)


def test_a_sum_of_length_zero_has_no_direction_and_falls_back_too() -> None:
    sums = known_sums([9.0] * 3)
    empty = replace(sums, values=np.zeros_like(sums.values))
    np.testing.assert_allclose(empty.bank(np.eye(3, WIDTH), least_count=-1.0).image, np.eye(3, WIDTH))


def test_projected_prototypes_are_lifted_among_the_embeddings() -> None:
    projection = Projection.random(width=20, dimension=WIDTH, seed=0)
    prompts = np.eye(3, 20)
    bank = known_sums([50.0, 50.0, 0.0]).bank(prompts, least_count=10.0, projection=projection)
    np.testing.assert_allclose(bank.image[0], -projection.basis[0], atol=1e-6)
    np.testing.assert_allclose(bank.image[2], prompts[2])
    with pytest.raises(PrivacyError, match=r"expected prompts of shape \(3, 20\), got \(3, 6\)"):
        known_sums([0.0] * 3).bank(np.eye(3, WIDTH), least_count=0.0, projection=projection)


@pytest.mark.parametrize("value", [0.0, 2.0, math.nan])
def test_a_bank_of_other_than_unit_vectors_is_refused(value: float) -> None:
    good = np.eye(3, WIDTH, dtype=np.float32)
    bad = good.copy()
    bad[1, 1] = value
    with pytest.raises(PrivacyError, match="expected text prototypes of length 1"):
        PrototypeBank(concepts=CONCEPTS, wordings=WORDINGS, image=good, text=bad)


def test_a_bank_of_other_shapes_is_refused() -> None:
    good = np.eye(3, WIDTH, dtype=np.float32)
    for image, text in ((good[:2], good), (good, good[:2]), (good, good[:, :5]), (good[0], good)):
        with pytest.raises(PrivacyError, match="prototypes of 3 concepts in rows of D"):
            PrototypeBank(concepts=CONCEPTS, wordings=WORDINGS, image=image, text=text)


def test_prototypes_stand_behind_the_bank_as_they_are() -> None:
    images, texts = (F.normalize(torch.randn(4, WIDTH), dim=1).double() for _ in range(2))
    prototypes = known_sums([50.0] * 3).bank(np.eye(3, WIDTH), least_count=10.0)
    longer_images, longer_texts = append_prototypes((images, texts), prototypes)
    assert torch.equal(longer_images[:4], images)
    assert torch.equal(longer_texts[:4], texts)
    assert torch.equal(longer_images[4:], torch.from_numpy(prototypes.image).double())
    assert torch.equal(longer_texts[4:], torch.from_numpy(prototypes.text).double())
    assert not longer_images.requires_grad
    with pytest.raises(PrivacyError, match="anchors of width 5, prototypes of 6"):
        append_prototypes((images[:, :5], texts[:, :5]), prototypes)
