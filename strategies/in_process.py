"""Flower's grid in one process: every site's ClientApp is called here, one after the other, without Ray."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    RecordDict,
    UserConfigValue,
)
from flwr.serverapp import Grid

from strategies.flower_compat import ErrorCode, Run, act_as_coordinator, make_message, stamp
from strategies.handover import Unwritten

logger = logging.getLogger(f"clipward.{__name__}")

FAILED = "the site's client app failed; the cause is in the site's own log"
_RUN_ID = 1

ClientCall = Callable[[Message, Context], Message]


class InProcessGrid(Grid):  # type: ignore[misc]  # flwr is not annotated for us
    """Runs the same ClientApp object as Flower's engines do, with the same messages.

    Guarantees:
        Lazy: a site works when its reply is pulled, so at most the reply just pulled is in memory. Each side
        has its own records, so neither changes the other's; arrays are shared, never copied, and those that
        `strategies.messages` encodes are never written either: the other side reads them where they lie.
        A site's context keeps its state from message to message. An exception in a site becomes an error
        reply with the constant text `FAILED`.

    Args:
        client_app: What a site answers with; Flower's ``ClientApp`` is such a callable.
        node_configs: One per site; nodes are numbered 1, 2, … in this order.
        run_config: The run's settings, the same for all.
    """

    def __init__(
        self,
        client_app: ClientCall,
        node_configs: Sequence[Mapping[str, UserConfigValue]],
        run_config: Mapping[str, UserConfigValue] | None = None,
    ) -> None:
        self._client_app = client_app
        self._contexts = {
            node_id: Context(
                run_id=_RUN_ID,
                node_id=node_id,
                node_config=dict(node_config),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node_id, node_config in enumerate(node_configs, start=1)
        }
        self._run = Run.create_empty(_RUN_ID)
        self._ids = itertools.count(1)
        self._sent: dict[str, Message] = {}
        act_as_coordinator(_RUN_ID)

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; Flower's interface asks for this, new code calls ``Message``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Nodes of all sites."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages without running anybody yet.

        Returns:
            The ids of the accepted ones; one for an unknown node is left out, as Flower's engines do.
        """
        accepted = []
        for message in messages:
            message_id = str(next(self._ids))
            stamp(message, message_id)
            if message.metadata.dst_node_id in self._contexts:
                self._sent[message_id] = _isolated(message)
                accepted.append(message_id)
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the sites asked, each when the iterator comes to it; an unknown or pulled id yields nothing."""
        return (self._reply_to(self._sent.pop(one)) for one in message_ids if one in self._sent)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull; nothing waits here, so the timeout has no effect."""
        return self.pull_messages(self.push_messages(messages))

    def _reply_to(self, message: Message) -> Message:
        return answer(self._client_app, message, self._contexts[message.metadata.dst_node_id])


def answer(client_app: ClientCall, message: Message, context: Context) -> Message:
    """Call a site's ClientApp; whatever goes wrong in it, only a constant text leaves.

    Flower's engines put the exception's text into the reply, and that text may hold patient data.
    """
    try:
        return _isolated(client_app(message, context))
    except Exception:
        logger.exception("the client app of node %d failed", context.node_id)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message)


def _isolated(message: Message) -> Message:
    """The message with metadata and records of its own; what cannot change, the arrays' values, it shares."""
    metadata = copy.copy(message.metadata)
    if message.has_error():
        return make_message(metadata, error=Error(message.error.code, FAILED))
    content = {name: _copied(record) for name, record in message.content.items()}
    return make_message(metadata, content=RecordDict(content))


def _copied(record: Any) -> Any:
    if not isinstance(record, ArrayRecord):
        return copy.deepcopy(record)
    copied = ArrayRecord()  # which, given them all at once, would write each
    for name, array in record.items():
        copied[name] = array.again() if isinstance(array, Unwritten) else _again(array)
    return copied


def _again(array: Array) -> Array:
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
