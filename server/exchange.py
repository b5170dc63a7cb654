"""One round's exchange: the request goes to the sites drawn, their releases are folded in one at a time."""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from server.anchors import AnchorBook
from server.late import LateReleases, staleness_factor
from server.metrics import RunLog
from server.registry import RELEASED, UNREACHABLE, Registry
from server.replies import UNKNOWN, accepted, read, refusal, told
from server.roster import POLL_SECONDS, Site
from strategies.messages import (
    TRAIN,
    MessageError,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    TrainRequest,
    addressed,
    bytes_of,
    encode,
)
from strategies.share import released
from strategies.strategy import Strategy
from strategies.wire import unpack

logger = logging.getLogger(f"clipward.{__name__}")

Weighting = Literal["declared", "equal"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How answers are waited for and weighed.

    Attributes:
        weighting: By declared patients, or every site alike.
        retries: How often a site is asked again within the round, where that costs no budget.
        pause_seconds: Before asking again for the second time; twice as long before each further one.
        late: Releases after the deadline are dropped, or used in a later round with less weight.
        staleness_exponent: How fast that weight falls with the rounds.
    """

    weighting: Weighting
    retries: int
    pause_seconds: float
    late: Literal["drop", "stale"]
    staleness_exponent: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of asking.

    Attributes:
        replied: Facts of the releases folded in, by site name.
        refused: Why the other sites gave none.
        late: Names of kept late releases that this round has used up or made obsolete.
        seconds: From the first message to the last fold.
        aggregate_seconds: Of them, spent on folding.
    """

    replied: Mapping[str, ReleaseFacts]
    refused: Mapping[Site, RefusalCode]
    late: Sequence[str]
    seconds: float
    aggregate_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Ask:
    row: int
    message_id: str | None  # None: Flower did not take the message
    until: float  # when Flower throws it away
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class _Folded:
    facts: ReleaseFacts
    bytes_up: int
    seconds: float


class Exchange:
    """Asks sites and takes their answers, in one round after the other.

    Args:
        grid: Flower's way to the sites.
        rules: How answers are waited for and weighed.
        anchors: Heads of the sites' ledgers: each is sent its last, and its new one is kept.
        registry: Takes each ask before it is sent, and what came of it.
        late: Takes over those that did not answer in time.
        log: Takes ``site_replied``, ``site_refused``, ``site_retried``, ``site_late``, ``stale_used`` and
            ``late_dropped``.
    """

    def __init__(
        self,
        grid: Grid,
        rules: Rules,
        *,
        anchors: AnchorBook,
        registry: Registry,
        late: LateReleases,
        log: RunLog,
    ) -> None:
        self._grid, self._rules, self._log = grid, rules, log
        self._anchors, self._registry, self._late = anchors, registry, late

    def round(self, request: TrainRequest, sites: Sequence[Site], strategy: Strategy) -> Outcome:
        """Ask ``sites``, wait for each in their order, fold what they release, record what each did.

        Guarantees:
            One reply is in memory at a time. The order of folding is that of ``sites``, then of late releases
            by round and site, so the result is the same bits whoever answers first. Every site ends up in
            ``replied`` or ``refused``; nothing a site sends raises. A private release is folded in only after
            the head of its site's ledger is on disk.

        Args:
            request: What all are asked; its deadline is announced to them and kept here.
            sites: Whom to ask.
            strategy: Folds the updates; begun here.
        """
        began, folding = time.monotonic(), 0.0
        strategy.begin(released(request))
        asks = self._ask(request, sites, strategy)
        replied: dict[str, ReleaseFacts] = {}
        refused: dict[Site, RefusalCode] = {}
        for site in sites:
            said = self._take(site, asks[site], request, strategy)
            if isinstance(said, Refusal):
                refused[site] = said.code
                self._log.record(
                    "site_refused",
                    round=request.server_round,
                    site=site.name,
                    code=said.code,
                    incident=said.incident,
                )
            else:
                replied[site.name] = said.facts
                folding += said.seconds
                self._log.record(
                    "site_replied",
                    round=request.server_round,
                    bytes_up=said.bytes_up,
                    bytes_down=asks[site].bytes_down,
                    **told(said.facts),
                )
        begin = time.monotonic()
        late = self._fold_late(request, replied, strategy)
        now = time.monotonic()
        return Outcome(
            replied=replied,
            refused=refused,
            late=late,
            seconds=now - began,
            aggregate_seconds=folding + now - begin,
        )

    def _ask(self, request: TrainRequest, sites: Sequence[Site], strategy: Strategy) -> dict[Site, _Ask]:
        """Write the asks down, then send them.

        A stored reply dies with the message it answers, and replies are fetched one by one, also after the
        deadline; so a message lives twice as long as the sites have.
        """
        patience = _deadline(request) - time.time()
        ttl = None if math.isinf(patience) else max(1.0, 2 * patience)
        corrections = {site: strategy.correction_for(site.name) or {} for site in sites}
        shared, size = request.digest, bytes_of(request.arrays)
        rows = self._registry.asked(
            run=request.run,
            server_round=request.server_round,
            requests={
                site.name: replace(request, correction=own).digest if own else shared
                for site, own in corrections.items()
            },
            bytes_down={site.name: size + bytes_of(own) for site, own in corrections.items()},
        )
        content = encode(request)
        messages = {
            site: Message(
                addressed(content, anchor=self._anchors.last(site.name), correction=own),
                site.node_id,
                TRAIN,
                ttl=ttl,
                group_id=str(request.server_round),
            )
            for site, own in corrections.items()
        }
        taken, until = set(self._grid.push_messages(messages.values())), time.time() + (ttl or math.inf)
        ids = {site: message.metadata.message_id for site, message in messages.items()}
        return {
            site: _Ask(
                row=rows[site.name],
                message_id=one if one in taken else None,
                until=until,
                bytes_down=size + bytes_of(corrections[site]),
            )
            for site, one in ids.items()
        }

    def _take(self, site: Site, ask: _Ask, request: TrainRequest, strategy: Strategy) -> _Folded | Refusal:
        """One site's answer, folded in, after asking again where that may help and costs nothing."""
        said = self._hear(site, ask, request, strategy)
        for again in range(self._rules.retries):
            pause = self._rules.pause_seconds * (2**again - 1)
            if not _may_be_asked_again(said, request) or pause >= _deadline(request) - time.time():
                break
            self._log.record(
                "site_retried",
                round=request.server_round,
                site=site.name,
                attempt=again + 2,
                reason="its answer was lost, or it failed: the same request again costs no budget",
            )
            time.sleep(pause)
            said = self._hear(site, self._ask(request, [site], strategy)[site], request, strategy)
        return said

    def _hear(self, site: Site, ask: _Ask, request: TrainRequest, strategy: Strategy) -> _Folded | Refusal:
        """The answer to one ask, folded in; the arrays are gone from memory when this returns."""
        if ask.message_id is None:
            self._registry.answered(ask.row, outcome=UNREACHABLE)
            return refusal(RefusalCode.FAILED)
        reply, deadline = self._await(ask.message_id, _deadline(request)), _deadline(request)
        if reply is None or (time.time() > deadline and reply.metadata.created_at > deadline):
            return self._too_late(reply, site, ask, request)
        said: _Folded | Release | Refusal = accepted(read(reply), site.name, request, self._anchors)
        del reply
        if isinstance(said, Release):
            said = self._fold(said, request, strategy)
        if isinstance(said, Refusal):
            self._registry.answered(ask.row, outcome=said.code)
        else:
            self._registry.answered(ask.row, outcome=RELEASED, bytes_up=said.bytes_up)
        return said

    def _await(self, message_id: str, deadline: float) -> Message | None:
        """The reply; None when it is not there at the deadline."""
        while True:
            for reply in self._grid.pull_messages([message_id]):
                return reply
            if (left := deadline - time.time()) <= 0:
                return None
            time.sleep(min(POLL_SECONDS, left))

    def _too_late(self, reply: Message | None, site: Site, ask: _Ask, request: TrainRequest) -> Refusal:
        stale = self._rules.late == "stale"
        fate = "used in a later round with less weight" if stale else "dropped"
        self._log.record(
            "site_late",
            round=request.server_round,
            site=site.name,
            reason=f"no release at the deadline; one that comes later is {fate} (strategy.late)",
        )
        if stale and reply is not None:
            self._late.keep(reply, site, ask.row, request, server_round=request.server_round)
        elif stale and ask.message_id is not None:
            self._late.wait(ask.message_id, site, ask.row, request, until=ask.until)
        else:
            self._registry.answered(ask.row, outcome=RefusalCode.DEADLINE)
        return refusal(RefusalCode.DEADLINE)

    def _fold(
        self, release: Release, request: TrainRequest, strategy: Strategy, *, factor: float = 1.0
    ) -> _Folded | Refusal:
        begin = time.monotonic()
        facts = release.facts
        weight = facts.patients_declared if self._rules.weighting == "declared" else 1
        try:
            update = unpack(release.update, request.plan.wire, like=released(request))
            strategy.fold(facts.site, update, factor * weight)
        except MessageError as error:
            logger.warning("round %d: reply of %s not used: %.200s", request.server_round, facts.site, error)
            return refusal(RefusalCode.MESSAGE)
        return _Folded(facts=facts, bytes_up=bytes_of(release.update), seconds=time.monotonic() - begin)

    def _fold_late(self, request: TrainRequest, replied: Collection[str], strategy: Strategy) -> list[str]:
        """Fold what came late for earlier rounds; the names of the files that no later round needs."""
        server_round = request.server_round
        self._late.collect(self._grid, server_round=server_round)
        done = []
        for late in self._late.kept():
            staleness = server_round - late.facts.server_round
            factor = staleness_factor(staleness, self._rules.staleness_exponent)
            if late.facts.site in replied:
                self._late.drop(late, server_round, "another release of this site was used")
            elif staleness <= 0:
                continue  # a release of this very round, for the next one
            elif isinstance(self._fold(late.release(), request, strategy, factor=factor), Refusal):
                self._late.drop(late, server_round, "it does not fit the model")
            else:
                self._log.record(
                    "stale_used",
                    round=server_round,
                    site=late.facts.site,
                    staleness=staleness,
                    factor=factor,
                    reason=f"it was asked for in round {late.facts.server_round} and came late",
                )
            done.append(late.path.name)
        return done


def _deadline(request: TrainRequest) -> float:
    return math.inf if request.deadline_unix_seconds is None else request.deadline_unix_seconds


def _may_be_asked_again(said: _Folded | Refusal, request: TrainRequest) -> bool:
    """Whether the same request again may help and costs nothing.

    It does where the answer was lost on the way: a release that is stored is sent again, and a reservation
    that is open is taken up. A failure that a private site itself reports is closed on its ledger, and to
    train anew is charged anew.
    """
    if not isinstance(said, Refusal) or said.code is not RefusalCode.FAILED:
        return False
    return said.incident == UNKNOWN or request.plan.privacy == "none"
