"""How a radiologist writes that a finding is there, or is not: the sentences of zero-shot classification."""

import re
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


PROMPTS = {
    "opacity": PromptPair(
        positive=(
            "There is a focal opacity in the right lung.",
            "There is a patchy opacity at the left lung base.",
            "Airspace opacities are present.",
        ),
        negative=("No focal opacity.", "There is no airspace opacity.", "The lungs are clear."),
    ),
    "consolidation": PromptPair(
        positive=(
            "There is consolidation in the right lower lobe.",
            "There is a left lower lobe consolidation.",
            "Focal consolidation is present.",
        ),
        negative=("No focal consolidation.", "There is no consolidation.", "The lungs are clear."),
    ),
    "effusion": PromptPair(
        positive=(
            "There is a left pleural effusion.",
            "There is a right pleural effusion.",
            "Small bilateral pleural effusions are present.",
        ),
        negative=(
            "No pleural effusion.",
            "There is no pleural effusion.",
            "The costophrenic angles are sharp.",
        ),
    ),
    "cardiomegaly": PromptPair(
        positive=("There is cardiomegaly.", "The heart is enlarged.", "The cardiac silhouette is enlarged."),
        negative=(
            "No cardiomegaly.",
            "The heart size is normal.",
            "The cardiac silhouette is normal in size.",
        ),
    ),
    "pneumothorax": PromptPair(
        positive=(
            "There is a left pneumothorax.",
            "There is a right pneumothorax.",
            "A small apical pneumothorax is present.",
        ),
        negative=("No pneumothorax.", "There is no pneumothorax.", "No pneumothorax is seen."),
    ),
    "nodule": PromptPair(
        positive=(
            "There is a nodule in the right lung.",
            "There is a left upper lobe pulmonary nodule.",
            "A pulmonary nodule is present.",
        ),
        negative=("No pulmonary nodule.", "There is no lung nodule.", "No suspicious nodule is seen."),
    ),
    "device": PromptPair(
        positive=(
            "A support device is present.",
            "An endotracheal tube is in place.",
            "There is a central venous line.",
        ),
        negative=("No support device.", "There are no lines or tubes.", "No indwelling device is seen."),
    ),
    "atelectasis": PromptPair(
        positive=(
            "There is left basilar atelectasis.",
            "There is atelectasis in the right lower lobe.",
            "Bibasilar atelectasis is present.",
        ),
        negative=("No atelectasis.", "There is no atelectasis.", "The lungs are well expanded."),
    ),
    "edema": PromptPair(
        positive=(
            "There is pulmonary edema.",
            "There is mild interstitial edema.",
            "Pulmonary vascular congestion with edema is present.",
        ),
        negative=(
            "No pulmonary edema.",
            "There is no pulmonary edema.",
            "The pulmonary vasculature is normal.",
        ),
    ),
    "pneumonia": PromptPair(
        positive=(
            "There is pneumonia in the right lower lobe.",
            "Findings are consistent with pneumonia.",
            "There is a left lower lobe pneumonia.",
        ),
        negative=("No pneumonia.", "There is no evidence of pneumonia.", "No focal infectious process."),
    ),
    "fracture": PromptPair(
        positive=(
            "There is a rib fracture.",
            "There is an acute fracture.",
            "A displaced fracture is present.",
        ),
        negative=("No fracture.", "There is no acute fracture.", "The osseous structures are intact."),
    ),
    # The template would read "There is no no finding.", and the label would be scored upside down.
    "no finding": PromptPair(
        positive=("No acute cardiopulmonary process.", "The chest is normal.", "There is no abnormality."),
        negative=("The chest is abnormal.", "There is an abnormality.", "Abnormal findings are present."),
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
