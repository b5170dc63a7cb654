"""Names, numbers and dates are taken out of a report before anything learns from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from client.text.known import KnownIdentifiers, Words, known_spans
from client.text.masks import MASK, unify_masks
from client.text.patterns import general_spans

__all__ = ["KnownIdentifiers", "Scrubbed", "scrub"]

NOBODY = KnownIdentifiers()


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
    words = Words.of(text)
    spans = sorted([*known_spans(words, known), *general_spans(words)])
    hits: Counter[str] = Counter()
    kept, begin = [], 0
    for start, end, kind in spans:
        if start >= begin:
            kept += [text[begin:start], MASK]
            hits[kind] += 1
        begin = max(begin, end)
    return Scrubbed(text=unify_masks("".join([*kept, text[begin:]])), hits_by_kind=dict(hits))
