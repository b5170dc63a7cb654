"""A DICOMweb server that says anything a server may say."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from client.cohort.outcomes import Code
from client.pacs import DicomWebTable, Fetched, PacsConfused, PacsRefused, PacsUnreachable, Spool, fetch
from client.pacs.dicomweb import ACCEPT, DicomWeb
from client.pacs.source import Series
from tests.client.pacs.conftest import free_port

STUDY, SERIES, UIDS = "1.2", "1.2.3", ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
WHOLE = f"/dicom-web/studies/{STUDY}/series/{SERIES}"
MULTIPART = 'multipart/related; type="application/dicom"; boundary=xx'

Answer = tuple[int, str, bytes]
S = TypeVar("S", bound="Server")


def encoded(uid: str) -> bytes:
    dataset = Dataset()
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = uid
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def multipart(*bodies: bytes) -> Answer:
    parts = b"".join(b"--xx\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n" for body in bodies)
    return 200, MULTIPART, parts + b"--xx--\r\n"


def found(*answers: Mapping[str, object]) -> Answer:
    models = [{tag: {"vr": "UI", "Value": [value]} for tag, value in answer.items()} for answer in answers]
    return 200, "application/dicom+json", json.dumps(models).encode()


class Server(ThreadingHTTPServer):
    """Answers as ``answers`` say, by path; the rest as a good server of one study would."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[], Answer]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.length_lie = 0
        self.page = 1000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"

    def good(self, path: str, query: dict[str, list[str]]) -> Answer:
        tags: list[dict[str, object]]
        match path.removeprefix("/dicom-web/").split("/"):
            case ["studies"]:
                tags = [{"0020000D": STUDY, "00201208": 3}]
            case ["studies", _, "series"]:
                tags = [{"0020000E": SERIES, "00080060": "CR"}]
            case ["studies", _, "series", _, "instances"]:
                tags = [{"00080018": uid} for uid in UIDS]
            case ["studies", _, "series", _]:
                return multipart(*map(encoded, UIDS))
            case ["studies", _, "series", _, "instances", uid]:
                return multipart(encoded(uid))
            case _:
                return 404, "text/plain", b"no"
        start = int(query.get("offset", ["0"])[0])
        return found(*tags[start : start + min(self.page, int(query["limit"][0]))])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(url.path)
        status, kind, body = answer() if answer else self.server.good(url.path, parse_qs(url.query))
        if not status:
            return  # hang up without a word
        lie = self.server.length_lie if kind == MULTIPART else 0
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + lie))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@contextmanager
def serving(server: S) -> Iterator[S]:
    with server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def run(url: str, folder: Path, **changes: object) -> Fetched:
    spool = Spool(folder / "incoming")
    table = DicomWebTable.model_validate({"url": url, "timeout_seconds": 5, **changes})
    return fetch(DicomWeb(table, spool), table, spool, waits=(0.0,))


def test_objects_are_kept_as_they_are_sent(server: Server, tmp_path: Path) -> None:
    result = run(server.url, tmp_path)
    assert (result.instances, result.new, dict(result.codes)) == (3, 3, {})
    spool = Spool(tmp_path / "incoming")
    assert [spool.path(uid).read_bytes() for uid in UIDS] == list(map(encoded, UIDS))
    objects = [headers for path, headers in server.requests if path == WHOLE]
    assert [headers["Accept"] for headers in objects] == [ACCEPT]
    assert {headers["Host"] for _, headers in server.requests} == {f"127.0.0.1:{server.server_port}"}


def test_answers_are_read_page_by_page(server: Server, tmp_path: Path) -> None:
    server.page = 1
    assert run(server.url, tmp_path).instances == 3


def test_a_server_without_pages_does_not_hold_up(server: Server, tmp_path: Path) -> None:
    server.answers[f"{WHOLE}/instances"] = lambda: found(*({"00080018": uid} for uid in UIDS))
    assert run(server.url, tmp_path).instances == 3


def test_other_modalities_stay_where_they_are(server: Server, tmp_path: Path) -> None:
    other = {"0020000E": "1.2.4", "00080060": "CT"}
    report = {"0020000E": "1.2.5", "00080060": "SR"}
    image: dict[str, object] = {"0020000E": SERIES, "00080060": "CR", "00201209": 3}
    series = f"/dicom-web/studies/{STUDY}/series"
    server.answers[series] = lambda: found(other, report, image)
    server.answers[f"{series}/1.2.5/instances"] = lambda: found({"00080018": "1.2.5.1"})
    assert run(server.url, tmp_path).instances == 4
    assert not [path for path, _ in server.requests if "/1.2.4" in path]


