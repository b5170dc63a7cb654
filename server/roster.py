"""Who takes part: sites are greeted, named, and given the public bundle when they lack it."""

import logging
import time
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.errors import QuorumError, RunError
from server.metrics import RunLog
from server.replies import read
from strategies.messages import (
    HELLO,
    INSTALL,
    Hello,
    Installed,
    PublicBundle,
    Refusal,
    SiteFacts,
    encode,
)

logger = logging.getLogger(f"clipward.{__name__}")

POLL_SECONDS = 0.5
_RETRY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hospital that is ready to train.

    Attributes:
        name: What it calls itself.
        node_id: Where Flower reaches it.
        patients: Its declared size.
    """

    name: str
    node_id: int
    patients: int = 1


@dataclass(frozen=True, kw_only=True)
class _Asked:
    node_id: int
    since: float
    facts: SiteFacts | None = None  # what it answered to hello, once it is sent the bundle


class Roster:
    """The sites of one run.

    Args:
        grid: Flower's way to the nodes.
        run: Name of the run.
        bundle: What every site must hold before it can train.
        log: Takes ``site_joined`` and ``site_left`` from the second round on (who is there at first stands in
            the start of the run), and ``site_retired``.
    """

    def __init__(self, grid: Grid, *, run: str, bundle: PublicBundle, log: RunLog) -> None:
        self._grid, self._log = grid, log
        self._hello = Hello(run=run, bundle=bundle.digest)
        self._bundle = bundle
        self._asked: dict[str, _Asked] = {}
        self._declined: dict[int, tuple[float, str]] = {}
        self._sites: dict[str, Site] = {}
        self._retired: dict[str, Site] = {}
        self._members: dict[str, int] | None = None  # who was there after the last gathering, and where

    def gather(self, *, server_round: int, at_least: int, patience_seconds: float) -> list[Site]:
        """Greet every node that is new, and wait for enough sites.

        Once there are enough, a site that was asked but is slow to answer holds the others up by a tenth of
        ``patience_seconds``; it joins a later round. A site that declined is asked again after 30 s.

        Args:
            server_round: The round they are needed for.
            at_least: How many the round needs.
            patience_seconds: Longest wait for them; 0 waits for nobody who does not answer at once.

        Returns:
            All sites that are ready, in the order of their names.

        Raises:
            QuorumError: the wait is over and there are fewer.
            RunError: two nodes go by one name.
        """
        begin = time.monotonic()
        while True:
            self._greet(ttl=patience_seconds)
            if self._listen(ttl=patience_seconds):
                continue
            now = time.monotonic()
            over = now - begin >= patience_seconds
            slow = any(now - one.since < patience_seconds / 10 for one in self._asked.values())
            if len(self._sites) >= at_least and (over or not slow):
                self._tell_changes(server_round)
                return [self._sites[name] for name in sorted(self._sites)]
            if over:
                raise QuorumError(self._too_few(server_round, at_least))
            time.sleep(min(POLL_SECONDS, begin + patience_seconds - now))

    def forget(self, site: Site) -> None:
        """Greet this site anew before the next round: it failed, and may have moved or lost the bundle."""
        self._sites.pop(site.name, None)

    def retire(self, site: Site, *, server_round: int, reason: str) -> None:
        """Do not ask this site again, as long as this coordinator lives: a resumed run greets it anew."""
        self._retired[site.name] = self._sites.pop(site.name)
        self._log.record("site_retired", round=server_round, site=site.name, reason=reason)

    def _greet(self, *, ttl: float) -> None:
        now, connected = time.monotonic(), dict.fromkeys(self._grid.get_node_ids())
        self._sites = {name: site for name, site in self._sites.items() if site.node_id in connected}
        known = {site.node_id for site in [*self._sites.values(), *self._retired.values()]}
        asked = {one.node_id for one in self._asked.values()}
        resting = {node for node, (since, _) in self._declined.items() if now - since < _RETRY_SECONDS}
        engaged = known | asked | resting
        new = [node for node in connected if node not in engaged]
        fresh = [_Asked(node_id=node, since=now) for node in new]
        if fresh:
            self._send(fresh, HELLO, encode(self._hello), ttl=ttl)

    def _listen(self, *, ttl: float) -> bool:
        """Take the answers that are there; whether there were any."""
        if not self._asked:
            return False
        lacking: list[_Asked] = []
        waiting = len(self._asked)
        for reply in self._grid.pull_messages(list(self._asked)):
            asked = self._asked.pop(reply.metadata.reply_to_message_id)
            match read(reply):
                case SiteFacts(has_bundle=False) as facts:
                    lacking.append(replace(asked, since=time.monotonic(), facts=facts))
                case SiteFacts() as facts:
                    self._admit(facts, asked.node_id)
                case Installed(bundle=digest) if asked.facts and digest == self._hello.bundle:
                    self._admit(asked.facts, asked.node_id)
                case Refusal(code=code, incident=incident):
                    self._decline(asked.node_id, f"{code} (incident {incident})")
                case unexpected:
                    self._decline(asked.node_id, f"unexpected {type(unexpected).__name__}")
        answered = len(self._asked) < waiting
        if lacking:
            self._send(lacking, INSTALL, encode(self._bundle), ttl=ttl)
        return answered

    def _send(self, asked: list[_Asked], action: str, content: RecordDict, *, ttl: float) -> None:
        messages = [Message(content, one.node_id, action, ttl=ttl or None) for one in asked]
        accepted = set(self._grid.push_messages(messages))
        for one, message in zip(asked, messages, strict=True):
            if message.metadata.message_id in accepted:
                self._asked[message.metadata.message_id] = one
            else:
                self._decline(one.node_id, "not reachable")

    def _admit(self, facts: SiteFacts, node_id: int) -> None:
        known = self._sites.get(facts.site) or self._retired.get(facts.site)
        if known and known.node_id != node_id and known.node_id in self._grid.get_node_ids():
            raise RunError(
                f"nodes {known.node_id} and {node_id} both call themselves site {facts.site!r}: "
                "give every site a name of its own in its site.toml"
            )
        self._declined.pop(node_id, None)
        self._sites[facts.site] = Site(name=facts.site, node_id=node_id, patients=facts.patients_declared)

    def _decline(self, node_id: int, why: str) -> None:
        logger.warning("node %d does not take part yet: %s", node_id, why)
        self._declined[node_id] = (time.monotonic(), why)

    def _tell_changes(self, server_round: int) -> None:
        """Record who came and who went since the last gathering; a site that is greeted anew did neither."""
        now = {name: site.node_id for name, site in self._sites.items()}
        connected = set(self._grid.get_node_ids())
        before = self._members if self._members is not None else now
        for name in sorted(now.keys() - before.keys()):
            self._log.record("site_joined", round=server_round, site=name, reason="it is ready to train")
        gone = {name: node for name, node in before.items() if now.get(name, node) not in connected}
        for name in sorted(gone):
            self._log.record("site_left", round=server_round, site=name, reason="its node is gone")
        stayed = {name: node for name, node in before.items() if name not in gone}
        self._members = {**stayed, **now}

    def _too_few(self, server_round: int, at_least: int) -> str:
        reasons = [f"node {node} declined: {why}" for node, (_, why) in sorted(self._declined.items())]
        reasons += [f"{name} has spent its budget" for name in sorted(self._retired)]
        return (
            f"round {server_round}: {len(self._sites)} of the {at_least} sites needed are ready "
            f"({'; '.join(reasons) or 'no other node is connected'}); start or repair them, then --resume"
        )
