"""The centre of the images: summed over the sites, found once a run, paid once, in every round's weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import answers
from client.centre import release_centre
from client.site import Site
from encoders.clip import load as load_encoder
from encoders.parts import trainable_part
from privacy.accounting import epsilon
from server.centre import CENTRE_FILE, CentreSum, keep, load
from server.checkpoints import load_latest
from server.errors import QuorumError, RunError
from server.start import part_of
from strategies.messages import CENTRE_SUM, Arrays, CentrePlan, MessageError, TrainRequest
from strategies.share import IMAGE_SHIFT
from tests.server.runs import Run, heard
from tests.small_hospitals import EPSILON, ROUNDS, SITES, change_site

WIDTH = 4
PLAN = CentrePlan(noise_multiplier=2.0, max_norm=1.5, count_weight=0.5)
HEAD: dict[str, Any] = {"share": {"part": "image-head"}, "centre": {"noise-multiplier": 0.5}}


def released(patients: float, *, along: int = 0) -> Arrays:
    """A release of so many patients whose divided features are all of length 1 along one axis."""
    values = np.zeros(WIDTH + 1, dtype=np.float32)
    values[along], values[-1] = patients, patients * PLAN.count_weight
    return {CENTRE_SUM: values}


PUBLIC = np.array([0.5, -0.5, 1.0, 0.0], dtype=np.float32)


def summed(*patients: float, private: bool = True) -> CentreSum:
    total = CentreSum(PLAN, public=PUBLIC, private=private)
    for number, count in enumerate(patients):
        total.fold(f"site-{number}", released(count, along=number), weight=1)
    return total


def test_the_way_to_the_centre_is_the_mean_over_the_patients_of_all_sites_in_units_of_features() -> None:
    way = math.sqrt(WIDTH) * np.array([0.75, 0.25, 0, 0])
    assert summed(300.0, 100.0).centre() == pytest.approx(PUBLIC + way)


def test_the_noise_of_the_mean_is_that_of_all_sites_over_all_patients() -> None:
    expected = math.sqrt(2 * WIDTH) * 2.0 * 1.5 / 400
    assert summed(300.0, 100.0).noise == pytest.approx(expected)
    assert summed(300.0, 100.0, private=False).noise == 0
    drawn = np.random.default_rng(0).normal(0, 2.0 * 1.5, (20_000, 2, WIDTH)).sum(1) / 400
    assert np.sqrt(np.square(drawn).sum(1).mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("patients", [(3.0, 2.0), (0.0, 0.0), (-8.0, 1.0)])
def test_where_noise_drowns_the_way_the_centre_is_the_public_one(patients: tuple[float, ...]) -> None:
    total = summed(*patients)
    assert not total.facts()["used"]
    assert np.array_equal(total.centre(), PUBLIC)


@pytest.mark.parametrize(("times", "used"), [(1.3, False), (1.5, True)])
def test_the_way_is_used_where_it_is_longer_than_the_noise_it_was_found_with(
    times: float, used: bool
) -> None:
    """Its square is that of the true way and of the noise: it has to be twice that of the noise."""
    total = summed(400.0)
    total.total[0] = 400.0 * times * total.noise
    assert total.is_used is used


def test_a_release_of_another_shape_leaves_no_trace() -> None:
    total = summed(300.0)
    with pytest.raises(MessageError, match=CENTRE_SUM):
        total.fold("b", {CENTRE_SUM: np.zeros(WIDTH, np.float32)}, weight=1.0)
    assert total.facts()["sites"] == 1


def test_a_centre_of_another_model_or_half_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / CENTRE_FILE
    keep(np.ones(WIDTH, np.float32), path)
    assert np.array_equal(load(path, width=WIDTH), np.ones(WIDTH))
    with pytest.raises(RunError, match="no centre of 5 numbers"):
        load(path, width=WIDTH + 1)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match="cannot be read"):
        load(path, width=WIDTH)


class CentredRun(Run):
    """It trains the image head, with a centre."""

    def __init__(self, root: Path, **changes: Any) -> None:
        super().__init__(root, **{**HEAD, **changes})

    def centre(self) -> np.ndarray:
        return load(self.run_dir / CENTRE_FILE, width=len(self.start.arrays[IMAGE_SHIFT]))


PAID = [("prototypes", "released"), *[("anchored", "released")] * ROUNDS]


def test_a_run_pays_once_for_its_centre_and_all_of_it_is_the_runs_epsilon(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = CentredRun(hospitals), heard(monkeypatch)
    after = run.go()
    assert run.charges() == PAID
    ledger = run.site().ledger()
    assert 0.98 * EPSILON < ledger.spent() <= EPSILON
    assert (
        epsilon(ledger.events()[:1], delta=ledger.delta) > 0.5
    )  # what a run that forgot it would be over by
    assert [one.phase for one in asked] == ["centre"] * SITES + ["train"] * SITES * ROUNDS
    assert [event["site"] for event in run.events("centre_replied")] == ["site-1", "site-2", "site-3"]
    (found,) = run.events("centre_found")
    assert (found["sites"], found["used"]) == (SITES, True)
    assert found["length"] == pytest.approx(float(np.linalg.norm(run.centre())))
    for one in asked[SITES:]:
        assert np.array_equal(one.arrays[IMAGE_SHIFT], run.centre())
    assert np.array_equal(after[IMAGE_SHIFT], run.centre())
    assert not np.array_equal(after["visual_projection.weight"], run.start.arrays["visual_projection.weight"])


def test_a_run_starts_at_the_centre_of_the_public_anchors_images(hospitals: Path) -> None:
    run = CentredRun(hospitals)
    features = part_of(run.settings, run.prepared.bundle).encoder.image_features(
        run.prepared.bundle.anchor_images
    )
    assert run.start.arrays[IMAGE_SHIFT] == pytest.approx(features.numpy().mean(0), abs=1e-5)
    assert np.abs(run.start.arrays[IMAGE_SHIFT]).max() > 0.1


def test_the_centre_is_near_the_mean_of_all_patients_features(hospitals: Path) -> None:
    run = CentredRun(hospitals, training={"rounds": 1})
    run.go()
    encoder = part_of(run.settings, run.prepared.bundle).encoder
    means = []
    for name in ("site-1", "site-2", "site-3"):
        cohort = run.site(name).cohort()
        rows = cohort.train()
        features = encoder.image_features(cohort.images[rows]).numpy()
        means += [features[cohort.patients[rows] == one].mean(0) for one in np.unique(cohort.patients[rows])]
    expected = np.mean(means, axis=0)
    cosine = run.centre() @ expected / np.linalg.norm(run.centre()) / np.linalg.norm(expected)
    assert cosine > 0.8
    assert np.linalg.norm(run.centre()) == pytest.approx(np.linalg.norm(expected), rel=0.4)


def test_the_exported_model_embeds_as_the_run_does(hospitals: Path, tmp_path: Path) -> None:
    run = CentredRun(hospitals, training={"rounds": 1})
    arrays = run.go()
    part = part_of(run.settings, run.prepared.bundle)
    part.load(arrays)
    part.merged().export(tmp_path / "model")
    cohort = run.site().cohort()
    images = np.array(cohort.images[:5])
    again = trainable_part(load_encoder(tmp_path / "model"), "image-head")
    assert again.encoder.image_embeddings(images) == pytest.approx(part.merged().image_embeddings(images))
    plain = part_of(run.settings, run.prepared.bundle).encoder.image_embeddings(images)
    assert np.abs(plain - again.encoder.image_embeddings(images)).max() > 1e-2


def killed(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("dies_in", ["train", "centre"])
def test_a_run_killed_behind_or_amid_its_centre_pays_no_second_one(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    run, answer, asked = CentredRun(hospitals), answers.answer_train, []

    def dying(site: Site, request: TrainRequest) -> Any:
        asked.append(request)
        last = site.name == "site-3"
        return killed() if request.phase == dies_in and last else answer(site, request)

    with monkeypatch.context() as patch:
        patch.setattr("client.app.answer_request", dying)
        with pytest.raises(KeyboardInterrupt):
            run.go()
    before = run.centre() if dies_in == "train" else None
    run.go(resume=True)
    assert [run.charges(name) for name in ("site-1", "site-2", "site-3")] == [PAID] * SITES
    assert len(run.events("centre_found")) == 1
    assert before is None or np.array_equal(run.centre(), before)
    done = load_latest(run.run_dir)
    assert done is not None
    assert np.array_equal(done.arrays[IMAGE_SHIFT], run.centre())


def failing_at(number: int) -> Any:
    calls: list[None] = []

    def failing(pairs: Any, **settings: Any) -> Arrays:
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("the disk is on fire")
        return release_centre(pairs, **settings)

    return failing


def test_a_site_that_fails_at_the_centre_is_left_out_of_it_and_trains_with_it(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "release_centre", failing_at(2))
    run = CentredRun(hospitals, training={"rounds": 1})
    run.go()
    assert [(event["site"], event["code"]) for event in run.events("centre_refused")] == [
        ("site-2", "failed")
    ]
    assert [event["sites"] for event in run.events("centre_found")] == [SITES - 1]
    assert len(run.events("site_replied")) == SITES
    assert run.charges("site-2") == [("prototypes", "abandoned"), ("anchored", "released")]


def test_too_few_sites_for_a_centre_stop_the_run_before_any_training(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_site(hospitals / "hospitals" / "site-2", policy={"epsilon-max": 2 * EPSILON})  # it pays it twice
    run = CentredRun(hospitals, strategy={"min-sites": SITES}, training={"rounds": 1})
    with monkeypatch.context() as patch:
        patch.setattr(answers, "release_centre", failing_at(2))
        with pytest.raises(QuorumError, match=r"2 sites replied, 3 are needed.*Asked was the centre"):
            run.go()
    assert not (run.run_dir / CENTRE_FILE).exists()
    assert run.charges() == PAID[:1]
    run.go(resume=True)  # those who released send the same again
    assert run.charges() == PAID[:2]


def test_a_hospital_that_releases_no_prototypes_takes_no_part(hospitals: Path) -> None:
    change_site(hospitals / "hospitals" / "site-3", policy={"prototypes": False})
    run = CentredRun(hospitals, training={"rounds": 1})
    run.go()
    assert {event["site"]: event["code"] for event in run.events("centre_refused")} == {"site-3": "policy"}
    assert {event["site"]: event["code"] for event in run.events("site_refused")} == {"site-3": "policy"}
    assert run.charges("site-3") == []
