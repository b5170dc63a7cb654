"""Every name taken from Flower's private modules, in one place; each has a contract test.

Flower promises nothing about these between minor versions, so ``flwr`` is pinned to one and an upgrade starts
with ``tests/strategies/test_flower_compat.py``.
"""

import os

from flwr.app import Message
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from strategies.offline import OFFLINE

__all__ = ["ErrorCode", "Run", "act_as_coordinator", "make_message", "stamp", "stay_offline"]


def stay_offline() -> None:
    """Keep Flower and Ray from calling home and from writing to the user's home, here and in child processes.

    Flower reads its telemetry switch when it is imported, and writes an identifier into the home directory
    even when switched off; so the module that is already loaded is told too.
    """
    os.environ.update(OFFLINE)
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    telemetry.state["source"] = "unavailable"


def act_as_coordinator(run_id: int) -> None:
    """Give this process the identity that ``Message`` writes into what it sends, as Flower's engines do."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 0


def stamp(message: Message, message_id: str) -> None:
    """Set a message's id, as Flower's own grids do on sending; there is no setter."""
    message.metadata.__dict__["_message_id"] = message_id
