"""A run over real small hospitals in this process, to be listened to, disturbed and resumed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from client import answers
from client.app import app
from client.site import Site
from server.metrics import Event, RunLog, read_events
from server.rounds import Start, run_rounds
from server.start import Prepared, prepare_from_settings, start_of
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, TrainRequest
from tests.small_hospitals import federation


class Run:
    """A run over the hospitals below a folder."""

    def __init__(self, root: Path, *, folder: str = "run", **changes: Any) -> None:
        self.folders = sorted((root / "hospitals").iterdir())
        self.run_dir = root / folder
        self.settings = federation(root, **changes)

    @cached_property
    def prepared(self) -> Prepared:
        return prepare_from_settings(self.settings)

    @property
    def start(self) -> Start:
        return start_of(self.settings, self.prepared)

    def grid(self) -> InProcessGrid:
        return InProcessGrid(app, [{"site": str(folder)} for folder in self.folders])

    def go(self, *, resume: bool = False, grid: Any = None) -> Arrays:
        return run_rounds(
            grid or self.grid(),
            self.settings,
            run_dir=self.run_dir,
            start=self.start,
            evaluate=lambda _: None,
            log=RunLog(self.run_dir / "metrics.jsonl"),
            resume=resume,
        )

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_events(self.run_dir / "metrics.jsonl") if event["kind"] == kind]

    def site(self, name: str = "site-1") -> Site:
        (folder,) = [folder for folder in self.folders if folder.name == name]
        return Site.open(folder)

    def charges(self, name: str = "site-1") -> list[tuple[str, str | None]]:
        """Kind and outcome of all that the site's ledger was charged with."""
        return [(charge.request.kind, charge.outcome) for charge in self.site(name).ledger().charges()]


def heard(monkeypatch: pytest.MonkeyPatch) -> list[TrainRequest]:
    """All requests that sites are sent from now on."""
    asked: list[TrainRequest] = []
    answer = answers.answer_train

    def listening(site: Site, request: TrainRequest) -> Any:
        asked.append(request)
        return answer(site, request)

    monkeypatch.setattr("client.app.answer_request", listening)
    return asked
