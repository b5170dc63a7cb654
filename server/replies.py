"""What a node's reply says, however it went wrong."""

import logging

from flwr.app import Message

from strategies.messages import (
    Hello,
    Installed,
    MessageError,
    PublicBundle,
    Refusal,
    RefusalCode,
    Release,
    SiteFacts,
    TrainRequest,
    decode,
)

logger = logging.getLogger(f"clipward.{__name__}")

UNKNOWN = "unknown"

Said = Hello | SiteFacts | Installed | Refusal | PublicBundle | TrainRequest | Release


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
