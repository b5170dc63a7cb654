"""What every kind of source offers; a new kind is one class more."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from client.cohort.archives import container
from client.cohort.errors import SourceMissingError
from client.cohort.outcomes import Code, Rejected, Rendered
from client.reports.report import Report

T = TypeVar("T")
R = TypeVar("R")


class OrderedMap(Protocol):
    """The built-in ``map`` over one iterable, perhaps in other processes.

    A call that takes its process down or never ends yields a ``Rejected`` in its place.
    """

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R | Rejected]:
        """Yield ``function(item)`` for every item, in order."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Candidate:
    """An image that becomes a row if a text belongs to it.

    Attributes:
        path: Where the image lies.
        patient: The patient's id as the source has it; may be empty.
        study: What groups the images of one examination.
        keys: Values by which reports and labels are found: ``accession_number``, ``issuer`` of it,
            ``study_instance_uid``, ``study_id``, ``image``.
        uid: What makes the image itself unique.
        text: The report, where the source brings it along.
        header: What the image's header says of people, places, days and numbers, by DICOM keyword: its report
            must not repeat it.
        text_rule: Which part of the report became the training text.
        masked: What was taken out of the training text, hits by kind.
        labels: Finding to value; NaN is unknown.
        read_labels: The same, read from the training text.
        is_test: The split where the source fixes it.
        remarks: Noted while reading.
    """

    path: Path
    patient: str
    study: str
    keys: Mapping[str, str]
    uid: str
    text: str | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    text_rule: str = ""
    masked: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    read_labels: Mapping[str, float] = field(default_factory=dict)
    is_test: bool | None = None
    remarks: tuple[Code, ...] = ()


@dataclass(frozen=True, repr=False)
class Entry:
    """One input by its name, and what is known of it so far."""

    name: str
    outcome: Candidate | Report | Rejected


class Source(Protocol):
    """Where a site's images come from."""

    def __len__(self) -> int:
        """Return the number of inputs."""
        ...

    def stamps(self) -> Iterable[str]:
        """Yield name, size and modification time of every file the cohort depends on."""
        ...

    def may_end_process(self) -> bool:
        """Return whether an image may need a decoder that takes its process down with it."""
        ...

    def scan(self, ordered_map: OrderedMap) -> Iterable[Entry]:
        """Yield one entry per input, in a fixed order, from headers alone."""
        ...

    def renderer(self, size: int) -> Callable[[Path], Rendered | Rejected]:
        """Return what reads one image as it is packed; it goes to other processes, so it carries little."""
        ...


def stamp(path: Path, name: str) -> str:
    """Return what tells one state of a file, or of the zip it is in, from another without reading it.

    Raises:
        SourceMissingError: There is no such file.
    """
    try:
        status = os.stat(container(path))
    except OSError as error:
        raise SourceMissingError(f"expected the file {path}: {error.strerror}") from error
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}"
