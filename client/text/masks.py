"""One token for everything that was removed from a text."""

import re

MASK = "___"  # as MIMIC writes what was removed; OpenI writes XXXX, older releases [** ... **]

_LETTERS = re.compile(r"\bX{4,}_*")
_LINES = re.compile(r"_{2,}")
_RUN = re.compile(rf"{MASK}(?:\s+{MASK})+")


def unify_masks(text: str) -> str:
    """Write every mask as ``MASK``, and masks that follow each other as one.

    Guarantees:
        The result of a result is itself. Takes time linear in the text.
    """
    if "[**" in text:
        text = _without_brackets(text)
    if "XXXX" in text:
        text = _LETTERS.sub(MASK, text)
    return _RUN.sub(MASK, _LINES.sub(MASK, text)) if "__" in text else text


def _without_brackets(text: str) -> str:
    # By hand: the regex would look for an end from every beginning, which is quadratic where there is none.
    kept, begin = [], 0
    while (start := text.find("[**", begin)) >= 0 and (end := text.find("**]", start + 3)) >= 0:
        kept += [text[begin:start], MASK]
        begin = end + 3
    return "".join([*kept, text[begin:]])
