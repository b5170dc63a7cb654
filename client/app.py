"""The ClientApp: opens the site, asks for an answer, lets nothing else out.

Flower would send an exception's text to the coordinator, so no exception leaves this module: a failure
becomes a code of the closed list and the number under which the site's own log holds the cause.
"""

import logging
import os
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answers import answer_hello, answer_install, answer_train
from client.errors import Refused
from client.site import SITE_FILE, Site
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
    encode,
    require,
)
from strategies.settings import SettingsError

logger = logging.getLogger(f"clipward.{__name__}")
LOG_FILE = "site.log"
UNKNOWN = "unknown"  # a site whose settings cannot be read
T = TypeVar("T", Hello, PublicBundle, TrainRequest)

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who the site is."""
    return _answered(message, context, Hello, answer_hello)


@app.query("install")
def install(message: Message, context: Context) -> Message:
    """Take a public bundle."""
    return _answered(message, context, PublicBundle, answer_install)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return _answered(message, context, TrainRequest, answer_train)


def site_folder(context: Context) -> Path:
    """The folder of the site that this node is, as an absolute path: what is kept in memory goes by it.

    A deployed node is told by its operator (node setting ``site``). A simulated one takes its place in the
    sorted sub-folders of the run setting ``sites``.

    Raises:
        SettingsError: there are fewer sites than nodes.
    """
    if "site" in context.node_config:
        return Path(str(context.node_config["site"])).resolve()
    folders = site_folders(Path(str(context.run_config["sites"])).resolve())
    number = int(context.node_config["partition-id"])
    if number >= len(folders):
        raise SettingsError(
            f"node {number + 1} of the simulation has no site: the run setting 'sites' names a folder with "
            f"{len(folders)} of them; start as many nodes"
        )
    return folders[number]


def site_folders(root: Path) -> list[Path]:
    """The sub-folders of ``root`` that hold a site, by name."""
    return sorted(path.parent for path in root.glob(f"*/{SITE_FILE}"))


def _answered(
    message: Message,
    context: Context,
    expected: type[T],
    answer: Callable[[Site, T], SiteFacts | Installed | Release],
) -> Message:
    folder, name = None, UNKNOWN
    try:
        folder = site_folder(context)
        site = Site.open(folder)
        name = site.name
        content = encode(answer(site, require(decode(message.content), expected)))
    except Exception as error:
        content = encode(_refusal(folder, name, error))
    return Message(content, reply_to=message)


def _refusal(folder: Path | None, name: str, cause: Exception) -> Refusal:
    """The public half of a failure; the other half goes into the site's own log."""
    match cause:
        case Refused(code=code):
            pass
        case MessageError():
            code = RefusalCode.MESSAGE
        case _:
            code = RefusalCode.FAILED
    incident = uuid4().hex[:8]
    logger.warning("%s refused with code %s; its %s says why: incident %s", name, code, LOG_FILE, incident)
    if folder is None:
        logger.warning(
            "incident %s: this node is no site: %s", incident, cause
        )  # and opened no patient's file
    else:
        _log_locally(folder / LOG_FILE, incident, code, cause)
    return Refusal(site=name, code=code, incident=incident)


def _log_locally(path: Path, incident: str, code: RefusalCode, cause: Exception) -> None:
    """Append the whole cause to the site's own log, which only its owner may read: it may quote anything."""
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    trace = "".join(traceback.format_exception(cause))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{moment} incident {incident} code {code}\n{trace}\n")
    except OSError as error:  # its text names the folder, and must not be what leaves instead of the code
        logger.warning("incident %s could not be written to %s: %s", incident, path.name, error.strerror)
