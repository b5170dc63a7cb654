"""What a study's own header says about people, and where a report repeats it."""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import date
from functools import lru_cache
from itertools import pairwise

from client.text.resources import every_word, fold, word_list

Span = tuple[int, int, str]  # where it begins and ends in the text, and what kind of thing it is

# DICOM keywords (PS3.6) by the field their values belong to.
HEADER: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName"),
            *("ReferringPhysicianName", "ConsultingPhysicianName", "PerformingPhysicianName"),
            *("RequestingPhysician", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord", "OperatorsName"),
            *("ResponsiblePerson", "ScheduledPerformingPhysicianName", "VerifyingObserverName"),
        ),
        "people",
    ),
    **dict.fromkeys(
        (
            *(
                "PatientID",
                "OtherPatientIDs",
                "AccessionNumber",
                "StudyID",
                "AdmissionID",
                "IssuerOfPatientID",
            ),
            *("RequestedProcedureID", "PerformedProcedureStepID", "FillerOrderNumberImagingServiceRequest"),
            *("PlacerOrderNumberImagingServiceRequest", "PatientTelephoneNumbers", "StudyInstanceUID"),
        ),
        "ids",
    ),
    **dict.fromkeys(
        (
            *("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"),
            *("AdmittingDate", "AcquisitionDateTime", "PerformedProcedureStepStartDate"),
        ),
        "dates",
    ),
    **dict.fromkeys(("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"), "times"),
    **dict.fromkeys(
        ("InstitutionName", "InstitutionAddress", "PatientAddress", "RequestingService"), "places"
    ),
}
MIN_ID_CHARACTERS = 5  # "12" is a size before it is a patient
MAX_ABBREVIATION = 4  # letters before a full stop that ends no sentence: "Prof. Smith"
MAX_NAME_WORDS = 12  # beyond this a name goes on as another one

_LISTS = word_list("scrub.yaml")
PARTICLES = frozenset(map(fold, _LISTS["particles"]))
TITLES = frozenset(map(fold, _LISTS["titles"]))
_ABBREVIATED = frozenset(map(fold, _LISTS["abbreviated"]))
ORDINARY = frozenset(
    fold(word)
    for lists in (
        *(_LISTS["ordinary"], {"": _LISTS["degrees"]}, {"": _LISTS["titles"]}),
        *word_list("headings.yaml").values(),
        *word_list("sentences.yaml")["comparison"].values(),
        *(each for each in word_list("context.yaml").values() if isinstance(each, dict)),
        *(each for finding in word_list("findings.yaml")["findings"].values() for each in finding.values()),
    )
    for entry in every_word(lists)
    for word in re.findall(r"[^\W_]+", entry)
)

_TOKEN = re.compile(r"[^\W_]+")
_DIGIT = re.compile(r"\d")
_GAP = re.compile(r"[\s.,'\u2019^=/&-]{0,3}")
_GLUE = re.compile(r"[\s'\u2019-]?")
_ID_GAP = re.compile(r"[\s._/:^-]{0,3}")
_DAY_MONTH = re.compile(r"(?<![\d./-])(\d{1,2})([./-])(\d{1,2})(?![\d/-])(?!\.\d)")
_TWO_LETTERS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"})
_IDEOGRAM = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True, kw_only=True)
class KnownIdentifiers:
    """What a study's header says that its report must not repeat.

    Attributes:
        people: Names of the patient and of the staff, as DICOM (family^given^middle) or as people write them.
        ids: Patient, accession and order numbers.
        dates: Birth and study dates, as DICOM (YYYYMMDD) or ISO.
        times: As DICOM (HHMMSS).
        places: Institutions and addresses.
    """

    people: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = ", ".join(f"{field.name}={len(getattr(self, field.name))}" for field in fields(self))
        return f"KnownIdentifiers({counts})"

    @classmethod
    def from_header(cls, header: Mapping[str, object]) -> "KnownIdentifiers":
        """Collect what a DICOM header says under the keywords of ``HEADER``; every other keyword is ignored.

        Args:
            header: Values by keyword, as text; several values are separated by a backslash, as in DICOM.
        """
        values: dict[str, list[str]] = defaultdict(list)
        for keyword, field in HEADER.items():
            if text := str(header.get(keyword) or ""):
                values[field] += [value.strip() for value in text.split("\\") if value.strip()]
        return cls(**{field: tuple(dict.fromkeys(each)) for field, each in values.items()})


@dataclass(frozen=True, kw_only=True, repr=False)
class _Name:
    """One person or place: the words that give it away, and all of its words."""

    kind: str
    strong: frozenset[str]
    words: frozenset[str]

    def has(self, spellings: Iterable[str]) -> bool:
        return not self.words.isdisjoint(spellings)


@dataclass(frozen=True, kw_only=True, repr=False)
class Words:
    """The words of a text: where they are, and how they may be spelled without accents."""

    text: str
    spans: list[tuple[int, int]]
    spellings: list[tuple[str, ...]]

    @classmethod
    def of(cls, text: str) -> "Words":
        """Find the words of ``text``: letters and digits, without underscores."""
        spans = [match.span() for match in _TOKEN.finditer(text)]
        if text.isascii():
            return cls(text=text, spans=spans, spellings=[(word,) for word in _TOKEN.findall(text.lower())])
        return cls(text=text, spans=spans, spellings=[_spellings(text[begin:end]) for begin, end in spans])


