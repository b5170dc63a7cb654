"""A PACS by DICOM's own protocol: studies by C-FIND, objects by C-MOVE to this site's own receiver."""

import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from pydicom import Dataset
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from client.cohort.outcomes import Code
from client.pacs.errors import ItemFailed, PacsConfused, PacsRefused, PacsUnreachable
from client.pacs.receiver import Receiver
from client.pacs.settings import DimseTable
from client.pacs.source import Series, Study, uid, wanted
from client.pacs.spool import Spool

_PENDING = (0xFF00, 0xFF01)  # PS3.4 C.4.1.1.4
_SUCCESS, _SOME_FAILED, _UNKNOWN_DESTINATION = 0x0000, 0xB000, 0xA801  # PS3.4 C.4.2.1.5
_NOBODY = "2.25.0"
_CALLING_AE, _CALLED_AE = 3, 7  # why an association is rejected, PS3.8 9.3.4


class Dimse:
    """A query and retrieve provider; see ``PacsSource``."""

    def __init__(self, table: DimseTable, spool: Spool) -> None:
        """Ask the node that ``table`` names; what it sends goes into ``spool``."""
        self._table = table
        self._spool = spool
        self._where = f"{table.host}:{table.port}"
        self._ae = AE(table.calling_ae)
        self._ae.acse_timeout = self._ae.dimse_timeout = self._ae.network_timeout = table.timeout_seconds
        self._ae.connection_timeout = table.timeout_seconds
        for context in (
            Verification,
            StudyRootQueryRetrieveInformationModelFind,
            StudyRootQueryRetrieveInformationModelMove,
        ):
            self._ae.add_requested_context(context)
        self._receiver = Receiver(
            spool,
            ae_title=table.calling_ae,
            address=table.own_address,
            port=table.own_port,
            senders=table.senders or (table.called_ae,),
            timeout_seconds=table.timeout_seconds,
            tls=_tls(table, ssl.Purpose.CLIENT_AUTH),
        )
        self._client_tls = _tls(table, ssl.Purpose.SERVER_AUTH)

    def __enter__(self) -> Self:
        """Start the receiver."""
        self._receiver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        self._receiver.__exit__(kind, error, traceback)

    def check(self) -> None:
        """Send a C-ECHO, and ask for a study that nobody has: a stranger may often do the first alone."""
        with self._association() as association:
            if association.send_c_echo().get("Status") != _SUCCESS:
                raise PacsConfused(f"{self._named} does not answer a C-ECHO; is it a PACS?")
        try:
            list(self.studies({"StudyInstanceUID": _NOBODY}))
        except PacsUnreachable:
            raise PacsRefused(
                f"{self._named} breaks off a query of {self._table.calling_ae!r}: have this AE title "
                "entered there, or see cohort.dimse.calling-ae"
            ) from None

    def studies(self, filters: Mapping[str, str]) -> Iterator[Study]:
        """Yield the studies that match."""
        keys = {"StudyInstanceUID": "", "NumberOfStudyRelatedInstances": "", **filters}
        with self._association() as association:
            try:
                for found in _find(association, "STUDY", keys):
                    count = _text(found, "NumberOfStudyRelatedInstances")
                    yield Study(
                        uid=_text(found, "StudyInstanceUID"), instances=int(count) if count.isdigit() else 0
                    )
            except ItemFailed as failed:
                why = failed.rejected.detail or failed.rejected.code.meaning
                if failed.passing:
                    raise PacsUnreachable(f"{self._named} broke off a query ({why}); is it well?") from None
                raise PacsConfused(
                    f"{self._named} answered a query with {why}; ask for less at a time, see since, until, "
                    "modalities and keys in cohort.dimse"
                ) from None

    def series(self, study: str, modalities: Sequence[str]) -> Sequence[Series]:
        """Return the wanted series of a study, all over one association."""
        keys = {"StudyInstanceUID": uid(study), "SeriesInstanceUID": "", "Modality": ""}
        with self._association() as association:
            names = [
                uid(_text(found, "SeriesInstanceUID"))
                for found in _find(association, "SERIES", keys)
                if wanted(_text(found, "Modality"), modalities)
            ]
            return [
                Series(study=study, uid=name, instances=_instances(association, study, name))
                for name in names
            ]

    def fetch(self, series: Series, instance: str | None) -> None:
        """Have an instance, or all of a series, sent to the receiver."""
        level = "IMAGE" if instance else "SERIES"
        request = _request(level, {"StudyInstanceUID": series.study, "SeriesInstanceUID": series.uid})
        if instance:
            request.SOPInstanceUID = instance
        with self._association() as association:
            status = None
            for answer, _ in association.send_c_move(
                request, self._table.calling_ae, StudyRootQueryRetrieveInformationModelMove
            ):
                status = answer.get("Status")
        if status == _UNKNOWN_DESTINATION:
            raise PacsRefused(self._unknown_destination)
        if status is None:
            raise ItemFailed(Code.E_FETCH_SILENT, passing=True)
        if status not in (_SUCCESS, _SOME_FAILED):
            raise ItemFailed(Code.E_FETCH_STATUS, f"0x{status:04X}{self._deaf}", passing=True)
        if instance and not self._spool.has(instance):
            raise ItemFailed(Code.E_FETCH_MISSING, self._deaf.strip(), passing=status == _SOME_FAILED)

    @contextmanager
    def _association(self) -> Iterator[Association]:
        """Hold an association.

        Raises:
            FetchError: There is none to be had; the message tells why.
        """
        table = self._table
        association = self._ae.associate(
            table.host,
            table.port,
            ae_title=table.called_ae,
            max_pdu=0,
            tls_args=(self._client_tls, table.host) if self._client_tls else None,
        )
        if not association.is_established:
            if association.dul.socket is not None:
                association.dul.socket.close()  # left open where the greeting was broken off
            raise self._not_associated(association)
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def _not_associated(self, association: Association) -> PacsRefused | PacsUnreachable:
        if association.is_rejected:
            answer: Any = association.acceptor.primitive
            if answer.diagnostic == _CALLED_AE and answer.result_source == 1:
                return PacsRefused(
                    f"{self._where} is not {self._table.called_ae!r}; see cohort.dimse.called-ae"
                )
            if answer.diagnostic == _CALLING_AE and answer.result_source == 1:
                return PacsRefused(
                    f"{self._named} does not know {self._table.calling_ae!r}: have this AE title entered "
                    "there, or see cohort.dimse.calling-ae"
                )
            return PacsRefused(
                f"{self._named} rejects {self._table.calling_ae!r}; see both AE titles in cohort.dimse"
            )
        try:  # pynetdicom says the same of no answer and of a wrong one
            socket.create_connection(
                (self._table.host, self._table.port), self._table.timeout_seconds
            ).close()
        except OSError as error:
            return PacsUnreachable(
                f"nothing answers at {self._where} ({error.strerror or error}): see host and port in "
                "cohort.dimse, the firewall, and whether the PACS runs"
            )
        return PacsUnreachable(
            f"{self._named} breaks off the greeting; see port, tls and both AE titles in cohort.dimse"
        )

    @property
    def _named(self) -> str:
        return f"{self._table.called_ae!r} at {self._where}"

    @property
    def _unknown_destination(self) -> str:
        table = self._table
        return (
            f"{self._named} cannot send to {table.calling_ae!r}: have this AE title entered there with this "
            f"machine's address and port {table.own_port}, open that port, and see senders in cohort.dimse"
        )

    @property
    def _deaf(self) -> str:
        """What to add to a failure while the PACS has never connected to this site."""
        if self._receiver.connections:
            return ""
        table = self._table
        return (
            f" and nothing has connected to port {table.own_port}; see the firewall, and what the PACS "
            f"has for {table.calling_ae!r}"
        )


