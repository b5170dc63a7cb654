"""Packing a cohort: row by row into a folder of its own, which takes its place whole or not at all."""

import csv
import fcntl
import glob
import hmac
import io
import json
import math
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from client.cohort.errors import CohortError, EmptyCohortError, StoredCohortError, TooManyFailuresError
from client.cohort.index_file import INDEX, Index
from client.cohort.on_disk import FindingsOnDisk
from client.cohort.outcomes import Code, Rejected, State
from client.cohort.packed_images import IMAGES, KEYS, NO_KEY, PackedImages
from client.cohort.scan_index import SCAN, SCAN_FILES
from client.cohort.store import MANIFEST, QUARANTINE, VERSION
from client.cohort.tables import plain
from client.cohort.token_file import TOKENS, write_tokens
from client.text.keys import KEY_DIGITS, text_key
from strategies.files import sync

# Beside a lateral view, a note or a second copy, every input ought to become a row or a report.
FAILURES = frozenset({State.QUARANTINED, State.UNSUPPORTED, State.UNPAIRED})
_NO_FAULT = frozenset({State.IGNORED, State.DUPLICATE})

# An image may be taken over from a packing that was killed only if the disk has it for certain.
_BYTES_BETWEEN_SYNCS = 64 * 2**20
_INDEX_BEFORE = "index.npz"  # of cohorts before version 4, which give way to a new one
_FILES = {IMAGES, KEYS, INDEX, TOKENS, _INDEX_BEFORE, MANIFEST, QUARANTINE, *SCAN_FILES}
_DIGEST_BYTES, _PSEUDONYM_BYTES = 16, 32


@dataclass(frozen=True, kw_only=True, repr=False)
class Row:
    """What a row says beside its image.

    Attributes:
        text: The training text.
        text_rule: Which part of the report gave it.
        patient: Pseudonym of the patient, of 32 bytes at most.
        study: Pseudonym of the study, unlike that of any other patient's study.
        is_test: Whether the patient is held out.
        masked: What was taken out of the text, hits by kind.
        labels: Finding to value; absent and NaN are unknown.
        read_labels: The same, read from the text: for findings of which ``labels`` says nothing in any row.
    """

    text: str
    text_rule: str = ""
    masked: Mapping[str, int] = field(default_factory=dict)
    patient: bytes
    study: bytes
    is_test: bool
    labels: Mapping[str, float]
    read_labels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class About:
    """What the manifest says beside what was counted; see ``Cohort``."""

    pipeline: int
    rules: str
    fingerprint: str
    unpaired_reports: int
    unknown_merges: int = 0


