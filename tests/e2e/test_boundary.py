"""Nothing of a patient leaves a hospital's folder, whatever fails on the way.

The hospitals' files hold marker strings wherever a patient could be recognised. A whole run is then searched
for them: every message, every file of the run, the metrics page, all that was printed or logged.
"""

import csv
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from prometheus_client import generate_latest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from typer.testing import CliRunner

import client.app
from client import answers
from client.cohort import SourceMissingError
from client.site import Site
from clipward import backends, cli
from encoders.errors import EncoderError
from server.metrics import PrometheusExporter, read_events
from strategies.in_process import InProcessGrid
from strategies.messages import (
    Arrays,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    decode,
)
from tests.small_hospitals import PATIENTS, ROUNDS, change_site, write_federation

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PHRASE = "zyxwolfian opacity"
MARKERS = {
    "patient name": "Wolframzyx",
    "patient id": "MRN-7719",
    "uid": "1.2.826.0.99.7719",
    "accession number": "ACCZ7719",
    "report": PHRASE,
    "date": "19430717",
    "folder": "st-zyx-7719",
}
EVERYTHING = " ".join(MARKERS.values())


@dataclass
class Outside:
    """All that can be seen from outside of the hospitals."""

    root: Path
    messages: list[Message] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    printed: str = ""

    def run(self) -> int:
        command = ["--verbose", "simulate", "federation.toml", "--metrics-port", "0"]
        result = CliRunner().invoke(cli.app, command)
        self.printed += result.output
        return result.exit_code

    def codes(self) -> set[str]:
        events = read_events(self.root / "runs" / "small" / "metrics.jsonl")
        return {event["code"] for event in events if event["kind"] == "site_refused"}

    def leaks(self) -> list[str]:
        """Where a marker is found, and which."""
        return [
            f"{kind} in {place}"
            for place, content in self.places()
            for kind, marker in MARKERS.items()
            if marker.lower().encode() in content.lower()
        ]

    def places(self) -> Iterator[tuple[str, bytes]]:
        for number, message in enumerate([*self.messages, *self.replies]):
            yield from ((f"message {number}", content) for content in contents(message))
        for path in (self.root / "runs").rglob("*"):
            yield "a name in the run's folder", str(path.relative_to(self.root)).encode()
            if path.is_file():
                yield str(path.relative_to(self.root)), path.read_bytes()
        yield "what was printed", self.printed.encode()
        yield "the log", "\n".join(self.logged).encode()
        yield from (("/metrics", page) for page in self.pages)


def contents(message: Message) -> Iterable[bytes]:
    """Everything in a message, arrays byte for byte."""
    yield str(message.metadata).encode()
    if message.has_error():
        yield str(message.error.reason).encode()
        return
    for name, record in message.content.items():
        yield name.encode()
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                yield key.encode() + array.data
        else:
            yield str(dict(record)).encode()


