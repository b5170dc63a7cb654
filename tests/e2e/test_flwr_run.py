"""`flwr run .` as in the manual: Flower builds the bundle, starts its SuperLink, and the run ends well."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from client.site import Site
from server.metrics import Event, read_events
from tests.small_hospitals import ROUNDS, change_site, write_federation

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 600.0


@pytest.fixture
def flower(hospitals: Path) -> Iterator[Mapping[str, str]]:
    """An environment with a Flower home and ports of its own; the SuperLink outlives a run, so end it."""
    temporary = tempfile.mkdtemp()  # Ray's sockets need a short path
    home = hospitals / "flwr"
    yield {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": temporary,
    }
    for process in superlinks(home):
        os.kill(process, signal.SIGTERM)
    wait_until(lambda: not superlinks(home), seconds=180)
    shutil.rmtree(temporary, ignore_errors=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def superlinks(home: Path) -> list[int]:
    """Processes whose command line names this Flower home; nobody else's does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{home}/local-superlink".encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def wait_until(done: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "Flower did not come to an end"
        time.sleep(0.2)


def call(command: list[str | Path], *, cwd: Path, env: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def events(root: Path) -> list[Event]:
    path = root / "runs" / "small" / "metrics.jsonl"
    return read_events(path) if path.is_file() else []


def test_the_app_runs_on_flowers_own_engine(hospitals: Path, flower: Mapping[str, str]) -> None:
    """With public data to measure on, so that the start is prepared beforehand, and with secure sums.

    As in a deployed run, every site holds pins of all. Flower answers each message in a process of its own.
    """
    reports = "hospitals/site-3/reports.csv"
    public = {"dicom": str(hospitals / "hospitals/site-3/dicom"), "reports": str(hospitals / reports)}
    folders = sorted((hospitals / "hospitals").iterdir())
    keys = {folder.name: Site.open(folder).key().public for folder in folders}
    for folder in folders:
        change_site(folder, **{"secure-aggregation": {"pins": keys, "required": True}})
    write_federation(hospitals, evaluation={"data": public}, **{"secure-aggregation": {"sites": keys}})
    call([BIN / "clipward", "start", "federation.toml"], cwd=hospitals, env=flower)
    settings = 'federation="federation.toml" sites="hospitals"'
    said = call(
        [
            BIN / "flwr",
            "run",
            ROOT,
            "--stream",
            "--federation-config",
            "num-supernodes=3",
            "--run-config",
            settings,
        ],
        cwd=hospitals,
        env=flower,
    )
    wait_until(lambda: any(e["kind"] == "run_finished" for e in events(hospitals)), seconds=300)
    kinds = [event["kind"] for event in events(hospitals)]
    assert kinds.count("site_replied") == kinds.count("site_masked") == 3 * ROUNDS
    assert [one["sites"] for one in events(hospitals) if one["kind"] == "sum_made"] == [sorted(keys)] * ROUNDS
    assert kinds.count("evaluated") == ROUNDS + 1
    assert kinds[-1] == "run_finished"
    assert "Successfully started run" in said
    for folder in folders:
        assert not list((folder / "attempts").iterdir())
        assert len(Site.open(folder).ledger().events()) == ROUNDS
        assert not (folder / "site.log").exists()
