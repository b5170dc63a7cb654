"""Sites cut for a study: who is where, how they look, what they lack."""

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.cohort import Cohort, CohortSettingsError, ColumnMissingError, State
from client.site import Site
from clipward.heterogeneity import CUT, LOOKS, SITE, Look, assign, cut_table, pool, sizes
from clipward.simulate import prepare_sites, simulate
from server.federation import Cut, Federation, Simulation
from strategies.settings import SettingsError
from tests.small_hospitals import change_site, federation, without_claim

PATIENTS, SIDE = 40, 24


def cut(sites: int, **keys: Any) -> Cut:
    return Cut(sites=sites, **keys)


@given(
    patients=st.integers(1, 120),
    sites=st.integers(1, 30),
    values=st.integers(1, 6),
    alpha=st.sampled_from([None, 1e-300, 1e-3, 0.1, 1.0, 1e6]),
    size_skew=st.sampled_from([0.0, 0.5, 1.0, 5.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_every_patient_is_in_exactly_one_site_of_its_stated_size_whatever_the_skew(
    patients: int, sites: int, values: int, alpha: float | None, size_skew: float, seed: int
) -> None:
    kinds = [str(patient % values) for patient in range(patients)]
    asked = cut(sites, label="kind" if alpha else None, alpha=alpha, size_skew=size_skew)
    if patients < sites:
        with pytest.raises(SettingsError, match=rf"{sites} sites cannot be made of {patients} patients"):
            assign(kinds, asked, seed=seed)
        return
    found = assign(kinds, asked, seed=seed)
    assert np.bincount(found, minlength=sites).tolist() == sizes(patients, sites=sites, skew=size_skew)
    assert min(np.bincount(found, minlength=sites)) >= 1
    assert np.array_equal(found, assign(kinds, asked, seed=seed))


def test_size_skew_falls_as_a_power_of_the_sites_number() -> None:
    assert sizes(100, sites=4, skew=0.0) == [25, 25, 25, 25]
    assert sizes(4 + 1200, sites=4, skew=1.0) == [577, 289, 193, 145]  # 12 : 6 : 4 : 3
    assert sizes(3, sites=3, skew=5.0) == [1, 1, 1]
    assert sizes(7, sites=1, skew=1.0) == [7]


def purity(alpha: float) -> float:
    """Share of a site's patients with its most frequent value, mean over sites: 0.1 if all were alike."""
    values = [str(patient % 10) for patient in range(1000)]
    found = assign(values, cut(20, label="kind", alpha=alpha), seed=1)
    shares = []
    for site in range(20):
        counts = Counter(value for value, own in zip(values, found, strict=True) if own == site)
        shares.append(max(counts.values()) / counts.total())
    return float(np.mean(shares))


def test_a_small_alpha_gives_each_site_few_values_and_a_large_one_all() -> None:
    strong, middle, weak = purity(0.01), purity(10.0), purity(1e4)
    assert strong > 0.6
    assert strong > 2 * middle
    assert 0.1 < weak < 0.2 < middle


def test_another_seed_is_another_cut() -> None:
    values = ["a", "b"] * 20
    first, second = (assign(values, cut(4), seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_a_scanner_of_strength_0_changes_nothing_and_black_stays_black() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    pixels[:4] = 0
    assert np.array_equal(Look.of("site-1", strength=0.0, seed=0)(pixels), pixels)
    looks = [Look.of(f"site-{n}", strength=1.0, seed=0) for n in range(5)]
    taken = [look(pixels) for look in looks]
    assert all(not image[:4].any() for image in taken)
    assert len({image.tobytes() for image in taken}) == 5
    assert Look.of("site-1", strength=1.0, seed=0) == looks[1] != Look.of("site-1", strength=1.0, seed=1)


def test_each_term_of_a_look_does_what_it_says() -> None:
    plain = {"gamma": 1.0, "contrast": 1.0, "brightness": 0.0, "blur": 0.0}
    grey = np.full((SIDE, SIDE), 102, dtype=np.uint8)
    grey[::2] = 204
    said = {
        "gamma": (2.0, [0.64 * 255, 0.16 * 255]),
        "contrast": (0.5, [0.65 * 255, 0.45 * 255]),
        "brightness": (0.1, [0.9 * 255, 0.5 * 255]),
    }
    for name, (value, expected) in said.items():
        assert Look(**{**plain, name: value})(grey)[:2, 0].tolist() == np.rint(expected).tolist()
    assert np.ptp(Look(**{**plain, "blur": 0.1})(grey)) < np.ptp(grey)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty patients with one or two images each, of three kinds and two clinics, one image missing."""
    folder = tmp_path_factory.mktemp("table")
    rng, rows = np.random.default_rng(0), []
    for patient in range(PATIENTS):
        for image in range(1 + patient % 2):
            name = f"{patient}-{image}.png"
            if patient != 7:
                Image.fromarray(rng.integers(1, 256, (30, 30), dtype=np.uint8)).save(folder / name)
            kind, clinic = "abc"[patient % 3], str(patient % 2)
            text = f"Finding {kind} in the {'left' if image else 'right'} lung."
            rows.append([name, text, f"p{patient}", kind, str(patient % 3 % 2), clinic])
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "text", "patient_id", "kind", "effusion", "clinic"], *rows])
    return folder / "images.csv"


def asked(table: Path, **keys: Any) -> Simulation:
    return Simulation.model_validate({"table": table, "by": "clinic", "image_size": SIDE, **keys})


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_cut_table_holds_every_row_once_and_no_patient_twice(table: Path, tmp_path: Path) -> None:
    made = rows_of(cut_table(table, asked(table, cut={"sites": 5, "size_skew": 1.0}), tmp_path))
    source = rows_of(table)
    assert [row["text"] for row in made] == [row["text"] for row in source]
    assert [Path(row["image"]).name for row in made] == [row["image"] for row in source]
    owners: dict[str, set[str]] = {}
    for row in made:
        owners.setdefault(row["patient_id"], set()).add(row[SITE])
    assert all(len(sites) == 1 for sites in owners.values())
    assert set.union(*owners.values()) == {f"site-{n}" for n in range(1, 6)}


def test_what_is_made_again_is_left_as_it_was(table: Path, tmp_path: Path) -> None:
    simulation = asked(table, cut={"sites": 2}, scanner_shift=1.0)
    made = cut_table(table, simulation, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert cut_table(table, simulation, tmp_path) == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    cut_table(table, asked(table, cut={"sites": 2}, scanner_shift=1.0, seed=1), tmp_path)
    assert made.stat().st_mtime_ns != before[made]


def test_a_true_column_is_used_as_it_is_and_is_no_label(table: Path, tmp_path: Path) -> None:
    made = rows_of(cut_table(table, asked(table, scanner_shift=0.5), tmp_path))
    assert [row[SITE] for row in made] == [row["clinic"] for row in rows_of(table)]
    assert "clinic" not in made[0]


def test_scanners_change_the_images_of_their_sites_and_nothing_else(table: Path, tmp_path: Path) -> None:
    simulation = asked(table, cut={"sites": 2}, scanner_shift=1.0)
    made = rows_of(cut_table(table, simulation, tmp_path))
    plain = rows_of(cut_table(table, asked(table, cut={"sites": 2}), tmp_path / "plain"))
    assert [{**row, "image": ""} for row in made] == [{**row, "image": ""} for row in plain]
    for row, source in zip(made, plain, strict=True):
        if source["patient_id"] == "p7":  # whose file is not there, which the cohort has to see
            assert row["image"] == source["image"]
            continue
        assert Path(row["image"]).parent.name == LOOKS
        with Image.open(row["image"]) as taken:
            assert taken.size == (SIDE, SIDE)


def cohorts(table: Path, root: Path, **simulation: Any) -> dict[str, Cohort]:
    document: dict[str, Any] = {
        "version": 1,
        "name": "study",
        "privacy": {"epsilon": 8.0},
        "simulation": {"table": str(table), "by": "clinic", "image-size": SIDE, **simulation},
    }
    folders = prepare_sites(Federation.parse(document, source="test"), root)
    return {folder.name: Site.open(folder).cohort() for folder in folders}


def labelled(cohort: Cohort) -> int:
    known = ~np.isnan(cohort.labels["effusion"])
    return len(np.unique(cohort.patients[known]))


def test_a_site_lacks_what_it_is_said_to_lack(table: Path, tmp_path: Path) -> None:
    missing = {"site-1": {"labels": 1.0}, "site-2": {"reports": 0.5, "images": 0.25}}
    found = cohorts(table, tmp_path, cut={"sites": 3}, missing=missing)
    bare, sparse, whole = (found[f"site-{n}"] for n in (1, 2, 3))
    assert labelled(bare) == 0
    assert len(np.unique(bare.patients)) in (13, 14)
    own = {row["patient_id"] for row in rows_of(tmp_path / "sites" / CUT) if row[SITE] == "site-2"}
    assert len(np.unique(sparse.patients)) == len(own) - len(own) // 2 - len(own) // 4
    assert sparse.counts[State.UNPAIRED] >= len(own) // 2
    assert labelled(whole) == len(np.unique(whole.patients))


@pytest.mark.parametrize(("missing", "modality"), [("reports", "images"), ("images", "texts")])
def test_a_site_that_lacks_a_whole_side_keeps_the_other(
    missing: str, modality: str, table: Path, tmp_path: Path
) -> None:
    found = cohorts(table, tmp_path, cut={"sites": 3}, missing={"site-2": {missing: 1.0}})
    alone, whole = found["site-2"], found["site-3"]
    assert Site.open(tmp_path / "sites" / "site-2").settings.cohort.modality == modality
    assert len(np.unique(alone.patients)) in (13, 14)
    assert any(alone.texts) == (modality == "texts")
    assert bool(alone.images.any()) == (modality == "images")
    assert labelled(alone) == len(np.unique(alone.patients))
    assert all(whole.texts)
    assert whole.images.any()


@pytest.mark.parametrize("missing", [{"reports": 0.5, "images": 0.5}, {"reports": 1.0, "images": 0.5}])
def test_a_site_without_any_pair_is_refused(missing: Mapping[str, float], table: Path) -> None:
    with pytest.raises(ValueError, match="this site would have no pair: let reports"):
        asked(table, missing={"site-1": missing})


def test_every_site_can_have_a_budget_and_a_least_noise_of_its_own(table: Path, tmp_path: Path) -> None:
    own = {"site-2": {"epsilon-max": 1.0, "min-noise-multiplier": 2.0}}
    cohorts(table, tmp_path, cut={"sites": 2}, policies=own, policy={"epsilon-max": 4.0})
    policies = [Site.open(tmp_path / "sites" / f"site-{n}").settings.policy for n in (1, 2)]
    assert [policy.epsilon_max for policy in policies] == [4.0, 1.0]
    assert [policy.min_noise_multiplier for policy in policies] == [0.3, 2.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"missing": {"site-9": {"labels": 1.0}}}, r"missing names 'site-9', which is none of the 2 sites"),
        ({"policies": {"1": {"epsilon-max": 1.0}}}, r"policies names '1', which is none of the 2 sites"),
        ({"cut": {"sites": 41}}, r"41 sites cannot be made of 40 patients: ask for fewer"),
    ],
)
def test_what_cannot_be_made_of_the_table_says_why(
    keys: Mapping[str, Any], message: str, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        cohorts(table, tmp_path, **{"cut": {"sites": 2}, **keys})


def test_a_label_that_is_no_column_names_the_columns(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ColumnMissingError, match=r"no column 'kinds' \(did you mean 'kind'"):
        cohorts(table, tmp_path, cut={"sites": 2, "label": "kinds", "alpha": 1.0})


@pytest.mark.parametrize("half", [{"label": "kind"}, {"alpha": 1.0}])
def test_a_skew_needs_its_column_and_its_strength(half: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="label and alpha belong together"):
        cut(2, **half)


def test_policies_of_sites_that_have_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="those in a folder have their own"):
        Simulation.model_validate({"sites": tmp_path, "policies": {"site-1": {"epsilon-max": 1.0}}})


def test_hospitals_are_pooled_with_their_texts_labels_and_held_out_patients(
    hospitals: Path, tmp_path: Path
) -> None:
    folders = sorted((hospitals / "hospitals").glob("site-*"))
    rows = rows_of(pool(folders, tmp_path))
    whole = [Site.open(folder).cohort() for folder in folders]
    assert [row["text"] for row in rows] == [text for cohort in whole for text in cohort.texts]
    held_out = [row["split"] == "test" for row in rows]
    assert held_out == np.concatenate([cohort.is_test for cohort in whole]).tolist()
    with Image.open(rows[0]["image"]) as image:
        assert np.array_equal(np.asarray(image), whole[0].images[0])
    assert len({row["patient_id"] for row in rows}) == sum(len(np.unique(c.patients)) for c in whole)
    assert {row["pneumothorax"] for row in rows} <= {"", "0", "1"}


def test_windows_are_not_flattened_into_a_pool_of_grey_images(hospitals: Path, tmp_path: Path) -> None:
    site = hospitals / "hospitals" / "site-2"
    change_site(site, cohort={"ct-windows": [[-600, 1500], [40, 400]]})
    with pytest.raises(CohortSettingsError, match="site-2 shows CT windows as channels"):
        pool([site], tmp_path)


def test_synthetic_hospitals_are_cut_anew_and_trained_on(hospitals: Path) -> None:
    study = {
        "cut": {"sites": 4, "label": "pneumothorax", "alpha": 0.3},
        "image-size": 32,
        "scanner-shift": 1.0,
        "policy": {"min-patients": 5, "require-dp": False},
    }
    result = simulate(
        federation(hospitals, **without_claim(simulation=study, training={"rounds": 1})),
        runs=hospitals / "runs",
    )
    assert [site["rounds"] for site in result.summary["sites"]] == [1, 1, 1, 1]
