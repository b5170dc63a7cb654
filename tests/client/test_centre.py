"""What a site releases for the centre: a noised sum of its patients' mean features, each of them bounded."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from client.answers import answer_train
from client.centre import raw_centre, release_centre
from client.errors import Refused
from client.policy import centre_for, check_plan, mechanism_for
from client.site import Site
from client.workbench import training_pairs
from encoders.fitting import Pairs
from encoders.parts import trainable_part
from privacy.accounting import epsilon
from privacy.noise import GaussianNoise
from privacy.prototypes import PrototypeRelease
from strategies.messages import CENTRE_SUM, CentrePlan, TrainRequest
from strategies.share import IMAGE_SHIFT
from tests.attacks.climbing import Case, farthest
from tests.encoders.micro import micro_encoder
from tests.small_hospitals import EPSILON, PATIENTS, ROUNDS, change_site, plan, ready, request

WIDTH, ROWS = 6, 9
NOISE, BOUND, COUNT = 3.0, 1.5, 0.5
PLAN = CentrePlan(noise_multiplier=NOISE, max_norm=BOUND, count_weight=COUNT)
OWNERS = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5])


def release(noise_multiplier: float = NOISE, max_norm: float = BOUND, width: int = WIDTH) -> PrototypeRelease:
    return PrototypeRelease(
        concepts=("image",),
        dimension=width,
        max_norm=max_norm,
        noise_multiplier=noise_multiplier,
        count_weight=COUNT,
    )


def pairs_of(features: torch.Tensor) -> Pairs:
    rows = len(features)
    return Pairs(images=features, texts=torch.zeros(rows, 2), text_keys=torch.arange(rows))


def features(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    """Such as a layer norm makes: of length sqrt(d)."""
    raw = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled: torch.Tensor = math.sqrt(width) * raw / raw.norm(dim=1, keepdim=True)
    return scaled


NOWHERE = np.zeros(WIDTH, dtype=np.float32)


def exact(
    of: torch.Tensor, patients: np.ndarray, mechanism: PrototypeRelease, public: np.ndarray = NOWHERE
) -> np.ndarray:
    return raw_centre(pairs_of(of), patients=patients, public=public, mechanism=mechanism)[CENTRE_SUM]


def asked(*, server_round: int = 1, **changes: Any) -> TrainRequest:
    made = request(server_round=server_round, part="image-head", centre=PLAN, **changes)
    return replace(made, phase="centre")


@pytest.fixture
def site(hospitals: Path) -> Site:
    return ready(hospitals / "hospitals" / "site-1")


def test_a_patient_adds_the_mean_of_their_own_images_once() -> None:
    found, means = exact(features(), OWNERS, release()), np.zeros(WIDTH)
    for patient in np.unique(OWNERS):
        means += features().numpy()[patient == OWNERS].mean(0) / math.sqrt(WIDTH)
    assert found[:-1] == pytest.approx(means, abs=1e-5)
    assert found[-1] == pytest.approx(COUNT * len(np.unique(OWNERS)), abs=1e-5)


def test_what_is_public_of_a_feature_is_taken_away_before_it_is_bounded() -> None:
    public = np.arange(WIDTH, dtype=np.float32)
    found = exact(features() + torch.from_numpy(public), OWNERS, release(), public)
    assert found == pytest.approx(exact(features(), OWNERS, release()), abs=1e-5)
    assert np.abs(exact(features(), OWNERS, release(), public) - found).max() > 0.1


def test_features_longer_than_a_norm_leaves_them_are_cut_with_their_count() -> None:
    found = exact(100 * features(1), np.zeros(1, dtype=int), release())
    assert np.linalg.norm(found) == pytest.approx(BOUND, rel=1e-5)


def test_a_patient_whose_features_are_no_number_counts_as_nobody() -> None:
    broken = features()
    broken[OWNERS == 2] = math.nan
    assert exact(broken, OWNERS, release()) == pytest.approx(
        exact(features()[OWNERS != 2], OWNERS[OWNERS != 2], release())
    )


def moved(case: Case) -> float:
    """How far the sum moves when patient 0 leaves with all images, in units of what is declared."""
    mechanism, stays = release(), OWNERS != 0
    whole = exact(case["features"], OWNERS, mechanism)
    return float(np.linalg.norm(whole - exact(case["features"][stays], OWNERS[stays], mechanism))) / BOUND


def test_a_patient_of_three_images_who_leaves_moves_the_sum_by_the_bound_and_no_farther() -> None:
    starts: list[Case] = [{"features": scale * features()} for scale in (0.5, 1.0, 30.0)]
    assert 0.99 < farthest(moved, starts, tries=20) <= 1 + 1e-5  # what is released is float32


def test_counting_images_for_patients_would_have_moved_it_farther() -> None:
    def by_rows(case: Case) -> float:
        rows, stays = np.arange(ROWS), OWNERS != 0
        whole = exact(case["features"], rows, release())
        return float(np.linalg.norm(whole - exact(case["features"][stays], rows[stays], release()))) / BOUND

    assert farthest(by_rows, [{"features": 30 * torch.ones(ROWS, WIDTH)}], tries=1) > 2.9


def test_the_noise_is_normal_of_the_declared_size_on_every_number_and_the_count() -> None:
    width, mechanism = 4000, release(width=4000)
    noised = release_centre(
        pairs_of(features(ROWS, width)),
        patients=OWNERS,
        public=np.zeros(width, np.float32),
        mechanism=mechanism,
        noise=GaussianNoise(insecure_seed=0),
    )
    noise = noised[CENTRE_SUM] - exact(features(ROWS, width), OWNERS, mechanism, np.zeros(width, np.float32))
    assert noise.shape == (width + 1,)
    assert abs(noise[-1]) > 1e-3
    assert stats.kstest(noise, "norm", args=(0, NOISE * BOUND)).pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "norm", args=(0, wrong * NOISE * BOUND)).pvalue < 1e-6


def test_a_site_charges_the_centre_before_it_answers_and_says_no_more_than_the_sum(site: Site) -> None:
    answer = answer_train(site, asked())
    (charge,) = site.ledger().charges()
    assert (charge.request.kind, charge.request.sampler, charge.request.steps) == ("prototypes", "none", 1)
    assert (charge.request.sensitivity, charge.request.noise_std) == (BOUND, NOISE * BOUND)
    width = len(asked().arrays[IMAGE_SHIFT])
    assert {name: value.shape for name, value in answer.update.items()} == {CENTRE_SUM: (width + 1,)}
    assert answer_train(site, asked()).facts.replayed
    assert len(site.ledger().charges()) == 1


def test_what_a_site_releases_is_its_own_sum_with_that_noise(hospitals: Path) -> None:
    folder = change_site(hospitals / "hospitals" / "site-1", policy={"min-noise-multiplier": 1e-9})
    quiet = CentrePlan(noise_multiplier=1e-3, max_norm=BOUND, count_weight=COUNT)
    made = request(part="image-head", centre=quiet, epsilon=1e9)
    public = np.linspace(-0.1, 0.1, len(made.arrays[IMAGE_SHIFT]), dtype=np.float32)
    made = replace(made, arrays={**made.arrays, IMAGE_SHIFT: public})
    change_site(folder, policy={"epsilon-max": 1e9})
    update = answer_train(ready(folder), replace(made, phase="centre")).update[CENTRE_SUM]
    part = trainable_part(micro_encoder(), "image-head")
    known, mechanism = training_pairs(folder, part), release(width=len(update) - 1)
    whole = raw_centre(known.pairs, patients=known.patients, public=public, mechanism=mechanism)[CENTRE_SUM]
    assert update == pytest.approx(whole, abs=6 * 1e-3 * BOUND)
    assert 0 < np.linalg.norm(update) <= BOUND * PATIENTS


def test_the_centre_and_all_training_cost_the_plans_epsilon_together(site: Site) -> None:
    planned = plan(part="image-head", centre=PLAN)
    training = mechanism_for(site, planned)
    once = centre_for(site, planned, width=WIDTH).event
    assert 0.99 * EPSILON < epsilon([once, *[training.event] * ROUNDS], delta=site.delta) <= EPSILON
    assert training.noise_multiplier > mechanism_for(site, plan(part="image-head")).noise_multiplier


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"server_round": 2}, "the centre is asked for once, before the first round"),
        ({"part": "heads"}, "a centre is of the features that part image-head alone is trained on"),
        ({"centre": None}, "a centre is asked for, and the plan names none"),
    ],
)
def test_a_centre_that_cannot_be_meant_is_refused(site: Site, changes: dict[str, Any], reason: str) -> None:
    facts: dict[str, Any] = {"part": "image-head", "centre": PLAN, **changes}
    made = request(**facts)
    with pytest.raises(Refused, match=reason):
        check_plan(site, replace(made, phase="centre"))
    assert site.ledger().charges() == []


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"prototypes": False}, "a centre of features, and policy.prototypes is false"),
        ({"parts": ["heads"]}, "part 'image-head' is not among policy.parts"),
        ({"min-noise-multiplier": 4.0}, "noise multiplier 3 is below policy.min-noise-multiplier 4"),
        ({"epsilon-max": 1.0}, "the run's epsilon 8.0 is above policy.epsilon-max"),
    ],
)
def test_a_hospital_may_release_no_centre(hospitals: Path, policy: dict[str, Any], reason: str) -> None:
    site = ready(change_site(hospitals / "hospitals" / "site-1", policy=policy))
    with pytest.raises(Refused, match=reason):
        answer_train(site, asked())
    assert site.ledger().charges() == []


def test_without_privacy_the_sum_is_exact_where_the_hospital_allows_that(hospitals: Path) -> None:
    folder = change_site(hospitals / "hospitals" / "site-1", policy={"require-dp": False})
    plainly = asked(privacy="none", objective="infonce", epsilon=None)
    one, other = (answer_train(ready(folder), plainly).update[CENTRE_SUM] for _ in range(2))
    assert np.array_equal(one, other)
    assert 0.5 * PATIENTS < one[-1] / COUNT <= PATIENTS
    change_site(folder, policy={"require-dp": True})
    with pytest.raises(Refused, match=r"policy.require-dp is set and the plan has no privacy"):
        answer_train(ready(folder), plainly)
