"""What reading an input has found, as text to keep: JSON of the outcome, and back."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from client.cohort.outcomes import Code, Rejected, State
from client.cohort.sources import Candidate
from client.reports.report import Report, Status

Outcome = Candidate | Report | Rejected

_KINDS: dict[str, type[Outcome]] = {"image": Candidate, "report": Report, "rejected": Rejected}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_FIELDS = {name: [field.name for field in fields(kind)] for name, kind in _KINDS.items()}
_FIELDS["image"].remove("path")  # where the archive is mounted is no fact about the image

# Changes with the fields, so that what another version of this program has kept is never misread.
LAYOUT = json.dumps(_FIELDS)


def encode(outcome: Outcome) -> str:
    """Return an outcome as JSON; all but an image's path."""
    name = _NAMES[type(outcome)]
    return json.dumps([name, [getattr(outcome, field) for field in _FIELDS[name]]])


def decode(text: str, path: Path) -> Outcome:
    """Return what ``encode`` was given, of the image at ``path``."""
    name, values = json.loads(text)
    known: dict[str, Any] = dict(zip(_FIELDS[name], values, strict=True))
    if name == "rejected":
        return Rejected(State(known["state"]), Code[known["code"]], known["detail"])
    known["remarks"] = codes(known["remarks"])
    if name == "report":
        return Report(**known | {"status": Status(known["status"])})
    return Candidate(path=path, **known)


def codes(names: list[str]) -> tuple[Code, ...]:
    """Return codes by their names."""
    return tuple(Code[name] for name in names)
