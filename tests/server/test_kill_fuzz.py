"""Killed with SIGKILL at any line of its own, a coordinator ends as if nobody had disturbed it."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server import checkpoints
from server.metrics import effective, finished_rounds, read_events
from server.registry import REGISTRY_FILE, Registry
from strategies.messages import digest_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, SITES, KILLS = 4, ("alpha", "beta", "gamma"), 20
# One process imports everything and forks each life off. A life dies by its own hand at the n-th line that it
# runs of the coordinator's code, wherever that is: in the middle of asking, folding, or writing a file.
PARENT = """
import json, os, signal, sys, traceback
from pathlib import Path
from server.metrics import read_events
from tests.fake_site import federation
from tests.server.cases import SITES, Case

ROOT, ROUNDS = sys.argv[1], int(sys.argv[2])
WATCHED = tuple(f"{ROOT}/{package}/" for package in ("server", "strategies"))


def live(root, name, die_at):
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        lines += event == "line"
        if lines == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    case = Case(
        Path(root),
        settings=federation(
            training={"rounds": ROUNDS, "optimizer": "sgd"},
            strategy={"name": name, "min-sites": 2, "target-sites": 2},
            evaluation={"metric": "zero_shot.macro_auroc"},
            checkpoints={"keep": 1},
        ),
    )
    case.evaluate = lambda now: {"zero_shot": {"macro_auroc": float(abs(now["a"]).sum() % 1)}}
    sys.settrace(trace)
    case.run(resume=True)
    sys.settrace(None)
    return lines


for told in sys.stdin:
    asked = json.loads(told)
    reading, writing = os.pipe()
    life = os.fork()
    if life == 0:
        try:
            os.write(writing, str(live(**asked)).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])
    with os.fdopen(reading) as lines:
        print(json.dumps({"status": status, "lines": int(lines.read() or 0)}), flush=True)
"""


class Lives:
    """Begins or goes on with runs."""

    def __init__(self, parent: "subprocess.Popen[str]") -> None:
        self._parent = parent

    def live(self, root: Path, name: str, *, die_at: int = -1) -> dict[str, int]:
        """One life; its exit status, and how many lines it ran when it came to its end."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps({"root": str(root), "name": name, "die_at": die_at}) + "\n")
        self._parent.stdin.flush()
        said: dict[str, int] = json.loads(self._parent.stdout.readline())
        return said


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ROOT), str(ROUNDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as parent:
        yield Lives(parent)
        assert parent.stdin is not None
        parent.stdin.close()


@pytest.mark.parametrize("name", ["fedadam", "scaffold"])
def test_killed_at_any_line_it_ends_as_if_undisturbed(name: str, lives: Lives, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    undisturbed = lives.live(whole, name)
    assert undisturbed["status"] == 0
    draw = random.Random(name)  # noqa: S311
    kills, number, phases = 0, 0, set()
    while kills < KILLS:
        root, number = tmp_path / str(number), number + 1
        ended = False
        while not ended:
            died = lives.live(root, name, die_at=draw.randint(1, undisturbed["lines"]))
            ended = died["status"] == 0
            kills += died["status"] == -signal.SIGKILL
            assert died["status"] in (0, -signal.SIGKILL)
            require_sound(root / "run")
            phases |= {event["kind"] for event in last_words(root / "run")}
        require_same(root, whole)
    assert len(phases) >= 3, phases  # not always in the middle of the same thing


def last_words(run_dir: Path) -> list[dict[str, Any]]:
    return events(run_dir)[-1:]


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return read_events(path) if path.exists() else []


def require_sound(run_dir: Path) -> None:
    """What holds at every moment, whoever looks."""
    latest = checkpoints.load_latest(run_dir)
    assert (latest.server_round if latest else None) == checkpoints.newest_round(run_dir)
    best = checkpoints.best_of(run_dir)
    assert best is None or checkpoints.load_best(run_dir) is not None
    assert finished_rounds(events(run_dir)) <= set(range(1, (latest.server_round if latest else 0) + 1))
    if (run_dir / REGISTRY_FILE).exists():
        with closing(sqlite3.connect(run_dir / REGISTRY_FILE)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def require_same(root: Path, whole: Path) -> None:
    """The same weights, state, best checkpoint, draws and requests; each release was taken once."""
    runs = [one / "run" for one in (root, whole)]
    for load in (checkpoints.load_latest, checkpoints.load_best):
        ours, theirs = (load(run_dir) for run_dir in runs)
        assert ours is not None
        assert theirs is not None
        assert ours.server_round == theirs.server_round
        assert digest_of(ours.arrays) == digest_of(theirs.arrays)
        assert digest_of(ours.strategy) == digest_of(theirs.strategy)
    assert not list(runs[0].rglob(".tmp-*"))
    assert finished_rounds(events(runs[0])) == set(range(1, ROUNDS + 1))
    assert asked(runs[0]) == asked(runs[1])
    with Registry(runs[0] / REGISTRY_FILE) as registry:
        entries = registry.entries()
    requests = {(one.server_round, one.site): one.request for one in entries}
    for key in requests:
        mine = [one for one in entries if (one.server_round, one.site) == key]
        assert [one.attempt for one in mine] == list(range(1, len(mine) + 1))
        assert {one.request for one in mine} == {requests[key]}
        assert mine[-1].outcome == "released"
    for site in SITES:
        trained = root / "sites" / f"{site}.trained"
        times = len(trained.read_text().splitlines()) if trained.exists() else 0
        assert times == sum(name == site for _, name in requests)


def asked(run_dir: Path) -> dict[int, list[str]]:
    counted = effective(events(run_dir))
    return {event["round"]: event["sites"] for event in counted if event["kind"] == "round_started"}
