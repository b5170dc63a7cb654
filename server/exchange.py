"""One round's exchange: the request goes to all sites, their releases are folded in one at a time."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from server.anchors import AnchorBook, AnchorRefused
from server.metrics import RunLog
from server.replies import read, refusal
from server.roster import POLL_SECONDS, Site
from strategies.fedavg import FedAvg
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
    require,
)

logger = logging.getLogger(f"clipward.{__name__}")

Weighting = Literal["declared", "equal"]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What came of asking.

    Attributes:
        average: Holds all releases that can be used.
        replied: Facts of those releases, by site name.
        refused: Why the other sites gave none.
        aggregate_seconds: Spent on averaging.
    """

    average: FedAvg
    replied: Mapping[str, ReleaseFacts]
    refused: Mapping[Site, RefusalCode]
    aggregate_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Folded:
    facts: ReleaseFacts
    bytes_up: int
    seconds: float


def exchange(
    grid: Grid,
    request: TrainRequest,
    sites: Sequence[Site],
    *,
    weighting: Weighting,
    anchors: AnchorBook,
    log: RunLog,
) -> Exchange:
    """Ask ``sites``, wait for each in their order, record what each did.

    Guarantees:
        One reply is in memory at a time. The order of folding is that of ``sites``, so the average is the
        same bits whoever answers first. Every site ends up in ``replied`` or ``refused``; nothing a site
        sends raises. A private release is folded in only after the head of its site's ledger is on disk.

    Args:
        grid: Flower's way to the sites.
        request: What all are asked; its deadline is announced to them and kept here.
        sites: Whom to ask.
        weighting: By declared patients, or every site alike.
        anchors: Heads of the sites' ledgers: each is sent its last, and its new one is kept.
        log: Takes ``site_replied`` and ``site_refused``.
    """
    average = FedAvg(request.arrays)
    bytes_down = bytes_of(request.arrays)
    deadline = math.inf if request.deadline_unix_seconds is None else request.deadline_unix_seconds
    ids = _push(grid, request, sites, anchors, patience_seconds=deadline - time.time())
    replied: dict[str, ReleaseFacts] = {}
    refused: dict[Site, RefusalCode] = {}
    aggregate_seconds = 0.0
    for site in sites:
        said = _take(
            grid, ids.get(site), site, request, average, anchors, weighting=weighting, deadline=deadline
        )
        if isinstance(said, Refusal):
            refused[site] = said.code
            log.record(
                "site_refused",
                round=request.server_round,
                site=site.name,
                code=said.code,
                incident=said.incident,
            )
        else:
            replied[site.name] = said.facts
            aggregate_seconds += said.seconds
            facts = said.facts.model_dump(mode="json", exclude={"server_round", "anchor"})
            log.record(
                "site_replied",
                round=request.server_round,
                bytes_up=said.bytes_up,
                bytes_down=bytes_down,
                **facts,
            )
    return Exchange(average=average, replied=replied, refused=refused, aggregate_seconds=aggregate_seconds)


def _push(
    grid: Grid,
    request: TrainRequest,
    sites: Sequence[Site],
    anchors: AnchorBook,
    *,
    patience_seconds: float,
) -> dict[Site, str]:
    """Send the request; the ids of the messages Flower took.

    A stored reply dies with the message it answers, and replies are fetched one by one, also after the
    deadline; so a message lives twice as long as the sites have.
    """
    content = encode(request)
    ttl = None if math.isinf(patience_seconds) else max(1.0, 2 * patience_seconds)
    messages = [
        Message(
            addressed(content, anchors.last(site.name)),
            site.node_id,
            TRAIN,
            ttl=ttl,
            group_id=str(request.server_round),
        )
        for site in sites
    ]
    accepted = set(grid.push_messages(messages))
    ids = {site: message.metadata.message_id for site, message in zip(sites, messages, strict=True)}
    return {site: message_id for site, message_id in ids.items() if message_id in accepted}


def _take(
    grid: Grid,
    message_id: str | None,
    site: Site,
    request: TrainRequest,
    average: FedAvg,
    anchors: AnchorBook,
    *,
    weighting: Weighting,
    deadline: float,
) -> _Folded | Refusal:
    """One site's answer, folded in; the arrays are gone from memory when this returns."""
    if message_id is None:
        return refusal(RefusalCode.FAILED)
    reply = _await(grid, message_id, deadline)
    if reply is None:
        return refusal(RefusalCode.DEADLINE)
    said = read(reply)
    del reply
    if isinstance(said, Refusal):
        return said
    begin = time.monotonic()
    try:
        release = require(said, Release)
        _require_answer(release.facts, site, request)
        if release.facts.anchor is not None:
            anchors.take(site.name, release.facts.anchor, run=request.run, server_round=request.server_round)
        weight = release.facts.patients_declared if weighting == "declared" else 1
        average.fold(release.update, weight)
    except MessageError as error:
        logger.warning("round %d: reply of %s not used: %.200s", request.server_round, site.name, error)
        return refusal(RefusalCode.MESSAGE)
    except AnchorRefused as error:
        logger.warning("round %d: release of %s not used: %s", request.server_round, site.name, error)
        return refusal(RefusalCode.LEDGER)
    return _Folded(facts=release.facts, bytes_up=bytes_of(release.update), seconds=time.monotonic() - begin)


def _await(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """The reply; None when it is not there at the deadline, or was written later."""
    while True:
        for reply in grid.pull_messages([message_id]):
            late = time.time() > deadline and reply.metadata.created_at > deadline
            return None if late else reply
        if (left := deadline - time.time()) <= 0:
            return None
        time.sleep(min(POLL_SECONDS, left))


def _require_answer(facts: ReleaseFacts, site: Site, request: TrainRequest) -> None:
    if (facts.site, facts.server_round) != (site.name, request.server_round):
        raise MessageError("the release is for another site or round than was asked")
    if request.plan.privacy == "dp" and facts.anchor is None:
        raise MessageError("a release with privacy names the head of its site's ledger")