@pytest.fixture
def outside(made_hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    """Two hospitals full of markers, and every way out of them watched."""
    seen = Outside(tmp_path)
    (tmp_path / "micro").symlink_to(made_hospitals / "micro")
    for name in ("north", "south"):
        write_hospital(tmp_path / "hospitals" / f"{MARKERS['folder']}-{name}", name)
    write_federation(tmp_path, strategy={"min-sites": 1})

    class Watched(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            sent = list(messages)
            seen.messages += sent
            return super().push_messages(sent)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                seen.replies.append(reply)
                yield reply

    def close(exporter: PrometheusExporter) -> None:
        seen.pages.append(generate_latest(exporter.registry))
        closed(exporter)

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = factory(*args, **kwargs)
        seen.logged.append(logging.Formatter().format(made))
        return made

    closed, factory = PrometheusExporter.close, logging.getLogRecordFactory()
    root = logging.getLogger()
    handlers, level = root.handlers.copy(), root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "InProcessGrid", Watched)
    monkeypatch.setattr(PrometheusExporter, "close", close)
    logging.setLogRecordFactory(record)
    yield seen
    logging.setLogRecordFactory(factory)
    root.handlers[:] = handlers
    root.setLevel(level)


def write_hospital(folder: Path, name: str) -> None:
    """Twenty-five patients with a marker in every field that could name them; two files are broken."""
    rng = np.random.default_rng(len(name) + ord(name[0]))
    rows = [("accession_number", "study_instance_uid", "patient_id", "report")]
    (folder / "dicom").mkdir(parents=True)
    for number in range(PATIENTS):
        image = Dataset()
        image.SOPClassUID = ComputedRadiographyImageStorage
        image.StudyInstanceUID = f"{MARKERS['uid']}.{number}"
        image.SOPInstanceUID = f"{image.StudyInstanceUID}.1"
        image.PatientName = f"{MARKERS['patient name']}^{name}"
        image.PatientID = f"{MARKERS['patient id']}-{number}"
        image.PatientBirthDate = image.StudyDate = MARKERS["date"]
        image.AccessionNumber = f"{MARKERS['accession number']}{number}"
        image.ViewPosition, image.BurnedInAnnotation = "PA", "NO"
        image.PhotometricInterpretation, image.SamplesPerPixel = "MONOCHROME2", 1
        image.Rows = image.Columns = 32
        image.BitsAllocated = image.BitsStored = 8
        image.HighBit, image.PixelRepresentation = 7, 0
        image.PixelData = rng.integers(0, 256, size=(32, 32), dtype=np.uint8).tobytes()
        image["PixelData"].VR = "OB"
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(folder / "dicom" / f"{image.PatientID}.dcm", enforce_file_format=True)
        report = f"FINDINGS: A {PHRASE} at {number} cm. IMPRESSION: {PHRASE.capitalize()}, grade {number}."
        rows.append((image.AccessionNumber, image.StudyInstanceUID, image.PatientID, report))
    first = folder / "dicom" / f"{MARKERS['patient id']}-0.dcm"
    data = first.read_bytes()  # a date that is none makes readers complain, and complaints quote
    first.write_bytes(data.replace(MARKERS["date"].encode(), b"MRN-7719"))
    (folder / "dicom" / f"{EVERYTHING}.dcm").write_text(EVERYTHING)
    with (folder / "reports.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "site.toml").write_text(
        f'version = 1\nname = "{name}"\n'
        f'[cohort]\ndicom = "dicom"\nreports = "reports.csv"\npatients-declared = {PATIENTS}\n'
        "image-size = 32\n[policy]\nmin-patients = 10\n[device]\nthreads = 1\n"
    )


def hospital(outside: Outside, name: str) -> Path:
    return outside.root / "hospitals" / f"{MARKERS['folder']}-{name}"


def at_south(monkeypatch: pytest.MonkeyPatch, name: str, failure: Callable[[], Any]) -> None:
    """Replace a function of the site's answers by one that fails at one of the two sites."""
    original: Callable[..., Any] = vars(answers)[name]
    of_south: list[bool] = [False]
    train: Callable[..., Any] = vars(client.app)["answer_train"]

    def noticing(site: Site, request: Any) -> Any:
        of_south[0] = site.name == "south"
        return train(site, request)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return failure() if of_south[0] else original(*args, **kwargs)

    monkeypatch.setattr(client.app, "answer_train", noticing)
    monkeypatch.setattr(answers, name, replaced)


def raising(error: Exception) -> Callable[[], Any]:
    def failure() -> Any:
        raise error

    return failure


def not_a_number() -> Arrays:
    return {
        name: np.full((8, 16), np.nan, dtype=np.float32)
        for name in ("text_projection.weight", "visual_projection.weight")
    }


def test_the_hospitals_really_hold_the_markers(outside: Outside) -> None:
    """Else a clean search would prove nothing; packed text is what training sees."""
    cohort = Site.open(hospital(outside, "south")).cohort()
    assert len(cohort) == PATIENTS
    assert all(PHRASE in text.lower() for text in cohort.texts)


def test_a_run_without_failures_lets_nothing_out(outside: Outside) -> None:
    assert outside.run() == 0
    assert outside.codes() == set()
    assert outside.leaks() == []
    kinds = {type(decode(reply.content)).__name__ for reply in outside.replies}
    assert kinds == {"SiteFacts", "Installed", "Release"}
    assert any("clipward_epsilon_spent" in page.decode() for page in outside.pages)


@pytest.mark.parametrize(
    ("where", "failure", "code"),
    [
        ("packed_cohort", raising(SourceMissingError(f"expected the table {EVERYTHING}")), "cohort"),
        ("packed_cohort", raising(OSError(5, "Input/output error", EVERYTHING)), "failed"),
        ("part_of", raising(EncoderError(EVERYTHING)), "model"),
        ("part_of", raising(RuntimeError(f"CUDA out of memory while encoding {EVERYTHING}")), "failed"),
        ("anchors_of", raising(ValueError(EVERYTHING)), "failed"),
        ("training_data", raising(KeyError(EVERYTHING)), "failed"),
        ("train_privately", raising(RuntimeError(EVERYTHING)), "failed"),
        ("mechanism_for", raising(ArithmeticError(EVERYTHING)), "failed"),
        ("train_privately", not_a_number, "message"),
    ],
)
def test_a_failure_in_any_layer_lets_out_a_code_and_nothing_else(
    where: str, failure: Callable[[], Any], code: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_south(monkeypatch, where, failure)
    assert outside.run() == 0
    assert outside.codes() == {code}
    assert outside.leaks() == []
    if code != "message":  # which is the coordinator's, so there is no cause at the site
        assert PHRASE in (hospital(outside, "south") / "site.log").read_text()
    assert not (hospital(outside, "north") / "site.log").exists()


def test_a_ledger_that_is_locked_lets_nothing_out(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger._LOCK_TIMEOUT_SECONDS", 0.05)
    Site.open(hospital(outside, "south")).ledger()
    with closing(
        sqlite3.connect(hospital(outside, "south") / "ledger.sqlite", isolation_level=None)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert outside.run() == 0
    assert outside.codes() == {"failed"}
    assert outside.leaks() == []
    assert "database is locked" in (hospital(outside, "south") / "site.log").read_text()


def test_a_ledger_that_was_tampered_with_lets_nothing_out(outside: Outside) -> None:
    path = hospital(outside, "south") / "ledger.sqlite"
    Site.open(path.parent).ledger()
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"OPENED"'))
    assert outside.run() == 0
    assert outside.codes() == {"ledger"}
    assert outside.leaks() == []
    assert "LedgerTampered" in (path.parent / "site.log").read_text()


def test_a_site_file_that_breaks_during_the_run_lets_nothing_out(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it() -> Any:
        change_site(hospital(outside, "south"), policy={EVERYTHING: 1})
        raise RuntimeError(EVERYTHING)

    at_south(monkeypatch, "train_privately", break_it)
    assert outside.run() == 0
    assert outside.codes() == {"failed"}
    assert outside.leaks() == []
    assert "unknown key" in (hospital(outside, "south") / "site.log").read_text()


def test_the_search_finds_an_answer_that_quotes_its_cause(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: an exception's text where its number belongs."""

    def quoting(folder: Path | None, name: str, cause: Exception) -> Refusal:
        return Refusal(site=name, code=RefusalCode.FAILED, incident=str(cause)[:60])

    at_south(monkeypatch, "train_privately", raising(RuntimeError(EVERYTHING)))
    monkeypatch.setattr(client.app, "_refusal", quoting)
    assert outside.run() == 0
    leaks = "\n".join(outside.leaks())
    assert "patient name in message" in leaks
    assert "patient name in runs/small/metrics.jsonl" in leaks
    assert "patient name in what was printed" in leaks


def test_the_search_finds_a_name_in_the_log_and_in_arrays(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def telling() -> Any:
        logging.getLogger("clipward.client").warning("skipped %s", MARKERS["patient id"])
        name = np.frombuffer(MARKERS["patient name"][:8].encode(), dtype=np.float32)
        arrays = not_a_number()
        for value in arrays.values():
            value[:] = 0
            value.flat[: len(name)] = name
        return arrays

    monkeypatch.setitem(MARKERS, "patient name", MARKERS["patient name"][:8])
    at_south(monkeypatch, "train_privately", telling)
    outside.run()
    leaks = "\n".join(outside.leaks())
    assert "patient id in the log" in leaks
    assert "patient name in message" in leaks


def test_no_field_of_a_reply_tells_two_true_sizes_apart(outside: Outside) -> None:
    """Equal declared size, other patients and fewer of them: every public field is the same, byte for byte.

    Only the ledger's head differs, since each row of it is salted.
    """
    stories: list[list[tuple[str, int]]] = []
    for kept in (PATIENTS, PATIENTS - 10):
        folder = hospital(outside, "south")
        reports = (folder / "reports.csv").read_text().splitlines(keepends=True)
        (folder / "reports.csv").write_text("".join(reports[: kept + 1]))
        for name in ("ledger.sqlite", "releases", "bundles"):
            remove(folder / name)
        remove(outside.root / "runs" / "small")
        outside.replies.clear()
        assert outside.run() == 0
        assert len(np.unique(Site.open(folder).cohort().patients)) == kept
        stories.append([seen for reply in outside.replies if (seen := public(decode(reply.content), reply))])
    assert stories[0] == stories[1]
    assert len(stories[0]) == 1 + ROUNDS  # hello and every round


def public(said: object, reply: Message) -> tuple[str, int] | None:
    """What a reply of the smaller hospital shows, and how long it is."""
    length = sum(len(content) for content in contents(reply)) - len(str(reply.metadata).encode())
    if isinstance(said, SiteFacts) and said.site == "south":
        return said.model_dump_json(), length
    if isinstance(said, Release) and said.facts.site == "south":
        facts: ReleaseFacts = said.facts
        assert facts.anchor is not None
        hidden = {"head", "signature", "key"}
        return facts.model_dump_json(exclude={"anchor": hidden}), length
    return None


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
