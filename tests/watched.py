"""A federation of hospitals full of markers, with every way out of them watched."""

import csv
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from prometheus_client import generate_latest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from typer.testing import CliRunner

import client.app
from client.site import Site, packed_cohort
from client.workbench import anchors_of, part_of, training_data
from clipward import backends, cli
from server.metrics import PrometheusExporter, read_events
from strategies.in_process import InProcessGrid
from tests.small_hospitals import PATIENTS

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

# What is another number in every run of the same data: clocks, and what is drawn for a ledger's rows.
FRESH = {"deadline_unix_seconds", "head", "signature", "key"}

Place = tuple[str, bytes]


@dataclass
class Outside:
    """All that can be seen from outside of the hospitals, which lie in ``root/hospitals``."""

    root: Path
    messages: list[Message] = field(default_factory=list)
    logged: list[logging.LogRecord] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    printed: str = ""

    def run(self) -> int:
        command = ["--verbose", "simulate", "federation.toml", "--metrics-port", "0"]
        result = CliRunner().invoke(cli.app, command)
        self.printed += result.output
        return result.exit_code

    @property
    def replies(self) -> list[Message]:
        return [message for message in self.messages if message.metadata.src_node_id]

    def events(self, kind: str) -> list[dict[str, Any]]:
        events = read_events(self.root / "runs" / "small" / "metrics.jsonl")
        return [event for event in events if event["kind"] == kind]

    def codes(self) -> dict[int, str]:
        """Refusals by round, of the one site that refuses here."""
        return {event["round"]: event["code"] for event in self.events("site_refused")}

    def leaks(self, markers: Mapping[str, str] = MARKERS) -> list[str]:
        """Where a marker is found, and which."""
        wanted = {kind: marker.lower().encode() for kind, marker in markers.items()}
        return [
            f"{kind} in {place}"
            for place, content in self.places()
            for kind, marker in wanted.items()
            if marker in content
        ]

    def places(self) -> Iterator[Place]:
        """All there is outside, in lower case."""
        yield from ((place, content.lower()) for place, content in self._places())

    def _places(self) -> Iterator[Place]:
        for number, message in enumerate(self.messages):
            yield from ((f"message {number}", content) for content in contents(message))
        for path in self.root.rglob("*"):
            inside = path.relative_to(self.root)
            if inside.parts[0] == "hospitals":
                continue
            yield "a name of a file", str(inside).encode()
            if path.is_file():
                yield str(inside), path.read_bytes()
        yield "what was printed", self.printed.encode()
        yield "the log", "\n".join(map(logging.Formatter().format, self.logged)).encode()
        yield from (("/metrics", page) for page in self.pages)

    def story(self) -> list[str]:
        """What a site's messages, the run's events and the log say; of arrays only how large they are.

        Equal stories are equal byte for byte, but for `FRESH`.
        """
        said = [line for message in self.messages for line in _told(message)]
        events = [
            json.dumps(_masked(event, FRESH | {"time"}))
            for kind in ("site_replied", "site_refused", "round_started")
            for event in self.events(kind)
        ]
        sites = ("clipward.client", "clipward.privacy", "clipward.strategies")
        logged = [record.getMessage() for record in self.logged if record.name.startswith(sites)]
        return [*said, *events, *logged]

    def forget(self) -> None:
        """Begin anew: the same hospitals with no past, and nothing seen yet."""
        for folder in self.root.glob("hospitals/*"):
            for kept in ("releases", "bundles", "cohort"):
                shutil.rmtree(folder / kept, ignore_errors=True)
            for file in ("ledger.sqlite", "site.key", "site.pub", "site.log", "refusals.jsonl"):
                (folder / file).unlink(missing_ok=True)
        shutil.rmtree(self.root / "runs", ignore_errors=True)
        for seen in (self.messages, self.logged, self.pages):
            seen.clear()
        forget_memory()


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


def _told(message: Message) -> Iterator[str]:
    metadata = message.metadata
    yield f"{metadata.src_node_id} to {metadata.dst_node_id}: {metadata.message_type} {metadata.group_id}"
    if message.has_error():
        yield f"error {message.error.code} {message.error.reason}"
        return
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord) and set(record) == {"sha256"}:
            yield f"{name} of the arrays"  # follows from them
        elif isinstance(record, ArrayRecord):
            yield from (
                f"{name}/{key} {array.dtype}{array.shape} {len(array.data)}" for key, array in record.items()
            )
        elif isinstance(record, ConfigRecord):
            facts = _masked(json.loads(str(record["json"])), FRESH)
            yield f"{name} {json.dumps({**record, 'json': facts})}"
        else:
            yield f"{name} {dict(record)}"


def _masked(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: "…" if key in names else _masked(item, names) for key, item in value.items()}
    return value