def _find(association: Association, level: str, keys: Mapping[str, str]) -> Iterator[Dataset]:
    """Yield the answers to one C-FIND.

    Raises:
        ItemFailed: The query fails, or the answers break off.
    """
    for answer, found in association.send_c_find(
        _request(level, keys), StudyRootQueryRetrieveInformationModelFind
    ):
        status = answer.get("Status")
        if status is None:
            raise ItemFailed(Code.E_FETCH_SILENT, passing=True)
        if status in _PENDING and found is not None:
            yield found
        elif status != _SUCCESS:
            raise ItemFailed(Code.E_FETCH_LIST, f"0x{status:04X}")


def _instances(association: Association, study: str, series: str) -> list[str]:
    keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": ""}
    return [uid(_text(found, "SOPInstanceUID")) for found in _find(association, "IMAGE", keys)]


def _request(level: str, keys: Mapping[str, str]) -> Dataset:
    request = Dataset()
    request.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(request, keyword, value)
    return request


def _text(answer: Dataset, keyword: str) -> str:
    return str(answer.get(keyword) or "").strip(" \0")


def _tls(table: DimseTable, purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """Return what encrypts one direction; both sides show a certificate (PS3.15 B.12)."""
    if not table.tls or table.certificate is None or table.key is None:
        return None
    try:
        context = ssl.create_default_context(purpose, cafile=table.ca)
        context.load_cert_chain(table.certificate, table.key)
    except (OSError, ssl.SSLError) as error:
        raise PacsRefused(f"cannot use ca, certificate and key of cohort.dimse: {error.strerror}") from None
    if table.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
