"""One key for texts that say the same in the same words."""

import hashlib
import re
import unicodedata

from client.text.masks import MASK, unify_masks

# What carries meaning though it is no letter: "<5 mm" is not ">5 mm", and a question no statement.
_DROPPED = re.compile(r"[^\w<>=%?+]+")
KEY_DIGITS = 32
_RUN = re.compile(rf"{MASK}(?: {MASK})+")


def text_key(text: str) -> str:
    """Return the same key for texts that differ in case, blanks, punctuation and masks alone.

    Two images whose reports have one key are no negatives of each other: many reports are "No acute disease."

    Guarantees:
        32 hexadecimal digits. Digits count, and so do signs that carry meaning (< > = % ? +); a decimal point
        keeps its digits apart ("1.5" is not "15"). The key of a text without letters and digits is that of
        the empty text. A key is derived from a report and stays where reports stay.
    """
    plain = unify_masks(unicodedata.normalize("NFKC", text)).casefold()
    words = _RUN.sub(MASK, _DROPPED.sub(" ", plain).strip())
    if not any(character.isalnum() for character in words.replace(MASK, "")):
        words = ""
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=KEY_DIGITS // 2).hexdigest()
