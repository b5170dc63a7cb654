"""Killed with SIGKILL anywhere between reserving and replying, a site never under-counts or answers twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.releases import ReleaseStore
from client.site import Site
from strategies.messages import digest_of
from tests.small_hospitals import ready

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, KILLS, KILLS_PER_SITE = 100, 208, 26
STATES = 5  # that a kill can leave a site in: see `states`
MOST_KILLS = 2_000  # what the clock hits is luck: a test that waits for something ends with it, long before
# Importing torch and computing the noise take seconds, so one process does both and forks each life off. A
# life asks its site for one round after the other, and notes durably what an outsider would have seen. It
# dies by its own hand at the n-th line that it had not run before, or is killed by the clock, in C code too.
PARENT = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path

import torch
torch.set_num_threads(1)
import privacy.ledger
from client import answers
from client.releases import ReleaseStore
from client.site import Site
from privacy.ledger import Ledger, Reservation
from strategies.messages import digest_of
from tests.small_hospitals import request

privacy.ledger.epsilon = lambda events, *, delta: 0.001 * len(list(events))  # the accountant only takes time
WATCHED = ("client/answers.py", "client/releases.py", "privacy/ledger.py", "privacy/signing.py")
train = answers.train_privately


class Life:
    def __init__(self, root, seed, die_at, variant):
        self.root, self.random, self.die_at = root, random.Random(seed), die_at
        self.lines, self.last = set(), None
        getattr(self, variant.replace("-", "_"))()
        answers.train_privately = self.train

    def sound(self):
        pass

    def sent_before_stored(self):
        store = ReleaseStore.store
        def storing(folder, digest, release):
            self.say(request=digest, release=digest_of(release.update))
            return store(folder, digest, release)
        ReleaseStore.store = storing

    def charged_after_sending(self):
        reserve, released = Ledger.reserve, Ledger.released
        Ledger.reserve = lambda ledger, charge: Reservation(seq=-1, hash="", request=charge)
        def late(ledger, reservation, *, output_digest):
            self.say(request=reservation.request.request_digest, release=output_digest)
            released(ledger, reserve(ledger, reservation.request), output_digest=output_digest)
        Ledger.released = late
        Ledger.abandoned = lambda *args, **kwargs: None  # there is no row yet that could say so

    def train(self, *args, **kwargs):
        if self.random.random() < 0.1:
            raise RuntimeError("the disk is on fire")
        return train(*args, **kwargs)

    def say(self, **seen):
        file = os.open(self.root / "seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, json.dumps(seen).encode() + b"\\n")
        os.fsync(file)
        os.close(file)

    def ask(self, number):
        asked = request(server_round=number, rounds=ROUNDS, steps=1)
        try:
            release = answers.answer_train(Site.open(self.root), asked)
        except RuntimeError as error:
            if "on fire" not in str(error):
                raise
            self.say(request=asked.digest, failure=True)
            return
        self.say(request=asked.digest, release=digest_of(release.update), seq=release.facts.anchor.seq)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        self.lines.add((frame.f_code, frame.f_lineno))
        if len(self.lines) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.trace

    def go(self):
        seen = self.root / "seen"
        lines = seen.read_text().splitlines() if seen.exists() else []
        done = {json.loads(line)["request"] for line in lines}
        if self.die_at:
            sys.settrace(self.trace)
        first = max(1, len(done) + self.random.choice((-1, 0, 1, 1, 1)))
        for number in range(first, first + 2 if self.die_at else ROUNDS):
            self.ask(number)
        os.kill(os.getpid(), signal.SIGKILL)


ROUNDS = int(sys.argv[1])
warm = Life(Path(sys.argv[2]), 1, 0, "sound")
warm.random.random = lambda: 1.0
warm.ask(1)
started = time.monotonic()
warm.ask(2)
print(time.monotonic() - started, flush=True)
sys.settrace(warm.trace)
warm.ask(3)
sys.settrace(None)
print(len(warm.lines), flush=True)
for line in sys.stdin:
    told = json.loads(line)
    life = os.fork()
    if life == 0:
        try:
            Life(Path(told["root"]), told["seed"], told["die_at"], told["variant"]).go()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(life, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
"""


