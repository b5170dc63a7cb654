"""How radiologists of different hospitals say the same thing.

``PHRASES`` holds every way of naming a finding; the first is the plain one. The public set uses the plain
ones alone, each hospital a few of the others as well; so hospitals share wordings the public set never shows.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clipward.synthetic.findings import DEVICES, FINDINGS, GRADES, NODULE_SIZES, ZONES, Observation, Study

T = TypeVar("T")

# {a} is the article and {s} the plural of both sides at once; {grade} is the size or the severity.
PHRASES: Mapping[str, tuple[str, ...]] = {
    "opacity": (
        "{change} {grade} opacity in {place}",
        "{change} {grade} hazy density in {place}",
        "{change} {grade} ground glass change in {place}",
        "{change} {grade} haziness of {place}",
        "{change} {grade} veiling of {place}",
        "{change} {grade} cloudy increase in density over {place}",
    ),
    "consolidation": (
        "{change} {grade} consolidation in {place}",
        "{change} {grade} airspace disease in {place}",
        "{change} {grade} dense infiltrate of {place}",
        "{change} {grade} confluent shadowing in {place}",
        "{change} {grade} alveolar filling of {place}",
        "{change} {grade} pneumonic focus in {place}",
    ),
    "effusion": (
        "{a} {change} {grade} {side} pleural effusion{s}",
        "{change} {grade} fluid in {the_side} costophrenic angle{s}",
        "{change} {grade} {side} pleural fluid",
        "{change} {grade} {side} hydrothorax",
        "{change} {grade} fluid level at {the_side} lung base{s}",
        "{change} {grade} blunting of {the_side} costophrenic angle{s}",
    ),
    "cardiomegaly": (
        "{change} {grade} cardiomegaly",
        "{a} {change} {grade}ly enlarged cardiac silhouette",
        "{change} {grade} enlargement of the heart",
        "{a} {change} {grade}ly widened heart shadow",
        "{change} {grade} increase of the cardiothoracic ratio",
        "{change} {grade} dilatation of the heart",
    ),
    "pneumothorax": (
        "{a} {change} {grade} {side} pneumothorax",
        "{a} {change} {grade} collection of air in {the_side} pleural space",
        "{change} {grade} {side} pleural air",
        "{change} {grade} collapse of {the_side} lung with a visible pleural line",
        "{change} {grade} {side} apical air",
        "{a} {change} {grade} lucency without markings along {the_side} chest wall",
    ),
    "nodule": (
        "{a} {change} {grade} nodule in {place}",
        "{a} {change} {grade} rounded lesion in {place}",
        "{a} {change} {grade} coin lesion in {place}",
        "{a} {change} {grade} focal spot in {place}",
        "{a} {change} {grade} round focus projecting over {place}",
        "{a} {change} {grade} circumscribed mass in {place}",
    ),
    "pacemaker": (
        "{a} {change} {side} pacemaker device",
        "{a} {change} {side} pulse generator with lead",
        "{a} {change} {side} cardiac pacing system",
        "{a} {change} {side} implanted pacing unit",
        "{a} {change} {side} chest wall generator",
        "{a} {change} {side} cardiac implant with electrode",
    ),
    "catheter": (
        "{a} {change} {side} catheter device",
        "{a} {change} {side} central venous line",
        "{a} {change} {side} jugular line",
        "{a} {change} {side} infusion line",
        "{a} {change} central line from the {side}",
        "{a} {change} {side} vascular access line",
    ),
}
PLAIN_WORDS: Mapping[str, str] = {
    "worse": "worsening",
    "improved": "decreasing",
}  # other words stand for themselves


@dataclass(frozen=True, kw_only=True)
class Style:
    """One department's way of reporting.

    Attributes:
        phrases: Indices into each tuple of ``PHRASES``; one that stands twice is used twice as often.
        words: Its own words for sizes, severities, zones, changes and lungs; "" leaves the word out. None may
            begin with a vowel: the article is "a".
        statements: Frames around a finding: {np} and {Np} with its article, {Bare} without.
        negations: Frames around a list of what is absent.
        absent: What it calls a finding that is not there.
        resolved: Frame around a finding that has gone.
        heart_normal: Said when the heart is not enlarged.
        lungs_clear: Said when the lungs show nothing.
        extras: Sentences that say nothing about the patient.
        normal: Impressions of a normal study.
        closings: What may end an abnormal impression.
        preamble: Sections before the findings.
        headings: Of findings and impression.
        joiner: Between the findings of an impression.
        numbered: Whether the impression numbers its findings.
        indent: Blanks before each line of text.
        width: Line length in characters; 0 leaves each section on one line.
        impression_first: Whether the impression stands above the findings.
        verbosity: Chance of each optional sentence, in [0, 1].
    """

    phrases: tuple[int, ...]
    words: Mapping[str, str]
    statements: tuple[str, ...]
    negations: tuple[str, ...]
    absent: Mapping[str, str]
    resolved: str
    heart_normal: tuple[str, ...]
    lungs_clear: tuple[str, ...]
    extras: tuple[str, ...]
    normal: tuple[str, ...]
    closings: tuple[str, ...]
    preamble: tuple[str, ...]
    headings: tuple[str, str]
    joiner: str
    numbered: bool = False
    indent: int
    width: int
    impression_first: bool
    verbosity: float


PUBLIC_STYLE = Style(
    phrases=(0,),
    words={"new": "", "stable": "", "worse": "", "improved": ""},
    statements=("There {is} {np}.",),
    negations=("No {absent}.",),
    absent={"effusion": "pleural effusion"},
    resolved="",
    heart_normal=("The heart is normal in size.",),
    lungs_clear=("The lungs are clear.",),
    extras=(),
    normal=("No acute cardiopulmonary abnormality.", "Normal chest radiograph."),
    closings=(),
    preamble=(),
    headings=("FINDINGS:", "IMPRESSION:"),
    joiner=". ",
    indent=0,
    width=0,
    impression_first=False,
    verbosity=0.5,
)

HOSPITAL_STYLES: tuple[Style, ...] = (
    Style(
        phrases=(0, 1, 1, 2),
        words={"mild": "slight", "severe": "marked", "worse": "growing"},
        statements=("There {is} {np}.", "{Np} {is} present."),
        negations=("No {absent}.", "There is no evidence of {absent}."),
        absent={"effusion": "pleural fluid", "consolidation": "airspace disease", "device": "line or tube"},
        resolved="The {finding} has cleared.",
        heart_normal=(
            "The cardiac silhouette is within normal limits.",
            "Normal cardiomediastinal contours.",
        ),
        lungs_clear=("The lungs are clear.", "Both lungs are well expanded and clear."),
        extras=("The visualized osseous structures are unremarkable.", "Upper abdomen is unremarkable."),
        normal=("No acute cardiopulmonary process.", "No radiographic evidence of acute disease."),
        closings=("Clinical correlation is recommended.",),
        preamble=("EXAMINATION: Chest radiograph, single frontal view.", "COMPARISON: None available."),
        headings=("FINDINGS:", "IMPRESSION:"),
        joiner=". ",
        indent=1,
        width=72,
        impression_first=False,
        verbosity=0.6,
    ),
    Style(
        phrases=(0, 2, 3, 3),
        words={
            "small": "minor",
            "large": "big",
            "new": "recent",
            "lung": "lung field",
            "lungs": "lung fields",
        },
        statements=("{Bare}.", "{Bare} noted."),
        negations=("No {absent}.", "{Absent} not seen."),
        absent={"effusion": "hydrothorax", "consolidation": "infiltrate", "nodule": "coin lesion"},
        resolved="Previous {finding} no longer seen.",
        heart_normal=("Heart normal.", "Heart size normal."),
        lungs_clear=("Lung fields clear.", "No focal lung lesion."),
        extras=("Bones intact.",),
        normal=("Normal study.", "No active lung disease.", "Normal heart and lungs."),
        closings=(),
        preamble=(),
        headings=("Findings:", "Impression:"),
        joiner="; ",
        indent=0,
        width=0,
        impression_first=False,
        verbosity=0.3,
    ),
    Style(
        phrases=(0, 3, 4, 4),
        words={"moderate": "medium", "severe": "pronounced", "lower": "basal", "stable": "persistent"},
        statements=("We see {np}.", "{Np} {is} seen.", "The image shows {np}."),
        negations=("There is no sign of {absent}.", "{Absent} can be excluded."),
        absent={"effusion": "fluid", "pneumothorax": "apical air", "cardiomegaly": "dilatation of the heart"},
        resolved="The known {finding} is gone.",
        heart_normal=("The heart is slender.", "The heart shadow is not widened."),
        lungs_clear=("Regular ventilation of both lungs.", "The lung parenchyma is free of lesions."),
        extras=(
            "The hila are regular.",
            "The bony thorax is inconspicuous.",
            "The trachea is central.",
        ),
        normal=("Inconspicuous chest.", "Regular heart and lungs.", "No pathological finding of the chest."),
        closings=("Follow up is advised.", "Please compare with clinical findings."),
        preamble=("Clinical question: Infiltrate? Effusion?",),
        headings=("Findings:", "IMPRESSION:"),
        joiner=". ",
        numbered=True,
        indent=3,
        width=60,
        impression_first=True,
        verbosity=0.8,
    ),
    Style(
        phrases=(0, 4, 5, 1),
        words={
            "small": "little",
            "mild": "faint",
            "large": "gross",
            "severe": "gross",
            "improved": "receding",
        },
        statements=("Appearances suggest {np}.", "There {is} {np}."),
        negations=("No convincing {absent}.", "No {absent} demonstrated."),
        absent={"effusion": "blunting of the costophrenic angles", "opacity": "veiling", "nodule": "mass"},
        resolved="The {finding} seen previously has resolved.",
        heart_normal=("Cardiothoracic ratio is normal.", "The heart is not enlarged."),
        lungs_clear=("No focal lung abnormality.", "The lungs and pleural spaces are clear."),
        extras=("Degenerative change of the thoracic spine.", "No free air below the diaphragm."),
        normal=("No focal abnormality.", "Normal appearances.", "No significant abnormality demonstrated."),
        closings=("Suggest repeat imaging.",),
        preamble=("CLINICAL INDICATION: Cough and shortness of breath.",),
        headings=("FINDINGS:", "Impression:"),
        joiner=". ",
        indent=2,
        width=0,
        impression_first=False,
        verbosity=0.5,
    ),
    Style(
        phrases=(0, 5, 2, 5),
        words={
            "mild": "discrete",
            "large": "massive",
            "mid": "middle",
            "lung": "lung zone",
            "lungs": "lung zones",
        },
        statements=("{Np} {is} observed.", "{Bare} visible."),
        negations=("Absence of {absent}.", "No {absent}."),
        absent={"effusion": "pleural fluid", "cardiomegaly": "increase of the cardiothoracic ratio"},
        resolved="Complete resolution of the {finding}.",
        heart_normal=("Cardiac area of normal size.", "Preserved cardiothoracic ratio."),
        lungs_clear=("Lungs of normal transparency.", "No parenchymal lesion."),
        extras=("Aorta of normal calibre.", "Soft tissues without particularities."),
        normal=("Study within normal limits.", "Chest without relevant findings."),
        closings=("Control is suggested.",),
        preamble=("TECHNIQUE: Digital chest radiograph.", "INDICATION: Fever."),
        headings=("FINDINGS:", "IMPRESSION:"),
        joiner=". ",
        numbered=True,
        indent=0,
        width=80,
        impression_first=False,
        verbosity=0.5,
    ),
)


def write_report(study: Study, style: Style, rng: np.random.Generator) -> str:
    """Write the report of one study.

    Returns:
        Lines of text with a findings and an impression section. The impression names every finding with its
        side and grade; nothing that is present is denied.
    """
    indent = " " * style.indent
    sections = [
        (style.headings[0], _findings(study, style, rng)),
        (style.headings[1], _impression(study, style, rng)),
    ]
    if style.impression_first:
        sections.reverse()
    lines = [line for line in style.preamble if rng.random() < style.verbosity]
    for heading, sentences in sections:
        text = " ".join(sentences)
        body = textwrap.wrap(text, style.width, break_on_hyphens=False) if style.width else [text]
        lines += [heading, *(indent + line for line in body)]
    return "\n".join(lines)


def all_wording() -> list[str]:
    """Sentences that hold every word a report can hold.

    Guarantees:
        Deterministic, and complete for every hospital and every seed: each word of ``write_report`` (letters,
        digits and hyphens, in any case) stands in at least one sentence. Each sentence adds a word.
    """
    seen: set[str] = set()
    kept: list[str] = []
    for sentence in itertools.chain.from_iterable(map(_vocabulary, (PUBLIC_STYLE, *HOSPITAL_STYLES))):
        new = set(words_of(sentence)) - seen
        if new:
            seen |= new
            kept.append(sentence)
    return kept


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, hyphenated ones whole."""
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())


