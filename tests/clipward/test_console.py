"""Long work says how far it is, how fast, and how long it will take."""

import io

import pytest
from rich.console import Console

from clipward import console
from clipward.console import PLAIN_SECONDS, progress_bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("clipward.console.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, width=200))
    return written


def test_without_a_terminal_lines_tell_rate_and_time_left(clock: list[float], output: io.StringIO) -> None:
    with progress_bars() as show:
        for done in range(0, 41, 10):
            show("read files", done, 100)
            clock[0] += PLAIN_SECONDS / 2
    lines = output.getvalue().splitlines()
    assert lines == [
        "read files: 20 of 100, 2.0/s, 0:00:40 left",
        "read files: 40 of 100, 2.0/s, 0:00:30 left",
    ]


def test_the_last_line_has_nothing_left(clock: list[float], output: io.StringIO) -> None:
    with progress_bars() as show:
        show("read files", 0, 10)
        clock[0] += 2.0
        show("read files", 10, 10)
    assert output.getvalue() == "read files: 10 of 10, 5.0/s\n"


def test_what_is_done_at_once_has_no_rate(clock: list[float], output: io.StringIO) -> None:
    with progress_bars() as show:
        show("read files", 10, 10)
    assert output.getvalue() == "read files: 10 of 10\n"


def test_a_terminal_shows_the_rate_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=120))
    with progress_bars() as show:
        for done in range(5):
            show("read files", done, 5)
    assert "read files" in screen.getvalue()
    assert "/s" in screen.getvalue()
