"""Names, numbers and dates are taken out of a report before anything learns from it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from client.text.known import (
    MAX_ABBREVIATION,
    ORDINARY,
    PARTICLES,
    TITLES,
    KnownIdentifiers,
    Span,
    is_title,
    known_spans,
)
from client.text.masks import MASK, unify_masks
from client.text.resources import fold, word_list
from client.text.sections import SIGNATURE_CUES

__all__ = ["KnownIdentifiers", "Scrubbed", "scrub"]

NOBODY = KnownIdentifiers()
MAX_SIGNATURE_LINE = 160  # characters; a longer line holds a report as well
MIN_MIXED_DIGITS = 4  # of a token of letters and digits: "ACC1EF62FA10", but not "COVID19" or "B12"
MIN_MIXED_CHARACTERS = 7


@dataclass(frozen=True, kw_only=True)
class Scrubbed:
    """A text without what was found in it, and how much that was.

    Attributes:
        text: The text with ``MASK`` for each hit.
        hits_by_kind: How often by kind: name, place, id, date, time, phone, email, url, signature, age.
    """

    text: str
    hits_by_kind: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Scrubbed(hits_by_kind={dict(self.hits_by_kind)})"


class _Flat(dict[int, int]):
    """Each character in lower case without its accent, one for one, so that places stay the same."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(fold(chr(code))[:1] or chr(code))
        return self[code]


_FLAT = _Flat()
_LISTS = word_list("scrub.yaml")
_MONTHS = {fold(name): month for month, names in enumerate(_LISTS["months"], start=1) for name in names}
_DEGREES = frozenset(map(fold, _LISTS["degrees"]))
_TITLED = TITLES | _DEGREES | PARTICLES


def _any_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(fold(word)) for word in sorted(words, key=len, reverse=True))


