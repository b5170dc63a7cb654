"""Reports in a table, one row each: CSV as hospitals export it, or Parquet."""

import codecs
import csv
import datetime
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, TextIO

from client.cohort.errors import ColumnMissingError, SourceMissingError, TableUnreadableError
from client.cohort.outcomes import Code, Rejected
from client.cohort.tables import MAX_CELL_CHARACTERS, Table, is_label, label_value
from client.reports.files import UNREADABLE, ReportFiles, outcome_of
from client.reports.report import Report, Status, moment

Row = Mapping[str, str]

ROWS_AT_A_TIME = 1024
# Words and letters of English and German systems; HL7's and FHIR's are among them.
_STATUS: Mapping[str, Status] = {
    **dict.fromkeys(("", "f", "final", "verified", "approved", "signed", "authorized"), Status.FINAL),
    **dict.fromkeys(("released", "complete", "completed", "vidiert", "freigegeben"), Status.FINAL),
    **dict.fromkeys(("c", "corrected", "amended", "revised", "appended", "korrigiert"), Status.CORRECTED),
    **dict.fromkeys(("p", "preliminary", "draft", "unverified", "partial", "vorläufig"), Status.PRELIMINARY),
    **dict.fromkeys(("a", "addendum", "nachtrag"), Status.ADDENDUM),
    **dict.fromkeys(("x", "cancelled", "canceled", "deleted", "withdrawn", "storniert"), Status.WITHDRAWN),
    **dict.fromkeys(("entered-in-error", "entered in error"), Status.WITHDRAWN),
}
_COLUMNS = {
    "accession": "accession_number",
    "issuer": "issuer_of_accession_number",
    "study_uid": "study_instance_uid",
    "patient": "patient_id",
    "text": "report",
    "status": "report_status",
    "when": "report_date",
    "language": "language",
}
_PARQUET = b"PAR1"


class ReportTable(ReportFiles):
    """A CSV file of any encoding and delimiter, or a Parquet file.

    Needs the column report and one of accession_number and study_instance_uid. Reads also patient_id,
    issuer_of_accession_number, report_status, report_date, language, and labels: columns in which every cell
    is empty, 0 to 1, yes, no, or -1 for uncertain.
    """

    numbers_from_one: ClassVar[bool] = True

    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        try:
            with open(path, "rb") as file:
                is_parquet = file.read(len(_PARQUET)) == _PARQUET
        except OSError as error:
            raise SourceMissingError(f"expected the table {path}: {error.strerror}") from error
        rows = ParquetRows(path) if is_parquet else CsvRows(path)
        header = Table(path, rows.columns, ())
        columns = {name: header.column(column) for name, column in _COLUMNS.items()}
        columns["text"] = header.need(_COLUMNS["text"])
        if not (columns["accession"] or columns["study_uid"]):
            raise ColumnMissingError(
                f"{path} has none of the columns accession_number, study_instance_uid; "
                f"its columns are {', '.join(header.columns)}"
            )
        named = {name: column for name, column in columns.items() if column}
        labels = _label_columns(rows, without=named.values())
        for row in rows.read([*named.values(), *labels]):
            yield row if isinstance(row, Rejected) else outcome_of(partial(_report, row, named, labels))


class CsvRows:
    """The rows of a CSV file, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Find out encoding, delimiter and columns.

        Raises:
            TableUnreadableError: There is no line of column names.
        """
        self._path = path
        self._encoding = _encoding(path)
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        with self._open() as file:
            header = file.readline(MAX_CELL_CHARACTERS)
        self._delimiter = max(",;\t", key=header.count)
        with self._open() as file:
            try:
                names = next(self._reader(file), [])
            except csv.Error as error:
                raise TableUnreadableError(f"{path} line 1 is not CSV: {error}") from None
        self.columns = [name.strip() for name in names]
        if not any(self.columns):
            raise TableUnreadableError(f"{path} is empty; expected a line of column names")

    def read(self, columns: Sequence[str]) -> Iterator[Row | Rejected]:
        """Yield the cells of ``columns``, row by row, stripped; a damaged row is rejected."""
        places = {column: place for place, column in enumerate(self.columns)}
        with self._open() as file:
            reader = self._reader(file)
            next(reader)
            while True:
                try:
                    line = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    yield UNREADABLE
                    continue
                if len(line) > len(self.columns):
                    yield UNREADABLE
                elif any(line):
                    line.extend([""] * (len(self.columns) - len(line)))
                    yield {column: line[places[column]].strip() for column in columns}

    def _open(self) -> TextIO:
        return open(self._path, encoding=self._encoding, errors="replace", newline="")

    def _reader(self, file: TextIO) -> "Iterator[list[str]]":
        return csv.reader(file, delimiter=self._delimiter, strict=True)


class ParquetRows:
    """The rows of a Parquet file, a batch of them in memory at a time."""

    def __init__(self, path: Path) -> None:
        """Read the schema.

        Raises:
            TableUnreadableError: The file is damaged.
        """
        # Imported here since it costs as much to load as everything else that reads reports.
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped, unused-ignore]

        try:
            self._file = parquet.ParquetFile(path)
        except (ArrowException, OSError, ValueError):
            raise TableUnreadableError(
                f"{path} begins like Parquet and cannot be read; export it again"
            ) from None
        self.columns: list[str] = list(self._file.schema_arrow.names)

    def read(self, columns: Sequence[str]) -> Iterator[Row | Rejected]:
        """Yield the cells of ``columns`` as text, row by row."""
        for batch in self._file.iter_batches(ROWS_AT_A_TIME, columns=list(columns)):
            for row in batch.to_pylist():
                yield {column: _cell(row[column]) for column in columns}


def _report(row: Row, named: Mapping[str, str], labels: Sequence[str]) -> Report:
    cells = {name: row[column] for name, column in named.items()}
    word = cells.pop("status", "").lower()
    status = _STATUS.get(word, Status.PRELIMINARY)
    when = moment(cells.pop("when", ""))
    if status is Status.WITHDRAWN:
        cells["text"] = ""
    return Report(
        source="table",
        status=status,
        when=when,
        labels={name: label_value(row[name]) for name in labels},
        remarks=() if word in _STATUS else (Code.W_STATUS,),
        **cells,
    )


def _label_columns(rows: CsvRows | ParquetRows, *, without: Collection[str]) -> Sequence[str]:
    """Return the columns in which every cell is a label or empty, and some cell is not empty."""
    possible, filled = [column for column in rows.columns if column not in without], set[str]()
    if not possible:
        return []
    for row in rows.read(possible):
        if not isinstance(row, Rejected):
            possible = [column for column in possible if is_label(row[column])]
            filled.update(column for column in possible if row[column])
        if not possible:
            break
    return [column for column in possible if column in filled]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # numbers with gaps become floats: 123.0 was an accession number
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value).strip()


def _encoding(path: Path) -> str:
    """Return UTF-8, or Windows-1252 where the file is not."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        try:
            for block in iter(partial(file.read, 2**20), b""):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8-sig"
