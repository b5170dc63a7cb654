"""From a report as it was dictated to the text a model learns from."""

import re
from collections.abc import Iterator, Mapping, Sequence

MASK = "___"  # as MIMIC writes what was removed; OpenI writes XXXX, others [** ... **]

_NAMES: Mapping[str, Sequence[str]] = {
    "impression": (
        *("impression", "impressions", "conclusion", "conclusions", "opinion", "assessment", "summary"),
        *("findings and impression", "findings/impression", "impression and recommendation"),
        *("beurteilung", "conclusión", "conclusiones", "impresión", "impresión diagnóstica"),
        *("conclusione", "conclusioni", "conclusão", "impressão"),
    ),
    "findings": (
        *("finding", "findings", "report", "result", "results", "befund", "befunde", "hallazgos"),
        *("résultat", "résultats", "description", "referto", "reperti", "achados", "relatório"),
    ),
    "other": (
        *("indication", "indications", "history", "comparison", "comparisons", "technique", "procedure"),
        *("exam", "examination", "study", "reason", "protocol", "contrast", "recommendation", "addendum"),
        *("recommendations", "notification", "wet read", "final report", "type of examination"),
        *("clinical history", "clinical information", "clinical indication", "clinical data"),
        *("reason for exam", "reason for examination", "reason for study"),
        *("indikation", "klinische angaben", "fragestellung", "technik", "vergleich", "voraufnahmen"),
        *("indicación", "técnica", "comparación", "renseignements cliniques", "quesito clinico"),
        *("tecnica", "confronto", "indicação"),
    ),
}
_KIND = {name: kind for kind, names in _NAMES.items() for name in names}
_ANY_NAME = "|".join(re.escape(name) for name in sorted(_KIND, key=len, reverse=True))
# A heading is a known name that opens a line, in any case, before a colon or alone; exports that lost their
# line ends still have capitals and a colon. Unknown names ("Lungs: clear") belong to their section.
_HEADING = re.compile(
    rf"^[ \t*#]*(?P<line>{_ANY_NAME})[ \t*]*(?:\([^()\n]*\)[ \t]*)?(?::[ \t*]*|$)"
    rf"|(?<=[.;!?)\s])(?P<inline>(?-i:{_ANY_NAME.upper()})):",
    re.IGNORECASE | re.MULTILINE,
)
_SIGNATURE = re.compile(
    r"^[ \t]*(?:electronically signed|(?:signed|dictated|transcribed|approved) by)\b.*$",
    re.IGNORECASE | re.MULTILINE,
)
_MASKED = re.compile(r"_{2,}|\bX{4,}|\[\*\*.*?\*\*\]", re.DOTALL)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def training_text(report: str) -> str:
    """Return impression, then findings: what matters first, because the tokenizer cuts the end.

    Guarantees:
        One line of single-spaced text; every mask is ``MASK``; signature lines are gone; the result of a
        result is itself. Empty exactly when the report holds no letter that could be learnt from.

    Args:
        report: The whole report, line ends kept. The last non-empty section of a kind counts, since addenda
            follow what they correct. Without findings and impression, the text under no heading is taken,
            and the paragraphs that follow the first one of indication, comparison and the like.
    """
    sections = list(_sections(_SIGNATURE.sub("", report.replace("\r\n", "\n").replace("\r", "\n"))))
    last = {kind: body for kind, body in sections if _normal(body)}
    chosen = [last[kind] for kind in ("impression", "findings") if kind in last]
    if not chosen:
        chosen = [body if kind == "none" else _after_first_paragraph(body) for kind, body in sections]
    text = _normal("\n".join(chosen))
    return text if any(character.isalpha() for character in text) else ""


def _sections(report: str) -> Iterator[tuple[str, str]]:
    headings = list(_HEADING.finditer(report))
    bounds = [*(heading.start() for heading in headings), len(report)]
    yield "none", report[: bounds[0]]
    for heading, end in zip(headings, bounds[1:], strict=True):
        name = heading["line"] or heading["inline"]
        yield _KIND[name.lower()], report[heading.end() : end]


def _after_first_paragraph(body: str) -> str:
    return "\n".join(_BLANK_LINE.split(body.lstrip("\n"))[1:])


def _normal(text: str) -> str:
    return " ".join(_MASKED.sub(MASK, text).split())