@pytest.mark.parametrize(
    "answer",
    [
        (500, "text/plain", b"no codec"),
        (200, MULTIPART, multipart(*map(encoded, UIDS))[2][:-4]),
        (200, MULTIPART, multipart(encoded(UIDS[0]))[2][:300]),
        (200, MULTIPART, b"garbage"),
        (200, MULTIPART, b""),
        (200, "text/html", b"<html>please log in</html>"),
        multipart(b"<html>", *map(encoded, UIDS)),
        multipart(encoded("9.9.9")),
        multipart(),
        (0, "", b""),
    ],
)
def test_a_broken_series_is_fetched_one_by_one(server: Server, tmp_path: Path, answer: Answer) -> None:
    server.answers[WHOLE] = lambda: answer
    result = run(server.url, tmp_path)
    assert (result.instances, dict(result.codes)) == (3, {})


@pytest.mark.parametrize(
    ("answer", "code", "detail"),
    [
        ((500, "text/plain", b"no codec"), Code.E_FETCH_STATUS, "HTTP 500"),
        ((503, "text/plain", b"later"), Code.E_FETCH_STATUS, "HTTP 503"),
        ((404, "text/plain", b"gone"), Code.E_FETCH_STATUS, "HTTP 404"),
        ((200, MULTIPART, b"--xx\r\n\r\n" + encoded(UIDS[1])), Code.E_FETCH_CUT, ""),
        (multipart(b"garbage"), Code.E_FETCH_CUT, ""),
        (multipart(encoded(UIDS[0])), Code.E_FETCH_MISSING, ""),
        ((200, "text/html", b"<html>please log in</html>"), Code.E_FETCH_CUT, "Content-Type"),
        ((0, "", b""), Code.E_FETCH_CUT, ""),
    ],
)
def test_a_broken_instance_costs_itself_only(
    server: Server, tmp_path: Path, answer: Answer, code: Code, detail: str
) -> None:
    server.answers[WHOLE] = lambda: (500, "text/plain", b"")
    server.answers[f"{WHOLE}/instances/{UIDS[1]}"] = lambda: answer
    result = run(server.url, tmp_path)
    assert (result.instances, dict(result.codes)) == (2, {code: 1})
    assert result.failures.read_text().splitlines()[1:] == [
        f"{STUDY}/{SERIES}/{UIDS[1]},{code},{detail},{code.meaning}"
    ]
    spool = Spool(tmp_path / "incoming")
    assert [spool.has(uid) for uid in UIDS] == [True, False, True]
    assert not any(spool.drafts.iterdir())


def test_an_object_that_was_not_asked_for_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.answers[WHOLE] = lambda: multipart(encoded("9.9.9"), encoded(UIDS[0]))
    spool = Spool(tmp_path / "incoming")
    with spool.locked(), DicomWeb(DicomWebTable(url=server.url), spool) as source:
        source.fetch(Series(study=STUDY, uid=SERIES, instances=UIDS), None)
        assert [spool.has(uid) for uid in ("9.9.9", UIDS[0])] == [False, True]


def test_a_body_shorter_than_it_says_is_cut(server: Server, tmp_path: Path) -> None:
    server.length_lie = 10
    result = run(server.url, tmp_path)
    assert (result.instances, dict(result.codes)) == (0, {Code.E_FETCH_CUT: 3})


def test_a_server_that_says_nothing_is_not_waited_for_long(server: Server, tmp_path: Path) -> None:
    def slowly() -> Answer:
        sleep(4)
        return 0, "", b""

    server.answers[f"{WHOLE}/instances/{UIDS[1]}"] = slowly
    server.answers[WHOLE] = lambda: (500, "text/plain", b"")
    assert dict(run(server.url, tmp_path, timeout_seconds=2).codes) == {Code.E_FETCH_SILENT: 1}


@pytest.mark.parametrize(
    "answer",
    [
        (500, "text/plain", b""),
        (200, "application/dicom+json", b"{"),
        (200, "application/dicom+json", b"[1]"),
        (200, "application/dicom+json", b'[{"0020000E": 7}]'),
        (200, "text/html", b"<html>"),
        found({"0020000E": "../../studies"}),
        found({"00080060": "CR"}),
    ],
)
def test_a_study_that_is_not_listed_costs_itself_only(server: Server, tmp_path: Path, answer: Answer) -> None:
    server.answers["/dicom-web/studies"] = lambda: found({"0020000D": STUDY}, {"0020000D": "1.9"})
    server.answers["/dicom-web/studies/1.9/series"] = lambda: answer
    result = run(server.url, tmp_path)
    assert (result.instances, dict(result.codes)) == (3, {Code.E_FETCH_LIST: 1})


