"""One round's exchange: the request goes to the sites drawn, their releases are folded in one at a time."""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.anchors import AnchorBook
from server.late import LateReleases, staleness_factor
from server.metrics import RunLog
from server.registry import RELEASED, UNREACHABLE, Registry
from server.replies import UNKNOWN, accepted, read, refusal, told
from server.roster import POLL_SECONDS, Site
from strategies.messages import (
    TRAIN,
    Arrays,
    MessageError,
    Ready,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    TrainRequest,
    addressed,
    bytes_of,
    encode,
)
from strategies.secure_sum.coordinator import SecureSum
from strategies.secure_sum.errors import SecureSumError
from strategies.secure_sum.messages import Weighting
from strategies.share import wire_of
from strategies.wire import unpack

logger = logging.getLogger(f"clipward.{__name__}")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How answers are waited for and weighed.

    Attributes:
        weighting: By declared patients, or every site alike.
        retries: How often a site is asked again within the round, where that costs no budget.
        in_turn: The sites work one after the other, in this process: each is asked when its turn comes, and
            a pause before asking again would be the others' time.
        late: Releases after the deadline are dropped, or used in a later round with less weight.
        staleness_exponent: How fast that weight falls with the rounds.
    """

    weighting: Weighting
    retries: int
    in_turn: bool
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
        reason: Why sites that were ready are not in ``replied`` either; empty: there are none.
    """

    replied: Mapping[str, ReleaseFacts]
    refused: Mapping[Site, RefusalCode]
    late: Sequence[str]
    seconds: float
    aggregate_seconds: float
    reason: str = ""


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


