"""The package's word lists, and one way of writing words so that spellings meet."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

import yaml

# What survives decomposition: letters of their own that a plain keyboard writes in two.
_LIGATURES = str.maketrans({"ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ð": "d", "þ": "th"})


def word_list(name: str) -> Any:
    """Return the content of the package's file ``name``, as YAML gives it."""
    return parse_yaml(resources.files("client.text").joinpath(name).read_text(encoding="utf-8"))


def parse_yaml(text: str) -> Any:
    """Return what a YAML document says, every scalar as text: "no" is a word here.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    return yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # noqa: S506, makes no objects


def every_word(lists: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The entries of all languages."""
    for entries in lists.values():
        yield from entries


def fold(text: str) -> str:
    """Return ``text`` in lower case without accents: "Résumé" and "RESUME" meet, "Müller" is "muller".

    Guarantees:
        The result of a result is itself.
    """
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text.casefold().translate(_LIGATURES))
    folded = "".join(character for character in decomposed if not unicodedata.combining(character))
    return folded or text  # a lone sign that is nothing but an accent
