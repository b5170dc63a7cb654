"""The ClientApp: opens the site, asks for an answer, lets nothing else out.

Flower would send an exception's text to the coordinator, so no exception leaves this module: a failure
becomes a code of the closed list and the number under which the site's own log holds the cause.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
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

logger = logging.getLogger(f"clipward.{__name__}")
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
    """The folder of the site that this node is.

    A deployed node is told by its operator (node setting ``site``). A simulated one takes its place in the
    sorted sub-folders of the run setting ``sites``.
    """
    if "site" in context.node_config:
        return Path(str(context.node_config["site"]))
    folders = site_folders(Path(str(context.run_config["sites"])))
    return folders[int(context.node_config["partition-id"])]


def site_folders(root: Path) -> list[Path]:
    """The sub-folders of ``root`` that hold a site, by name."""
    return sorted(path.parent for path in root.glob(f"*/{SITE_FILE}"))


def _answered(
    message: Message,
    context: Context,
    expected: type[T],
    answer: Callable[[Site, T], SiteFacts | Installed | Release],
) -> Message:
    name = "unknown"
    try:
        site = Site.open(site_folder(context))
        name = site.name
        content = encode(answer(site, require(decode(message.content), expected)))
    except Refused as refused:
        content = _refusal(name, refused.code, refused)
    except MessageError as error:
        content = _refusal(name, RefusalCode.MESSAGE, error)
    except Exception as error:
        content = _refusal(name, RefusalCode.FAILED, error)
    return Message(content, reply_to=message)


def _refusal(site: str, code: RefusalCode, cause: Exception) -> RecordDict:
    incident = uuid4().hex[:8]
    # The traceback may quote files and values: it goes to the site's own log, at a level nobody forwards.
    logger.warning("refused with code %s, incident %s", code, incident)
    logging.getLogger("clipward.site").error("incident %s", incident, exc_info=cause)
    return encode(Refusal(site=site, code=code, incident=incident))
