"""What is wrong with a synthetic patient, and how it changes from study to study."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

FINDINGS = ("opacity", "consolidation", "effusion", "cardiomegaly", "pneumothorax", "nodule", "device")
ZONES = ("upper", "mid", "lower")
SIZES = ("small", "moderate", "large")
SEVERITIES = ("mild", "moderate", "severe")
# Not below 10 mm, which 64 pixels do not show; 8, 11 and 18 would ask for the article "an".
NODULE_SIZES = ("10 mm", "12 mm", "15 mm", "20 mm", "25 mm", "30 mm")
DEVICES = ("pacemaker", "catheter")
GRADES = {  # what is graded, and its steps; a device has none
    "opacity": ("severity", SEVERITIES),
    "consolidation": ("severity", SEVERITIES),
    "effusion": ("size", SIZES),
    "cardiomegaly": ("severity", SEVERITIES),
    "pneumothorax": ("size", SIZES),
    "nodule": ("size", NODULE_SIZES),
}

STUDY_COUNT_SHARES = (0.62, 0.22, 0.08, 0.04, 0.025, 0.015)  # of 1 to 6 studies: mean 1.7
FINDING_COUNT_SHARES = (0.48, 0.33, 0.15, 0.04)  # of 1 to 4 findings in an abnormal first study
BILATERAL_SHARES = {"opacity": 0.3, "consolidation": 0.15, "effusion": 0.3}
LASTING = ("cardiomegaly", "device")
# Findings that come together: fluid with a failing heart or pneumonia, a tube with a collapsed lung.
COMPANIONS = {
    "effusion": ("consolidation", "cardiomegaly", "opacity"),
    "consolidation": ("effusion",),
    "cardiomegaly": ("effusion", "device"),
    "pneumothorax": ("device",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One finding of one study; an empty text means "does not apply".

    Attributes:
        finding: One of ``FINDINGS``.
        side: "left", "right" or "bilateral"; empty for the heart.
        zone: One of ``ZONES``, for findings inside the lung.
        size: One of ``SIZES`` (effusion, pneumothorax) or of ``NODULE_SIZES``.
        severity: One of ``SEVERITIES`` (opacity, consolidation, cardiomegaly).
        kind: One of ``DEVICES``, for a device.
        change: "new", "stable", "worse", "improved" against the study before; empty in a first study.
        place: Offset inside the zone, both in [-1, 1]: a lesion stays where it is.
    """

    finding: str
    side: str = ""
    zone: str = ""
    size: str = ""
    severity: str = ""
    kind: str = ""
    change: str = ""
    place: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What one study shows, and what has gone since the one before."""

    observations: tuple[Observation, ...]
    resolved: tuple[Observation, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseMix:
    """How often a hospital sees what.

    Attributes:
        normal: Share of patients whose first study is normal, in [0, 1].
        weights: Relative frequency of each of ``FINDINGS``.
    """

    normal: float
    weights: tuple[float, ...]


def draw_history(rng: np.random.Generator, mix: CaseMix) -> list[Study]:
    """Draw one to six studies of one patient, each following from the one before.

    Guarantees:
        No study holds a finding twice. An observation of the first study has no ``change``, of a later one
        it always has.
    """
    count = 1 + int(rng.choice(len(STUDY_COUNT_SHARES), p=STUDY_COUNT_SHARES))
    observations: list[Observation] = []
    if rng.random() >= mix.normal:
        for _ in range(1 + int(rng.choice(len(FINDING_COUNT_SHARES), p=FINDING_COUNT_SHARES))):
            observations.append(_draw_observation(rng, mix, observations))
    studies = [Study(observations=tuple(observations))]
    while len(studies) < count:
        studies.append(_follow_up(rng, mix, studies[-1].observations))
    return studies


def _draw_observation(
    rng: np.random.Generator, mix: CaseMix, present: list[Observation], *, change: str = ""
) -> Observation:
    weights = np.array(mix.weights)
    for other in present:
        weights[[FINDINGS.index(name) for name in COMPANIONS.get(other.finding, ())]] *= 2
    weights[[FINDINGS.index(other.finding) for other in present]] = 0
    finding = FINDINGS[int(rng.choice(len(FINDINGS), p=weights / weights.sum()))]
    side = "left" if rng.random() < 0.5 else "right"
    if rng.random() < BILATERAL_SHARES.get(finding, 0):
        side = "bilateral"
    if finding == "cardiomegaly":
        side = ""
    across, along = rng.uniform(-1, 1, 2).tolist()
    observation = Observation(
        finding=finding,
        side=side,
        zone=_one(rng, ZONES) if finding in ("opacity", "consolidation", "nodule") else "",
        kind=_one(rng, DEVICES) if finding == "device" else "",
        change=change,
        place=(across, along),
    )
    return _graded(observation, _one(rng, GRADES[finding][1])) if finding in GRADES else observation


def _graded(observation: Observation, grade: str) -> Observation:
    if GRADES[observation.finding][0] == "size":
        return replace(observation, size=grade)
    return replace(observation, severity=grade)


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _follow_up(rng: np.random.Generator, mix: CaseMix, before: tuple[Observation, ...]) -> Study:
    observations: list[Observation] = []
    resolved: list[Observation] = []
    for observation in before:
        after = _progress(rng, observation)
        if after is None:
            resolved.append(observation)
        else:
            observations.append(after)
    if len(observations) < len(FINDING_COUNT_SHARES) and rng.random() < 0.2:
        observations.append(_draw_observation(rng, mix, observations + resolved, change="new"))
    return Study(observations=tuple(observations), resolved=tuple(resolved))


def _progress(rng: np.random.Generator, observation: Observation) -> Observation | None:
    """The same finding one study later; None when it is gone."""
    fate = rng.random()
    if observation.finding in LASTING or fate < 0.4:
        return replace(observation, change="stable")
    if fate < 0.65:
        return None
    step, change = (1, "worse") if fate < 0.82 else (-1, "improved")
    ladder = GRADES[observation.finding][1]
    rung = ladder.index(observation.size or observation.severity) + step
    if rung < 0:
        return None
    if rung == len(ladder):
        return replace(observation, change="stable")
    return replace(_graded(observation, ladder[rung]), change=change)
