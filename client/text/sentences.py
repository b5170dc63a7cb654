"""A report's sentences, and which of them teach something about the image."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from client.text.masks import MASK
from client.text.resources import every_word, fold, word_list


class Kind(StrEnum):
    """What a sentence is about."""

    FINDING = "finding"
    BOILERPLATE = "boilerplate"
    COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence of a report.

    Attributes:
        text: The sentence without the bullet or number before it.
        kind: Whether it tells of this image, of somebody's work, or of change alone.
    """

    text: str
    kind: Kind

    def __repr__(self) -> str:
        return f"Sentence(kind={self.kind.value!r})"


_LISTS: Mapping[str, Any] = word_list("sentences.yaml")
_ABBREVIATIONS = frozenset(map(fold, every_word(_LISTS["abbreviations"])))
_BEFORE_NUMBERS = frozenset(map(fold, _LISTS["before_numbers"]))
_AFTER_ORDINALS = frozenset(map(fold, _LISTS["after_ordinals"]))
_BOILERPLATE = re.compile("|".join(f"(?:{pattern})" for pattern in every_word(_LISTS["boilerplate"])))
_CUES = frozenset(map(fold, every_word(_LISTS["comparison"]["cues"])))
_NO_NEWS = _CUES | frozenset(map(fold, every_word(_LISTS["comparison"]["fillers"])))

# Where a sentence may end: at a mark before a blank, at one glued to a capital ("clear.Heart"), at a blank
# line, before a bullet that opens a line.
_END = re.compile(
    r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)"
    r"|(?<=[^\W\d_]{2})\.(?=[^\W\d_a-zß-ÿ][^\W\d_A-Z])"
    r"|\n(?=[ \t]*\n|[ \t]*(?:[-*\u2022\u00b7]|\d{1,2}[.)])[ \t])"
)
_BULLET = re.compile(r"[\s\-*\u2022\u00b7\u2013]*(?:\(?\d{1,2}[.)](?=\s|[^\W\d_]))?[\s\-*\u2022\u00b7]*")
_NUMBERED = re.compile(r"(?<=\s)(\d{1,2})[.)]\s+(?=\S)")
_TOKEN_AFTER = re.compile(r"\s*(\w{1,40})")
_WORD = re.compile(r"[^\W\d]+")
_MAX_TOKEN = 40


def split_sentences(text: str) -> tuple[str, ...]:
    """Return the sentences of ``text`` in order, without bullets and numbers of lists.

    Guarantees:
        None is empty and none holds a line end; nothing but white space, bullets and list numbers is lost.
        Takes time linear in the text. Knows abbreviations, initials, decimals and German ordinals.
    """
    return tuple(_split(text))


def sentences(text: str) -> tuple[Sentence, ...]:
    """Return the sentences of ``text`` and what each is about."""
    return tuple(Sentence(text=sentence, kind=_kind(sentence)) for sentence in _split(text))


def learnable_sentences(text: str) -> tuple[str, ...]:
    """Return the sentences that tell something about the image.

    Guarantees:
        A part of ``split_sentences(text)``, in its order. Empty where a report only says that nothing has
        changed, or whom it was sent to: an image alone cannot teach that.
    """
    return tuple(sentence.text for sentence in sentences(text) if sentence.kind is Kind.FINDING)


def _split(text: str) -> Iterator[str]:
    begin = 0
    for end in _END.finditer(text):
        if end.start() >= begin and not _goes_on(text, begin, end):
            yield from _items(text[begin : end.end()])
            begin = end.end()
    yield from _items(text[begin:])


def _goes_on(text: str, begin: int, end: re.Match[str]) -> bool:
    """Whether the full stop belongs to an abbreviation, an initial, an ordinal or a list's number."""
    if end.group() != ".":
        return False
    token = text[max(begin, end.start() - _MAX_TOKEN) : end.start()]
    token = token[max(map(token.rfind, " \t\n(")) + 1 :]
    after = _TOKEN_AFTER.match(text, end.end())
    following = after[1] if after else ""
    if token.isdigit():
        opens = not text[begin : end.start() - len(token)].strip(" \t\n-*\u2022(")
        return (len(token) <= 2 and opens) or fold(following) in _AFTER_ORDINALS
    if len(token) == 1 and token.isupper():
        return True
    name = fold(token)
    return name in _ABBREVIATIONS or (name in _BEFORE_NUMBERS and following[:1].isdigit())


def _items(sentence: str) -> Iterator[str]:
    """The items of a list that numbers without full stops ("1) Edema 2) Effusion")."""
    lead = _BULLET.match(sentence)
    begin = lead.end() if lead else 0
    if "1" in (lead.group() if lead else ""):
        wanted = 2
        for number in _NUMBERED.finditer(sentence, begin):
            if int(number[1]) == wanted:
                yield from _clean(sentence[begin : number.start()])
                begin, wanted = number.end(), wanted + 1
    yield from _clean(sentence[begin:])


def _clean(sentence: str) -> Iterator[str]:
    cleaned = " ".join(sentence.split())
    if any(character.isalnum() for character in cleaned):
        yield cleaned


def _kind(sentence: str) -> Kind:
    folded = fold(sentence)
    if _BOILERPLATE.search(folded):
        return Kind.BOILERPLATE
    words = set(_WORD.findall(folded.replace(MASK, " ")))
    if words & _CUES and words <= _NO_NEWS:
        return Kind.COMPARISON
    return Kind.FINDING
