"""A fetch that is killed at any moment goes on, and asks for nothing it has."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest

from client.pacs import DicomWebTable, Spool, fetch
from client.pacs.dicomweb import DicomWeb
from tests.client.pacs.conftest import wait_until
from tests.client.pacs.test_dicomweb import Answer, Server, encoded, found, multipart, serving

STUDIES, KILLED_AFTER = 60, (3, 20, 41)
CHILD = """
import sys
from pathlib import Path
from client.pacs import DicomWebTable, Spool, fetch
from client.pacs.dicomweb import DicomWeb
table, spool = DicomWebTable(url=sys.argv[1]), Spool(Path(sys.argv[2]))
fetch(DicomWeb(table, spool), table, spool)
"""


class Archive(Server):
    """Many studies of two instances each."""

    def good(self, path: str, query: dict[str, list[str]]) -> Answer:
        start = int(query.get("offset", ["0"])[0])
        match path.removeprefix("/dicom-web/").split("/"):
            case ["studies"]:
                answers: list[dict[str, object]] = [
                    {"0020000D": f"1.{n}", "00201208": 2} for n in range(STUDIES)
                ]
            case ["studies", study, "series"]:
                answers = [{"0020000E": f"{study}.1"}]
            case ["studies", _, "series", series, "instances"]:
                answers = [{"00080018": f"{series}.{n}", "00201209": 2} for n in range(2)]
            case ["studies", _, "series", _, "instances", uid]:
                return multipart(encoded(uid))
            case ["studies", _, "series", series]:
                sleep(0.01)
                return multipart(*(encoded(f"{series}.{n}") for n in range(2)))
            case _:
                return 404, "", b""
        return found(*answers[start:])


@pytest.fixture
def archive() -> Iterator[Archive]:
    with serving(Archive()) as running:
        yield running


def held(spool: Spool) -> set[Path]:
    return set(spool.folder.rglob("*.dcm"))


def test_a_killed_fetch_goes_on_where_it_was(archive: Archive, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "incoming")
    root = Path(__file__).parents[3]
    for count in KILLED_AFTER:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, archive.url, str(spool.folder)],
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        wait_until(lambda count=count: len(held(spool)) >= count, what=f"{count} files are there")  # type: ignore[misc]
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    before, mark = held(spool), len(archive.requests)
    assert KILLED_AFTER[-1] <= len(before) < 2 * STUDIES
    table = DicomWebTable(url=archive.url)
    result = fetch(DicomWeb(table, spool), table, spool)
    assert (result.instances, dict(result.codes)) == (2 * STUDIES, {})
    assert result.new == 2 * STUDIES - len(before)
    expected = {spool.path(f"1.{study}.1.{n}") for study in range(STUDIES) for n in range(2)}
    assert held(spool) == expected
    for study in range(STUDIES):
        here = [spool.path(f"1.{study}.1.{n}") in before for n in range(2)]
        asked = [
            path for path, _ in archive.requests[mark:] if path.startswith(f"/dicom-web/studies/1.{study}/")
        ]
        objects = [path for path in asked if "?" not in path]
        if all(here):
            assert not objects
        elif any(here):
            assert objects == [
                f"/dicom-web/studies/1.{study}/series/1.{study}.1/instances/1.{study}.1.{here.index(False)}"
            ]
    assert not any(spool.drafts.iterdir())
