"""Whatever a federation file offers to share and to combine by, a run of real sites ends well with it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from client import answers
from client.app import app
from client.site import Site
from client.training import train_plainly, train_privately
from server.metrics import RunLog, effective, read_events
from server.rounds import run_rounds
from server.start import prepare_from_settings, start_of
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, Part
from strategies.share import IMAGE_SHIFT
from strategies.strategy import StrategyName
from tests.small_hospitals import change_site, federation, without_claim

pytestmark = pytest.mark.slow

SITES, ROUNDS = 6, 2
FAILING = "site-4"
PARTS: tuple[Part, ...] = get_args(Part)
FAIR = ("q-ffl", "afl")
NAMES = [name for name in get_args(StrategyName) if name not in FAIR]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def six(made_hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals and their twins, who are other sites with the same patients."""
    root = tmp_path_factory.mktemp("six")
    shutil.copytree(made_hospitals / "micro", root / "micro")
    for number in range(1, SITES + 1):
        folder = root / "hospitals" / f"site-{number}"
        made = made_hospitals / "hospitals" / f"site-{(number - 1) % 3 + 1}"
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("dicom"))
        (folder / "dicom").symlink_to(made / "dicom", target_is_directory=True)
        change_site(folder, name=f"site-{number}", policy={"require-dp": False, "epsilon-max": 1e6})
        Site.open(folder).cohort()
    return root


def fails_at(site: str, answer: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """The training of all sites, one of which loses its disk."""

    def training(*args: Any, **kwargs: Any) -> Arrays:
        trained.append(None)
        if (len(trained) - 1) % SITES == int(site.removeprefix("site-")) - 1:
            raise RuntimeError("the disk is on fire")
        return answer(*args, **kwargs)

    trained: list[None] = []
    return training


def run(root: Path, run_dir: Path, **changes: Any) -> tuple[Arrays, Arrays, list[dict[str, Any]]]:
    """Weights before and after, and the events."""
    settings = federation(
        root,
        name=run_dir.name,
        training={"rounds": ROUNDS, "steps": 1, "batch": 8, "optimizer": "sgd", "learning-rate": 0.1},
        **changes,
    )
    start = start_of(settings, prepare_from_settings(settings))
    after = run_rounds(
        InProcessGrid(app, [{"site": str(folder)} for folder in sorted((root / "hospitals").iterdir())]),
        settings,
        run_dir=run_dir,
        start=start,
        evaluate=lambda _: None,
        log=RunLog(run_dir / "metrics.jsonl"),
        resume=False,
    )
    return start.arrays, after, effective(read_events(run_dir / "metrics.jsonl"))


def assert_ended_well(before: Arrays, after: Arrays, events: list[dict[str, Any]]) -> None:
    assert after.keys() == before.keys()
    assert all(np.isfinite(value).all() for value in after.values())
    assert any(not np.array_equal(after[name], before[name]) for name in after if name != IMAGE_SHIFT)
    answers = [(event["kind"], event["site"]) for event in events if event["kind"].startswith("site_re")]
    assert answers.count(("site_refused", FAILING)) == ROUNDS
    assert sum(kind == "site_replied" for kind, _ in answers) == ROUNDS * (SITES - 1)
    assert events[-1]["kind"] == "run_finished"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_share_goes_with_every_strategy(
    name: str, part: Part, six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "train_plainly", fails_at(FAILING, train_plainly))
    wire = ("fp32", "bf16", "int8")[PARTS.index(part) % 3]
    share = {"part": part, "prompt-tokens": 3, "wire": wire, "lora-rank": 2}
    if name in ("scaffold", "feddyn"):  # what a site's weights did in every round, they have to know
        share["lora-train"] = "b"
    own = {"update-norm": 1.0, "noise-multiplier": 0.1, "hospitals": SITES} if name == "hospital-dp" else {}
    strategy = {"name": name, "min-sites": SITES - 1, "retries": 0, **own}
    assert_ended_well(*run(six, tmp_path / f"{name}-{part}", **without_claim(share=share, strategy=strategy)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["fedavg", *FAIR])
def test_every_share_goes_with_privacy_prototypes_and_fairness(
    name: str, part: Part, six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "train_privately", fails_at(FAILING, train_privately))
    before, after, events = run(
        six,
        tmp_path / f"{name}-{part}",
        share={"part": part, "prompt-tokens": 3, "lora-rank": 2},
        strategy={"name": name, "min-sites": SITES - 1, "retries": 0},
        prototypes={"noise-multiplier": 5.0, "findings": ["effusion"]},
    )
    assert_ended_well(before, after, events)
    assert [event["sites"] for event in events if event["kind"] == "prototypes_made"] == [SITES] * ROUNDS


def test_what_sites_keep_is_theirs_and_the_rest_is_averaged(six: Path, tmp_path: Path) -> None:
    strategy = {"min-sites": SITES, "retries": 0}
    share = {"part": "full", "keep": ["norms", "heads"]}
    before, after, _ = run(six, tmp_path / "kept", **without_claim(share=share, strategy=strategy))
    assert not [name for name in after if "projection" in name or "norm" in name]
    assert all(not np.array_equal(after[name], before[name]) for name in after if name.endswith("fc1.weight"))
    kept = [sorted(folder.glob("personal/*/*.safetensors")) for folder in (six / "hospitals").iterdir()]
    assert [len(files) for files in kept] == [ROUNDS] * SITES
