"""Which studies are asked for, as one query after another."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from client.cohort.errors import ColumnMissingError
from client.cohort.tables import read_table
from client.pacs.settings import PacsTable

_COLUMNS = {"study_instance_uid": "StudyInstanceUID", "accession_number": "AccessionNumber"}
_WILDCARDS = frozenset("*?\\")  # PS3.4 C.2.2.2: they would match more than the one study that is meant


@dataclass(frozen=True, kw_only=True, repr=False)
class Criteria:
    """One query.

    Attributes:
        name: Where the query comes from: the place in a list, empty for a range of dates.
        filters: Keyword to value.
    """

    name: str
    filters: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether a listed study is named exactly."""
        return not self.name or not any(_WILDCARDS & set(value) for value in self.filters.values())


def queries(table: PacsTable, *, today: date) -> Iterator[Criteria]:
    """Yield what to ask a PACS for; a study may answer several.

    A range of dates is asked day by day: archives cut long answers, and not every one says so.

    Raises:
        CohortError: The list of studies cannot be read.
    """
    if table.studies is not None:
        yield from _listed(table.studies, table.keys)
        return
    for day in _days(table.since, table.until or today):
        for modality in table.modalities or ("",):
            filters = {"StudyDate": day, "ModalitiesInStudy": modality}
            yield Criteria(
                name="", filters={**{key: value for key, value in filters.items() if value}, **table.keys}
            )


def _listed(path: Path, keys: Mapping[str, str]) -> Iterator[Criteria]:
    table = read_table(path)
    if not any(map(table.column, _COLUMNS)):
        raise ColumnMissingError(
            f"{path} has neither a column accession_number nor study_instance_uid; "
            f"its columns are {', '.join(table.columns)}"
        )
    columns = {keyword: table.values(column) for column, keyword in _COLUMNS.items()}
    asked: set[str] = set()
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        named = [(keyword, value) for keyword, value in zip(columns, values, strict=True) if value]
        if named and named[0][1] not in asked:  # the study UID where both are given: it is unique
            asked.add(named[0][1])
            yield Criteria(name=f"{path.name} row {number}", filters={**dict(named[:1]), **keys})


def _days(since: date | None, until: date) -> Iterator[str]:
    if since is None:
        yield ""
        return
    for days in range((until - since).days + 1):
        yield (since + timedelta(days)).strftime("%Y%m%d")
