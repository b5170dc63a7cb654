"""Runs with secure sums over four real hospitals in this process, to be overheard, disturbed and killed."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client import app as site_app
from client.releases import ReleaseStore
from client.site import Site
from clipward.simulate import with_keys
from server import checkpoints
from server.prototypes import Prototypes
from server.secure_exchange import SUMS_FOLDER, Pledge, Pledges
from strategies.messages import Arrays, Phase, decode
from strategies.secure_sum.coordinator import SecureSum
from tests.server import runs
from tests.server.cases import Killed
from tests.small_hospitals import change_site, without_claim

NAMES = [f"site-{number}" for number in range(1, 5)]


def four_of(hospitals: Path) -> Path:
    """Four hospitals of different declared sizes that train without a claim, or with repeatable noise."""
    folder = hospitals / "hospitals" / "site-4"
    shutil.copytree(hospitals / "hospitals" / "site-3", folder, symlinks=True)
    change_site(folder, name="site-4")
    for number, name in enumerate(NAMES):
        change_site(
            hospitals / "hospitals" / name,
            cohort={"patients-declared": 25 + 5 * number},
            policy={"require-dp": False},
            testing={"insecure-noise-seed": 5},
        )
    return hospitals


class Run(runs.Run):
    """A run over all four, whose grid a test may listen to or change."""

    def __init__(self, root: Path, *, secure: bool = True, folder: str = "run", **changes: Any) -> None:
        tables = without_claim(**{"training": {"rounds": 1}, "strategy": {"min-sites": 2}} | changes)
        super().__init__(root, folder=folder, **({"secure-aggregation": {}} if secure else {}) | tables)
        self.settings = with_keys(self.settings, self.folders)

    @property
    def prototypes(self) -> Prototypes:
        prototypes = self.start.prototypes
        assert prototypes is not None
        return prototypes

    @property
    def pledge(self) -> Pledge:
        return self.pledge_of("train")

    def pledge_of(self, phase: Phase, server_round: int = 1) -> Pledge:
        folder = self.run_dir / SUMS_FOLDER
        pledge = Pledges(folder=folder if phase == "train" else folder / phase).of(server_round)
        assert pledge is not None
        return pledge

    def stored(self, name: str, phase: Phase = "train", server_round: int = 1) -> Arrays:
        """What a site keeps of its release."""
        release = ReleaseStore(folder=self.folders[0].parent / name / "releases").find(
            self.pledge_of(phase, server_round).terms.request
        )
        assert release is not None
        return release.update

    def moved_by(self, names: Iterable[str]) -> Arrays:
        """The start, moved by the weighted mean of the stored releases of these sites."""
        weights = [self.pledge.terms.by_name[name].weight for name in names]
        stored = [self.stored(name) for name in names]
        return {
            name: value + np.average([one[name].astype(float) for one in stored], axis=0, weights=weights)
            for name, value in self.start.arrays.items()
        }

    def summed(self, names: Iterable[str]) -> Arrays:
        """The same to the last bit: summed in fixed point, as the masks leave it."""
        terms = self.pledge.terms
        moved = {}
        for name, value in self.start.arrays.items():
            encoded = [
                terms.grid.encode(self.stored(one)[name], weight=terms.by_name[one].weight) for one in names
            ]
            total = np.asarray(np.sum(encoded, axis=0, dtype=np.uint32))
            moved[name] = value + terms.grid.mean(total, weight=terms.weight_of(list(names)))
        return moved


class Overheard:
    """A grid that hands every reply to a test, which may answer with another one."""

    def __init__(self, run: Run, change: Callable[[str, Message], Message] = lambda _, reply: reply) -> None:
        self._inner, self._change = run.grid(), change
        self.actions: dict[str, str] = {}
        self.replies: list[tuple[str, Any]] = []
        self.sent: list[tuple[str, Any]] = []

    def get_node_ids(self) -> list[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = [self._change(f"to {one.metadata.message_type}", one) for one in messages]
        accepted = self._inner.push_messages(messages)
        for message in messages:
            self.actions[message.metadata.message_id] = message.metadata.message_type
            self.sent.append((message.metadata.message_type, decode(message.content)))
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in self._inner.pull_messages(list(message_ids)):
            changed = self._change(self.actions[reply.metadata.reply_to_message_id], reply)
            self.replies.append((self.actions[reply.metadata.reply_to_message_id], decode(changed.content)))
            yield changed


def dying(monkeypatch: pytest.MonkeyPatch, answer: str, *names: str, times: int = 99) -> None:
    """Let sites fail where they should give this answer, so often in all."""
    original, left = getattr(site_app, answer), [times]

    def failing(site: Site, asked: Any) -> Any:
        if site.name in names and left[0]:
            left[0] -= 1
            raise MemoryError
        return original(site, asked)

    monkeypatch.setattr(site_app, answer, failing)


def with_claim(root: Path) -> dict[str, Any]:
    """Tables of a private run, over sites of one size: their noise is calibrated once."""
    for folder in sites_of(root):
        change_site(folder, cohort={"patients-declared": 25})
    return {"privacy": {"mode": "dp", "epsilon": 8.0}, "objective": {"name": "anchored"}}


def charges(run: Run) -> list[int]:
    return [len(run.charges(folder.name)) for folder in run.folders]


def killed(run: Run, *, die_at: int, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    done = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if done[0] == die_at:
                raise Killed
            done[0] += 1
            return result

        return watching

    with monkeypatch.context() as patch:
        for owner, name in ((Pledges, "keep"), (checkpoints, "save")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        for name in ("offers", "shares", "survivors", "consents", "mean"):
            patch.setattr(SecureSum, name, watched(getattr(SecureSum, name)))
        return run.go()


def sites_of(root: Path) -> list[Path]:
    return [root / "hospitals" / name for name in NAMES]
