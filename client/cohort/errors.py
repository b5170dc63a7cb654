"""What can stop a cohort from being built or opened.

These messages name files and columns: they are for the hospital's own terminal and never leave the site.
"""


class CohortError(ValueError):
    """A cohort could not be built or opened; the message says what to change."""


class CohortSettingsError(CohortError):
    """The settings contradict themselves."""


class SourceMissingError(CohortError):
    """A folder or file that the settings name is absent or cannot be read."""


class TableUnreadableError(CohortError):
    """A CSV file is not one."""


class ColumnMissingError(CohortError):
    """A table lacks a column that is needed."""


class EmptyCohortError(CohortError):
    """Not one image could be paired with a text."""


class TooManyFailuresError(CohortError):
    """More inputs than the site allows could not be used."""


class StoredCohortError(CohortError):
    """A folder holds no cohort, one of another version, a damaged one, or something else entirely."""


class SaltError(CohortError):
    """The site's secret is lost, damaged, or known to others."""


class OverlapError(CohortError):
    """Two cohorts cannot be compared."""


class WorkersError(CohortError):
    """The processes that read files do not start."""
