"""What can be wrong with a hospital's own word lists.

These messages name files, keys and terms, never a report's text.
"""


class TextError(ValueError):
    """Text settings cannot be used; the message says what to change."""


class FindingsFileError(TextError):
    """A file of findings is absent, no YAML, or holds something else than findings."""