# Every pattern reads the flat text. Repetitions are bounded and none is nested in another, so that each
# takes time linear in the text (Davis et al. 2018, doi:10.1145/3236024.3236027, on what happens otherwise).
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH = r"(?:0?[1-9]|1[0-2])"
_YEAR = r"(?:19|20)\d\d"
_NO_SIZE = r"(?!\d|[.,]\d|\s?(?:mm|cm|x\s?\d|%))"
_OF = r"(?:\s?(?:de|di|del|of)\s|[\s,.-]{1,3}|)"
_NUMERIC_DATES = re.compile(
    rf"(?<![\d.,/-])(?:{_YEAR}([-/.])\s?{_MONTH}\1\s?{_DAY}|{_DAY}([-/.])\s?{_DAY}\2\s?(?:{_YEAR}|\d\d)){_NO_SIZE}"
    rf"|(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"
    rf"|(?<![\d./-]){_MONTH}[/.]{_YEAR}{_NO_SIZE}"
)
_WRITTEN_DATES = re.compile(
    rf"(?<![\d.,]){_DAY}(?:st|nd|rd|th|er|\.|\u00ba|\u00aa|o)?{_OF}(?P<after>{_any_of(_MONTHS)})(?![^\W\d_])\.?"
    rf"(?:(?:{_OF}{_YEAR}|[\s'./-]\d\d){_NO_SIZE})?"
    rf"|(?<![^\W\d_])(?P<before>{_any_of(_MONTHS)})(?![^\W\d_])\.?{_OF}"
    rf"(?:{_YEAR}|{_DAY}(?:st|nd|rd|th)?{_NO_SIZE}(?:{_OF}{_YEAR})?){_NO_SIZE}"
)
_TIMES = re.compile(
    r"(?<![\d.:/])(?:[01]?\d|2[0-3])(?::[0-5]\d(?::[0-5]\d)?|h[0-5]\d|(?:[.:][0-5]\d)?(?=\s?(?:uhr|[ap]\.m|pm)\b))"
    r"(?![\d:])(?:\s?(?:[ap]\.?m\b\.?|uhr\b|hrs?\b|hours\b))?(?!\s?-?(?:position|o.clock|axis|uhr))"
    r"|(?<![\d.])[0-2]\d[0-5]\d\s?(?:hours|hrs|uhr)\b"
)
_PHONES = re.compile(
    r"(?<![\w.])(?:\+|00)\d(?:[ ()/.-]{0,2}\d){6,14}(?!\d)"
    r"|(?<![\w.])(?:\(\d{3}\)|\d{3})[ .-]{1,2}\d{3}[ .-]\d{4}(?!\d)"
    r"|(?<![\w.,])0\d{2,5}[ /-]{1,3}\d{3,9}(?:[ -]\d{1,6})?(?!\d)"
    rf"|\b(?:{_any_of(_LISTS['phone_cues'])})\b[.:#\s]{{0,4}}"
    r"[\d(+][\d()/.-]{0,12}(?: ?[\d()/.-]{1,8}){0,4}"
)
_NUMBERS = re.compile(
    rf"(?<![\w.-])(?:{_any_of(_LISTS['number_cues'])})\b[.:#\s-]{{0,4}}"
    r"(?P<cued>[a-z]{0,6}[ -]?\d[\w-]{0,20})"
    r"|(?<![\d.])\d{1,64}(?:\.\d{1,64}){4,20}(?!\d)"  # a UID
    r"|(?<![\d.])\d{3}-\d{2}-\d{4}(?!\d)"  # a social security number
    r"|(?<![\w.,-])[a-z]{0,8}[-_]?\d{7,20}(?!\w)"
    r"|(?<![\w.,-])[a-z]{1,8}[-_]?\d{5,20}(?!\w)"
)
_MIXED = re.compile(rf"(?<!\w)\w{{{MIN_MIXED_CHARACTERS},40}}(?:-\w{{1,40}})?(?!\w)")
_AGES = re.compile(
    r"(?<![\d.])(?:9\d|1[01]\d)(?=[\s-]?(?:years?|yrs?|y\W?o|yo|jahr|j\.|anos|ans|anni)\b|[\s-]?jahr)"
)
_EMAILS = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,6}")
_URLS = re.compile(r"(?:https?://|www\.)\S{1,500}")
_TITLE = re.compile(rf"\b(?:{_any_of(TITLES)})\b")
_SIGNED = re.compile(rf"(?<!\w)(?:{_any_of(SIGNATURE_CUES)})(?!\w)")
_NAME_WORD = re.compile(r"[ \t.,^-]{0,3}([^\W\d_][\w'\u2019]{0,40})")
_SIGNATURE_WORD = re.compile(r"[ \t.,:;^-]{0,4}([^\W_](?:[\w'\u2019:/.-]{0,40}\w)?)")
_SIGNATURE_LINKS = frozenset(
    {"on", "at", "by", "am", "um", "von", "le", "el", "il", "a", "alle", "em", "the", "and"}
)
MAX_TITLED_WORDS, MAX_SIGNATURE_WORDS = 5, 12


def scrub(text: str, known: KnownIdentifiers = NOBODY) -> Scrubbed:
    """Replace what names a person, a place, a day or a number by ``MASK``.

    What the study's own header says is the surest source (see ``known_spans`` for what counts as a repetition
    and how names that are ordinary words are treated). Beyond it: dates (not years alone), times of day,
    phone numbers, numbers after words like "MRN" or too long for a measurement, whoever follows a title
    ("Dr."), who signed, e-mail and web addresses, and ages from 90 (45 CFR 164.514(b)(2)).

    Guarantees:
        Only adds masks: every other character stays, in order, but for blanks between masks. Takes time
        linear in the text. Neither errors nor ``repr`` hold a word of ``text`` or ``known``.

    Args:
        text: A report or a part of one, in any of the six languages.
        known: What the header of the same study says.
    """
    spans = sorted([*known_spans(text, known), *_general_spans(text)])
    hits: Counter[str] = Counter()
    kept, begin = [], 0
    for start, end, kind in spans:
        if start >= begin:
            kept += [text[begin:start], MASK]
            hits[kind] += 1
        begin = max(begin, end)
    return Scrubbed(text=unify_masks("".join([*kept, text[begin:]])), hits_by_kind=dict(hits))


