"""How a radiologist writes that a finding is there, or is not: the sentences of zero-shot classification."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.embeddings import EvaluationError


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """Sentences that state a finding and sentences that rule it out; neither set is empty."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


def prompts_for(finding: str) -> PromptPair:
    """Return the sentences for a finding; a finding not listed here gets "There is {}.", "There is no {}.".

    Case, hyphens and underscores do not matter, and the label names of the public chest X-ray sets are
    known (``"Pleural Effusion"``, ``"Support Devices"``, ``"No Finding"``).

    Raises:
        EvaluationError: ``finding`` is blank.
    """
    name = " ".join(re.split(r"[\s_-]+", finding.casefold())).strip()
    if not name:
        raise EvaluationError(f"expected the name of a finding, got {finding!r}")
    generic = PromptPair(positive=(f"There is {name}.",), negative=(f"There is no {name}.",))
    return PROMPTS.get(_ALIASES.get(name, name), generic)


_SIDES = ("left", "right")
_LUNG = tuple(f"the {side} {zone} lung" for side in _SIDES for zone in ("upper", "lower"))
# A report that finds nothing seldom names what it did not find, so the whole normal report is a negative too.
_NORMAL = (
    "No acute cardiopulmonary abnormality. The lungs are clear. The heart is normal in size.",
    "Normal chest radiograph. The lungs are clear.",
)


def _pair(positive: Iterable[str], *, absent: tuple[str, ...]) -> PromptPair:
    """Positives are impressions: severity x finding x place, as radiologists write them."""
    return PromptPair(positive=tuple(positive), negative=(*absent, *_NORMAL))


def _in_lung(finding: str) -> list[str]:
    return [f"{severity} {finding} in {place}." for severity in ("Mild", "Moderate") for place in _LUNG]


def _by_side(finding: str) -> list[str]:
    return [f"{size} {side} {finding}." for size in ("Small", "Large") for side in _SIDES]


PROMPTS = {
    "opacity": _pair(_in_lung("opacity"), absent=("No focal opacity.", "There is no opacity.")),
    "consolidation": _pair(
        _in_lung("consolidation"), absent=("No focal consolidation.", "There is no consolidation.")
    ),
    "effusion": _pair(
        _by_side("pleural effusion"), absent=("No pleural effusion.", "There is no pleural effusion.")
    ),
    "cardiomegaly": _pair(
        ("Mild cardiomegaly.", "Moderate cardiomegaly.", "Severe cardiomegaly.", "There is cardiomegaly."),
        absent=("No cardiomegaly.", "The heart is normal in size."),
    ),
    "pneumothorax": _pair(_by_side("pneumothorax"), absent=("No pneumothorax.", "There is no pneumothorax.")),
    "nodule": _pair(
        (f"{millimetres} mm nodule in {place}." for millimetres in (15, 30) for place in _LUNG),
        absent=("No nodule.", "There is no pulmonary nodule."),
    ),
    "device": _pair(
        ("Left pacemaker.", "Right central venous catheter.", "There is a support device."),
        absent=("No device.", "There are no lines or tubes."),
    ),
    "atelectasis": _pair(_in_lung("atelectasis"), absent=("No atelectasis.", "There is no atelectasis.")),
    "edema": _pair(
        ("Mild pulmonary edema.", "Moderate pulmonary edema.", "There is interstitial edema."),
        absent=("No pulmonary edema.", "The pulmonary vasculature is normal."),
    ),
    "pneumonia": _pair(_in_lung("pneumonia"), absent=("No pneumonia.", "No evidence of pneumonia.")),
    "fracture": _pair(
        ("Left rib fracture.", "Right rib fracture.", "There is an acute fracture."),
        absent=("No fracture.", "The osseous structures are intact."),
    ),
    # The template would read "There is no no finding.", and the label would be scored upside down.
    "no finding": PromptPair(
        positive=_NORMAL, negative=("The chest is abnormal.", "Abnormal findings are present.")
    ),
}

_ALIASES = {
    "airspace opacity": "opacity",
    "lung opacity": "opacity",
    "pleural effusion": "effusion",
    "lung nodule": "nodule",
    "pulmonary nodule": "nodule",
    "line": "device",
    "support device": "device",
    "support devices": "device",
    "tube": "device",
    "pulmonary edema": "edema",
    "normal": "no finding",
}
