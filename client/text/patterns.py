"""What names a person, a place or a day in any report: dates, numbers, titles, signatures."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from client.text.known import MAX_ABBREVIATION, ORDINARY, PARTICLES, TITLES, Span, Words, is_title
from client.text.resources import fold, word_list
from client.text.sections import SIGNATURE_CUES

MAX_SIGNATURE_LINE = 160  # characters; a longer line holds a report as well
MAX_TITLED_WORDS, MAX_SIGNATURE_WORDS = 5, 12
MIN_DIGITS = 7  # of a number that is too long for a measurement
MIN_LETTERED_DIGITS = 5  # of one with letters before it
MIN_MIXED_CHARACTERS, MIN_MIXED_DIGITS = 7, 4  # "ACC1EF62FA10", but not "COVID19" or "B12"

_LISTS = word_list("scrub.yaml")
_MONTHS = tuple(fold(name) for names in _LISTS["months"] for name in names)
_DEGREES = frozenset(map(fold, _LISTS["degrees"]))
_TITLED = TITLES | _DEGREES | PARTICLES


class _Flat(dict[int, int]):
    """Each character in lower case without its accent, one for one, so that places stay the same."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(fold(chr(code))[:1] or chr(code))
        return self[code]


_FLAT = _Flat()


def _any_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(fold(word)) for word in sorted(words, key=len, reverse=True))