@dataclass
class Fuzz:
    """One site after the other, each killed many times."""

    parent: "subprocess.Popen[str]"
    made: Path
    folder: Path
    seconds: float = 0.0  # of one answer
    lines: int = 0  # that it runs, each counted once
    found: Counter[str] = field(default_factory=Counter)

    def kills(self, count: int, *, variant: str, seed: int) -> Iterator[list[str]]:
        """Kill a site so often; after each kill, what is wrong with what it left."""
        draw = random.Random(seed)  # noqa: S311
        for kill in range(count):
            if kill % KILLS_PER_SITE == 0:
                root = self.folder / f"{variant}-{kill}"
                copied(self.made, root)
            self.kill(root, draw, variant=variant, by_line=kill % 2 == 0)
            self.found += states(root)
            yield faults(root)

    def kill(self, root: Path, draw: random.Random, *, variant: str, by_line: bool) -> None:
        die_at = draw.randint(1, self.lines) if by_line else 0
        self.tell({"root": str(root), "seed": draw.random(), "die_at": die_at, "variant": variant})
        life = int(self.said())
        if not by_line:
            time.sleep(draw.uniform(0.0, 2 * self.seconds))
            with suppress(ProcessLookupError):
                os.kill(life, signal.SIGKILL)
        assert int(self.said()) == -signal.SIGKILL

    def tell(self, what: dict[str, Any]) -> None:
        assert self.parent.stdin is not None
        self.parent.stdin.write(json.dumps(what) + "\n")
        self.parent.stdin.flush()

    def said(self) -> str:
        assert self.parent.stdout is not None
        return self.parent.stdout.readline().strip()


@pytest.fixture(scope="module")
def fuzz(made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    made, folder = made_hospitals / "hospitals" / "site-1", tmp_path_factory.mktemp("fuzz")
    warm = copied(made, folder / "warm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ROUNDS), str(warm)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        fuzz = Fuzz(parent=process, made=made, folder=folder)
        fuzz.seconds, fuzz.lines = float(fuzz.said()), int(fuzz.said())
        yield fuzz
        assert process.stdin is not None
        process.stdin.close()


def copied(made: Path, root: Path) -> Path:
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("dicom"))
    (root / "dicom").symlink_to(made / "dicom")
    ready(root)
    return root


def faults(root: Path) -> list[str]:
    """Where the site under-counts, answers twice, or left something that is not whole."""
    site = Site.open(root)
    ledger = site.ledger()
    found = ledger.problems()
    charged = Counter(charge.request.request_digest for charge in ledger.charges())
    store = ReleaseStore(folder=root / "releases")
    stored = {path.stem for path in store.folder.glob("*.safetensors")}
    releases: dict[str, set[str]] = {}
    failures: Counter[str] = Counter()
    for seen in seen_outside(root):
        if "failure" in seen:
            failures[seen["request"]] += 1
        else:
            releases.setdefault(seen["request"], set()).add(seen["release"])
    for request in {*releases, *failures, *stored}:
        visible = len(releases.get(request, ())) + failures[request]
        if charged[request] < max(visible, request in stored):
            found.append(
                f"{visible} results of {request[:8]} were seen or stored, {charged[request]} charged"
            )
    for request, digests in releases.items():
        if len(digests) > 1:
            found.append(f"{request[:8]} was answered with {len(digests)} different releases")
        if (kept := store.find(request)) is None or digest_of(kept.update) not in digests:
            found.append(f"the release of {request[:8]} that was seen is not the stored one")
    found += ledger.missing(*store.anchors().values())
    if len(list(store.folder.glob("*.partial"))) > 1:
        found.append("what an earlier life left half-written was not swept")
    return found


def seen_outside(root: Path) -> list[dict[str, Any]]:
    path = root / "seen"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(root: Path) -> Counter[str]:
    """In the middle of what the kill came, to know that the fuzz reaches everything."""
    outcomes = Counter(charge.outcome for charge in Site.open(root).ledger().charges())
    store = {path.stem for path in (root / "releases").glob("*.safetensors")}
    seen = {one["request"] for one in seen_outside(root) if "release" in one}
    return Counter(
        {
            "reserved, not stored": outcomes["open"] > 0 and len(store) == outcomes["released"],
            "stored, not recorded": len(store) > outcomes["released"],
            "recorded, not sent": outcomes["released"] > len(seen),
            "half-written": bool(list((root / "releases").glob("*.partial"))),
            "failed": outcomes["abandoned"] > 0,
        }
    )


def test_killed_anywhere_a_site_never_under_counts_nor_answers_twice(fuzz: Fuzz) -> None:
    fuzz.found.clear()
    for kill, found in enumerate(fuzz.kills(MOST_KILLS, variant="sound", seed=5), start=1):
        assert found == [], f"after kill {kill}"
        if kill >= KILLS and len(fuzz.found) == STATES:
            return
    pytest.fail(f"{MOST_KILLS} kills came in the middle of this alone: {fuzz.found}")


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("sent-before-stored", "different releases"),
        ("charged-after-sending", "were seen or stored, 0 charged"),
    ],
)
def test_the_fuzz_finds_a_site_that_does_it_in_the_wrong_order(fuzz: Fuzz, variant: str, fault: str) -> None:
    found = (one for faults in fuzz.kills(MOST_KILLS, variant=variant, seed=5) for one in faults)
    assert any(fault in one for one in found)
