"""What can go wrong between a site and its PACS.

The texts are for the hospital's own terminal: they name hosts, ports and remedies, never a value that a
PACS answered.
"""

from client.cohort.errors import CohortError
from client.cohort.outcomes import Code, Rejected, State


class FetchError(CohortError):
    """A fetch could not be begun or went no further; what is fetched stays, and the same command goes on."""


class PacsUnreachable(FetchError):
    """Nothing answers at the PACS's address, or no longer."""


class PacsRefused(FetchError):
    """The PACS answers, and does not let this site do what it asks."""


class PacsConfused(FetchError):
    """The PACS answers a query with something that is no answer."""


class SpoolError(FetchError):
    """The folder for fetched files cannot be used."""


class ItemFailed(Exception):
    """One study or instance could not be fetched: it costs itself only.

    Attributes:
        rejected: What becomes of it.
        passing: Whether asking again may help.
    """

    def __init__(self, code: Code, detail: str = "", *, passing: bool = False) -> None:
        super().__init__(code)
        self.rejected = Rejected(State.QUARANTINED, code, detail)
        self.passing = passing
