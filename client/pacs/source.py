"""What both ways of asking a PACS offer; a third is one class more."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from client.cohort.outcomes import Code
from client.pacs.errors import ItemFailed

# PS3.5 9.1 with the leniency archives need (leading zeros); nothing that could change the path of a URL.
_UID = re.compile(r"[0-9][0-9A-Za-z.-]{0,63}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Study:
    """A study as a query answers it; ``instances`` is what the PACS says it holds, 0 if it does not."""

    uid: str
    instances: int = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class Series:
    """A series of a study, and the SOP instance UIDs in it."""

    study: str
    uid: str
    instances: Sequence[str]


class PacsSource(Protocol):
    """A PACS. Entered before use; methods are called from several threads."""

    def __enter__(self) -> Self:
        """Make ready to receive."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of every connection and port."""
        ...

    def check(self) -> None:
        """Find out whether the PACS answers.

        Raises:
            FetchError: It does not, or not to this site; the message names the remedy.
        """
        ...

    def studies(self, filters: Mapping[str, str]) -> Iterator[Study]:
        """Yield the studies that match, by keyword and value.

        Raises:
            FetchError: The PACS cannot answer.
        """
        ...

    def series(self, study: str, modalities: Sequence[str]) -> Sequence[Series]:
        """Return the series of ``study``, of these modalities and structured reports, or all of them.

        Raises:
            ItemFailed: The PACS cannot answer for this study.
            FetchError: The PACS cannot answer at all.
        """
        ...

    def fetch(self, series: Series, instance: str | None) -> None:
        """Bring one instance, or the whole series, into the spool; what came whole stays, whatever follows.

        Raises:
            ItemFailed: It did not come, or not all of it.
            FetchError: The PACS cannot answer at all.
        """
        ...


def wanted(modality: str, modalities: Sequence[str]) -> bool:
    """Return whether a series is fetched: reports travel with their images, an unknown modality too."""
    return not modalities or not modality or modality == "SR" or modality in modalities


def uid(value: object) -> str:
    """Return a UID that a PACS answered.

    Raises:
        ItemFailed: It is not one.
    """
    text = str(value or "").strip(" \0")
    if not _UID.fullmatch(text):
        raise ItemFailed(Code.E_FETCH_LIST, "UID")
    return text
