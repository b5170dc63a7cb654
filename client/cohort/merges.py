"""One patient under several ids: the hospital's table of merges."""

from collections.abc import Mapping
from pathlib import Path

from client.cohort.tables import read_table


class PatientMerges:
    """Which ids are one patient's; transitive, in any order, in circles if need be.

    Such a patient is one in everything: on one side of the split, one unit of privacy, one pseudonym.
    """

    def __init__(self, same_as: Mapping[str, str] | None = None) -> None:
        """Take the first id of each patient, by every other id."""
        self._same_as = same_as or {}
        self._seen = set[str]()

    @classmethod
    def read(cls, path: Path | None) -> "PatientMerges":
        """Read a CSV with the columns patient_id and same_as; without a path, everyone has one id.

        Raises:
            CohortError: The table is absent, is not CSV, or lacks a column.
        """
        if path is None:
            return cls()
        table = read_table(path)
        patient, same_as = table.need("patient_id"), table.need("same_as")
        groups: dict[str, list[str]] = {}
        for row in table.rows:
            first, second = (groups.setdefault(one, [one]) for one in (row[patient], row[same_as]))
            if row[patient] and row[same_as] and first is not second:
                small, large = sorted((first, second), key=len)
                large.extend(small)  # every id moves at most log2 of its group's size times
                groups.update((one, large) for one in small)
        least = {id(group): min(group) for group in groups.values()}
        return cls({one: least[id(group)] for one, group in groups.items() if one})

    def __call__(self, patient: str) -> str:
        """Return the id that stands for all of the patient's: the first in the order of the alphabet."""
        found = self._same_as.get(patient)
        if found is None:
            return patient
        self._seen.add(patient)
        return found

    @property
    def unknown(self) -> int:
        """How many ids of the table nobody has asked for yet."""
        return len(self._same_as) - len(self._seen)