# Every pattern reads the flat text and is tried only where a number or one of its first words begins.
# Repetitions are bounded and none is nested in another, so that the whole takes time linear in the text
# (Davis et al. 2018, doi:10.1145/3236024.3236027, on what happens otherwise).
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH = r"(?:0?[1-9]|1[0-2])"
_YEAR = r"(?:19|20)\d\d"
_NO_SIZE = r"(?!\d|[.,]\d|\s?(?:mm|cm|x\s?\d|%))"
_OF = r"(?:\s?(?:de|di|del|of)\s|[\s,.-]{1,3}|)"
_WRITTEN_MONTH = rf"(?P<month>{_any_of(_MONTHS)})(?![^\W\d_])\.?"
_DATES = tuple(
    map(
        re.compile,
        (
            rf"(?<![\d.,/-]){_YEAR}([-/.])\s?{_MONTH}\1\s?{_DAY}{_NO_SIZE}",
            rf"(?<![\d.,/-]){_DAY}([-/.])\s?{_DAY}\1\s?(?:{_YEAR}|\d\d){_NO_SIZE}",
            rf"{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)",
            rf"(?<![./-]){_MONTH}[/.]{_YEAR}{_NO_SIZE}",
        ),
    )
)
_DAY_FIRST = re.compile(
    rf"(?<![.,]){_DAY}(?:st|nd|rd|th|er|\.|\u00ba|\u00aa|o)?{_OF}{_WRITTEN_MONTH}"
    rf"(?:(?:{_OF}{_YEAR}|[\s'./-]\d\d){_NO_SIZE})?"
)
_MONTH_FIRST = re.compile(
    rf"(?<![^\W\d_]){_WRITTEN_MONTH}{_OF}"
    rf"(?:{_YEAR}|{_DAY}(?:st|nd|rd|th)?{_NO_SIZE}(?:{_OF}{_YEAR})?){_NO_SIZE}"
)
_TIMES = tuple(
    map(
        re.compile,
        (
            r"(?<![.:/])(?:[01]?\d|2[0-3])"
            r"(?::[0-5]\d(?::[0-5]\d)?|h[0-5]\d|(?:[.:][0-5]\d)?(?=\s?(?:uhr|[ap]\.m|pm)\b))(?![\d:])"
            r"(?:\s?(?:[ap]\.?m\b\.?|uhr\b|hrs?\b|hours\b))?(?!\s?-?(?:position|o.clock|axis|uhr))",
            r"(?<!\.)[0-2]\d[0-5]\d\s?(?:hours|hrs|uhr)\b",
        ),
    )
)
_PHONES = tuple(
    map(
        re.compile,
        (
            r"(?<![\w.])(?:\+|00)\d(?:[ ()/.-]{0,2}\d){6,14}(?!\d)",
            r"(?<![\w.])(?:\(\d{3}\)|\d{3})[ .-]{1,2}\d{3}[ .-]\d{4}(?!\d)",
            r"(?<![\w.,])0\d{2,5}[ /-]{1,3}\d{3,9}(?:[ -]\d{1,6})?(?!\d)",
        ),
    )
)
_UID = re.compile(r"(?<!\.)\d{1,64}(?:\.\d{1,64}){4,20}(?!\d)")
_SOCIAL_SECURITY = re.compile(r"(?<!\.)\d{3}-\d{2}-\d{4}(?!\d)")
_AGE = re.compile(r"(?<!\.)(?:9\d|1[01]\d)(?=[\s-]?(?:years?|yrs?|y\W?o|yo|j\.|anos|ans|anni)\b|[\s-]?jahr)")
_AT_NUMBER: tuple[tuple[re.Pattern[str], str], ...] = (
    *((pattern, "date") for pattern in _DATES),
    *((pattern, "time") for pattern in _TIMES),
    *((pattern, "phone") for pattern in _PHONES),
    *((_UID, "id"), (_SOCIAL_SECURITY, "id"), (_AGE, "age")),
)
_AFTER_PHONE_CUE = r"\b[.:#\s]{0,4}[\d(+][\d()/.-]{0,12}(?: ?[\d()/.-]{1,8}){0,4}"
_AFTER_NUMBER_CUE = r"\b[.:#\s-]{0,4}(?P<number>[a-z]{0,6}[ -]?\d[\w-]{0,20})"
_CUED_PHONE = re.compile(rf"(?:{_any_of(_LISTS['phone_cues'])}){_AFTER_PHONE_CUE}")
_CUED_NUMBER = re.compile(rf"(?<![\w.-])(?:{_any_of(_LISTS['number_cues'])}){_AFTER_NUMBER_CUE}")
_SIGNED = re.compile(rf"(?<!\w)(?:{_any_of(SIGNATURE_CUES)})(?!\w)")
_DIGITS = re.compile(r"\d+")
_LETTERS_BEFORE = re.compile(r"(?<![\w.,-])[a-z]{0,8}[-_]?\Z")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,6}")
_URL = re.compile(r"(?:https?://|www\.)\S{1,500}")
_NAME_WORD = re.compile(r"[ \t.,^-]{0,3}([^\W\d_][\w'\u2019]{0,40})")
_SIGNATURE_WORD = re.compile(r"[ \t.,:;^-]{0,4}([^\W_](?:[\w'\u2019:/.-]{0,40}\w)?)")
_SIGNATURE_LINKS = frozenset(
    {"on", "at", "by", "am", "um", "von", "le", "el", "il", "a", "alle", "em", "the", "and"}
)


def general_spans(words: Words) -> Iterator[Span]:
    """Find dates, times, numbers, ages, addresses, and names beside titles and signatures."""
    text = words.text
    flat = text.lower() if text.isascii() else text.translate(_FLAT)
    if "@" in flat:
        yield from ((*match.span(), "email") for match in _EMAIL.finditer(flat))
    if "www." in flat or "://" in flat:
        yield from ((*match.span(), "url") for match in _URL.finditer(flat))
    for (begin, end), spellings in zip(words.spans, words.spellings, strict=True):
        word = spellings[0]
        for find in _AT_WORD.get(word, ()):
            yield from find(text, flat, begin)
        mixed = len(word) >= MIN_MIXED_CHARACTERS and not (word.isalpha() or word.isdigit())
        if mixed and sum(map(str.isdigit, word)) >= MIN_MIXED_DIGITS:
            yield begin, end, "id"
    for digits in _DIGITS.finditer(flat):
        yield from _numbers(text, flat, digits)


