"""What the benchmarks say alike: the machine, a table with footnotes, a file of rows."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """What the figures are of, with the versions of these packages; null: not installed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: _version(name) for name in packages}
    return {"cores": len(os.sched_getaffinity(0)), "memory": memory, **versions, "device": "cpu"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_rows(
    path: Path, bench: str, rows: Sequence[Mapping[str, Any]], *, packages: Sequence[str] = ("torch",)
) -> None:
    """The rows as JSON, with what they are of."""
    result = {"bench": bench, "machine": machine(*packages), "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Table:
    """A Markdown table, with a footnote for each reason why figures are missing."""

    def __init__(self, header: Sequence[str]) -> None:
        self._lines = [header, ["---"] * len(header)]
        self._reasons: list[str] = []

    def add(self, cells: Sequence[str]) -> None:
        """One more line."""
        self._lines.append(cells)

    def mark(self, reason: str | None) -> str:
        """What stands behind a name: the number of the reason's footnote; empty without a reason."""
        if not reason:
            return ""
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f" [{self._reasons.index(reason) + 1}]"

    def __str__(self) -> str:
        lines = ["| " + " | ".join(cells) + " |" for cells in self._lines]
        notes = [f"[{number}] {reason}" for number, reason in enumerate(self._reasons, 1)]
        return "\n".join([*lines, *([""] if notes else []), *notes])


def cell(value: float | None, scale: float = 1.0, *, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value * scale:.{digits}f}"


def over(value: float | None, base: float | None) -> float | None:
    """A ratio, where there are both."""
    return None if value is None or not base else value / base
