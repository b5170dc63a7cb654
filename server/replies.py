"""What a node's reply says, however it went wrong."""

import logging
from typing import Any, TypeVar

from flwr.app import Message

from server.anchors import AnchorBook, AnchorRefused
from strategies.messages import (
    MessageError,
    Ready,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    Said,
    TrainRequest,
    decode,
    require,
)

logger = logging.getLogger(f"clipward.{__name__}")

UNKNOWN = "unknown"
T = TypeVar("T", Release, Ready)


def read(reply: Message) -> Said:
    """The message in a reply; Flower's error and a malformed message read as refusals."""
    if reply.has_error():
        logger.warning("node %d: Flower error %d", reply.metadata.src_node_id, reply.error.code)
        return refusal(RefusalCode.FAILED)
    try:
        return decode(reply.content)
    except MessageError as error:
        logger.warning("node %d sent a malformed reply: %.200s", reply.metadata.src_node_id, error)
        return refusal(RefusalCode.MESSAGE)


def refusal(code: RefusalCode) -> Refusal:
    """A refusal that no site wrote, so nobody knows of an entry in a site's log."""
    return Refusal(site=UNKNOWN, code=code, incident=UNKNOWN)


def accepted(
    said: Said, site: str, request: TrainRequest, anchors: AnchorBook, *, expected: type[T]
) -> T | Refusal:
    """What answers ``request``, once the head of its site's ledger is on the disk.

    Args:
        said: What came back.
        site: Who was asked.
        request: What was asked.
        anchors: Heads of the sites' ledgers; takes the new one.
        expected: The release itself, or that one is ready for a secure sum.

    Returns:
        What was expected; or the site's refusal; or one that no site wrote, because what came is no answer
        to the request, or because its site's ledger is not the one seen before.
    """
    if isinstance(said, Refusal):
        return said
    try:
        answer = require(said, expected)
        _require_answer(answer.facts, site, request)
        if answer.facts.anchor is not None:
            anchors.take(site, answer.facts.anchor, run=request.run, server_round=request.server_round)
    except MessageError as error:
        logger.warning("round %d: reply of %s not used: %.200s", request.server_round, site, error)
        return refusal(RefusalCode.MESSAGE)
    except AnchorRefused as error:
        logger.warning("round %d: release of %s not used: %s", request.server_round, site, error)
        return refusal(RefusalCode.LEDGER)
    return answer


def told(facts: ReleaseFacts) -> dict[str, Any]:
    """What the run's events say of a release."""
    return facts.model_dump(mode="json", exclude={"server_round", "anchor"})


def _require_answer(facts: ReleaseFacts, site: str, request: TrainRequest) -> None:
    if (facts.site, facts.server_round) != (site, request.server_round):
        raise MessageError("the release is for another site or round than was asked")
    if request.plan.privacy == "dp" and facts.anchor is None:
        raise MessageError("a release with privacy names the head of its site's ledger")