def test_an_empty_study_is_no_failure(server: Server, tmp_path: Path) -> None:
    server.answers[f"/dicom-web/studies/{STUDY}/series"] = lambda: (204, "", b"")
    result = run(server.url, tmp_path)
    assert (result.instances, dict(result.codes)) == (0, {})


@pytest.mark.parametrize(
    "answer",
    [
        (404, "text/plain", b""),
        (500, "text/plain", b""),
        (200, "application/dicom+json", b"{"),
        (200, "text/html", b"<html>please log in</html>"),
    ],
)
def test_a_server_that_is_no_dicomweb_is_named(server: Server, tmp_path: Path, answer: Answer) -> None:
    server.answers["/dicom-web/studies"] = lambda: answer
    message = rf"no DICOMweb answer from {server.url} \(.*; cohort.dicomweb.url is what precedes /studies"
    with pytest.raises(PacsConfused, match=message):
        run(server.url, tmp_path)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_stays_busy_is_named(server: Server, tmp_path: Path, status: int) -> None:
    server.answers["/dicom-web/studies"] = lambda: (status, "text/plain", b"")
    with pytest.raises(PacsUnreachable, match=rf"no usable answer from .*\(HTTP {status}\)"):
        run(server.url, tmp_path)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("path", ["/dicom-web/studies", f"{WHOLE}/instances"])
def test_a_closed_door_is_named(server: Server, tmp_path: Path, status: int, path: str) -> None:
    server.answers[path] = lambda: (status, "text/plain", b"")
    message = rf"127\.0\.0\.1:{server.server_port} refuses this site \(HTTP {status}\); see user and secret"
    with pytest.raises(PacsRefused, match=message):
        run(server.url, tmp_path)


def test_a_refused_connection_is_named(tmp_path: Path) -> None:
    port = free_port()
    message = rf"nothing answers at 127\.0\.0\.1:{port}: see cohort\.dicomweb\.url and whether the PACS runs"
    with pytest.raises(PacsUnreachable, match=message):
        run(f"http://127.0.0.1:{port}/dicom-web", tmp_path)


def test_an_unknown_host_is_named(tmp_path: Path) -> None:
    with pytest.raises(PacsUnreachable, match=r"nothing answers at pacs\.invalid:443"):
        run("https://pacs.invalid", tmp_path)


def test_plain_text_behind_https_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        PacsRefused, match=r"no encrypted connection to 127\.0\.0\.1:.* set cohort\.dicomweb\.ca"
    ):
        run(server.url.replace("http:", "https:"), tmp_path)


def test_secrets_come_from_a_file_or_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("tôken\n")
    run(server.url, tmp_path / "0", secret_file=secret, user="me")
    monkeypatch.setenv("PACS_SECRET", "t2")
    run(server.url, tmp_path / "1", secret_env="PACS_SECRET")  # noqa: S106 - a variable's name
    said = {headers["Authorization"] for _, headers in server.requests}
    basic = base64.b64encode("me:tôken".encode()).decode()
    assert said == {f"Basic {basic}", "Bearer t2"}


def test_a_renewed_token_is_used_at_once(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")

    def renewed() -> Answer:
        secret.write_text("new")
        return found({"0020000E": SERIES})

    server.answers[f"/dicom-web/studies/{STUDY}/series"] = renewed
    run(server.url, tmp_path, secret_file=secret)
    assert [headers["Authorization"] for _, headers in server.requests][-1] == "Bearer new"


def test_a_missing_secret_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PacsRefused, match=r"cannot read the file .*absent of cohort\.dicomweb\.secret-file"):
        run(server.url, tmp_path, secret_file=tmp_path / "absent")
    with pytest.raises(
        PacsRefused, match=r"variable ABSENT_SECRET of cohort\.dicomweb\.secret-env is not set"
    ):
        run(server.url, tmp_path, secret_env="ABSENT_SECRET")  # noqa: S106 - a variable's name
    assert not server.requests


def test_the_environment_does_not_decide_whom_to_ask(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert run(server.url, tmp_path).instances == 3
