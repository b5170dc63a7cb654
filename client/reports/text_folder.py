"""A folder of text files whose paths name the study, as MIMIC-CXR has them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.cohort.errors import CohortSettingsError
from client.cohort.outcomes import Rejected
from client.reports.files import NOT_REPORT, TOO_LARGE, ReportFiles, decoded, outcome_of
from client.reports.report import MAX_TEXT_CHARACTERS, Report

# p10/p10000032/s50414267.txt; the images of MIMIC-CXR carry the two numbers as PatientID and StudyID.
MIMIC = r"p(?P<patient>\d+)/s(?P<study_id>\d+)\.txt"
GROUPS = frozenset({"accession", "study_uid", "study_id", "patient"})


@dataclass(frozen=True, repr=False)
class TextFolder(ReportFiles):
    """Text files, UTF-8 or Windows-1252, one report each.

    Attributes:
        path: The folder.
        pattern: Regular expression that the end of a file's path below the folder must match, with the named
            groups accession, study_uid, study_id and patient as far as the path tells them. A study_id
            pairs only together with the patient. Other files are no reports.

    Raises:
        CohortSettingsError: The pattern is no regular expression, or names no study.
    """

    pattern: str = MIMIC

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groupindex.keys()
        except re.error as error:
            raise CohortSettingsError(
                f"expected a regular expression, got the pattern {self.pattern!r}: {error}"
            ) from None
        if groups - GROUPS:
            raise CohortSettingsError(
                f"the pattern {self.pattern!r} has the groups {', '.join(sorted(groups))}; "
                f"known are {', '.join(sorted(GROUPS))}"
            )
        if not (groups & {"accession", "study_uid"} or {"study_id", "patient"} <= groups):
            raise CohortSettingsError(
                f"the pattern {self.pattern!r} names no study: give it the group accession, study_uid, or "
                "study_id and patient"
            )

    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        found = re.search(rf"(?:^|/)(?:{self.pattern})$", path.relative_to(self.path).as_posix())
        if found is None:
            yield NOT_REPORT
        elif path.stat().st_size > MAX_TEXT_CHARACTERS:
            yield TOO_LARGE
        else:
            keys: dict[str, Any] = {name: value or "" for name, value in found.groupdict().items()}
            yield outcome_of(lambda: Report(source="text", text=decoded(path.read_bytes()), **keys))
