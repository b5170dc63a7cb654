"""A site's cohort: image-text pairs read from where a hospital keeps them, packed once."""

from client.cohort.build import PIPELINE, build_cohort
from client.cohort.errors import (
    CohortError,
    CohortSettingsError,
    ColumnMissingError,
    EmptyCohortError,
    SaltError,
    SourceMissingError,
    StoredCohortError,
    TableUnreadableError,
    TooManyFailuresError,
    WorkersError,
)
from client.cohort.outcomes import Code, State
from client.cohort.settings import CohortSettings
from client.cohort.store import Cohort, open_cohort

__all__ = [
    "PIPELINE",
    "Code",
    "Cohort",
    "CohortError",
    "CohortSettings",
    "CohortSettingsError",
    "ColumnMissingError",
    "EmptyCohortError",
    "SaltError",
    "SourceMissingError",
    "State",
    "StoredCohortError",
    "TableUnreadableError",
    "TooManyFailuresError",
    "WorkersError",
    "build_cohort",
    "open_cohort",
]
