"""What a site writes down for its own people alone: `site.log`, and `refusals.jsonl`, which counts refusals.

Both lie in the site's folder and only their owner may read them. The log may quote anything, patients
included. A line of ``refusals.jsonl`` is made of closed lists and numbers: a hospital's own monitoring
can count it by code and rule without reading a log.
"""

import json
import logging
import os
import traceback
from datetime import UTC, datetime
from pathlib import Path

from client.errors import Refused
from strategies.messages import RefusalCode

logger = logging.getLogger(f"clipward.{__name__}")
LOG_FILE = "site.log"
REFUSALS_FILE = "refusals.jsonl"
VERSION = 1


def write_refusal(folder: Path, incident: str, code: RefusalCode, cause: Exception) -> None:
    """Keep the whole cause of a refusal, and count it."""
    rule = cause.rule if isinstance(cause, Refused) else None
    moment = _now()
    headline = f"{moment} incident {incident} code {code}" + (f" rule policy.{rule}" if rule else "")
    trace = "".join(traceback.format_exception(cause))
    _append(folder / LOG_FILE, f"{headline}\n{trace}\n", what=f"incident {incident}")
    line = {"version": VERSION, "time": moment, "incident": incident, "code": code, "rule": rule}
    _append(folder / REFUSALS_FILE, json.dumps(line) + "\n", what=f"incident {incident}")


def write_note(folder: Path, text: str) -> None:
    """Tell the hospital's people something that is no refusal."""
    _append(folder / LOG_FILE, f"{_now()} note: {text}\n\n", what="a note")


def _append(path: Path, text: str, *, what: str) -> None:
    """Append in one write, so that lines of two processes never mix."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab", buffering=0) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:  # its text names the folder, and must not be what leaves instead of the code
        logger.warning("%s could not be written to %s: %s", what, path.name, error.strerror)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
