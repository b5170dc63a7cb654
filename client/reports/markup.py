"""The text of an HTML document, with the line ends that its blocks make."""

import re
from html.parser import HTMLParser

_BLOCKS = frozenset(
    "address article br dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre section table tr ul".split()  # noqa: SIM905
)
# Word writes <![if ...]>, which the parser of Python 3.11 may refuse, quoting the text.
_MARKED = re.compile(r"<!\[[^>]*>?")
_UNSEEN = frozenset({"script", "style", "head"})


def plain_text(html: str) -> str:
    """Return what a reader of ``html`` sees; no markup makes this raise."""
    reader = _Reader()
    reader.feed(_MARKED.sub("", html))
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # A head that is never closed ends where the body begins.
        self._unseen = 0 if tag == "body" else self._unseen + (tag in _UNSEEN)
        self._end_line(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._unseen = max(0, self._unseen - (tag in _UNSEEN))
        self._end_line(tag)

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.pieces.append(re.sub(r"\s+", " ", data))

    def _end_line(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append(" ")