def _findings(study: Study, style: Style, rng: np.random.Generator) -> list[str]:
    present = {observation.finding for observation in study.observations}
    sentences = [
        _statement(o, style, phrase=_one(rng, style.phrases), frame=_one(rng, style.statements))
        for o in study.observations
    ]
    if not present & {"opacity", "consolidation", "nodule", "effusion", "pneumothorax"}:
        sentences.append(_one(rng, style.lungs_clear))
    if "cardiomegaly" not in present:
        sentences.append(_one(rng, style.heart_normal))
    absent = [name for name in FINDINGS if name not in present]
    denied = [
        absent[i] for i in sorted(rng.choice(len(absent), size=1 + int(rng.integers(3)), replace=False))
    ]
    sentences.append(_negation(denied, style, frame=_one(rng, style.negations)))
    if style.resolved:
        sentences += [style.resolved.format(finding=o.finding) for o in study.resolved]
    return sentences + _some(rng, style.extras, style.verbosity)


def _impression(study: Study, style: Style, rng: np.random.Generator) -> list[str]:
    if not study.observations:
        return [_one(rng, style.normal)]
    named = [_bare(o, style, phrase=_one(rng, style.phrases)) for o in study.observations]
    if style.numbered and len(named) > 1:
        return [f"{number}. {_capital(name)}." for number, name in enumerate(named, start=1)]
    if style.joiner.startswith("."):
        named = [_capital(name) for name in named]
    return [_capital(style.joiner.join(named)) + ".", *_some(rng, style.closings, style.verbosity / 2)]


