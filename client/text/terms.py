"""Terms as a word list writes them, found in a sentence: the longest at each place."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

from client.text.resources import fold

T = TypeVar("T")

MAX_GAP_WORDS = 4
GAP = "..."
_KEY_LETTERS = 3
_TOKEN = re.compile(r"\w+|[,;:?]|[-\u2013\u2014](?=\s)")
_TERM_WORD = re.compile(r"\.\.\.|[\w*|]+|[,;:?]")


@dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """A term in a sentence.

    Attributes:
        first: Number of its first word.
        last: Number of its last word.
        value: What the term stands for.
    """

    first: int
    last: int
    value: T


def check_term(term: str) -> list[str]:
    """Return the words of a term, folded.

    Raises:
        ValueError: A term has no word, or begins or ends with a gap.
    """
    words = _TERM_WORD.findall(fold(term))
    if not words or GAP in (words[0], words[-1]) or not all(word.strip("*|") for word in words):
        raise ValueError("expected words with letters, and ... only between them")
    return words


def words_of(sentence: str) -> list[str]:
    """Words and marks of a sentence, folded; a dash between blanks is a semicolon."""
    return [word if word[0] not in "-\u2013\u2014" else ";" for word in _TOKEN.findall(fold(sentence))]


class Terms(Generic[T]):
    """A set of terms, each with what it stands for."""

    def __init__(self, terms: Iterable[tuple[str, T]]) -> None:
        """Compile the terms.

        Raises:
            ValueError: A term has no word, or begins or ends with a gap.
        """
        self._by_start: dict[str, list[tuple[re.Pattern[str], T]]] = defaultdict(list)
        inner: list[tuple[str, re.Pattern[str], T]] = []
        for term, value in terms:
            words = check_term(term)
            pattern = re.compile(_regex(words))
            for first in words[0].split("|"):
                stem = first.rstrip("*")
                if "*" in stem or len(stem) < min(_KEY_LETTERS, len(first)):
                    inner.append((first, pattern, value))
                else:
                    self._by_start[stem[:_KEY_LETTERS]].append((pattern, value))
        self._inner = [(pattern, value) for _, pattern, value in inner]
        # The longest run of letters of each: where none is in a sentence, the slow search is not needed.
        self._stems = {max(first.split("*"), key=len) for first, _, _ in inner}
        self._any_inner = re.compile(
            "|".join(rf"(?<!\w){_word(first)}(?!\w)" for first, _, _ in inner) or r"(?!)"
        )

    def find(self, words: list[str]) -> Iterator[Found[T]]:
        """Yield the terms from left to right; none overlaps another, and the longest goes first."""
        text = " ".join(words)
        inner: Set[int] = frozenset()
        if any(stem in text for stem in self._stems):
            inner = {match.start() for match in self._any_inner.finditer(text)}
        by_start = self._by_start
        done, start, following = -1, 0, 0
        for number, word in enumerate(words):
            start, following = following, following + len(word) + 1
            candidates = by_start.get(word[:_KEY_LETTERS])
            if number <= done or not (candidates or start in inner):
                continue
            end = -1
            for pattern, value in (*(candidates or ()), *(self._inner if start in inner else ())):
                match = pattern.match(text, start)
                if match and match.end() > end:
                    end, best = match.end(), value
            if end >= 0:
                done = number + text.count(" ", start, end)
                yield Found(first=number, last=done, value=best)


def _regex(words: list[str]) -> str:
    regex = ""
    for word in words:
        if word == GAP:
            regex += rf"(?: \w+){{0,{MAX_GAP_WORDS}}}?"
        else:
            regex += (" " if regex else "") + _word(word)
    return regex + r"(?!\w)"


def _word(word: str) -> str:
    choices = "|".join(re.escape(choice).replace(r"\*", r"\w*") for choice in word.split("|"))
    return f"(?:{choices})"
