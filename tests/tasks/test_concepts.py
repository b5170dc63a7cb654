"""What a study states depends on that study alone, and unknown is neither there nor ruled out."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.concepts import (
    Concept,
    concept_prompts,
    finding_concepts,
    members_by_labels,
    members_by_reports,
    named_concepts,
)
from tasks.embeddings import EvaluationError
from tasks.prompts import prompts_for

CONCEPTS = finding_concepts(["effusion", "my finding"])
LABEL = st.sampled_from([0.0, 1.0, 0.5, -1.0, np.nan])


def stated(report: str) -> dict[str, bool]:
    return {"effusion": "no" not in report} if "effusion" in report else {}


def test_every_finding_has_two_sides_with_the_prompts_of_zero_shot() -> None:
    assert [concept.name for concept in CONCEPTS] == [
        "effusion present",
        "effusion absent",
        "my finding present",
        "my finding absent",
    ]
    assert CONCEPTS[0].prompts == prompts_for("effusion").positive
    assert CONCEPTS[3] == Concept(finding="my finding", present=False, prompts=("There is no my finding.",))
    assert finding_concepts([]) == ()


def test_a_blank_finding_is_refused() -> None:
    with pytest.raises(EvaluationError, match="expected the name of a finding, got ' '"):
        finding_concepts([" "])


def test_labels_state_what_is_known() -> None:
    labels = {"effusion": np.array([1.0, 0.0, np.nan, 0.5]), "unused": np.ones(4)}
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert members_by_labels(CONCEPTS, labels, rows=4).tolist() == expected
    assert members_by_labels(CONCEPTS, {}, rows=0).shape == (0, 4)


def test_reports_state_what_the_caller_reads_in_them() -> None:
    found = members_by_reports(CONCEPTS, ["large effusion", "no effusion", "clear"], stated=stated)
    assert found.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert members_by_reports(CONCEPTS, [], stated=stated).shape == (0, 4)


@given(own=LABEL, others=st.lists(LABEL, max_size=4))
def test_what_a_study_states_is_untouched_by_others(own: float, others: list[float]) -> None:
    alone = members_by_labels(CONCEPTS, {"effusion": np.array([own])}, rows=1)
    among = members_by_labels(CONCEPTS, {"effusion": np.array([*others, own])}, rows=len(others) + 1)
    assert np.array_equal(among[-1], alone[0])
    assert alone.sum() <= 1


def test_a_concepts_prompt_is_the_direction_of_the_mean_sentence() -> None:
    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.eye(16, dtype=np.float32)[: len(texts)]

    directions = concept_prompts(CONCEPTS, encode)
    assert directions.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    count = len(CONCEPTS[0].prompts)
    np.testing.assert_allclose(directions[0, :count], 1 / np.sqrt(count), rtol=1e-6)


def test_prompts_that_are_no_unit_vectors_are_refused() -> None:
    with pytest.raises(EvaluationError, match="prompts for 'effusion present'"):
        concept_prompts(CONCEPTS, lambda texts: np.zeros((len(texts), 4), dtype=np.float32))


def test_a_concept_is_found_by_its_name() -> None:
    assert named_concepts([concept.name for concept in CONCEPTS]) == CONCEPTS
    for name in ("effusion", "effusion perhaps", "", " present"):
        with pytest.raises(EvaluationError):
            named_concepts([name])
