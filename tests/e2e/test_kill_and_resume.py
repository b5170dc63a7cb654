"""A real simulation, killed with SIGKILL at any moment, loses nothing and pays for nothing twice."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from client.releases import ReleaseStore
from client.site import Site
from privacy.accounting import epsilon
from privacy.ledger import Ledger
from server import checkpoints
from server.metrics import finished_rounds, read_events
from server.registry import REGISTRY_FILE, Registry
from strategies.messages import digest_of
from tests.small_hospitals import change_site, write_federation

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, SITES = 6, ("site-1", "site-2")
PATIENCE_SECONDS = 300.0

# Importing torch and computing the noise take seconds, so one process does both and forks each life off. From
# there a life is a process of its own: it reads the files, runs the federation, and is killed alone.
PARENT = """
import os, sys, traceback
from pathlib import Path

from clipward.simulate import simulate
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from server.federation import Federation

rounds = int(sys.argv[1])
noise = noise_multiplier_for(epsilon=8.0, delta=1e-3, sample_rate=0.4, steps=2 * rounds)
event = PoissonGaussian(sample_rate=0.4, noise_multiplier=noise, steps=2)
for count in range(rounds + 1):
    epsilon([event] * count, delta=1e-3)
print("ready", flush=True)
for line in sys.stdin:
    root, log = Path(line.rstrip()), None
    life = os.fork()
    if life == 0:
        try:
            simulate(Federation.load(root / "federation.toml"), runs=root / "runs", resume=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(life, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
"""


class Parent:
    """Starts lives."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._said() == "ready"

    def start(self, root: Path) -> int:
        """Begin or go on with the run in ``root``; the id of the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()
        return int(self._said())

    def end(self) -> int:
        """Wait for the life; its exit status, minus the signal that killed it."""
        return int(self._said())

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    yield from started_parent(rounds=ROUNDS)


def started_parent(*, rounds: int) -> Iterator[Parent]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        yield Parent(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def reference(parent: Parent, made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    root = copied(made_hospitals, tmp_path_factory.mktemp("reference"))
    parent.start(root)
    assert parent.end() == 0
    return root


def copied(made: Path, root: Path) -> Path:
    """Two hospitals whose noise comes from a fixed seed, so that equal runs have equal weights."""
    (root / "micro").symlink_to(made / "micro")
    for name in SITES:
        folder = root / "hospitals" / name
        shutil.copytree(made / "hospitals" / name, folder, ignore=shutil.ignore_patterns("dicom"))
        (folder / "dicom").symlink_to(made / "hospitals" / name / "dicom")
        change_site(folder, testing={"insecure-noise-seed": 11})
    # A strategy with a state of its own, which a run that forgot it would show.
    write_federation(root, training={"rounds": ROUNDS}, strategy={"name": "fedadam"})
    return root


@pytest.mark.parametrize("seed", range(6))
def test_killed_in_every_round_it_ends_as_if_undisturbed(
    seed: int, parent: Parent, reference: Path, made_hospitals: Path, tmp_path: Path
) -> None:
    """Eight kills each: before the first event, in each of six rounds, and while the results are written."""
    root = copied(made_hospitals, tmp_path)
    if seed == 0:
        for name in SITES:
            shutil.rmtree(root / "hospitals" / name / "cohort")  # killed while the cohorts are packed, too
    draw = random.Random(seed)  # noqa: S311
    lengths = round_seconds(reference)
    killed = 0
    for moment in range(ROUNDS + 2):
        life = parent.start(root)
        wait_for(root, moment)
        time.sleep(draw.random() * lengths[moment])
        with suppress(ProcessLookupError):
            os.kill(life, signal.SIGKILL)
        killed += parent.end() == -signal.SIGKILL
        require_sound(root)
    assert killed >= ROUNDS + 1  # the last moment is short, so the last life may have been faster
    parent.start(root)
    assert parent.end() == 0
    require_sound(root)
    require_complete(root, reference)


@pytest.mark.parametrize(
    "trace",
    [
        "hospitals/site-1/ledger.sqlite-journal",
        "hospitals/site-2/releases/*.partial",
        "hospitals/site-2/releases/*.safetensors",
        "runs/small/checkpoints/.tmp-*",
        "runs/small/.model.partial",
    ],
)
def test_killed_as_a_file_appears_it_ends_as_if_undisturbed(
    trace: str, parent: Parent, reference: Path, made_hospitals: Path, tmp_path: Path
) -> None:
    """In the middle of writing the ledger, a release, a checkpoint, the model."""
    root = copied(made_hospitals, tmp_path)
    life = parent.start(root)
    with patience(trace):
        while not list(root.glob(trace)):
            time.sleep(0)
    os.kill(life, signal.SIGKILL)
    assert parent.end() == -signal.SIGKILL
    require_sound(root)
    parent.start(root)
    assert parent.end() == 0
    require_complete(root, reference)


def events(root: Path) -> list[dict[str, Any]]:
    path = root / "runs" / "small" / "metrics.jsonl"
    return read_events(path) if path.exists() else []


def round_seconds(root: Path) -> list[float]:
    """How long after each moment its kill may come: half a second, then each round, then the writing."""
    kinds = ("round_started", "run_finished")
    times = [datetime.fromisoformat(event["time"]) for event in events(root) if event["kind"] in kinds]
    rounds = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    written = (root / "runs" / "small" / "report.html").stat().st_mtime - times[-1].timestamp()
    return [0.5, *rounds, written]


def wait_for_round(root: Path, server_round: int) -> None:
    with patience(f"round {server_round}"):
        while not any(
            (event["kind"], event.get("round")) == ("round_started", server_round) for event in events(root)
        ):
            time.sleep(0.001)


def wait_for(root: Path, moment: int) -> None:
    """Moment 0 is at once; 1 to the last round: that round has begun; after it: the run has finished."""

    def come() -> bool:
        said = events(root)
        if moment > ROUNDS:
            return any(event["kind"] == "run_finished" for event in said)
        return any(event["kind"] == "round_started" and event["round"] == moment for event in said)

    with patience(f"moment {moment}"):
        while moment and not come():
            time.sleep(0.001)


@contextmanager
def patience(what: str) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"{what} did not come in {PATIENCE_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def require_sound(root: Path) -> None:
    """What holds at every moment, whoever looks."""
    run_dir = root / "runs" / "small"
    whole = [checkpoints._load(path, int(path.name[6:])) for path in run_dir.glob("checkpoints/round-*")]
    latest = checkpoints.load_latest(run_dir)
    assert (latest.server_round if latest else None) == checkpoints.newest_round(run_dir)
    assert bool(whole) == bool(latest)
    for name in SITES:
        require_sound_ledger(root / "hospitals" / name, finished=latest.server_round if latest else 0)
    for path in (run_dir / "summary.json", root / "runs" / ".starts"):
        if path.is_file():
            json.loads(path.read_text())


def require_sound_ledger(folder: Path, *, finished: int) -> None:
    """Every stored release is charged, each request once, and none beyond the round being worked on."""
    site = Site.open(folder)
    bodies = [row.body for row in site.ledger().rows()[1:]]
    charged = {
        body["seq"]: body["request"]["request_digest"] for body in bodies if body["event"] == "reserved"
    }
    released = [charged[body["reservation"]] for body in bodies if body["event"] == "released"]
    store = ReleaseStore(folder=folder / "releases")
    stored = {path.stem for path in store.folder.glob("*.safetensors")}
    assert {body["event"] for body in bodies} <= {"reserved", "released"}
    assert len(set(charged.values())) == len(charged) <= finished + 1
    assert len(set(released)) == len(released)
    assert set(released) <= stored <= set(charged.values())
    mechanisms = site.ledger().events()
    assert site.ledger().spent() >= epsilon(mechanisms[: len(stored)], delta=site.delta)
    digests = {body["output_digest"] for body in bodies if body["event"] == "released"}
    releases = [store.find(digest) for digest in released]
    assert digests == {digest_of(release.update) for release in releases if release}


def require_told(root: Path) -> None:
    """The registry has the one request of every site and round, and that its release was taken at last."""
    with Registry(root / "runs" / "small" / REGISTRY_FILE) as registry:
        entries = registry.entries()
    for site, server_round in itertools.product(SITES, range(1, ROUNDS + 1)):
        mine = [one for one in entries if (one.site, one.server_round) == (site, server_round)]
        assert [one.attempt for one in mine] == list(range(1, len(mine) + 1))
        assert len({one.request for one in mine}) == 1
        assert {one.outcome for one in mine} <= {"released", None}
        assert mine[-1].outcome == "released"
    charged = {
        row.body["request"]["request_digest"]
        for site in SITES
        for row in Site.open(root / "hospitals" / site).ledger().rows()[1:]
        if row.body["event"] == "reserved"
    }
    assert charged == {one.request for one in entries}


def story(ledger: Ledger) -> list[dict[str, Any]]:
    """What was done, without when it was and with whose key."""
    beside = ("time", "clock", "salt", "key")
    return [{k: v for k, v in row.body.items() if k not in beside} for row in ledger.rows()]


def require_complete(root: Path, reference: Path) -> None:
    said = events(root)
    assert finished_rounds(said) == set(range(1, ROUNDS + 1))
    assert said[-1]["kind"] == "run_finished"
    ends = [checkpoints.load_latest(one / "runs" / "small") for one in (root, reference)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].server_round == ROUNDS
    assert digest_of(ends[0].arrays) == digest_of(ends[1].arrays)
    assert ends[0].strategy
    assert digest_of(ends[0].strategy) == digest_of(ends[1].strategy)
    assert checkpoints.best_of(root / "runs/small") == checkpoints.best_of(reference / "runs/small")
    require_told(root)
    for name in SITES:
        ours, theirs = (Site.open(one / "hospitals" / name).ledger() for one in (root, reference))
        assert len(ours.events()) == ROUNDS
        assert story(ours) == story(theirs)
        assert ours.problems() == theirs.problems() == []
        assert not list((root / "hospitals" / name).glob("ledger.sqlite-*"))
    summaries = [json.loads((one / "runs/small/summary.json").read_text()) for one in (root, reference)]
    assert [summary["rounds"] for summary in summaries] == [ROUNDS, ROUNDS]
    for key in ("privacy", "evaluation", "sites"):
        assert summaries[0][key] == summaries[1][key]
    weights = [(one / "runs/small/model/model.safetensors").read_bytes() for one in (root, reference)]
    assert weights[0] == weights[1]
    assert not list((root / "runs" / "small" / "checkpoints").glob(".tmp-*"))
