"""What the sources that read files have in common: which files, their names, and that none stops the rest."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from client.cohort.errors import CohortError, SourceMissingError
from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.cohort.sources import stamp
from client.reports.report import Report, ReportEntry, checked

UNREADABLE = Rejected(State.QUARANTINED, Code.E_UNREADABLE)
TOO_LARGE = Rejected(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)
EMPTY = Rejected(State.QUARANTINED, Code.E_EMPTY_FILE)
NOT_REPORT = Rejected(State.IGNORED, Code.E_NOT_REPORT)


@dataclass(frozen=True, repr=False)
class ReportFiles(ABC):
    """A file of reports, or every file below a folder, by name; links to folders are not followed."""

    path: Path

    numbers_from_one: ClassVar[bool] = False

    def files(self) -> Iterator[Path]:
        """Yield the files that are read.

        Raises:
            SourceMissingError: The file or folder is absent, or cannot be listed.
        """
        if not self.path.is_dir():
            stamp(self.path, "")
            yield self.path
            return
        for folder, folders, names in os.walk(self.path, onerror=_stop):
            folders.sort()
            yield from (Path(folder) / name for name in sorted(names) if (Path(folder) / name).is_file())

    def stamps(self) -> Iterator[str]:
        """Yield name, size and modification time of every file."""
        return (stamp(path, self.name(path)) for path in self.files())

    def read(self) -> Iterator[ReportEntry]:
        """Yield one entry per report, or per file that holds none.

        The second report of a file is called ``name#2``, and so on.
        """
        for path in self.files():
            name, number = self.name(path), 0
            for number, outcome in enumerate(self._guarded(path), start=1):
                counted = number > 1 or self.numbers_from_one
                yield ReportEntry(f"{name}#{number}" if counted else name, outcome)
            if number == 0:
                yield ReportEntry(name, NOT_REPORT if path.stat().st_size else EMPTY)

    def name(self, path: Path) -> str:
        """Return how a file is called in lists: from the folder's own name on."""
        return path.relative_to(self.path.parent).as_posix()

    def _guarded(self, path: Path) -> Iterator[Report | Rejected]:
        try:
            yield from self._outcomes(path)
        except CohortError:
            raise
        except Exception:  # any type, where a file is damaged between its reports
            yield UNREADABLE

    @abstractmethod
    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        """Yield what a file holds; raising ends this file, not the others."""


def outcome_of(make: Callable[[], Report]) -> Report | Rejected:
    """Return the report that ``make`` returns if it is usable, or why it is not; raises nothing."""
    try:
        return checked(make())
    except RefusedError as refusal:
        return refusal.rejected
    except Exception:  # any type on a damaged report
        return UNREADABLE


def decoded(data: bytes) -> str:
    """Return text in UTF-8, or else in Windows-1252, which is what exports are when they are not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _stop(error: OSError) -> None:
    raise SourceMissingError(f"cannot read the folder {error.filename}: {error.strerror}") from error