def known_spans(tokens: Words, known: KnownIdentifiers) -> Iterator[Span]:
    """Find what ``known`` holds, in every usual spelling.

    A word of a name is found in any case, with or without accents, umlauts in either spelling, hyphens,
    particles and initials beside it. A word that is ordinary in reports ("Left", "Nodule", "Klein") is taken
    for a name only after a title or beside another word of the same name; so is a particle. A name of
    nothing but ordinary words needs three of them, or a comma between family and given name. Two letters
    count where only the first is a capital. Numbers need ``MIN_ID_CHARACTERS``; separators and leading zeros
    make no difference.
    """
    lettered = [value for value in known.ids if not _DIGIT.search(value)]
    listed = ((known.people, "name"), (known.places, "place"), (lettered, "id"))
    if names := [name for values, kind in listed for value in values for name in _names(value, kind)]:
        yield from _name_spans(tokens, names)
    yield from _literal_spans(tokens, _literals(known))
    days = {(day.day, day.month) for day in map(_as_date, known.dates) if day}
    if days:
        for match in _DAY_MONTH.finditer(tokens.text):
            pair = (int(match[1]), int(match[3]))
            if pair in days or pair[::-1] in days:
                yield (*match.span(), "date")


def is_title(text: str, begin: int, end: int) -> bool:
    """Whether the word is what stands before a person's name."""
    title = fold(text[begin:end])
    if title not in TITLES:
        return False
    shouted = text[begin:end].isupper() and text[end : end + 1] != "."
    return not (shouted and title in _ABBREVIATED)


def _spellings(word: str) -> tuple[str, ...]:
    if word.isascii():
        return (word.lower(),)
    return tuple(dict.fromkeys((fold(word), fold(word.lower().translate(_TWO_LETTERS)))))


@lru_cache(maxsize=4096)  # staff and institutions come again and again
def _names(value: str, kind: str) -> tuple[_Name, ...]:
    """The name that ``value`` spells, if it holds a word."""
    strong: set[str] = set()
    weak: set[str] = set()
    for component in re.split(r"[\^=,;]", value):
        words = [spelling for word in _TOKEN.findall(component) for spelling in _spellings(word)]
        for group in component.split():
            parts = _TOKEN.findall(group)
            words += _spellings("".join(parts)) if len(parts) > 1 else ()  # OBrien, SchmidtRottluff
        if len(words) > 1 and words[0] in PARTICLES:
            words += _spellings("".join(_TOKEN.findall(component)))  # vanderBerg
        for word in words:
            (strong if _gives_away(word) else weak).add(word)
    name = _Name(kind=kind, strong=frozenset(strong), words=frozenset(strong | weak))
    return (name,) if name.words else ()


def _gives_away(word: str) -> bool:
    if word in ORDINARY or word in PARTICLES:
        return False
    if word.isdigit():
        return len(word) >= MIN_ID_CHARACTERS
    return len(word) > 1


def _name_spans(tokens: Words, names: list[_Name]) -> Iterator[Span]:
    owners: dict[str, list[_Name]] = defaultdict(list)
    for name in names:
        for word in name.words:
            owners[word].append(name)
    done = -1
    for index, spellings in enumerate(tokens.spellings):
        word = spellings[0]
        stranger = len(spellings) == 1 and word not in owners and word[-1] != "s" and word not in PARTICLES
        if stranger or index <= done:
            continue
        known_to = [name for form in _forms(tokens, index) for name in owners.get(form, ())]
        for name in dict.fromkeys(known_to):
            last = _run(tokens, index, name)
            if _is_name(tokens, index, last, name):
                first, last = _with_initials(tokens, index, last, name)
                yield tokens.spans[first][0], tokens.spans[last][1], name.kind
                done = max(done, last)


def _forms(tokens: Words, index: int) -> tuple[str, ...]:
    """What to look a word up as: as it is, without a genitive's s, and together with the word after it."""
    spellings = tokens.spellings[index]
    forms = spellings
    if spellings[0][-1] == "s" and len(spellings[0]) > 4:
        forms += tuple(spelling[:-1] for spelling in spellings)
    if spellings[0] in PARTICLES and index + 1 < len(tokens.spans):
        gap = tokens.text[tokens.spans[index][1] : tokens.spans[index + 1][0]]
        if _GLUE.fullmatch(gap):
            forms += tuple(spellings[0] + after for after in tokens.spellings[index + 1])
    return forms


def _run(tokens: Words, first: int, name: _Name) -> int:
    """The last of the words after ``first`` that belong to the same name."""
    last = first
    if not name.has(tokens.spellings[first]) and tokens.spellings[first][0] in PARTICLES:
        last = min(first + 1, len(tokens.spans) - 1)  # found together with the word after it
    for index in range(last + 1, min(last + MAX_NAME_WORDS, len(tokens.spans))):
        if not _beside(tokens, index):
            break
        if name.has(_forms(tokens, index)):
            last = index
        elif not _is_initial(tokens, index, name):
            break
    return last