def _general_spans(text: str) -> Iterator[Span]:
    flat = text.lower() if text.isascii() else text.translate(_FLAT)
    yield from _signatures(text, flat)
    yield from _titled(text, flat)
    if "@" in flat:
        yield from _found(_EMAILS, flat, "email")
    if "www." in flat or "://" in flat:
        yield from _found(_URLS, flat, "url")
    if not any(digit in flat for digit in "0123456789"):
        return
    yield from _found(_NUMERIC_DATES, flat, "date")
    yield from _written_dates(text, flat)
    yield from _found(_TIMES, flat, "time")
    yield from _found(_PHONES, flat, "phone")
    yield from _found(_AGES, flat, "age")
    for match in _NUMBERS.finditer(flat):
        yield *match.span("cued" if match["cued"] else 0), "id"
    for match in _MIXED.finditer(flat):
        digits = sum(map(str.isdigit, match.group()))
        if MIN_MIXED_DIGITS <= digits < len(match.group()):
            yield *match.span(), "id"


def _found(pattern: re.Pattern[str], flat: str, kind: str) -> Iterator[Span]:
    for match in pattern.finditer(flat):
        yield *match.span(), kind


def _written_dates(text: str, flat: str) -> Iterator[Span]:
    for match in _WRITTEN_DATES.finditer(flat):
        month = "after" if match["after"] else "before"
        if not (match[month] == "may" and text[match.start(month)] == "m"):  # "nodule 1 may be a cyst"
            yield *match.span(), "date"


def _titled(text: str, flat: str) -> Iterator[Span]:
    """Names after titles; degrees are passed over, and the first word that is no name ends them."""
    done = 0
    for title in _TITLE.finditer(flat):
        if title.start() < done or not is_title(text, *title.span()):
            continue
        begin, end = 0, title.end()
        for _ in range(MAX_TITLED_WORDS):
            word = _NAME_WORD.match(text, end)
            if not word or not _may_be_name(word, begin=not begin):
                break
            begin, end = begin or word.start(1), word.end()
        if begin:
            done = end
            yield begin, end, "name"


def _may_be_name(word: re.Match[str], *, begin: bool) -> bool:
    folded, gap = fold(word[1]), word.group()[: word.start(1) - word.start()]
    if "," in gap:
        return folded in _DEGREES
    if folded in _TITLED or gap == "-":
        return True
    if begin:
        return word[1][0].isupper() or folded not in ORDINARY
    return word[1][0].isupper() and (len(folded) == 1 or folded not in ORDINARY)


def _signatures(text: str, flat: str) -> Iterator[Span]:
    """A short line that opens with "Signed by"; elsewhere the names, days and times that follow it."""
    for cue in _SIGNED.finditer(flat):
        opens = flat.rfind("\n", 0, cue.start()) + 1
        ends = flat.find("\n", cue.end())
        ends = len(flat) if ends < 0 else ends
        whole = not flat[opens : cue.start()].strip() and (opens or ends < len(flat))
        if whole and ends - opens <= MAX_SIGNATURE_LINE:
            yield cue.start(), ends, "signature"
        elif after := _signers(text, cue.end(), ends):
            yield *after, "signature"


def _signers(text: str, end: int, limit: int) -> tuple[int, int] | None:
    begin, last = 0, 0
    for _ in range(MAX_SIGNATURE_WORDS):
        word = _SIGNATURE_WORD.match(text, end, limit)
        if not word or (last > MAX_ABBREVIATION and word.group()[0] == "."):
            break
        folded = fold(word[1])
        named = word[1][0].isupper() and (len(folded) == 1 or folded not in ORDINARY)
        if not (named or word[1][0].isdigit() or folded in _SIGNATURE_LINKS or folded in _TITLED):
            break
        begin, end, last = begin or word.start(1), word.end(), len(word[1])
    return (begin, end) if begin else None
