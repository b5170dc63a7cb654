"""Which part of a report is learnt from: sections by many names, addenda, fall-backs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from client.text.masks import unify_masks
from client.text.resources import every_word, fold, word_list


class Rule(StrEnum):
    """Which part of a report gave its text."""

    IMPRESSION_AND_FINDINGS = "impression and findings"
    IMPRESSION = "impression"
    FINDINGS = "findings"
    UNHEADED = "unheaded text"
    LAST_PARAGRAPH = "last paragraph"
    NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a report says, and how that was found.

    Attributes:
        text: One line of single-spaced text; empty exactly when ``rule`` is ``NOTHING``.
        rule: Which part of the report gave the text.
        addendum: Whether the text holds words of an addendum.
    """

    text: str
    rule: Rule
    addendum: bool

    def __repr__(self) -> str:
        return f"Parsed(rule={self.rule.value!r}, addendum={self.addendum})"


def _kinds() -> tuple[Mapping[str, str], tuple[str, ...]]:
    lists = word_list("headings.yaml")
    signatures = tuple(fold(cue) for cue in every_word(lists.pop("signature")))
    return {fold(name): kind for kind, names in lists.items() for name in every_word(names)}, signatures


_KIND, SIGNATURE_CUES = _kinds()
_LAST_WORDS = frozenset(name.split()[-1] for name in _KIND)
_MAX_NAME = max(map(len, _KIND))
_SENTENCE_END = tuple(".;!?)")
_MAX_LINE = 2 * _MAX_NAME  # with marks and a remark in brackets around the name
_MAX_PASSES = 4
_BEFORE_NAME = re.compile(r"[*#>.;!?)]")
_WORD = re.compile(r"\S+")
_SIGNATURE = re.compile(rf"[\W_]*(?:{'|'.join(map(re.escape, SIGNATURE_CUES))})(?!\w)")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def training_text(report: str) -> str:
    """Return impression, then findings: what matters first, because the tokenizer cuts the end.

    Guarantees:
        Those of ``parse``, whose text this is.
    """
    return parse(report).text


def parse(report: str) -> Parsed:
    """Return impression, then what addenda add, then findings.

    A heading is a known name (``headings.yaml``), in any case and with or without accents, that opens a line
    before a colon or alone. Exports that lost their line ends still have capitals or the end of a sentence
    before the name, and a colon after it. Unknown names ("Lungs: clear") belong to their section.

    Of several sections of a kind the last non-empty one counts. A signed report is never rewritten: what is
    corrected or added later is put below it or above it as an addendum (ACR Practice Parameter for
    Communication of Diagnostic Imaging Findings, on final reports). So an addendum's impression replaces the
    report's, wherever it stands; its other words follow the impression, since they are what the radiologist
    found worth signing again; and an addendum above the report ends where a report's first heading stands.

    Without findings and impression, the text under no heading is taken, and the paragraphs that follow the
    first one of indication, comparison and the like.

    Guarantees:
        One line of single-spaced text; every mask is ``MASK``; lines of signature are gone; the result of a
        result is itself. Empty exactly when the report holds no letter that could be learnt from. Takes time
        linear in the report.

    Args:
        report: The whole report, line ends kept.
    """
    sections = list(_sections(report.replace("\r\n", "\n").replace("\r", "\n")))
    chosen, added, amended = _chosen(sections)
    rule = _RULES.get(tuple(chosen), Rule.UNHEADED)
    pieces = [chosen.get("impression", ""), *added, chosen.get("findings", "")]
    if not chosen:
        unheaded = [body for kind, body in sections if kind in ("none", "original") and _learnable(body)]
        rule = Rule.UNHEADED if unheaded or added else Rule.LAST_PARAGRAPH
        pieces = [
            body if kind in ("none", "original") else _after_first_paragraph(body)
            for kind, body in sections
            if kind != "addendum"
        ] + added
    text = _one_line("\n".join(pieces))
    return Parsed(text=text, rule=rule if text else Rule.NOTHING, addendum=bool(text) and amended)


_RULES: Mapping[tuple[str, ...], Rule] = {
    ("impression", "findings"): Rule.IMPRESSION_AND_FINDINGS,
    ("impression",): Rule.IMPRESSION,
    ("findings",): Rule.FINDINGS,
}


