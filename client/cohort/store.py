"""The packed cohort on disk: images to be memory-mapped, an index, a manifest; whole or not at all."""

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
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from client.cohort.errors import EmptyCohortError, StoredCohortError
from client.cohort.outcomes import Code, Rejected, State
from strategies.files import sync

VERSION = 1
IMAGES, INDEX, MANIFEST, QUARANTINE = "images.npy", "index.npz", "cohort.json", "quarantine.csv"
_FILES = {IMAGES, INDEX, MANIFEST, QUARANTINE}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cohort:
    """A site's image-text pairs, one per row; N rows of P patients, images of S × S pixels.

    Everything here is patient data and stays at the site, the counts included.

    Attributes:
        identity: Hex HMAC of the content under the site's salt: equal content, equal identity.
        images: Grey levels, uint8, shape (N, S, S), memory-mapped read-only.
        texts: N training texts.
        patients: Patient of each row, 0 to P - 1, int32, shape (N,).
        studies: Study of each row, numbered over all patients, int32, shape (N,).
        is_test: Whether the row's patient is held out, bool, shape (N,).
        labels: Finding to float32, shape (N,); NaN is unknown.
        counts: Inputs per state; the sum is the number of inputs seen.
        codes: Inputs per reason or remark.
        unpaired_reports: Reports that no image asked for.
    """

    identity: str
    images: NDArray[np.uint8]
    texts: tuple[str, ...]
    patients: NDArray[np.int32]
    studies: NDArray[np.int32]
    is_test: NDArray[np.bool_]
    labels: Mapping[str, NDArray[np.float32]]
    counts: Mapping[State, int]
    codes: Mapping[Code, int]
    unpaired_reports: int

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Cohort(identity={self.identity[:8]!r}, image_size={self.images.shape[1]})"

    def train(self) -> NDArray[np.intp]:
        """Return the rows of the patients a model may learn from."""
        return np.flatnonzero(~self.is_test)

    def test(self) -> NDArray[np.intp]:
        """Return the rows of the held-out patients."""
        return np.flatnonzero(self.is_test)


@dataclass(frozen=True, kw_only=True, repr=False)
class Row:
    """What a row says beside its image.

    Attributes:
        text: The training text.
        patient: Pseudonym of the patient.
        study: Pseudonym of the study, unlike that of any other patient's study.
        is_test: Whether the patient is held out.
        labels: Finding to value; absent and NaN are unknown.
    """

    text: str
    patient: str
    study: str
    is_test: bool
    labels: Mapping[str, float]


class CohortWriter:
    """A cohort in the making: a private folder beside ``out`` that takes its place when it is whole.

    A crash leaves the old cohort, or none, and a folder that the next build removes.
    """

    def __init__(self, out: Path, *, image_size: int, key: bytes) -> None:
        """Begin a cohort of images with ``image_size`` pixels; its identity is keyed with ``key``."""
        for abandoned in out.parent.glob(glob.escape(_partial(out)) + "*"):
            shutil.rmtree(abandoned)
        self._out = out
        self._folder = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out.parent))  # mode 0700
        self._digest = hmac.new(key, digestmod="sha256")
        self._size = image_size
        self._rows: list[Row] = []
        self._counts = Counter[State]()
        self._findings: list[tuple[str, State, Code, str]] = []
        self._images = _create(self._folder / IMAGES)
        self._write_header()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._images.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # after ``finish`` there is none

    def add(self, name: str, row: Row, pixels: NDArray[np.uint8], remarks: Iterable[Code]) -> None:
        """Add an input as the next row, with its image of shape (S, S)."""
        data = pixels.tobytes()
        self._digest.update(data)
        self._images.write(data)
        self._rows.append(row)
        self._counts[State.USED] += 1
        self._findings.extend((name, State.USED, remark, "") for remark in dict.fromkeys(remarks))

    def take_report(self, name: str, remarks: Iterable[Code]) -> None:
        """Count an input that gave a report."""
        self._counts[State.REPORT] += 1
        self._findings.extend((name, State.REPORT, remark, "") for remark in dict.fromkeys(remarks))

    def leave_out(self, name: str, rejected: Rejected) -> None:
        """Count an input that is no row, and list it with its reason."""
        self._counts[rejected.state] += 1
        self._findings.append((name, rejected.state, rejected.code, rejected.detail))

    def finish(self, *, pipeline: int, fingerprint: str, unpaired_reports: int) -> None:
        """Write what stands beside the images, force all of it to disk, and put it in the place of ``out``.

        Raises:
            EmptyCohortError: There is no row. The list of reasons is left in ``out`` all the same.
        """
        codes = Counter(code for _, _, code, _ in self._findings)
        if not self._rows:
            self._refuse(codes)
        self._images.seek(0)
        self._write_header()
        _flush(self._images)
        arrays = _arrays(self._rows)
        for name, array in sorted(arrays.items()):
            self._digest.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
        manifest = {
            "version": VERSION,
            "pipeline": pipeline,
            "fingerprint": fingerprint,
            "identity": self._digest.hexdigest(),
            "rows": len(self._rows),
            "image_size": self._size,
            "counts": {state: self._counts[state] for state in State},
            "codes": dict(sorted(codes.items())),
            "unpaired_reports": unpaired_reports,
        }
        with _create(self._folder / INDEX) as file:
            np.savez(file, allow_pickle=False, **arrays)
            _flush(file)
        _write(self._folder / QUARANTINE, self._quarantine())
        _write(self._folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        sync(self._folder)
        self._replace()

    def _refuse(self, codes: Counter[Code]) -> NoReturn:
        self._out.mkdir(mode=0o700, exist_ok=True)
        _write(self._folder / QUARANTINE, self._quarantine())
        os.replace(self._folder / QUARANTINE, self._out / QUARANTINE)
        reasons = "; ".join(f"{count} x {code} ({code.meaning})" for code, count in codes.most_common())
        raise EmptyCohortError(
            f"no usable pair among {self._counts.total()} inputs, see {self._out / QUARANTINE}: {reasons}"
        )

    def _quarantine(self) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "state", "code", "detail"])
        writer.writerows(sorted(self._findings))
        return text.getvalue().encode(errors="surrogateescape")

    def _replace(self) -> None:
        # A folder cannot be renamed over a full one: the old cohort steps aside first. Between the two
        # renames a crash leaves no cohort, and the next build makes it again.
        if self._out.exists():
            aside = Path(tempfile.mkdtemp(prefix=_partial(self._out), dir=self._out.parent))
            self._out.rename(aside)
            self._folder.rename(self._out)
            shutil.rmtree(aside)
        else:
            self._folder.rename(self._out)
        sync(self._out.parent)

    def _write_header(self) -> None:
        # numpy pads the header so that its length does not change while the first axis grows.
        shape = (len(self._rows), self._size, self._size)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._images, header)


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


