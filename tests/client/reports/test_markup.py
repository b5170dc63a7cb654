"""What a reader sees of an HTML report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.reports.markup import plain_text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<p>FINDINGS: Clear &amp; dry.</p><p>IMPRESSION:<br/>Normal.",
            "FINDINGS: Clear & dry.\n\nIMPRESSION:\nNormal.",
        ),
        ("<html><head><title>X</title><style>p{}</style></head><body>a\n b</body></html>", "a b"),
        ("<head><title>never closed<body>seen", "seen"),
        ("<script>var x = '<p>';</script>seen", "seen"),
        ("<tr><td>Heart</td><td>normal</td></tr>", "Heart normal"),
        ("no markup: 5 < 6 mm", "no markup: 5 < 6 mm"),
        ("", ""),
    ],
)
def test_text_keeps_its_lines_and_loses_its_markup(html: str, text: str) -> None:
    assert plain_text(html) == text


@given(st.text(alphabet="<>/!-[]&;bp'\" \n"))
def test_no_markup_makes_it_raise(html: str) -> None:
    plain_text(html)
