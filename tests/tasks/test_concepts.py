"""What a study states depends on that study alone, and unknown is neither there nor ruled out."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.concepts import (
    FindingConcept,
    Studies,
    concept_prompts,
    finding_concepts,
    members,
    named_concepts,
    view_concepts,
)
from tasks.embeddings import EvaluationError
from tasks.prompts import prompts_for
from tasks.views import VIEW_KINDS

CONCEPTS = finding_concepts(["effusion", "my finding"])
VIEWS = view_concepts((*VIEW_KINDS, "views"))
LABEL = st.sampled_from([0.0, 1.0, 0.5, -1.0, np.nan])
REPORT = st.sampled_from(["Axial CT of the brain: glioma.", "PA radiograph.", "", "CTA of the spinel"])


def stated(text: str) -> set[str]:
    row = members(VIEWS, Studies({}, [text]))[0]
    return {concept.name for concept, there in zip(VIEWS, row, strict=True) if there}


def test_every_finding_has_two_sides_with_the_prompts_of_zero_shot() -> None:
    assert [concept.name for concept in CONCEPTS] == [
        "effusion present",
        "effusion absent",
        "my finding present",
        "my finding absent",
    ]
    assert CONCEPTS[0].prompts == prompts_for("effusion").positive
    assert CONCEPTS[3] == FindingConcept(finding="my finding", present=False)
    assert CONCEPTS[3].prompts == ("There is no my finding.",)
    assert finding_concepts([]) == ()


def test_labels_state_what_is_known() -> None:
    labels = {"effusion": np.array([1.0, 0.0, np.nan, 0.5]), "unused": np.ones(4)}
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert members(CONCEPTS, Studies(labels, [""] * 4)).tolist() == expected
    assert members(CONCEPTS, Studies({}, [])).shape == (0, 4)
    assert members((), Studies({}, ["a"])).shape == (1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Axial CT of the skull and brain: glioma.",
            {"axial", "CT", "head", "brain", "axial CT of the head", "axial CT of the brain"},
        ),
        ("PA plain film of the lungs", {"PA", "plain radiograph", "lung", "PA plain radiograph of the lung"}),
        ("T1-weighted MRI, sagittal", {"T1-weighted MRI", "MRI", "sagittal"}),
        ("spinel, apnoea, ctx", set()),
        ("", set()),
    ],
)
def test_words_of_a_report_state_its_views_whatever_their_case(text: str, expected: set[str]) -> None:
    assert stated(text) == stated(text.upper()) == expected


@given(label=LABEL, report=REPORT, others=st.lists(st.tuples(LABEL, REPORT), max_size=4))
def test_what_a_study_states_is_untouched_by_others(
    label: float, report: str, others: list[tuple[float, str]]
) -> None:
    every = (*CONCEPTS, *VIEWS)
    alone = members(every, Studies({"effusion": np.array([label])}, [report]))
    labels = np.array([*(value for value, _ in others), label])
    among = members(every, Studies({"effusion": labels}, [*(text for _, text in others), report]))
    assert np.array_equal(among[-1], alone[0])
    assert alone[0, :2].sum() <= 1


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
    every = (*CONCEPTS, *VIEWS)
    assert named_concepts([concept.name for concept in every]) == every
    for name in ("effusion", "effusion perhaps", "", " present"):
        with pytest.raises(EvaluationError):
            named_concepts([name])