class Folding(Protocol):
    """What updates are folded into: a `Strategy`, or a sum of what else sites release."""

    def begin(self, base: Arrays) -> None:
        """Start a round from these arrays."""

    def correction_for(self, site: str) -> Arrays | None:
        """What the site adds to its gradients."""

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Take one site's update."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the sites are asked, and what their answers are folded into.

    Attributes:
        request: The same for all, but for each one's own anchor and correction.
        folding: Takes the updates.
        like: Arrays of the names and shapes of an update.
        secure: Takes the sites' keys; their updates then follow under masks. Null: they come as they are.
    """

    request: TrainRequest
    folding: Folding
    like: Arrays
    secure: SecureSum | None = None

    @cached_property
    def content(self) -> RecordDict:
        """The request as it is sent, encoded once for all."""
        return encode(self.request)

    @property
    def replied(self) -> str:
        """The event of a release."""
        return "site_replied" if self.request.phase == "train" else f"{self.request.phase}_replied"

    @property
    def refused(self) -> str:
        """The event of a refusal."""
        return "site_refused" if self.request.phase == "train" else f"{self.request.phase}_refused"

    def weighting(self, asked: Weighting) -> Weighting:
        """How sites are weighed that are asked to be weighed so: only updates are averaged."""
        return asked if self.request.phase == "train" else "equal"

    @property
    def takes_late(self) -> bool:
        """Whether an answer may be used in a later round: what was measured of older weights may not."""
        return self.request.phase == "train"


class Exchange:
    """Asks sites and takes their answers, in one round after the other.

    Args:
        grid: Flower's way to the sites.
        rules: How answers are waited for and weighed.
        anchors: Heads of the sites' ledgers: each is sent its last, and its new one is kept.
        registry: Takes each ask before it is sent, and what came of it.
        late: Takes over those that did not answer in time.
        log: Takes ``site_replied``, ``site_refused`` (of prototypes ``prototypes_replied`` and
            ``prototypes_refused``, of losses and centre alike), ``site_retried``, ``site_late``,
            ``stale_used`` and ``late_dropped``.
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

    def round(self, question: Question, sites: Sequence[Site]) -> Outcome:
        """Ask ``sites``, wait for each in their order, fold what they release, record what each did.

        Guarantees:
            One reply is in memory at a time. The order of folding is that of ``sites``, then of late releases
            by round and site, so the result is the same bits whoever answers first. Every site ends up in
            ``replied`` or ``refused``; nothing a site sends raises. A private release is folded in only after
            the head of its site's ledger is on disk.

        Args:
            question: What all are asked; its request's deadline is announced to them and kept here, and its
                folding is begun.
            sites: Whom to ask.
        """
        began, folding, request = time.monotonic(), 0.0, question.request
        question.folding.begin(question.like)
        # One after the other: what is sent to a site may be as large as the model, and is dropped when sent.
        asks = {} if self._rules.in_turn else {site: self._ask(question, site) for site in sites}
        replied: dict[str, ReleaseFacts] = {}
        refused: dict[Site, RefusalCode] = {}
        for site in sites:
            ask = asks.get(site) or self._ask(question, site)
            said = self._take(site, ask, question)
            if isinstance(said, Refusal):
                refused[site] = said.code
                self._log.record(
                    question.refused,
                    round=request.server_round,
                    site=site.name,
                    code=said.code,
                    incident=said.incident,
                )
            else:
                replied[site.name] = said.facts
                folding += said.seconds
                self._log.record(
                    question.replied,
                    round=request.server_round,
                    bytes_up=said.bytes_up,
                    bytes_down=ask.bytes_down,
                    **told(said.facts),
                )
        begin = time.monotonic()
        late = self._fold_late(question, replied) if question.takes_late else []
        now = time.monotonic()
        return Outcome(
            replied=replied,
            refused=refused,
            late=late,
            seconds=now - began,
            aggregate_seconds=folding + now - begin,
        )

    def _ask(self, question: Question, site: Site) -> _Ask:
        """Write the ask down, then send it.

        A stored reply dies with the message it answers, and replies are fetched one by one, also after the
        deadline; so a message lives twice as long as the sites have.
        """
        request, own = question.request, question.folding.correction_for(site.name) or {}
        patience, size = _deadline(request) - time.time(), bytes_of(request.arrays) + bytes_of(own)
        ttl = None if math.isinf(patience) else max(1.0, 2 * patience)
        row = self._registry.asked(
            run=request.run,
            server_round=request.server_round,
            site=site.name,
            request=replace(request, correction=own).digest if own else request.digest,
            bytes_down=size,
        )
        message = Message(
            addressed(question.content, anchor=self._anchors.last(site.name), correction=own),
            site.node_id,
            TRAIN,
            ttl=ttl,
            group_id=str(request.server_round),
        )
        taken = list(self._grid.push_messages([message]))
        return _Ask(
            row=row,
            message_id=taken[0] if taken else None,
            until=time.time() + (ttl or math.inf),
            bytes_down=size,
        )

    def _take(self, site: Site, ask: _Ask, question: Question) -> _Folded | Refusal:
        """One site's answer, folded in, after asking again where that may help and costs nothing."""
        request, said = question.request, self._hear(site, ask, question)
        for again in range(self._rules.retries):
            pause = 0.0 if self._rules.in_turn else POLL_SECONDS * (2**again - 1)
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
            said = self._hear(site, self._ask(question, site), question)
        return said

    def _hear(self, site: Site, ask: _Ask, question: Question) -> _Folded | Refusal:
        """The answer to one ask, folded in; the arrays are gone from memory when this returns."""
        request = question.request
        if ask.message_id is None:
            self._registry.answered(ask.row, outcome=UNREACHABLE)
            return refusal(RefusalCode.FAILED)
        reply, deadline = awaited(self._grid, ask.message_id, _deadline(request)), _deadline(request)
        if reply is None or (time.time() > deadline and reply.metadata.created_at > deadline):
            return self._too_late(reply, site, ask, question)
        said: _Folded | Refusal = self._taken(reply, site, question)
        del reply
        if isinstance(said, Refusal):
            self._registry.answered(ask.row, outcome=said.code)
        else:
            self._registry.answered(ask.row, outcome=RELEASED, bytes_up=said.bytes_up)
        return said

    def _taken(self, reply: Message, site: Site, question: Question) -> _Folded | Refusal:
        """What a reply in time says, folded in; or the keys with which its update will be masked."""
        request, secure = question.request, question.secure
        if secure is None:
            release = accepted(read(reply), site.name, request, self._anchors, expected=Release)
            return release if isinstance(release, Refusal) else self._fold(release, question)
        ready = accepted(read(reply), site.name, request, self._anchors, expected=Ready)
        if isinstance(ready, Refusal):
            return ready
        if ready.offer.site != site.name:
            logger.warning("round %d: %s offers another's keys", request.server_round, site.name)
            return refusal(RefusalCode.MESSAGE)
        try:
            secure.take_offer(ready.offer)
        except SecureSumError as error:
            logger.warning("round %d: keys of %s not used: %.200s", request.server_round, site.name, error)
            return refusal(RefusalCode.MESSAGE)
        return _Folded(facts=ready.facts, bytes_up=0, seconds=0.0)

    def _too_late(self, reply: Message | None, site: Site, ask: _Ask, question: Question) -> Refusal:
        request, stale = question.request, question.takes_late and self._rules.late == "stale"
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

    def _fold(self, release: Release, question: Question, *, factor: float = 1.0) -> _Folded | Refusal:
        begin, request = time.monotonic(), question.request
        facts = release.facts
        declared = question.weighting(self._rules.weighting) == "declared"
        weight = facts.patients_declared if declared else 1
        try:
            update = unpack(release.update, wire_of(request), like=question.like)
            question.folding.fold(facts.site, update, factor * weight)
        except MessageError as error:
            logger.warning("round %d: reply of %s not used: %.200s", request.server_round, facts.site, error)
            return refusal(RefusalCode.MESSAGE)
        return _Folded(facts=facts, bytes_up=bytes_of(release.update), seconds=time.monotonic() - begin)

    def _fold_late(self, question: Question, replied: Collection[str]) -> list[str]:
        """Fold what came late for earlier rounds; the names of the files that no later round needs."""
        server_round = question.request.server_round
        self._late.collect(self._grid, server_round=server_round)
        done = []
        for late in self._late.kept():
            staleness = server_round - late.facts.server_round
            factor = staleness_factor(staleness, self._rules.staleness_exponent)
            if late.facts.site in replied:
                self._late.drop(late, server_round, "another release of this site was used")
            elif staleness <= 0:
                continue  # a release of this very round, for the next one
            elif isinstance(self._fold(late.release(), question, factor=factor), Refusal):
                self._late.drop(late, server_round, "it does not fit what this round trains")
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


def awaited(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """The reply to a message; None when it is not there at the deadline."""
    while True:
        for reply in grid.pull_messages([message_id]):
            return reply
        if (left := deadline - time.time()) <= 0:
            return None
        time.sleep(min(POLL_SECONDS, left))


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
