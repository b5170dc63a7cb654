"""Whether a finding named in a sentence is there: the reach of "no", "possible" and "has resolved"."""

from collections.abc import Iterator, Set
from enum import IntEnum
from typing import TypeVar

from client.text.resources import every_word, fold, word_list
from client.text.terms import Found, Terms

Names = TypeVar("Names")


class Status(IntEnum):
    """What is said about a finding; of several statements about one the highest counts."""

    ABSENT = 0
    UNCERTAIN = 1
    PRESENT = 2


_LISTS = word_list("context.yaml")
_ROLES = (
    "denies_after",
    "denies_verb",
    "denies_before",
    "doubts_after",
    "doubts_before",
    "asks_after",
    "idle",
    "ends",
)
_VERBS = frozenset(map(fold, every_word(_LISTS["verbs"])))
_JOINS = frozenset(map(fold, _LISTS["joins"]))
_CLAUSE = frozenset({",", "and", "und", "y", "et", "e"})
MAX_REACH_WORDS = 60


def _triggers() -> Terms[frozenset[str]]:
    roles: dict[str, frozenset[str]] = {}
    for role in _ROLES:
        for term in every_word(_LISTS[role]):
            roles[fold(term)] = roles.get(fold(term), frozenset()) | {role}
    return Terms(roles.items())


_TRIGGERS = _triggers()


def statements(words: list[str], mentions: list[Found[Names]]) -> Iterator[tuple[Names, Status]]:
    """Say of each mention in a sentence whether it is stated, left open or denied.

    Mentions that are only asked about or belong to the past are left out. A denial goes before a doubt ("no
    suspicious nodule"). Forward, a word reaches to the end of the sentence, to one of ``ends``, and to a new
    clause: a comma or an "and" after a verb. Backward, it reaches to the nearest mention, and on through a
    list ("effusion or pneumothorax is not seen").
    """
    if not mentions:
        return
    reach = _Reach(words, mentions)
    for number, mention in enumerate(mentions):
        if number in reach.asked:
            continue
        status = Status.PRESENT
        if number in reach.denied:
            status = Status.ABSENT
        elif number in reach.doubted:
            status = Status.UNCERTAIN
        yield mention.value, status


class _Reach:
    """Which mentions of a sentence the words around them deny, doubt or ask for."""

    def __init__(self, words: list[str], mentions: list[Found[Names]]) -> None:
        self._words = words
        self._mention_at = {place: n for n, m in enumerate(mentions) for place in range(m.first, m.last + 1)}
        # Where a mention begins or ends no other term reads on: "no increase of the cardiothoracic ratio".
        edges = {place for mention in mentions for place in (mention.first, mention.last)}
        masked = ["_" if place in edges else word for place, word in enumerate(words)]
        triggers = list(_TRIGGERS.find(masked))
        self._ends = {found.first for found in triggers if "ends" in found.value}
        self.denied: set[int] = set()
        self.doubted: set[int] = set()
        self.asked: set[int] = set()
        for found in triggers:
            self._apply(found)

    def _apply(self, found: Found[frozenset[str]]) -> None:
        roles = found.value
        inside = self._mention_at.get(found.first)
        if inside is not None:
            # A term's own words are no trigger ("lucency without markings"); those in its gap are adverbs
            # ("the heart is not enlarged", "is borderline enlarged").
            self.denied.update([inside] if "denies_verb" in roles else ())
            self.doubted.update([inside] if "doubts_after" in roles else ())
            return
        if "denies_after" in roles:
            self.denied.update(self._ahead(found))
        if "denies_verb" in roles:
            self.denied.update(self._ahead(found, stops=_CLAUSE))
        if "denies_before" in roles:
            self.denied.update(self._back(found) or self._ahead(found))
        if "doubts_after" in roles:
            self.doubted.update(self._ahead(found))
        if "doubts_before" in roles:
            self.doubted.update(self._back(found))
        if "asks_after" in roles:
            self.asked.update(self._ahead(found, stops={","}))

    def _ahead(self, found: Found[frozenset[str]], *, stops: Set[str] = frozenset()) -> list[int]:
        reached = []
        for place in range(found.last + 1, min(found.last + MAX_REACH_WORDS, len(self._words))):
            number, word = self._mention_at.get(place), self._words[place]
            if number is not None:
                reached.append(number)
            elif place in self._ends or word in stops:
                break
            elif word in _VERBS:
                stops = _CLAUSE
        return reached

    def _back(self, found: Found[frozenset[str]]) -> list[int]:
        reached: list[int] = []
        between: set[str] = set()
        listed = False
        for place in range(found.first - 1, max(found.first - MAX_REACH_WORDS, -1), -1):
            number, word = self._mention_at.get(place), self._words[place]
            if number is None:
                between.add(word)
                if place in self._ends or (reached and word in _VERBS):
                    break
                continue
            if number in reached:
                continue
            listed = listed or not _JOINS.isdisjoint(between)
            if reached and not (listed and between & (_JOINS | {","})):
                break
            reached.append(number)
            between = set()
        return reached
