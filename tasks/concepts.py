"""The concepts of prototypes: findings, there or ruled out, and views. All are public."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.embeddings import EmbeddingArray, EvaluationError, checked_embeddings
from tasks.prompts import prompts_for
from tasks.views import VIEW_KINDS, VIEWS, ViewKind, capital, example_sentences, mentions
from tasks.zero_shot import TextEncoder

ConceptKind = Literal[ViewKind, "views"]  # of single words, or of a plane, a technique and a region together
Labels = Mapping[str, NDArray[np.floating[Any]]]


class Studies:
    """What is known of N studies, and which words their reports have.

    Args:
        labels: By finding, 1 there, 0 ruled out, else unknown, shape (N,); findings may lack.
        texts: N reports, blank where there is none.
    """

    def __init__(self, labels: Labels, texts: Sequence[str]) -> None:
        self._labels, self._texts = labels, texts
        self.mention = cache(self._mention)

    def __len__(self) -> int:
        return len(self._texts)

    def label(self, finding: str) -> NDArray[np.floating[Any]]:
        """Shape (N,)."""
        return self._labels.get(finding, np.full(len(self), np.nan))

    def _mention(self, kind: ViewKind, term: str) -> NDArray[np.bool_]:
        return mentions(kind, term, self._texts)


@dataclass(frozen=True, kw_only=True)
class FindingConcept:
    """One side of a finding, stated by labels.

    Attributes:
        finding: Its name, as in label columns.
        present: There, or ruled out.
    """

    finding: str
    present: bool

    @property
    def name(self) -> str:
        """``effusion present`` or ``effusion absent``."""
        return f"{self.finding} {'present' if self.present else 'absent'}"

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """How reports write that.

        Raises:
            EvaluationError: the finding is blank.
        """
        pair = prompts_for(self.finding)
        return pair.positive if self.present else pair.negative

    def stated(self, studies: Studies) -> NDArray[np.bool_]:
        """Where the label is 1 for present, 0 for absent; anything else is unknown and states neither."""
        return np.asarray(studies.label(self.finding) == float(self.present))


@dataclass(frozen=True, kw_only=True)
class ViewConcept:
    """What an image shows of whom, or by what technique, stated by the words of a report.

    Attributes:
        name: ``axial``, ``CT``, ``head``, or ``axial CT of the head``.
        terms: Of `tasks.views`; a report that has all of them states it.
    """

    name: str
    terms: tuple[tuple[ViewKind, str], ...]

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Sentences with its terms."""
        if len(self.terms) > 1:
            return (f"{capital(self.name)}.",)
        ((kind, term),) = self.terms
        return example_sentences(kind, term)

    def stated(self, studies: Studies) -> NDArray[np.bool_]:
        """Where the report has the terms."""
        there = [studies.mention(kind, term) for kind, term in self.terms]
        return np.asarray(np.logical_and.reduce(there))


Concept = FindingConcept | ViewConcept


def finding_concepts(findings: Sequence[str]) -> tuple[Concept, ...]:
    """Two concepts a finding, in order: present, absent."""
    return tuple(FindingConcept(finding=each, present=there) for each in findings for there in (True, False))


def view_concepts(kinds: Sequence[ConceptKind]) -> tuple[Concept, ...]:
    """All concepts of these kinds: one for each term, or for each plane, technique and region together."""
    return tuple(concept for kind in kinds for concept in _of_kind(kind))


def _of_kind(kind: ConceptKind) -> Iterator[ViewConcept]:
    if kind != "views":
        yield from (ViewConcept(name=term, terms=((kind, term),)) for term in VIEWS[kind])
        return
    for plane, technique, region in product(VIEWS["planes"], VIEWS["techniques"], VIEWS["regions"]):
        yield ViewConcept(
            name=f"{plane} {technique} of the {region}",
            terms=(("planes", plane), ("techniques", technique), ("regions", region)),
        )


@cache
def _views_by_name() -> Mapping[str, Concept]:
    return {concept.name: concept for concept in view_concepts((*VIEW_KINDS, "views"))}


def named_concepts(names: Sequence[str]) -> tuple[Concept, ...]:
    """The concepts of these names, as their ``name`` writes them.

    Raises:
        EvaluationError: a name is none of a concept.
    """
    return tuple(_views_by_name().get(name) or _finding(name) for name in names)


def unknown_names(names: Sequence[str]) -> list[str]:
    """Those that name no concept here."""
    return [name for name in names if name not in _views_by_name() and not _is_finding(name)]


def _is_finding(name: str) -> bool:
    finding, _, side = name.rpartition(" ")
    return bool(finding.strip()) and side in ("present", "absent")


def _finding(name: str) -> Concept:
    if not _is_finding(name):
        raise EvaluationError(f"{name!r} names no concept: expected a view, or a finding and its side")
    finding, _, side = name.rpartition(" ")
    return FindingConcept(finding=finding, present=side == "present")


def members(concepts: Sequence[Concept], studies: Studies) -> NDArray[np.float32]:
    """Which of K concepts each study states: 0 or 1, float32, shape (N, K).

    Row i depends on labels and text of study i alone.
    """
    columns = [concept.stated(studies) for concept in concepts]
    return np.array(columns, dtype=np.float32).reshape(len(concepts), len(studies)).T


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
