"""The ClientApp: opens the site, asks for an answer, lets nothing else out.

Flower would send an exception's text to the coordinator, so no exception leaves this module: a failure
becomes a code of the closed list and the number under which the site's own log holds the cause.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answers import answer_hello, answer_install
from client.errors import Refused
from client.journal import LOG_FILE, write_refusal
from client.secure import answer_agree, answer_deal, answer_mask, answer_request, answer_unmask
from client.site import SITE_FILE, Site
from privacy.errors import LedgerError
from strategies.messages import (
    Agree,
    Deal,
    Hello,
    Mask,
    MessageError,
    PublicBundle,
    Refusal,
    RefusalCode,
    Said,
    TrainRequest,
    Unmask,
    decode,
    encode,
    require,
)
from strategies.secure_sum.errors import OutOfRange, SecureSumError, TermsRefused
from strategies.settings import SettingsError

logger = logging.getLogger(f"clipward.{__name__}")
UNKNOWN = "unknown"  # a site whose settings cannot be read
T = TypeVar("T", Hello, PublicBundle, TrainRequest, Deal, Mask, Agree, Unmask)

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
    return _answered(message, context, TrainRequest, answer_request)


@app.query("deal")
def deal(message: Message, context: Context) -> Message:
    """Begin to hide the release in a sum."""
    return _answered(message, context, Deal, answer_deal)


@app.query("mask")
def mask(message: Message, context: Context) -> Message:
    """Send the release under masks."""
    return _answered(message, context, Mask, answer_mask)


@app.query("consent")
def consent(message: Message, context: Context) -> Message:
    """Agree to the sum."""
    return _answered(message, context, Agree, answer_agree)


@app.query("reveal")
def reveal(message: Message, context: Context) -> Message:
    """Unmask the sum."""
    return _answered(message, context, Unmask, answer_unmask)


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
    answer: Callable[[Site, T], Said],
) -> Message:
    folder, name = None, UNKNOWN
    try:
        folder = site_folder(context)
        site = Site.open(folder)
        name = site.name
        content = encode(answer(site, require(decode(message.content), expected)))
    except Exception as error:
        refusal = _refusal(folder, name, error)
    else:
        return Message(content, reply_to=message)
    return Message(encode(refusal), reply_to=message)  # out here, what fails no longer quotes the cause


def _refusal(folder: Path | None, name: str, cause: Exception) -> Refusal:
    """The public half of a failure; the other half goes into the site's own log."""
    match cause:
        case Refused(code=code):
            pass
        case TermsRefused() | OutOfRange():
            code = RefusalCode.POLICY
        case MessageError() | SecureSumError():
            code = RefusalCode.MESSAGE
        case LedgerError():
            code = RefusalCode.LEDGER
        case _:
            code = RefusalCode.FAILED
    incident = uuid4().hex[:8]
    logger.warning("%s refused with code %s; its %s says why: incident %s", name, code, LOG_FILE, incident)
    if folder is None:
        logger.warning(
            "incident %s: this node is no site: %s", incident, cause
        )  # and opened no patient's file
    else:
        try:
            write_refusal(folder, incident, code, cause)
        except Exception as error:  # whatever it is, it may quote the cause: its kind has to do
            logger.warning("incident %s could not be written down: %s", incident, type(error).__name__)
    return Refusal(site=name, code=code, incident=incident)