def _statement(observation: Observation, style: Style, *, phrase: int, frame: str) -> str:
    template = _template(observation, phrase)
    both = observation.side == "bilateral" and template.startswith("{a}")
    bare = _bare(observation, style, phrase=phrase)
    full = bare if both or not template.startswith("{a}") else f"a {bare}"
    return frame.format(np=full, Np=_capital(full), Bare=_capital(bare), **{"is": "are" if both else "is"})


def _bare(observation: Observation, style: Style, *, phrase: int) -> str:
    """The finding as a noun phrase without article, in the style's words."""

    def say(word: str) -> str:
        return style.words.get(word, PLAIN_WORDS.get(word, word))

    both = observation.side == "bilateral"
    lung = say("lungs") if both else say("lung")
    text = _template(observation, phrase).format(
        a="",
        s="s" if both else "",
        change=say(observation.change),
        grade=say(observation.size or observation.severity),
        side=observation.side,
        the_side="both" if both else f"the {observation.side}",
        place=f"{'both' if both else f'the {observation.side}'} {say(observation.zone)} {lung}",
    )
    return " ".join(text.split())


def _template(observation: Observation, phrase: int) -> str:
    return PHRASES[observation.kind or observation.finding][phrase]


def _negation(findings: Sequence[str], style: Style, *, frame: str) -> str:
    names = [style.absent.get(name, name) for name in findings]
    listed = " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return frame.format(absent=listed, Absent=_capital(listed))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _one(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, sentences: Iterable[str], chance: float) -> list[str]:
    return [sentence for sentence in sentences if rng.random() < chance]