def forget_memory() -> None:
    """Drop what the process keeps between rounds, so that every layer works again."""
    for cache in (packed_cohort, part_of, training_data, anchors_of):
        cache.cache_clear()


def watching(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    """Watch messages, log, metrics page, print and the process's own folder, which is ``root``."""
    seen = Outside(root)

    class Watched(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            sent = list(messages)
            seen.messages += sent
            return super().push_messages(sent)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                seen.messages.append(reply)
                yield reply

    def close(exporter: PrometheusExporter) -> None:
        seen.pages.append(generate_latest(exporter.registry))
        closed(exporter)

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = factory(*args, **kwargs)
        seen.logged.append(made)
        return made

    closed, factory = PrometheusExporter.close, logging.getLogRecordFactory()
    logger = logging.getLogger()
    handlers, level = logger.handlers.copy(), logger.level
    (root / "tmp").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("TMPDIR", str(root / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(backends, "InProcessGrid", Watched)
    monkeypatch.setattr(PrometheusExporter, "close", close)
    logging.setLogRecordFactory(record)
    forget_memory()
    yield seen
    logging.setLogRecordFactory(factory)
    logger.handlers[:] = handlers
    logger.setLevel(level)


class At:
    """Makes functions fail, or do what they should not, at one site and in one round each."""

    def __init__(self, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._site, self._monkeypatch = site, monkeypatch
        self._fresh: set[int] = set()
        self._now = ("", 0)
        answer: Callable[..., Any] = vars(client.app)["answer_request"]

        def noticing(site: Site, request: Any) -> Any:
            self._now = (site.name, request.server_round)
            if site.name == self._site and request.server_round in self._fresh:
                shutil.rmtree(site.folder / "cohort", ignore_errors=True)
                forget_memory()
            return answer(site, request)

        monkeypatch.setattr(client.app, "answer_request", noticing)

    def put(
        self, owner: Any, name: str, other: Callable[..., Any], *, server_round: int = 1, fresh: bool = False
    ) -> None:
        """Call ``other`` with the original and its arguments, instead of the original.

        Where it is ``fresh``, the cohort is packed anew and the process's memory dropped before that round.
        """
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if self._now == (self._site, server_round):
                return other(original, *args, **kwargs)
            return original(*args, **kwargs)

        if fresh:
            self._fresh.add(server_round)
        self._monkeypatch.setattr(owner, name, replaced)


def raising(error: Exception) -> Callable[..., Any]:
    def failure(*_: Any, **__: Any) -> Any:
        raise error

    return failure


def write_hospital(
    folder: Path, name: str, *, patients: int = PATIENTS, studies: int = 1, seed: int = 0
) -> None:
    """Patients with a marker in every field that could name them; two files are broken.

    The declared size is always the same, whatever ``patients`` is.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    rows = [("accession_number", "study_instance_uid", "patient_id", "report")]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "dicom").mkdir(parents=True)
    for number in range(patients * studies):
        image = _image(number // studies, number, name, rng)
        path = folder / "dicom" / f"{image.PatientID}-{number}.dcm"
        image.save_as(path, enforce_file_format=True)
        size = rng.integers(1, 99)
        report = f"FINDINGS: A {PHRASE} at {size} cm. IMPRESSION: {PHRASE.capitalize()}, grade {number}."
        rows.append((image.AccessionNumber, image.StudyInstanceUID, image.PatientID, report))
    first = folder / "dicom" / f"{MARKERS['patient id']}-0-0.dcm"
    data = first.read_bytes()  # a date that is none makes readers complain, and complaints quote
    first.write_bytes(data.replace(MARKERS["date"].encode(), b"MRN-7719"))
    (folder / "dicom" / f"{EVERYTHING}.dcm").write_text(EVERYTHING)
    with (folder / "reports.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    write_site(folder, name, dicom="dicom", reports="reports.csv")


def write_site(folder: Path, name: str, *, dicom: str, reports: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.toml").write_text(
        f'version = 1\nname = "{name}"\n'
        f'[cohort]\ndicom = "{dicom}"\nreports = "{reports}"\npatients-declared = {PATIENTS}\n'
        f'image-size = 32\nsalt = "{name}"\n[policy]\n'
        "min-patients = 10\n[device]\nthreads = 1\n"
    )


def _image(patient: int, number: int, name: str, rng: np.random.Generator) -> Dataset:
    image = Dataset()
    image.SOPClassUID = ComputedRadiographyImageStorage
    image.StudyInstanceUID = f"{MARKERS['uid']}.{number}"
    image.SOPInstanceUID = f"{image.StudyInstanceUID}.1"
    image.PatientName = f"{MARKERS['patient name']}^{name}"
    image.PatientID = f"{MARKERS['patient id']}-{patient}"
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
    return image