def stored_fingerprint(out: Path) -> str | None:
    """Return the fingerprint of the cohort in ``out``, or None where a new one has to be built."""
    try:
        return str(_manifest(out)["fingerprint"])
    except (StoredCohortError, KeyError):
        return None


def open_cohort(out: Path) -> Cohort:
    """Open a packed cohort; the images are mapped, not read.

    Raises:
        StoredCohortError: ``out`` holds no cohort, one of another version, or a damaged one.
    """
    manifest = _manifest(out)
    try:
        images = np.load(out / IMAGES, mmap_mode="r", allow_pickle=False)
        with open(out / INDEX, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = dict(arrays)
        text, ends = index["texts"].tobytes(), index["text_ends"].tolist()
        cohort = Cohort(
            identity=manifest["identity"],
            images=images,
            texts=tuple(text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)),
            patients=index["patients"],
            studies=index["studies"],
            is_test=index["is_test"],
            labels={
                str(name): index["labels"][:, column] for column, name in enumerate(index["label_names"])
            },
            counts={State(state): count for state, count in manifest["counts"].items()},
            codes={Code[code]: count for code, count in manifest["codes"].items()},
            unpaired_reports=manifest["unpaired_reports"],
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again") from error
    size = manifest["image_size"]
    if images.shape != (len(cohort), size, size) or len(cohort) != manifest["rows"]:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again")
    return cohort


def _manifest(out: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise StoredCohortError(f"there is no cohort in {out}; build one first") from None
    except ValueError as error:
        raise StoredCohortError(f"the cohort in {out} is damaged; remove it and build it again") from error
    if manifest.get("version") != VERSION:
        raise StoredCohortError(
            f"the cohort in {out} has version {manifest.get('version')}, expected {VERSION}; build it again"
        )
    return manifest


def _arrays(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """Return the index as arrays; pseudonyms become numbers in their own, random, order."""
    texts = [row.text.encode() for row in rows]
    names = sorted({name for row in rows for name in row.labels})
    labels = [[row.labels.get(name, math.nan) for name in names] for row in rows]
    return {
        "texts": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "patients": _numbered([row.patient for row in rows]),
        "studies": _numbered([row.study for row in rows]),
        "is_test": np.array([row.is_test for row in rows], dtype=bool),
        "label_names": np.array(names, dtype=np.str_),
        "labels": np.array(labels, dtype=np.float32).reshape(len(rows), len(names)),
    }


def _numbered(pseudonyms: Sequence[str]) -> NDArray[np.int32]:
    return np.unique(pseudonyms, return_inverse=True)[1].astype(np.int32)


def _partial(out: Path) -> str:
    return f".{out.name}.partial-"


def _create(path: Path) -> IO[bytes]:
    """Open a new file that only its owner may read."""
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "wb")


def _write(path: Path, data: bytes) -> None:
    with _create(path) as file:
        file.write(data)
        _flush(file)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
