"""The same federation in one process and on Ray ends with the same bits."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.site import Site
from server.checkpoints import load_latest
from server.metrics import read_events
from strategies.messages import digest_of
from tests.small_hospitals import ROUNDS, change_site, document, without_claim

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("in-process", "ray")
RUNS: dict[str, dict[str, Any]] = {
    "plain-heads": without_claim(),
    "plain-full": without_claim(share={"part": "full"}, training={"augment": True, "seed": 4}),
    "private-heads": {},
    "secure-heads": without_claim(**{"secure-aggregation": {}}),
}

# Ray takes the caller's process for its driver, so it gets one of its own.
PROGRAM = """
import sys
from pathlib import Path

from clipward.simulate import simulate
from server.federation import Federation

for name in sys.argv[3:]:
    root = Path(sys.argv[1])
    simulate(Federation.load(root / f"{name}.toml"), runs=root / "runs", backend=sys.argv[2])
"""


@pytest.fixture(scope="module")
def root(made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two equal worlds, one for each engine; a fixed noise seed makes what is private comparable."""
    root = tmp_path_factory.mktemp("engines")
    temporary = Path(tempfile.mkdtemp())  # Ray's sockets need a short path
    for backend in BACKENDS:
        world = root / backend
        shutil.copytree(made_hospitals, world, ignore=shutil.ignore_patterns("dicom"))
        for site in (made_hospitals / "hospitals").glob("site-*"):
            folder = world / "hospitals" / site.name
            (folder / "dicom").symlink_to(site / "dicom")
            change_site(folder, policy={"require-dp": False}, testing={"insecure-noise-seed": 3})
            if backend == BACKENDS[0]:
                Site.open(folder).key()
            else:  # the same hospitals, with the same keys
                for name in ("site.key", "site.pub"):
                    shutil.copy(root / BACKENDS[0] / "hospitals" / site.name / name, folder / name)
        for name, changes in RUNS.items():
            settings = document(world, name=name, **changes)
            settings["model"]["encoder"] = "micro"
            settings["simulation"]["sites"] = "hospitals"
            (world / f"{name}.toml").write_text(tomli_w.dumps(settings))
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(world), backend, *RUNS],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            check=True,
            timeout=600,
        )
    yield root
    shutil.rmtree(temporary)


@pytest.mark.parametrize("name", RUNS)
def test_both_engines_end_with_the_same_bits(name: str, root: Path) -> None:
    ends = [load_latest(root / backend / "runs" / name) for backend in BACKENDS]
    assert [end.server_round for end in ends if end] == [ROUNDS, ROUNDS]
    assert len({digest_of(end.arrays) for end in ends if end}) == 1


@pytest.mark.parametrize("name", RUNS)
def test_both_engines_tell_the_same_story(name: str, root: Path) -> None:
    stories = []
    for backend in BACKENDS:
        events = read_events(root / backend / "runs" / name / "metrics.jsonl")
        stories.append(
            [
                {key: value for key, value in event.items() if key not in ("time", "seconds")}
                for event in events
            ]
        )
    assert stories[0] == stories[1]
    summaries = [json.loads((root / b / "runs" / name / "summary.json").read_text()) for b in BACKENDS]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]
