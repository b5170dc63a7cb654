"""Prototypes of a round: the sites' noisy sums added up, and what the sites are then told of each concept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.banks import PrototypeBank
from privacy.noisy_sums import MODALITIES, NoisySums
from server.sums import SiteSum
from strategies.files import sync, write_bytes
from strategies.messages import PROTOTYPE_SUMS, Arrays, PrototypePlan
from tasks.concepts import Concept, FindingConcept, named_concepts

PROTOTYPES_FOLDER = "prototypes"
_LARGEST_NOISE = 10.0  # standard deviations
EmbedConcepts = Callable[[Arrays, tuple[Concept, ...]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """How a run makes prototypes.

    Attributes:
        plan: What sites are asked for.
        width: D of the embeddings.
        least_cosine: A direction is used where noise should leave it such a cosine with the one without
            noise; elsewhere a finding's prompts stand in, and a view is left out.
        least_patients: And where its noisy count, rounded, is so large.
        embed: Unit directions (K, D) of the concepts' prompts under given weights.
        private: Whether the sites add noise.
        shares_weights: Weights travel beside them. Without, every round needs a direction for every finding,
            and takes the prompts where nobody has released one: in the first round, of all.
    """

    plan: PrototypePlan
    width: int
    least_cosine: float
    least_patients: int
    embed: EmbedConcepts
    private: bool
    shares_weights: bool = True

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """K of them."""
        return named_concepts(self.plan.concepts)

    @property
    def like(self) -> Arrays:
        """The shape of a release."""
        shape = (len(MODALITIES), len(self.concepts), self.width + 1)
        return {PROTOTYPE_SUMS: np.zeros(shape, dtype=np.float32)}


class PrototypeSum(SiteSum):
    """The sum of all sites' releases, and what it says of each concept."""

    def __init__(self, prototypes: Prototypes) -> None:
        self._prototypes = prototypes
        super().__init__(prototypes.like)

    def sums(self) -> NoisySums:
        """What all of them released together."""
        plan = self._prototypes.plan
        return NoisySums(
            concepts=tuple(concept.name for concept in self._prototypes.concepts),
            values=self.total.astype(np.float32),
            noise_std=math.sqrt(self.sites) * plan.noise_multiplier * plan.max_norm
            if self._prototypes.private
            else 0.0,
            count_weight=plan.count_weight,
        )

    def bank(self, arrays: Arrays) -> PrototypeBank | None:
        """The prototypes for sites that train on from these weights; null: of no concept there is one."""
        prototypes, sums, least = self._prototypes, self.sums(), self._least
        kept = self._kept()
        if not kept:
            return None
        concepts = tuple(prototypes.concepts[number] for number in kept)
        used = replace(sums, concepts=tuple(each.name for each in concepts), values=sums.values[:, kept])
        return used.bank(
            prototypes.embed(arrays, concepts),
            least_count=least,
            wordings=[concept.prompts for concept in concepts],
        )

    def _kept(self) -> list[int]:
        """Numbers of the concepts that there is something to say of."""
        counts, least = self.sums().counts, self._least
        return [
            number
            for number, concept in enumerate(self._prototypes.concepts)
            if isinstance(concept, FindingConcept) or counts[:, number].min() >= least
        ]

    @property
    def _least(self) -> float:
        prototypes = self._prototypes
        least = least_count(self.sums(), least_cosine=prototypes.least_cosine)
        return max(least, prototypes.least_patients - 0.5)  # an exact sum is short of it by its last digits

    def facts(self) -> Mapping[str, Any]:
        """What the run's events say: noisy counts are public, as the sums are."""
        sums, least, kept = self.sums(), self._least, self._kept()
        return {
            "sites": self.sites,
            "concepts": len(sums.concepts),
            "used": {
                name: int((row[kept] >= least).sum()) if self.sites else 0  # nobody released: prompts alone
                for name, row in zip(MODALITIES, sums.counts, strict=True)
            },
            "least_count": least,
        }


def largest_value(plan: PrototypePlan, *, patients: int) -> float:
    """Bound on the values that a site of so many declared patients releases: the range of a secure sum.

    A patient adds ``max_norm`` at most to all values together, and so to each. Noise is beyond ten standard
    deviations once in 6e22 values. The site refuses a value beyond the range, and decides that on what it has
    noised, so a site that declared too few patients betrays none of them.
    """
    return plan.max_norm * (patients + _LARGEST_NOISE * plan.noise_multiplier)


def keep(bank: PrototypeBank, path: Path) -> None:
    """Write prototypes whole or not at all; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    bank.save(partial)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def keep_none(path: Path) -> None:
    """Write down that there are none; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, b"")


def least_count(sums: NoisySums, *, least_cosine: float) -> float:
    """Patients that a direction needs so that noise leaves it a cosine of about ``least_cosine``.

    n patients who all look in one direction add up to n, the noise to ``noise_std`` times sqrt(d): patients
    who differ need more.
    """
    noise = sums.noise_std * math.sqrt(sums.values.shape[-1] - 1)
    return noise * least_cosine / math.sqrt(1 - least_cosine**2)
