"""The concepts of prototypes: each finding, there or ruled out. They are public: their names tell nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.embeddings import EmbeddingArray, EvaluationError, checked_embeddings
from tasks.prompts import prompts_for
from tasks.zero_shot import TextEncoder


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One side of a finding.

    Attributes:
        finding: Its name, as in label columns.
        present: There, or ruled out.
        prompts: How reports write that.
    """

    finding: str
    present: bool
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        """``effusion present`` or ``effusion absent``."""
        return f"{self.finding} {'present' if self.present else 'absent'}"


def finding_concepts(findings: Sequence[str]) -> tuple[Concept, ...]:
    """Two concepts a finding, in order: present, absent.

    Raises:
        EvaluationError: a finding is blank.
    """
    return tuple(
        Concept(finding=finding, present=present, prompts=prompts)
        for finding in findings
        for present, prompts in (
            (True, prompts_for(finding).positive),
            (False, prompts_for(finding).negative),
        )
    )


def named_concepts(names: Sequence[str]) -> tuple[Concept, ...]:
    """The concepts of these names, as `Concept.name` writes them.

    Raises:
        EvaluationError: a name is none of a concept.
    """
    concepts = []
    for name in names:
        finding, _, side = name.rpartition(" ")
        found = [concept for concept in finding_concepts([finding] if side else []) if concept.name == name]
        if not found:
            raise EvaluationError(f"{name!r} names no concept: expected a finding, and present or absent")
        concepts += found
    return tuple(concepts)


def members_by_labels(
    concepts: Sequence[Concept], labels: Mapping[str, NDArray[np.floating[Any]]], *, rows: int
) -> NDArray[np.float32]:
    """Which concepts each study states, by its labels. Row i depends on row i of the labels alone.

    Args:
        concepts: K of them.
        labels: For each finding 1 present, 0 absent, shape (N,). Anything else is unknown and states neither,
            and so does a finding without labels.
        rows: N.

    Returns:
        0 or 1, float32, shape (N, K).
    """
    members = np.zeros((rows, len(concepts)), dtype=np.float32)
    for column, concept in enumerate(concepts):
        if concept.finding in labels:
            members[:, column] = labels[concept.finding] == float(concept.present)
    return members


def members_by_reports(
    concepts: Sequence[Concept], reports: Sequence[str], *, stated: Callable[[str], Mapping[str, bool]]
) -> NDArray[np.float32]:
    """Which concepts each report states, as ``stated`` reads it. Row i depends on report i alone.

    Args:
        concepts: K of them.
        reports: N of them.
        stated: Of one report: finding to there (True) or ruled out (False), without those it is silent on.
            It must remember nothing of other reports; a public rule or model does not.

    Returns:
        0 or 1, float32, shape (N, K).
    """
    members = np.zeros((len(reports), len(concepts)), dtype=np.float32)
    for row, report in enumerate(reports):
        found = stated(report)
        members[row] = [found.get(concept.finding) == concept.present for concept in concepts]
    return members


def concept_prompts(concepts: Sequence[Concept], encode_texts: TextEncoder) -> EmbeddingArray:
    """One direction a concept: the mean of its prompts' unit embeddings, normalised; float32 (K, D).

    Raises:
        EvaluationError: an embedding is not a finite unit vector.
    """
    directions = []
    for concept in concepts:
        embeddings = checked_embeddings(
            f"prompts for {concept.name!r}", encode_texts(concept.prompts), rows=len(concept.prompts)
        )
        mean = embeddings.mean(axis=0, dtype=np.float64)
        directions.append(mean / np.linalg.norm(mean))
    return np.array(directions, dtype=np.float32)