def _vocabulary(style: Style) -> Iterator[str]:
    """Sentences that show every word of one style."""
    for observation in _one_of_each():
        for phrase, frame in itertools.product(sorted(set(style.phrases)), style.statements):
            yield _statement(observation, style, phrase=phrase, frame=frame)
    for frame in style.negations:
        yield _negation(FINDINGS, style, frame=frame)
    yield from (style.resolved.format(finding=finding) for finding in FINDINGS)
    yield from (*style.heart_normal, *style.lungs_clear, *style.extras, *style.normal, *style.closings)
    yield from (*style.preamble, *style.headings, "1. 2. 3. 4." if style.numbered else "")


def _one_of_each() -> Iterator[Observation]:
    """For each finding, observations that together show every value of every field."""
    for finding, turn in itertools.product(FINDINGS, range(len(NODULE_SIZES))):
        yield Observation(
            finding=finding,
            side=_turn(turn, ("left", "right", "bilateral")),
            zone=_turn(turn, ZONES),
            size=_turn(turn, GRADES[finding][1]) if finding in GRADES else "",
            kind=_turn(turn // 3, DEVICES) if finding == "device" else "",
            change=_turn(turn, ("", "new", "stable", "worse", "improved")),
        )


def _turn(turn: int, values: Sequence[T]) -> T:
    return values[turn % len(values)]