class CohortWriter:
    """A cohort in the making: a private folder beside ``out`` that takes its place when it is whole.

    A crash leaves the old cohort, or none, and a folder from which the next build takes what is packed. What
    is held in memory is some hundred bytes a row, texts and images not among them.
    """

    def __init__(self, out: Path, *, image_shape: tuple[int, ...], key: bytes) -> None:
        """Begin a cohort of images of shape (S, S) or (S, S, C); its identity is keyed with ``key``."""
        self._out = out
        self._image_shape = image_shape
        self._left = _left_behind(out)
        self.packed = PackedImages([out, *self._left], shape=image_shape)
        self._folder = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out.parent))  # mode 0700
        self._digest = hmac.new(key, digestmod="sha256")
        self._counts = Counter[State]()
        self._codes = Counter[Code]()
        self._findings = FindingsOnDisk()
        self._images, self._keys = _create(self._folder / IMAGES), _create(self._folder / KEYS)
        self._unsynced, self._key_buffer = 0, bytearray()
        self._columns = _Columns(self._folder)
        self._write_header()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and len(self._columns) and not self._images.closed:
            self._sync_images()
        for file in (self._images, self._keys):
            file.close()
        self._columns.close()
        self._findings.close()
        if error is None or not len(self._columns):
            shutil.rmtree(self._folder, ignore_errors=True)  # after ``finish`` there is none

    def add(
        self,
        name: str,
        row: Row,
        pixels: NDArray[np.uint8],
        remarks: Iterable[Code],
        key: bytes = NO_KEY,
    ) -> None:
        """Add an input as the next row, with its image.

        Args:
            name: The input's.
            row: What it says.
            pixels: Its image, of the cohort's shape.
            remarks: On the input.
            key: By which the next build finds the image again.
        """
        if pixels.shape != self._image_shape:
            raise ValueError(f"expected an image of shape {self._image_shape}, got {pixels.shape}")
        data = pixels.tobytes()
        self._digest.update(data)
        self._images.write(data)
        self._key_buffer += key or NO_KEY
        self._unsynced += len(data)
        if self._unsynced >= _BYTES_BETWEEN_SYNCS:
            self._sync_images()
        self._columns.add(row)
        self._note(name, State.USED, remarks)

    def take_report(self, name: str, remarks: Iterable[Code]) -> None:
        """Count an input that gave a report."""
        self._note(name, State.REPORT, remarks)

    def leave_out(self, name: str, rejected: Rejected) -> None:
        """Count an input that is no row, and list it with its reason."""
        self._counts[rejected.state] += 1
        self._codes[rejected.code] += 1
        self._findings.add((name, rejected.state, rejected.code, rejected.detail))

    def _note(self, name: str, state: State, remarks: Iterable[Code]) -> None:
        self._counts[state] += 1
        for remark in dict.fromkeys(remarks):
            self._codes[remark] += 1
            self._findings.add((name, state, remark, ""))

    def finish(self, about: About, *, max_failure_share: float = 1.0) -> None:
        """Write what stands beside the images, force all of it to disk, and put it in the place of ``out``.

        Raises:
            EmptyCohortError: There is no row. The list of reasons is left in ``out`` all the same.
            TooManyFailuresError: More than ``max_failure_share`` of the inputs that are no second copies and
                not to be ignored are quarantined, unsupported or unpaired. What was packed in ``out`` before
                stays, beside the new list of reasons.
        """
        self._refuse_failures(max_failure_share)
        self._sync_images()
        self._images.seek(0)
        self._write_header()
        _flush(self._images)
        _flush(self._keys)
        arrays = self._columns.arrays()
        for name, values in sorted(arrays.items()):
            self._digest.update(f"{name} {values.dtype.str} {values.shape} ".encode())
            self._digest.update(values.data if values.dtype == np.uint8 else values.tobytes())
        labels = dict(zip(arrays.pop("label_names").tolist(), arrays.pop("labels").T, strict=True))
        facts = {"version": VERSION, "pipeline": about.pipeline, "identity": self._digest.hexdigest()}
        with _create(self._folder / INDEX) as file:
            Index(labels=labels, **arrays).write(file, facts=facts)
            _flush(file)
        with _create(self._folder / TOKENS) as file:
            write_tokens(file, _texts(arrays["texts"], arrays["text_ends"]), facts=facts)
            _flush(file)
        manifest = {
            **facts,
            **asdict(about),
            "rows": len(self._columns),
            "image_shape": self._image_shape,
            "counts": {state: self._counts[state] for state in State},
            "codes": dict(sorted(self._codes.items())),
            "text_rules": dict(sorted(self._columns.text_rules.items())),
            "masked": dict(sorted(self._columns.masked.items())),
        }
        del arrays, labels
        self._columns.close()
        self._write_quarantine()
        _write(self._folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        sync(self._folder)
        self._replace()

    def _refuse_failures(self, most: float) -> None:
        if not len(self._columns):
            self._refuse(EmptyCohortError, f"no usable pair among {self._counts.total()} inputs")
        failures = sum(self._counts[state] for state in FAILURES)
        expected = sum(count for state, count in self._counts.items() if state not in _NO_FAULT)
        if failures > most * expected:
            self._refuse(
                TooManyFailuresError,
                f"{failures} of {expected} inputs cannot be used, a larger share than "
                f"cohort.max-failure-share = {most:g}",
            )

    def _refuse(self, error: type[CohortError], what: str) -> NoReturn:
        self._out.mkdir(mode=0o700, exist_ok=True)
        self._write_quarantine()
        os.replace(self._folder / QUARANTINE, self._out / QUARANTINE)
        failed = [(code, count) for code, count in self._codes.most_common() if code.startswith("E_")]
        reasons = "; ".join(f"{count} x {code} ({code.meaning})" for code, count in failed)
        raise error(f"{what}, see {self._out / QUARANTINE}: {reasons}")

    def _write_quarantine(self) -> None:
        file = io.TextIOWrapper(
            _create(self._folder / QUARANTINE), encoding="utf-8", errors="surrogateescape", newline=""
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "state", "code", "detail"])
        writer.writerows(self._findings)
        _flush(file)

    def _sync_images(self) -> None:
        """Force the images to disk, then their keys: a key never stands for pixels that may be lost."""
        self._images.flush()
        os.fsync(self._images.fileno())
        self._keys.write(self._key_buffer)
        self._keys.flush()
        self._unsynced, self._key_buffer = 0, bytearray()

    def _replace(self) -> None:
        # A folder cannot be renamed over a full one: the old cohort steps aside first. Between the renames a
        # crash leaves no cohort, or one without its scan, and the next build puts that right.
        if self._out.exists():
            if (self._out / SCAN).exists():
                os.replace(self._out / SCAN, self._folder / SCAN)
            aside = Path(tempfile.mkdtemp(prefix=_partial(self._out), dir=self._out.parent))
            self._out.rename(aside)
            self._folder.rename(self._out)
            shutil.rmtree(aside)
        else:
            self._folder.rename(self._out)
        sync(self._out.parent)
        for folder in self._left:
            shutil.rmtree(folder)

    def _write_header(self) -> None:
        # numpy pads the header so that its length does not change while the first axis grows.
        shape = (len(self._columns), *self._image_shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._images, header)


