"""A PACS by DICOMweb: studies by QIDO-RS, objects by WADO-RS, streamed to disk as they are stored.

dicomweb-client asks and pages; it would parse every object in memory, so objects take their own way.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import requests
from dicomweb_client.api import DICOMwebClient
from requests.auth import AuthBase, HTTPBasicAuth
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from client.cohort.outcomes import Code
from client.pacs.errors import FetchError, ItemFailed, PacsConfused, PacsRefused, PacsUnreachable, SpoolError
from client.pacs.multipart import parts
from client.pacs.settings import DicomWebTable
from client.pacs.source import Series, Study, uid, wanted
from client.pacs.spool import Spool, instance_of

# As stored: a server that would have to decompress first answers 500 where it lacks the codec.
ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
PAGE = 1000
CHUNK_BYTES = 2**18
_STUDY, _SERIES, _INSTANCE, _MODALITY = "0020000D", "0020000E", "00080018", "00080060"
_IN_STUDY, _IN_SERIES = "00201208", "00201209"  # NumberOf...RelatedInstances
_BUSY = frozenset({408, 425, 429, 502, 503, 504})


class DicomWeb:
    """A DICOMweb service; see ``PacsSource``."""

    def __init__(self, table: DicomWebTable, spool: Spool) -> None:
        """Ask the service that ``table`` names and write into ``spool``."""
        self._url = table.url.rstrip("/")
        self._spool = spool
        self._timeout = table.timeout_seconds
        self._session = requests.Session()
        self._session.trust_env = False  # the site's file alone says whom to ask: no proxy, no .netrc
        self._session.verify = str(table.ca) if table.ca else True
        if table.certificate and table.key:
            self._session.cert = (str(table.certificate), str(table.key))
        self._session.auth = _Secret(table)
        self._session.mount("https://", _pool(table.connections))
        self._session.mount("http://", _pool(table.connections))
        self._client = DICOMwebClient(
            self._url, session=self._session, timeout=self._timeout, permissive_uid=True
        )
        self._client.set_http_retry_params(retry=False)  # who calls is patient

    def __enter__(self) -> Self:
        """Return the source."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close its connections."""
        self._session.close()

    def check(self) -> None:
        """Ask for one study."""
        with self._query_errors():
            self._client.search_for_studies(limit=1)

    def studies(self, filters: Mapping[str, str]) -> Iterator[Study]:
        """Yield the studies that match, page by page."""
        with self._query_errors():
            for found in self._pages(self._client.search_for_studies, filters, [_IN_STUDY]):
                yield Study(uid=str(_value(found, _STUDY)), instances=int(_value(found, _IN_STUDY) or 0))

    def series(self, study: str, modalities: Sequence[str]) -> Sequence[Series]:
        """Return the wanted series of a study."""
        with self._item_errors(Code.E_FETCH_LIST):
            found = self._pages(self._client.search_for_series, {}, [_MODALITY, _IN_SERIES], uid(study))
            return [
                self._listed(study, series)
                for series in found
                if wanted(str(_value(series, _MODALITY) or ""), modalities)
            ]

    def fetch(self, series: Series, instance: str | None) -> None:
        """Stream an instance, or all of a series, into the spool."""
        path = ["studies", series.study, "series", series.uid, *(["instances", instance] if instance else [])]
        url = "/".join([self._url, *(quote(step, safe="") for step in path)])
        with (
            self._item_errors(Code.E_FETCH_CUT),
            self._session.get(
                url, headers={"Accept": ACCEPT}, stream=True, timeout=self._timeout
            ) as response,
        ):
            response.raise_for_status()
            chunks = response.iter_content(CHUNK_BYTES)
            for part in parts(response.headers.get("Content-Type", ""), chunks):
                self._keep(part, {instance} if instance else set(series.instances))
        if instance and not self._spool.has(instance):
            raise ItemFailed(Code.E_FETCH_MISSING)

    def _keep(self, part: Iterator[bytes], expected: set[str]) -> None:
        with self._spool.draft() as draft:
            with _disk_errors(self._spool), open(draft, "wb") as file:
                file.writelines(part)
            found = instance_of(draft)
            if found in expected:
                self._spool.keep(draft, found)

    def _listed(self, study: str, found: Mapping[str, Any]) -> Series:
        name, count = uid(_value(found, _SERIES)), int(_value(found, _IN_SERIES) or 0)
        pages = self._pages(self._client.search_for_instances, {}, [], study, name, expected=count)
        instances = [uid(_value(instance, _INSTANCE)) for instance in pages]
        return Series(study=study, uid=name, instances=instances)

    def _pages(
        self, search: Any, filters: Mapping[str, str], fields: Sequence[str], *where: str, expected: int = 0
    ) -> Iterator[Mapping[str, Any]]:
        """Yield all answers, ``expected`` of them or until a page is empty.

        A server may give fewer at a time than it is asked for, so a short page says nothing; one without
        paging gives the same page again.
        """
        offset, first = 0, None
        while not expected or offset < expected:
            page = search(
                *where, limit=PAGE, offset=offset, fields=list(fields) or None, search_filters=dict(filters)
            )
            if not page or page[0] == first:
                return
            if not all(isinstance(answer, dict) for answer in page):
                raise TypeError("not a list of objects")
            yield from page
            offset, first = offset + len(page), page[0]

    @contextmanager
    def _query_errors(self) -> Iterator[None]:
        """Turn what goes wrong with a question about studies into errors that name the remedy."""
        try:
            with self._item_errors(Code.E_FETCH_LIST):
                yield
        except ItemFailed as failed:
            why = failed.rejected.detail or failed.rejected.code.meaning
            if failed.passing:
                raise PacsUnreachable(
                    f"no usable answer from {self._url} ({why}); is the PACS well?"
                ) from None
            raise PacsConfused(
                f"no DICOMweb answer from {self._url} ({why}); cohort.dicomweb.url is what precedes /studies"
            ) from None

    @contextmanager
    def _item_errors(self, broken: Code) -> Iterator[None]:
        """Turn what goes wrong with one item into what becomes of it, and the rest into a reason to stop."""
        try:
            yield
        except requests.HTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            if status in (401, 403):
                raise PacsRefused(
                    f"{self._where} refuses this site (HTTP {status}); see user and secret in cohort.dicomweb"
                ) from None
            raise ItemFailed(Code.E_FETCH_STATUS, f"HTTP {status}", passing=status in _BUSY) from None
        except requests.exceptions.SSLError:
            raise PacsRefused(
                f"no encrypted connection to {self._where}: set cohort.dicomweb.ca to the authority that "
                "vouches for it, and certificate and key if it asks for them"
            ) from None
        except requests.Timeout as error:
            if isinstance(error, requests.ConnectTimeout):
                raise PacsUnreachable(self._gone) from None
            raise ItemFailed(Code.E_FETCH_SILENT, passing=True) from None
        except requests.ConnectionError as error:
            cause = error.args[0] if error.args else None
            cause = getattr(cause, "reason", cause)
            if isinstance(cause, NewConnectionError):
                raise PacsUnreachable(self._gone) from None
            silent = isinstance(cause, ReadTimeoutError)
            raise ItemFailed(Code.E_FETCH_SILENT if silent else Code.E_FETCH_CUT, passing=True) from None
        except requests.exceptions.ChunkedEncodingError:
            raise ItemFailed(Code.E_FETCH_CUT, passing=True) from None
        except FetchError:
            raise  # a ValueError too
        except (requests.RequestException, ValueError, TypeError, KeyError, AttributeError):
            raise ItemFailed(broken, "no DICOM JSON" if broken is Code.E_FETCH_LIST else "") from None

    @property
    def _where(self) -> str:
        address = urlsplit(self._url)
        return f"{address.hostname}:{address.port or (443 if address.scheme == 'https' else 80)}"

    @property
    def _gone(self) -> str:
        return f"nothing answers at {self._where}: see cohort.dicomweb.url and whether the PACS runs"


