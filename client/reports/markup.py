"""The text of an HTML document, with the line ends that its blocks make.

Python's own parser begins again at every "<" of markup that is never closed: a minute for 80 kB, and so on.
This one looks at no character more than a few times.
"""

import re
from html import unescape

_BLOCKS = frozenset(
    "address article br dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre section table tr ul".split()  # noqa: SIM905
)
_CELLS = frozenset({"td", "th"})
# What a reader does not see, and what ends it: a head that is never closed ends where the body begins.
_UNSEEN = {
    "script": re.compile(r"</script\b", re.IGNORECASE),
    "style": re.compile(r"</style\b", re.IGNORECASE),
    "head": re.compile(r"</head\b|<body\b", re.IGNORECASE),
}
_TAG = re.compile(r"""</?([a-z][^\s/>]*+)(?:[^>"']++|"[^"]*+"|'[^']*+')*+>""", re.IGNORECASE)
_MAX_TAG = 2048  # characters in which a ">" between quotation marks is told from the tag's end
_NO_CHARACTER = re.compile(r"&#(?:[0-9]{8}|x[0-9a-f]{8})[0-9a-f]*;?", re.IGNORECASE)


def plain_text(html: str) -> str:
    """Return what a reader of ``html`` sees; no markup makes this raise, or take more than linear time."""
    pieces: list[str] = []
    last, last_comment = html.rfind(">"), html.rfind("-->")  # behind them nothing is closed any more
    place = 0
    while 0 <= (begin := html.find("<", place)) < last:
        pieces.append(_text(html[place:begin]))
        kind = html[begin + 1 : begin + 2]
        if html.startswith("<!--", begin) and begin + 4 <= last_comment:
            place = html.index("-->", begin + 4) + 3
        elif kind in "!?/" or kind.isalpha():
            place, name = _behind_tag(html, begin)
            pieces.append("\n" if name in _BLOCKS else " " if name in _CELLS else "")
        else:  # "< 5 mm"
            pieces.append("<")
            place = begin + 1
    pieces.append(_text(html[place:]))
    lines = (" ".join(line.split()) for line in "".join(pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _behind_tag(html: str, begin: int) -> tuple[int, str]:
    """Return the place behind the tag, and behind all that it hides, with its name."""
    tag = _TAG.match(html, begin, begin + _MAX_TAG)
    if tag is None:  # a declaration, or quotation marks that do not match
        return html.index(">", begin) + 1, ""
    name = tag[1].lower()
    if name not in _UNSEEN or tag[0].startswith("</") or tag[0].endswith("/>"):
        return tag.end(), name
    end = _UNSEEN[name].search(html, tag.end())
    return (html.find(">", end.end()) + 1 if end else 0) or len(html), name


def _text(data: str) -> str:
    return re.sub(r"\s+", " ", unescape(_NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", data)))