def _numbers(text: str, flat: str, digits: re.Match[str]) -> Iterator[Span]:
    start = digits.start()
    for pattern, kind in _AT_NUMBER:
        for begin in (start, start - 1) if start and flat[start - 1] in "+(" else (start,):
            if match := pattern.match(flat, begin):
                yield *match.span(), kind
    yield from _date(_DAY_FIRST, text, flat, start)
    if len(digits.group()) >= MIN_LETTERED_DIGITS and not flat[digits.end() : digits.end() + 1].isalnum():
        before = _LETTERS_BEFORE.search(flat, max(0, start - 10), start)
        if before and (len(digits.group()) >= MIN_DIGITS or before.group().strip("-_")):
            yield before.start(), digits.end(), "id"


def _date(pattern: re.Pattern[str], text: str, flat: str, begin: int) -> Iterator[Span]:
    match = pattern.match(flat, begin)
    if match and not (match["month"] == "may" and text[match.start("month")] == "m"):  # "nodule 1 may be"
        yield *match.span(), "date"


def _month(text: str, flat: str, begin: int) -> Iterator[Span]:
    return _date(_MONTH_FIRST, text, flat, begin)


def _phone(text: str, flat: str, begin: int) -> Iterator[Span]:
    if match := _CUED_PHONE.match(flat, begin):
        yield *match.span(), "phone"


def _number(text: str, flat: str, begin: int) -> Iterator[Span]:
    if match := _CUED_NUMBER.match(flat, begin):
        yield *match.span("number"), "id"


def _titled(text: str, flat: str, begin: int) -> Iterator[Span]:
    """Names after a title; degrees are passed over, and the first word that is no name ends them."""
    end = begin
    while flat[end : end + 1].isalnum():
        end += 1
    if not is_title(text, begin, end):
        return
    first = 0
    for _ in range(MAX_TITLED_WORDS):
        word = _NAME_WORD.match(text, end)
        if not word or not _may_be_name(word, begins=not first):
            break
        first, end = first or word.start(1), word.end()
    if first:
        yield first, end, "name"


def _may_be_name(word: re.Match[str], *, begins: bool) -> bool:
    folded, gap = fold(word[1]), word.group()[: word.start(1) - word.start()]
    if "," in gap:
        return folded in _DEGREES
    if folded in _TITLED or gap == "-":
        return True
    if begins:
        return word[1][0].isupper() or folded not in ORDINARY
    return word[1][0].isupper() and (len(folded) == 1 or folded not in ORDINARY)


def _signature(text: str, flat: str, begin: int) -> Iterator[Span]:
    """A short line that opens with "Signed by"; elsewhere the names, days and times that follow it."""
    cue = _SIGNED.match(flat, begin)
    if not cue:
        return
    opens = flat.rfind("\n", 0, begin) + 1
    ends = flat.find("\n", cue.end())
    ends = len(flat) if ends < 0 else ends
    whole = ends - opens <= MAX_SIGNATURE_LINE and (opens or ends < len(flat))
    if whole and not flat[opens:begin].strip():
        yield begin, ends, "signature"
        return
    first, last, end = 0, 0, cue.end()
    for _ in range(MAX_SIGNATURE_WORDS):
        word = _SIGNATURE_WORD.match(text, end, ends)
        if not word or (last > MAX_ABBREVIATION and word.group()[0] == ".") or not _signs(word[1]):
            break
        first, end, last = first or word.start(1), word.end(), len(word[1])
    if first:
        yield first, end, "signature"


def _signs(word: str) -> bool:
    folded = fold(word)
    named = word[0].isupper() and (len(folded) == 1 or folded not in ORDINARY)
    return named or word[0].isdigit() or folded in _SIGNATURE_LINKS or folded in _TITLED


_Finder = Callable[[str, str, int], Iterator[Span]]


def _at_word() -> dict[str, tuple[_Finder, ...]]:
    """What to try where a word begins."""
    starts: dict[str, list[_Finder]] = defaultdict(list)
    for find, cues in (
        (_month, _MONTHS),
        (_phone, _LISTS["phone_cues"]),
        (_number, _LISTS["number_cues"]),
        (_titled, TITLES),
        (_signature, SIGNATURE_CUES),
    ):
        for first in {re.findall(r"[^\W_]+", fold(cue))[0] for cue in cues}:
            starts[first].append(find)
    return {first: tuple(finders) for first, finders in starts.items()}


_AT_WORD = _at_word()
