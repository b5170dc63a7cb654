"""Releases that came after the deadline of their round, for a round after it."""

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from server.anchors import AnchorBook
from server.metrics import RunLog
from server.registry import DROPPED, LATE, WAITING, Registry
from server.replies import accepted, read, told
from server.roster import Site
from strategies.files import sync
from strategies.messages import Refusal, Release, ReleaseFacts, TrainRequest, bytes_of

logger = logging.getLogger(f"clipward.{__name__}")

LATE_FOLDER = "late"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"round-\d{4,}-[0-9a-f]{16}\.safetensors")


def staleness_factor(staleness: int, exponent: float) -> float:
    """What is left of the weight of an update that is so many rounds old: ``(1 + staleness) ** -exponent``.

    Source:
        The polynomial form of Xie et al. (2019), arXiv:1903.03934, section 5.2.
    """
    return float((1 + staleness) ** -exponent)


@dataclass(frozen=True, kw_only=True)
class Late:
    """A release that was kept.

    Attributes:
        path: The file with its update.
        facts: Its public half; ``server_round`` is the round it was asked for.
    """

    path: Path
    facts: ReleaseFacts

    def release(self) -> Release:
        """The whole release, read from the file."""
        return Release(facts=self.facts, update=load_file(self.path))


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    site: Site
    row: int
    request: TrainRequest  # without its arrays: they are the size of the model
    until: float


class LateReleases:
    """Waits for late releases and keeps them until a round has used them.

    Guarantees:
        A release that has come is on the disk before anything is made of it, so it survives a kill. One that
        is still on its way when the coordinator dies dies with its message: `drop_lost` says so by name, and
        its site is simply asked in the next round. The head of its site's ledger is kept first, as with any
        other release.

    Args:
        folder: Where they are kept; made with the first.
        anchors: Heads of the sites' ledgers.
        registry: Takes the last word on the ask.
        log: Takes ``late_arrived`` and ``late_dropped``.
    """

    def __init__(self, folder: Path, *, anchors: AnchorBook, registry: Registry, log: RunLog) -> None:
        self._folder, self._anchors, self._registry, self._log = folder, anchors, registry, log
        self._waiting: dict[str, _Waiting] = {}

    @property
    def engaged(self) -> frozenset[str]:
        """Sites that are still at work for an earlier round, or whose release of one stands for them."""
        kept = (late.facts.site for late in self.kept())
        return frozenset({*(one.site.name for one in self._waiting.values()), *kept})

    def wait(self, message_id: str, site: Site, row: int, request: TrainRequest, *, until: float) -> None:
        """Go on waiting for the answer to this message.

        Args:
            message_id: Of the request.
            site: Who was asked.
            row: Of the ask in the registry.
            request: What was asked.
            until: Unix seconds; later Flower has thrown the message away.
        """
        self._registry.answered(row, outcome=WAITING)
        self._waiting[message_id] = _Waiting(
            site=site, row=row, request=replace(request, arrays={}), until=until
        )

    def collect(self, grid: Grid, *, server_round: int) -> None:
        """Keep what has come by now, one reply in memory at a time; give up what cannot come any more."""
        for message_id in list(self._waiting):
            for reply in grid.pull_messages([message_id]):
                one = self._waiting.pop(message_id)
                self.keep(reply, one.site, one.row, one.request, server_round=server_round)
        for message_id, one in list(self._waiting.items()):
            if time.time() > one.until:
                del self._waiting[message_id]
                self._give_up(one, server_round, "it never came")

    def keep(self, reply: Message, site: Site, row: int, request: TrainRequest, *, server_round: int) -> None:
        """Keep the release in a reply that came too late for its round."""
        said = accepted(read(reply), site.name, request, self._anchors, expected=Release)
        if isinstance(said, Refusal):
            self._registry.answered(row, outcome=said.code)
            self._tell_dropped(
                site.name, request.server_round, server_round, f"it was a refusal: {said.code}"
            )
            return
        self._write(said)
        self._registry.answered(row, outcome=LATE, bytes_up=bytes_of(said.update))
        self._log.record(
            "late_arrived",
            round=server_round,
            asked_in_round=request.server_round,
            bytes_up=bytes_of(said.update),
            **told(said.facts),
        )

    def forget(self, server_round: int) -> None:
        """Stop waiting for answers to a round that is asked again: its sites answer the new message."""
        self._waiting = {
            message_id: one
            for message_id, one in self._waiting.items()
            if one.request.server_round != server_round
        }

    def give_up(self, server_round: int) -> None:
        """The run is over: what is still on its way is dropped by name."""
        for one in self._waiting.values():
            self._give_up(one, server_round, "the run is over")
        self._waiting.clear()

    def drop_lost(self, run: str, *, server_round: int) -> None:
        """The coordinator was restarted: what an earlier life was waiting for cannot reach this one."""
        for torn in self._folder.glob(f"{_TEMPORARY}*"):
            torn.unlink()
        for entry in self._registry.entries():
            if entry.run == run and entry.outcome == WAITING:
                self._registry.answered(entry.ask, outcome=DROPPED)
                reason = "the coordinator was restarted before it came"
                self._tell_dropped(entry.site, entry.server_round, server_round, reason)

    def kept(self) -> list[Late]:
        """What is kept, by round and site; a file that cannot be read is dropped with a warning."""
        found = [self._read(path) for path in self._folder.glob("round-*") if _NAME.fullmatch(path.name)]
        return sorted(
            (late for late in found if late is not None),
            key=lambda late: (late.facts.server_round, late.facts.site),
        )

    def drop(self, late: Late, server_round: int, reason: str) -> None:
        """Say that a kept release is not used; `remove` takes the file away once a checkpoint knows."""
        self._tell_dropped(late.facts.site, late.facts.server_round, server_round, reason)

    def remove(self, names: Collection[str]) -> None:
        """Remove kept files by name, those a checkpoint has in it."""
        for name in names:
            if _NAME.fullmatch(name):
                (self._folder / name).unlink(missing_ok=True)

    def _give_up(self, one: _Waiting, server_round: int, reason: str) -> None:
        self._registry.answered(one.row, outcome=DROPPED)
        self._tell_dropped(one.site.name, one.request.server_round, server_round, reason)

    def _write(self, release: Release) -> None:
        facts = release.facts
        site = hashlib.sha256(facts.site.encode()).hexdigest()[:16]  # a name may hold what no path may
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=self._folder, prefix=_TEMPORARY)
        os.close(descriptor)
        save_file(release.update, partial, metadata={"facts": facts.model_dump_json()})
        sync(Path(partial))
        os.replace(partial, self._folder / f"round-{facts.server_round:04d}-{site}.safetensors")
        sync(self._folder)

    def _read(self, path: Path) -> Late | None:
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {})["facts"]
            return Late(path=path, facts=ReleaseFacts.model_validate_json(text))
        except (OSError, SafetensorError, KeyError, ValidationError):
            logger.warning("passed over %s: it is no kept release; delete it", path.name)
            return None

    def _tell_dropped(self, site: str, asked_in_round: int, server_round: int, reason: str) -> None:
        self._log.record(
            "late_dropped", round=server_round, site=site, asked_in_round=asked_in_round, reason=reason
        )