def _is_name(tokens: Words, first: int, last: int, name: _Name) -> bool:
    run = range(first, last + 1)
    if any(_is_strong(tokens, index, name) for index in run):
        return True
    if first and _beside(tokens, first) and is_title(tokens.text, *tokens.spans[first - 1]):
        return tokens.text[tokens.spans[first][0]].isupper()
    covered = {spelling for index in run for spelling in tokens.spellings[index]} & name.words
    real = {word for word in covered if word not in PARTICLES and len(word) > 1}
    if len(real) >= 3 and len(real) == len(run):
        return True
    gaps = (tokens.text[tokens.spans[a][1] : tokens.spans[b][0]] for a, b in pairwise(run))
    return len(real) >= 2 and any(mark in gap for gap in gaps for mark in ",^") and name.kind == "name"


def _is_strong(tokens: Words, index: int, name: _Name) -> bool:
    forms = name.strong.intersection(_forms(tokens, index))
    if not forms:
        return False
    if max(map(len, forms)) == 2:
        word = tokens.text[slice(*tokens.spans[index])]
        return word.istitle()
    return True


def _with_initials(tokens: Words, first: int, last: int, name: _Name) -> tuple[int, int]:
    while first and _beside(tokens, first) and _is_initial(tokens, first - 1, name):
        first -= 1
    while last + 1 < len(tokens.spans) and _beside(tokens, last + 1) and _is_initial(tokens, last + 1, name):
        last += 1
    return first, last


def _is_initial(tokens: Words, index: int, name: _Name) -> bool:
    begin, end = tokens.spans[index]
    if end - begin != 1 or not tokens.text[begin].isupper():
        return False
    dotted = tokens.text[end : end + 1] == "."
    return dotted or any(word[:1] in tokens.spellings[index] for word in name.words)


def _beside(tokens: Words, index: int) -> bool:
    """Whether a word follows the one before it without anything else between."""
    (begin, end), after = tokens.spans[index - 1], tokens.spans[index][0]
    gap = tokens.text[end:after]
    ends_sentence = gap[:1] == "." and end - begin > MAX_ABBREVIATION
    return bool(_GAP.fullmatch(gap)) and not ends_sentence


def _literals(known: KnownIdentifiers) -> Mapping[str, str]:
    """Numbers without separators, and their kinds."""
    found: dict[str, str] = {}
    for value in known.ids:
        compact = "".join(spelling for word in _TOKEN.findall(value) for spelling in _spellings(word)[:1])
        if _DIGIT.search(compact):
            for spelling in {compact, compact.lstrip("0")}:
                found[spelling] = "id"
    for value in known.dates:
        if day := _as_date(value):
            year, two = f"{day.year:04d}", f"{day.year % 100:02d}"
            month, number = f"{day.month:02d}", f"{day.day:02d}"
            for spelled in (year, two):
                orders = (spelled + month + number, number + month + spelled, month + number + spelled)
                found.update(dict.fromkeys(orders, "date"))
    for value in known.times:
        digits = value.split(".")[0].replace(":", "")
        if digits.isdigit() and len(digits) == 6:
            found[digits] = "time"
    for value in known.people:
        for ideograms in (group for group in re.split(r"[\^=\s]", value) if _IDEOGRAM.search(group)):
            found[fold(ideograms)] = "name"
    return {
        value: kind
        for value, kind in found.items()
        if len(value) >= MIN_ID_CHARACTERS or _IDEOGRAM.search(value)
    }


def _literal_spans(tokens: Words, literals: Mapping[str, str]) -> Iterator[Span]:
    if not literals:
        return
    words = [spellings[0] for spellings in tokens.spellings]
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word))
    compact = "".join(words)
    for value, kind in literals.items():
        at = compact.find(value)
        while at >= 0:
            end = at + len(value)
            if kind == "name" or (_edge(compact, starts, at) and _edge(compact, starts, end)):
                first, last = bisect.bisect_right(starts, at) - 1, bisect.bisect_left(starts, end) - 1
                if _unbroken(tokens, first, last):
                    begin = tokens.spans[first][0] + at - starts[first]
                    yield begin, tokens.spans[last][1] - (starts[last + 1] - end), kind
            at = compact.find(value, at + 1)


def _edge(compact: str, starts: list[int], at: int) -> bool:
    """Whether a number may begin or end here: between words, or between letters and digits."""
    if starts[bisect.bisect_left(starts, at)] == at:
        return True
    return compact[at - 1].isdigit() != compact[at].isdigit()


def _unbroken(tokens: Words, first: int, last: int) -> bool:
    ends = pairwise(tokens.spans[first : last + 1])
    return all(_ID_GAP.fullmatch(tokens.text[left[1] : right[0]]) for left, right in ends)


def _as_date(value: str) -> date | None:
    digits = value.replace("-", "").replace(".", "").replace(":", "").strip()[:8]
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])) if len(digits) == 8 else None
    except ValueError:
        return None
