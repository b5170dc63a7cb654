"""The site as a storage provider: what a PACS sends by C-STORE goes into the spool, streamed to disk."""

import ssl
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import Verification

from client.pacs.errors import SpoolError
from client.pacs.spool import Spool

MAX_PDU_BYTES = 2**17  # what dcmtk, and most archives with it, send at most
_STORED, _OUT_OF_RESOURCES = 0x0000, 0xA700  # PS3.4 B.2.3


class Receiver:
    """Listens inside its ``with`` block.

    It takes every storage class in every transfer syntax: the sender proposes what it needs, so nothing is
    negotiated from the study's SOP classes and the limit of 128 contexts (PS3.8 9.3.2) is the sender's alone.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        ae_title: str,
        address: str,
        port: int,
        senders: Sequence[str],
        timeout_seconds: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take objects from the AE titles ``senders`` alone, or from anybody if there are none."""
        self._spool = spool
        self._address, self._tls = (address, port), tls
        self._ae = AE(ae_title)
        self._ae.add_supported_context(Verification)
        self._ae.require_calling_aet = list(senders)
        self._ae.maximum_pdu_size = MAX_PDU_BYTES
        self._ae.maximum_associations = 64
        self._ae.acse_timeout = timeout_seconds
        self._ae.network_timeout = None  # an archive may read from tape between two objects
        self.connections = 0

    def __enter__(self) -> Self:
        """Begin to listen.

        Raises:
            SpoolError: The port is taken or may not be used.
        """
        # pynetdicom has these for the process alone. Chunked: an object goes to a temporary file while it
        # arrives; that file must not lie where others look, and on the spool's file system it is renamed.
        self._before = (_config.STORE_RECV_CHUNKED_DATASET, _config.UNRESTRICTED_STORAGE_SERVICE)
        self._tempdir = tempfile.tempdir
        _config.STORE_RECV_CHUNKED_DATASET = _config.UNRESTRICTED_STORAGE_SERVICE = True
        tempfile.tempdir = str(self._spool.drafts)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_CONN_OPEN, self._connected)]
        try:
            self._ae.start_server(self._address, block=False, ssl_context=self._tls, evt_handlers=handlers)
        except OSError as error:
            self._restore()
            raise SpoolError(
                f"cannot listen at {self._address[0]}:{self._address[1]}: {error.strerror}; see own-address "
                "and own-port in cohort.dimse"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""
        self._ae.shutdown()
        self._restore()

    def _restore(self) -> None:
        _config.STORE_RECV_CHUNKED_DATASET, _config.UNRESTRICTED_STORAGE_SERVICE = self._before
        tempfile.tempdir = self._tempdir

    def _connected(self, _: evt.Event) -> None:
        self.connections += 1

    def _store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        try:
            if not self._spool.has(uid):
                self._spool.keep(event.dataset_path, uid)
        except OSError:
            return _OUT_OF_RESOURCES
        return _STORED
