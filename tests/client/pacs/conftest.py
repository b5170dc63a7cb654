"""A real PACS on loopback: Orthanc with its DICOMweb plugin, empty, gone after the test."""

import gc
import json
import os
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from client.pacs import DicomWebTable, DimseTable

PLUGINS = [
    path
    for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
    for path in sorted(Path(folder).glob("libOrthancDicomWeb.so*"))
]
ORTHANC = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
READY_SECONDS = 180.0


@pytest.fixture(autouse=True)
def _sockets_of_peers_cut_off_are_collected_here() -> Iterator[None]:
    """Not in whatever test comes later, where the warning would be an error that names nothing."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@dataclass(frozen=True, kw_only=True)
class Pacs:
    """A running Orthanc."""

    http_port: int
    dicom_port: int
    site_port: int
    process: subprocess.Popen[bytes]

    @property
    def rest(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def upload(self, files: Iterable[Path]) -> list[Path]:
        """Return the files that the PACS accepts; of two with one UID it keeps the first."""
        accepted = []
        with requests.Session() as session:
            session.trust_env = False
            for path in files:
                answer = session.post(f"{self.rest}/instances", data=path.read_bytes(), timeout=120)
                if answer.ok and answer.json()["Status"] == "Success":
                    accepted.append(path)
        return accepted

    def dicomweb(self, **changes: object) -> DicomWebTable:
        return DicomWebTable.model_validate(
            {"url": f"{self.rest}/dicom-web", "modalities": [], "timeout_seconds": 20, **changes}
        )

    def dimse(self, **changes: object) -> DimseTable:
        return DimseTable.model_validate(
            {
                "host": "127.0.0.1",
                "port": self.dicom_port,
                "called_ae": "ORTHANC",
                "calling_ae": "CLIPWARD",
                "own_address": "127.0.0.1",
                "own_port": self.site_port,
                "modalities": [],
                "timeout_seconds": 20,
                **changes,
            }
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


@contextmanager
def running(folder: Path) -> Iterator[Pacs]:
    if ORTHANC is None or not PLUGINS:
        pytest.skip("needs Orthanc with its DICOMweb plugin: apt-get install orthanc orthanc-dicomweb")
    http_port, dicom_port, site_port = (free_port() for _ in range(3))
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": http_port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "DicomCheckCalledAet": True,
        "DicomModalities": {"site": ["CLIPWARD", "127.0.0.1", site_port]},
        "OverwriteInstances": False,
        "KeepAlive": True,
        "TcpNoDelay": True,
        "Plugins": [str(PLUGINS[0])],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "orthanc.log", "wb") as log:
        process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    pacs = Pacs(http_port=http_port, dicom_port=dicom_port, site_port=site_port, process=process)
    try:
        wait_until(lambda: _answers(pacs), what="Orthanc is ready")
        yield pacs
    finally:
        process.kill()  # nothing it holds is needed: a polite end takes seconds
        process.wait(timeout=120)


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with running(tmp_path / "pacs") as started:
        yield started


def wait_until(condition: Callable[[], bool], *, what: str, seconds: float = READY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited in vain until {what}")
        time.sleep(0.05)


def _answers(pacs: Pacs) -> bool:
    assert pacs.process.poll() is None, "Orthanc has stopped"
    with requests.Session() as session:
        session.trust_env = False
        try:
            return session.get(f"{pacs.rest}/dicom-web/studies?limit=1", timeout=30).ok
        except requests.ConnectionError:
            return False
