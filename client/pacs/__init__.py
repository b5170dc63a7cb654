"""From a PACS to a folder: studies a site asks for, fetched once, kept as the PACS has them."""

from client.pacs.errors import FetchError, PacsConfused, PacsRefused, PacsUnreachable, SpoolError
from client.pacs.fetching import Fetched, fetch
from client.pacs.settings import DicomWebTable, DimseTable
from client.pacs.source import PacsSource
from client.pacs.spool import Spool

__all__ = [
    "DicomWebTable",
    "DimseTable",
    "FetchError",
    "Fetched",
    "PacsConfused",
    "PacsRefused",
    "PacsSource",
    "PacsUnreachable",
    "Spool",
    "SpoolError",
    "fetch",
    "open_source",
]


def open_source(table: DicomWebTable | DimseTable, spool: Spool) -> PacsSource:
    """Return the PACS that ``table`` describes; what it sends goes into ``spool``."""
    if isinstance(table, DicomWebTable):
        from client.pacs.dicomweb import DicomWeb  # a site without a PACS needs neither library

        return DicomWeb(table, spool)
    from client.pacs.dimse import Dimse

    return Dimse(table, spool)
