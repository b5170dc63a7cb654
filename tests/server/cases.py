"""A run over fake sites in a folder, to be disturbed, killed and resumed."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from server import checkpoints
from server.federation import Federation
from server.metrics import Event, RunLog, read_events
from server.registry import REGISTRY_FILE, Entry, Registry
from server.roster import Roster
from server.rounds import run_rounds
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, TrainRequest
from strategies.strategy import Strategy
from tests.fake_site import FakeSites, Reaction, federation, start, trained

SITES = ("alpha", "beta", "gamma")


class Case:
    """A federation in a folder, to be run once or again."""

    def __init__(self, folder: Path, *names: str, settings: Federation | None = None) -> None:
        (folder / "sites").mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "run"
        self.sites = FakeSites(folder / "sites")
        self.names = names or SITES
        self.settings = settings or federation()
        self.start = start()
        self.evaluate: Callable[[Arrays], Mapping[str, Any] | None] = lambda arrays: {"size": len(arrays)}

    def react(self, **reactions: Reaction) -> "Case":
        self.sites.reactions |= reactions
        return self

    def grid(self) -> InProcessGrid:
        return InProcessGrid(self.sites.app, FakeSites.configs(*self.names))

    def run(self, *, resume: bool = False, grid: Any = None) -> Arrays:
        return run_rounds(
            grid or self.grid(),
            self.settings,
            run_dir=self.run_dir,
            start=self.start,
            evaluate=self.evaluate,
            log=RunLog(self.run_dir / "metrics.jsonl"),
            resume=resume,
        )

    def events(self, kind: str) -> list[Event]:
        events = read_events(self.run_dir / "metrics.jsonl")
        return [event for event in events if event["kind"] == kind]

    def asks(self) -> list[Entry]:
        with Registry(self.run_dir / REGISTRY_FILE) as registry:
            return registry.entries()


def averaged(case: Case, *, rounds: int, weights: Mapping[str, float]) -> Arrays:
    """The weights by the textbook, in float64."""
    arrays = case.start.arrays
    for server_round in range(1, rounds + 1):
        updates = {site: learnt(case, arrays, server_round, site) for site in weights}
        arrays = moved(arrays, [(updates[site], weight) for site, weight in weights.items()])
    return arrays


def learnt(case: Case, arrays: Arrays, server_round: int, site: str) -> Arrays:
    """What a site releases in a round."""
    request = TrainRequest(
        run="test", server_round=server_round, bundle="", plan=case.settings.plan(), arrays=arrays
    )
    return trained(request, site)


def moved(arrays: Arrays, updates: Sequence[tuple[Arrays, float]]) -> Arrays:
    """Weights moved by the weighted mean of updates."""
    weights = [weight for _, weight in updates]
    return {
        name: (
            value
            + np.average([update[name].astype(np.float64) for update, _ in updates], axis=0, weights=weights)
        ).astype(np.float32)
        for name, value in arrays.items()
    }


def close(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.allclose(left[name], right[name]) for name in left)


def same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


class Deployed:
    """A grid of its own kind: sites work when they are sent something, or ``late``, when looked at."""

    def __init__(self, case: Case, *, silent: Iterable[int] = (), late: float = 0.0) -> None:
        self.inner = case.grid()
        self.silent, self.late, self.pulls = set(silent), late, 0
        self.ready: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        accepted = self.inner.push_messages(messages)
        for message in messages:
            training = message.metadata.message_type == "train"
            if not training or not (self.late or message.metadata.dst_node_id in self.silent):
                self.ready |= self.pulled(message.metadata.message_id)
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        ids = list(message_ids)
        if self.late and not self.ready.keys() & ids:
            time.sleep(self.late)
            self.ready |= self.pulled(*ids)
        return [self.ready.pop(one) for one in ids if one in self.ready]

    def pulled(self, *ids: str) -> dict[str, Message]:
        return {reply.metadata.reply_to_message_id: reply for reply in self.inner.pull_messages(ids)}


class Tardy(Deployed):
    """A grid whose site 1 answers the request of round 1 only when a later round's messages are sent.

    With ``tardiness`` 1 that is the next round, and so on.
    """

    def __init__(self, case: Case, *, tardiness: int = 1) -> None:
        super().__init__(case)
        self.tardiness = tardiness
        self.held: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        accepted = []
        for message in messages:
            accepted += super().push_messages([message])
            number = message.metadata.message_id
            if message.metadata.message_type == "train":
                if (message.metadata.dst_node_id, message.metadata.group_id) == (1, "1"):
                    self.held[number] = self.ready.pop(number)
                if int(message.metadata.group_id) > self.tardiness:
                    self.ready |= self.held
                    self.held = {}
        return accepted


class Killed(BaseException):
    """A kill -9: nothing catches it."""


class Steps:
    """Counts what a run does; dies at the given step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, die_at: int) -> None:
        self.done, self.die_at = 0, die_at
        for owner, name in (
            (RunLog, "record"),
            (Strategy, "begin"),
            (Strategy, "fold"),
            (Strategy, "finish"),
            (Registry, "asked"),
            (Registry, "answered"),
            (checkpoints, "save"),
            (InProcessGrid, "push_messages"),
            (InProcessGrid, "_reply_to"),
            (Roster, "gather"),
            (os, "rename"),
        ):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any, **named: Any) -> Any:
            self.step()
            result = function(*arguments, **named)
            self.step()
            return result

        return watching

    def step(self) -> None:
        self.done += 1
        if self.done == self.die_at:
            raise Killed