class _Secret(AuthBase):
    """The site's secret, read anew for every request; never kept, never shown."""

    def __init__(self, table: DicomWebTable) -> None:
        self._user, self._file, self._env = table.user, table.secret_file, table.secret_env

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # dicomweb-client writes a Host without its port; left out, it is written as it should be.
        request.headers.pop("Host", None)
        secret = self._read()
        if secret is None:
            return request
        if self._user is not None:
            return HTTPBasicAuth(self._user.encode(), secret.encode())(request)  # RFC 7617 2.1
        request.headers["Authorization"] = f"Bearer {secret}"
        return request

    def _read(self) -> str | None:
        if self._file is not None:
            try:
                return self._file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                raise PacsRefused(
                    f"cannot read the file {self._file} of cohort.dicomweb.secret-file"
                ) from None
        if self._env is not None:
            if self._env not in os.environ:
                raise PacsRefused(f"the variable {self._env} of cohort.dicomweb.secret-env is not set")
            return os.environ[self._env]
        return None


def _pool(size: int) -> requests.adapters.HTTPAdapter:
    return requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=size)


def _value(answer: Mapping[str, Any], tag: str) -> Any:
    """Return the first value of an attribute in the DICOM JSON model (PS3.18 F.2), None where it has none."""
    values = answer.get(tag, {}).get("Value") or [None]
    return values[0]


@contextmanager
def _disk_errors(spool: Spool) -> Iterator[None]:
    try:
        yield
    except requests.RequestException:
        raise  # they are OSErrors too
    except OSError as error:
        raise SpoolError(f"cannot write into {spool.folder}: {error.strerror}") from None
