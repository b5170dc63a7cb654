"""Patients' histories."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipward.synthetic.findings import FINDINGS, GRADES, CaseMix, Observation, Study, draw_history

EVEN = CaseMix(normal=0.45, weights=(1.0,) * len(FINDINGS))
GRADE_FIELDS = {"size", "severity"}


def histories(count: int, mix: CaseMix = EVEN) -> list[list[Study]]:
    return [draw_history(np.random.default_rng([1, patient]), mix) for patient in range(count)]


def same_lesion(observation: Observation) -> Observation:
    return replace(observation, size="", severity="", change="")


@given(seed=st.integers(0, 2**32 - 1), normal=st.sampled_from([0.0, 0.45, 1.0]))
def test_no_study_holds_a_finding_twice_and_only_the_first_has_no_change(seed: int, normal: float) -> None:
    studies = draw_history(np.random.default_rng(seed), replace(EVEN, normal=normal))
    assert 1 <= len(studies) <= 6
    for number, study in enumerate(studies):
        names = [observation.finding for observation in study.observations]
        assert len(set(names)) == len(names) <= 4
        assert all(bool(observation.change) == (number > 0) for observation in study.observations)


@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_not_new_was_there_before_at_the_same_place_and_moved_by_at_most_one_grade(seed: int) -> None:
    studies = draw_history(np.random.default_rng(seed), replace(EVEN, normal=0.0))
    for before, after in pairwise(studies):
        known = {observation.finding: observation for observation in before.observations}
        for observation in after.observations:
            if observation.change == "new":
                assert observation.finding not in known
                continue
            assert same_lesion(observation) == same_lesion(known[observation.finding])
            if observation.finding in GRADES:
                field, ladder = GRADES[observation.finding]
                step = ladder.index(getattr(observation, field)) - ladder.index(
                    getattr(known[observation.finding], field)
                )
                assert step == {"stable": 0, "worse": 1, "improved": -1}[observation.change]
        gone = set(known) - {observation.finding for observation in after.observations}
        assert gone == {observation.finding for observation in after.resolved}


@given(seed=st.integers(0, 2**32 - 1))
def test_each_finding_has_the_grades_of_its_kind_and_no_other(seed: int) -> None:
    for study in draw_history(np.random.default_rng(seed), replace(EVEN, normal=0.0)):
        for observation in study.observations:
            graded = {name for name in GRADE_FIELDS if getattr(observation, name)}
            expected = GRADES.get(observation.finding)
            assert graded == ({expected[0]} if expected else set())
            if expected:
                assert getattr(observation, expected[0]) in expected[1]
            assert bool(observation.side) == (observation.finding != "cardiomegaly")
            assert bool(observation.kind) == (observation.finding == "device")


def test_about_two_studies_in_five_are_normal_and_patients_have_1_7_studies_on_average() -> None:
    drawn = histories(3000)
    studies = [study for history in drawn for study in history]
    assert len(studies) / len(drawn) == pytest.approx(1.7, abs=0.07)
    assert 0.38 < np.mean([not study.observations for study in studies]) < 0.47
    seen = Counter(observation.finding for study in studies for observation in study.observations)
    assert set(seen) == set(FINDINGS)
    assert min(seen.values()) > 0.08 * len(studies)


def test_a_hospital_that_sees_only_the_healthy_starts_with_normal_studies() -> None:
    assert not any(history[0].observations for history in histories(200, replace(EVEN, normal=1.0)))


def test_an_observation_says_empty_where_a_field_does_not_apply() -> None:
    blank = Observation(finding="cardiomegaly")
    assert {getattr(blank, field.name) for field in fields(blank) if field.type == "str"} == {
        "cardiomegaly",
        "",
    }