def _chosen(sections: list[tuple[str, str]]) -> tuple[dict[str, str], list[str], bool]:
    """The impression and the findings that count, what addenda add, and whether any counts."""
    last: dict[str, str] = {}
    corrected: dict[str, str] = {}
    added: list[str] = []
    in_addendum = False
    for kind, body in sections:
        if kind == "addendum":
            in_addendum = True
        elif kind == "original" or (not last and kind in ("findings", "other")):
            in_addendum = False
        if not _learnable(body):
            continue
        if in_addendum and kind == "impression":
            corrected[kind] = body
        elif in_addendum and kind in ("addendum", "findings"):
            added.append(body)
        elif kind in ("impression", "findings"):
            last[kind] = body
    both = {**last, **corrected}
    chosen: dict[str, str] = {kind: both[kind] for kind in ("impression", "findings") if kind in both}
    return chosen, added, bool(added or corrected)


def _sections(report: str) -> Iterator[tuple[str, str]]:
    """Each section's kind and body without signatures; what stands before the first heading is of none."""
    kind, begin = "none", 0
    for start, end, following in _headings(report):
        yield kind, _without_signatures(report[begin:start])
        kind, begin = following, end
    yield kind, _without_signatures(report[begin:])


def _headings(report: str) -> Iterator[tuple[int, int, str]]:
    """Where each heading begins and ends, and its kind."""
    begin = 0
    for line in report.split("\n"):
        start, opens = begin, True
        begin += len(line) + 1
        if len(line) > _MAX_LINE and ":" not in line:
            continue
        before, *pieces = line.split(":")
        for after in (*pieces, None):
            found = _heading(before, opens=opens, colon=after is not None)
            if found is not None:
                end = start + len(before)
                if after is not None:
                    end += 1 + len(after) - len(after.lstrip(" \t*"))
                yield start + found[0], end, found[1]
            start, opens, before = start + len(before) + 1, False, after or ""


def _heading(piece: str, *, opens: bool, colon: bool) -> tuple[int, str] | None:
    """Where a heading begins in what stands before a colon or a line's end, and its kind."""
    name = piece.rstrip(" \t*")
    if name.endswith(")"):
        name = name[: name.rfind("(")].rstrip() if "(" in name else name
    words = name[-_MAX_NAME:].split()
    if not words or fold(_BEFORE_NAME.split(words[-1])[-1]) not in _LAST_WORDS:
        return None
    whole = name.lstrip(" \t*#>")
    kind = _KIND.get(_spaced(whole)) if opens and len(whole) <= _MAX_NAME else None
    if kind:
        return (0, kind) if colon or whole[0].isupper() else None
    return _inline_heading(name) if colon else None


def _inline_heading(name: str) -> tuple[int, str] | None:
    cut = max(0, len(name) - _MAX_NAME - 1)
    for word in _WORD.finditer(name, cut):
        begin = word.start()
        glued = max(name.rfind(mark, begin, word.end()) for mark in _SENTENCE_END)  # "clear.FINDINGS"
        begin = max(begin, glued + 1)
        suffix = name[begin:]
        kind = _KIND.get(_spaced(suffix))
        ends = name[:begin].rstrip().endswith(_SENTENCE_END)
        if kind and begin and (suffix.isupper() or (ends and suffix[0].isupper())):
            return begin, kind
    return None


def _spaced(name: str) -> str:
    return " ".join(fold(name).split())


def _without_signatures(body: str) -> str:
    return "\n".join(line for line in body.split("\n") if not _SIGNATURE.match(fold(line[:80])))


def _after_first_paragraph(body: str) -> str:
    return "\n".join(_BLANK_LINE.split(body.lstrip("\n"))[1:])


def _learnable(text: str) -> bool:
    return any(character.isalpha() for character in unify_masks(text))


def _one_line(text: str) -> str:
    """The text without what a second reading would take for a heading or a signature."""
    for _ in range(_MAX_PASSES):
        before, text = text, _once(text)
        if text == before:
            break
    else:  # headings inside headings: somebody's attack, or noise
        text = _once(_once(text.replace(":", " ")))
    return text if _learnable(text) else ""


def _once(text: str) -> str:
    kept, begin = [], 0
    for start, end, _ in _headings(text):
        kept.append(text[begin:start])
        begin = end
    return " ".join(unify_masks(_without_signatures(" ".join([*kept, text[begin:]]))).split())
