"""CSV files as hospitals export them: any encoding, any delimiter, columns by many names."""

import csv
import difflib
import io
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.cohort.errors import ColumnMissingError, SourceMissingError, TableUnreadableError

# Radiology reports pass csv's default of 128 KiB when a whole history is exported into one cell.
MAX_CELL_CHARACTERS = 16 * 2**20

ALIASES: Mapping[str, tuple[str, ...]] = {
    "accession_number": ("accession",),
    "study_instance_uid": ("study_uid",),
    "report": ("report_text", "text"),
    "patient_id": ("patient",),
    "issuer_of_accession_number": ("issuer", "accession_issuer"),
    "report_status": ("status", "result_status"),
    "report_date": ("report_datetime", "reported_at", "issued", "signed_at"),
    "language": ("lang",),
    "study_id": ("study",),
}
KEYS = ("accession_number", "study_instance_uid", "image")

# CheXpert's labels write -1 for uncertain (Irvin et al. 2019, section 3).
_UNKNOWN = dict.fromkeys(("", "-1", "-1.0", "nan"), math.nan)
_LABEL_WORDS: Mapping[str, float] = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0, **_UNKNOWN}


@dataclass(frozen=True, repr=False)
class Table:
    """The rows of one CSV file; cells are stripped strings, a missing cell is empty."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]

    def column(self, name: str) -> str | None:
        """Return the table's own spelling of ``name``, or None where it has no such column."""
        spelling = {plain(column): column for column in reversed(self.columns)}
        names = (name, *ALIASES.get(name, ()))
        return next((spelling[plain(other)] for other in names if plain(other) in spelling), None)

    def need(self, name: str) -> str:
        """Return the table's own spelling of ``name``.

        Raises:
            ColumnMissingError: There is none; the message names the nearest column.
        """
        column = self.column(name)
        if column is None:
            raise ColumnMissingError(
                f"{self.path} has no column {name!r}{_nearest(name, self.columns)}; "
                f"its columns are {', '.join(self.columns)}"
            )
        return column

    def values(self, name: str) -> Sequence[str]:
        """Return the column ``name``, or as many empty strings where there is none."""
        column = self.column(name)
        return [row[column] if column else "" for row in self.rows]

    def label_columns(self, *, without: Collection[str | None]) -> Sequence[str]:
        """Return the columns that hold labels: every cell is empty, 0 to 1, yes, no, or -1 for uncertain."""
        return [
            column
            for column in self.columns
            if column not in without
            and any(row[column] for row in self.rows)
            and all(is_label(row[column]) for row in self.rows)
        ]


def read_table(path: Path) -> Table:
    """Read a CSV file whatever its encoding (UTF-8, else Windows-1252) and delimiter (comma, semicolon, tab).

    Raises:
        SourceMissingError: The file is absent or cannot be opened.
        TableUnreadableError: The file is empty, binary, or its rows are longer than its header.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceMissingError(f"expected the table {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    header = text.partition("\n")[0]
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        rows = [dict(zip(columns, _cells(line, len(columns)), strict=True)) for line in reader if any(line)]
    except (csv.Error, ValueError) as error:
        raise TableUnreadableError(f"{path} line {reader.line_num} is not CSV: {error}") from error
    if not any(columns):
        raise TableUnreadableError(f"{path} is empty; expected a line of column names")
    return Table(path, columns, rows)


class KeyedRows:
    """The rows of a table, found by accession number, study UID or image."""

    def __init__(self, table: Table) -> None:
        """Index ``table``; of several rows with equal keys the last one counts, as addenda do.

        Raises:
            ColumnMissingError: The table has none of the key columns.
        """
        if not any(table.column(kind) for kind in KEYS):
            raise ColumnMissingError(
                f"{table.path} has none of the columns {', '.join(KEYS)}; "
                f"its columns are {', '.join(table.columns)}"
            )
        self.table = table
        self._keys = {kind: table.values(kind) for kind in KEYS}
        last = {tuple(keys): row for row, keys in enumerate(zip(*self._keys.values(), strict=True))}
        self._rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        for keys, row in last.items():
            for kind, value in zip(KEYS, keys, strict=True):
                if value:
                    self._rows[kind, value].append(row)

    def find(self, keys: Mapping[str, str]) -> Sequence[int]:
        """Return the rows that belong to ``keys``: none, one, or several that contradict each other.

        A row that agrees with every key goes before one that is only reached by some of them, so two
        studies under one accession number keep their own reports; the last of the agreeing rows counts.
        """
        keys = {kind: value for kind, value in keys.items() if value and kind in KEYS}
        found = {row for kind, value in keys.items() for row in self._rows.get((kind, value), ())}
        agreeing = [row for row in found if self._agrees(row, keys)]
        return [max(agreeing)] if agreeing else sorted(found)

    def _agrees(self, row: int, keys: Mapping[str, str]) -> bool:
        return all(self._keys[kind][row] in ("", value) for kind, value in keys.items())


def label_value(cell: str) -> float:
    """Return a label cell as a number in [0, 1], NaN where it is unknown (empty or -1).

    Raises:
        ValueError: The cell is no label.
    """
    cell = cell.lower()
    if cell in _LABEL_WORDS:
        return _LABEL_WORDS[cell]
    value = float(cell)
    if not 0 <= value <= 1:
        raise ValueError("expected a label in [0, 1]")
    return value


def is_label(cell: str) -> bool:
    """Return whether ``label_value`` reads the cell."""
    try:
        label_value(cell)
    except ValueError:
        return False
    return True


def plain(name: str) -> str:
    """Return a column's name without what its spellings differ in: case, blanks and marks."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _nearest(name: str, columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _cells(line: list[str], width: int) -> list[str]:
    if len(line) > width:
        raise ValueError(f"{len(line)} cells under {width} column names")
    return [cell.strip() for cell in line] + [""] * (width - len(line))