class _Columns:
    """All rows, as they are stored: texts on disk, numbers in arrays."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "texts.partial"
        self._texts = _create(self._path)
        self._text_digests = bytearray()
        self._text_ends = array("q")
        self._patients, self._studies, self._is_test = bytearray(), bytearray(), bytearray()
        self._labels: dict[str, array[float]] = {}
        self._read_labels: dict[str, array[float]] = {}
        self.text_rules = Counter[str]()
        self.masked = Counter[str]()

    def __len__(self) -> int:
        return len(self._is_test)

    def add(self, row: Row) -> None:
        text = row.text.encode()
        self._texts.write(text)
        self._text_ends.append(len(text) + (self._text_ends[-1] if self._text_ends else 0))
        self._text_digests += sha256(text).digest()[:_DIGEST_BYTES]
        self.text_rules[row.text_rule] += 1
        self.masked.update(row.masked)
        self._patients += row.patient.ljust(_PSEUDONYM_BYTES, b"\0")
        self._studies += row.study.ljust(_PSEUDONYM_BYTES, b"\0")
        for columns, labels in ((self._labels, row.labels), (self._read_labels, row.read_labels)):
            for name, value in labels.items():
                column = columns.setdefault(name, array("f"))
                column.extend([math.nan] * (len(self) - len(column)))
                column.append(value)
        self._is_test.append(row.is_test)

    def close(self) -> None:
        if not self._texts.closed:
            self._texts.close()
            self._path.unlink()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the index; of equal texts one is stored."""
        known = self._known_labels()
        rows, names = len(self), sorted(known)
        labels = np.full((rows, len(names)), np.nan, dtype=np.float32)
        for number, name in enumerate(names):
            labels[: len(known[name]), number] = known[name]
        _, first, number_of = np.unique(
            _strings(self._text_digests, _DIGEST_BYTES), return_index=True, return_inverse=True
        )
        order = np.argsort(first)  # texts are numbered as they come
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        ends = np.asarray(self._text_ends, dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        kept = first[order]
        texts, keys = self._distinct_texts(starts[kept], ends[kept])
        return {
            "texts": texts,
            "text_ends": np.cumsum(ends[kept] - starts[kept], dtype=np.int64),
            "text_keys": keys,
            "text_ids": rank[number_of].astype(np.int32),
            "patients": _numbered(self._patients),
            "studies": _numbered(self._studies),
            "is_test": np.frombuffer(bytes(self._is_test), dtype=bool),
            "label_names": np.array(names, dtype=np.str_),
            "labels": labels,
        }

    def _known_labels(self) -> dict[str, "array[float]"]:
        """Every finding's column: the site's own, and what was read of those that the site says nothing of.

        A finding is never mixed from both: labels by two rules cannot be compared.
        """
        own = {plain(name) for name in self._labels}
        read = {name: column for name, column in self._read_labels.items() if plain(name) not in own}
        return {**self._labels, **read}

    def _distinct_texts(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bytes_]]:
        """The texts between these places, one behind the other, and the key of each."""
        self._texts.flush()
        total, place = int((ends - starts).sum()), 0
        texts = np.empty(total, dtype=np.uint8)
        keys = np.empty(len(starts), dtype=f"S{KEY_DIGITS}")
        every = np.memmap(self._path, dtype=np.uint8, mode="r") if total else texts
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            text = every[start:end]
            texts[place : place + end - start] = text
            keys[number] = text_key(text.tobytes().decode())
            place += end - start
        return texts, keys


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the right to build ``out``; a second builder waits, then finds the work done.

    Raises:
        StoredCohortError: ``out`` exists and is not a cohort: it would be replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(out.parent / f".{out.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= _FILES):
            raise StoredCohortError(f"{out} holds something other than a cohort; name a new or empty folder")
        yield


def restore_scan(out: Path) -> None:
    """Put back the scan that a build had in its hands when it was killed."""
    for folder in _partials(out):
        if (folder / SCAN).exists() and not (out / SCAN).exists():
            out.mkdir(mode=0o700, exist_ok=True)
            os.replace(folder / SCAN, out / SCAN)


def _left_behind(out: Path) -> Sequence[Path]:
    """Return the folder of the killed build that got furthest, if any, and remove those of the others."""
    folders = sorted(_partials(out), key=_packed_bytes)
    kept = folders[-1:] if folders and _packed_bytes(folders[-1]) else []
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)
    return kept


def _packed_bytes(folder: Path) -> int:
    keys = folder / KEYS
    return keys.stat().st_size if keys.exists() else 0


def _partials(out: Path) -> list[Path]:
    return list(out.parent.glob(glob.escape(_partial(out)) + "*"))


def _partial(out: Path) -> str:
    return f".{out.name}.partial-"


def _texts(texts: NDArray[np.uint8], ends: NDArray[np.int64]) -> Iterator[str]:
    for start, end in pairwise([0, *ends.tolist()]):
        yield texts[start:end].tobytes().decode()


def _strings(fixed: bytearray, width: int) -> NDArray[np.bytes_]:
    return np.frombuffer(bytes(fixed), dtype=f"S{width}")


def _numbered(pseudonyms: bytearray) -> NDArray[np.int32]:
    """Return pseudonyms as numbers in their own, random, order."""
    return np.unique(_strings(pseudonyms, _PSEUDONYM_BYTES), return_inverse=True)[1].astype(np.int32)


def _create(path: Path) -> IO[bytes]:
    """Open a new file that only its owner may read."""
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "wb")


def _write(path: Path, data: bytes) -> None:
    with _create(path) as file:
        file.write(data)
        _flush(file)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
