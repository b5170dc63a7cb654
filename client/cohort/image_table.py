"""A table of PNG or JPEG images with texts: how public data sets and research exports come."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from client.cohort import display
from client.cohort.errors import EmptyCohortError
from client.cohort.outcomes import Code, RefusedError, Rejected, Rendered, State
from client.cohort.pixels import MAX_PIXELS
from client.cohort.resizing import Grey8, fit_square
from client.cohort.settings import CohortModality
from client.cohort.sources import Candidate, Entry, OrderedMap, stamp
from client.cohort.tables import Table, label_value, read_table

# Validation rows are held out like test rows: what a data set's authors kept from training stays so.
_IS_TEST = {"train": False, "training": False, "test": True, "val": True, "valid": True, "validation": True}
_DISPLAY_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True, repr=False)
class ImageTable:
    """The rows of a CSV whose cells equal ``where``, column by column; images are relative to the CSV.

    Of images, or texts, by themselves the other column is not read and need not be there.
    """

    path: Path
    where: Mapping[str, str] = field(default_factory=dict)
    modality: CohortModality = "pairs"

    @cached_property
    def _table(self) -> Table:
        return read_table(self.path)

    @cached_property
    def _rows(self) -> Sequence[Mapping[str, str]]:
        filters = {self._table.need(name): value for name, value in self.where.items()}
        rows = [row for row in self._table.rows if all(row[name] == value for name, value in filters.items())]
        if not rows:
            wanted = " and ".join(f"{name} = {value!r}" for name, value in filters.items())
            raise EmptyCohortError(f"{self.path} has no row" + (f" with {wanted}" if wanted else ""))
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def stamps(self) -> Iterator[str]:
        """Yield the table's stamp, then those of its images that are there."""
        yield stamp(self.path, self.path.name)
        if self.modality == "texts":
            return
        image = self._table.need("image")
        for name in sorted({row[image] for row in self._rows}):
            path = self.path.parent / name
            yield stamp(path, name) if _is_file(path) else f"{name}\0absent"

    def may_end_process(self) -> bool:
        """Return False: Pillow answers a damaged PNG or JPEG with an error."""
        return False

    def scan(self, ordered_map: OrderedMap) -> Iterator[Entry]:
        """Yield one entry per row, in the table's order; a row needs no other process to be judged."""
        columns = _Columns.of(self._table, filtered=self.where, modality=self.modality)
        splits = columns.splits(self._rows)
        seen: set[tuple[str, ...]] = set()
        for number, row in enumerate(self._rows):
            image = row[columns.image] if columns.image else ""
            text = row[columns.text] if columns.text else ""
            study = row[columns.study] if columns.study else ""
            path = self.path.parent / image if image else self.path
            # Two patients may have the same report, and no two the same image.
            row_key = (image, text) if columns.image else (row[columns.patient], study, text)
            outcome: Candidate | Rejected
            if row_key in seen:
                outcome = Rejected(State.DUPLICATE, Code.E_DUPLICATE_ROW)
            elif columns.image and not (image and _is_file(path)):
                outcome = Rejected(State.QUARANTINED, Code.E_FILE_MISSING)
            elif columns.split and row[columns.split].lower() not in ("", *_IS_TEST):
                outcome = Rejected(State.QUARANTINED, Code.E_BAD_SPLIT)
            else:
                own = splits[row[columns.patient]]
                outcome = Candidate(
                    path=path,
                    patient=row[columns.patient],
                    study=study or f"row {number}",
                    keys={"image": image},
                    uid=image or f"row {number}",
                    text=text,
                    labels={name: label_value(row[name]) for name in columns.labels},
                    is_test=own == {True} if own else None,
                    remarks=(Code.W_SPLIT_CONFLICT,) if len(own) > 1 else (),
                )
            seen.add(row_key)
            yield Entry(image if columns.image else f"row {number}", outcome)

    def renderer(self, size: int) -> Callable[[Path], Rendered | Rejected]:
        """Return what makes the packed image of a path."""
        return partial(_black if self.modality == "texts" else self.render, size=size)

    @staticmethod
    def render(path: Path, size: int) -> Rendered | Rejected:
        """Decode one image and make the packed one; nothing a file holds makes this raise."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's warnings quote the file
                pixels, remarks = _render(path, size)
        except RefusedError as refusal:
            return refusal.rejected
        except Exception:  # Pillow raises any type on a damaged file
            return Rejected(State.QUARANTINED, Code.E_DECODE)
        return Rendered(pixels, remarks)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The table's own spellings of what is read from it."""

    image: str | None
    text: str | None
    patient: str
    study: str | None
    split: str | None
    labels: Sequence[str]

    @classmethod
    def of(cls, table: Table, *, filtered: Collection[str], modality: CohortModality) -> "_Columns":
        image = table.column("image") if modality == "texts" else table.need("image")
        text = table.column("text") if modality == "images" else table.need("text")
        patient = table.need("patient_id")
        study, split = table.column("study_id"), table.column("split")
        taken = {image, text, patient, study, split, *(table.need(name) for name in filtered)}
        labels = table.label_columns(without=taken)
        return cls(
            image=None if modality == "texts" else image,
            text=None if modality == "images" else text,
            patient=patient,
            study=study,
            split=split,
            labels=labels,
        )

    def splits(self, rows: Sequence[Mapping[str, str]]) -> Mapping[str, set[bool]]:
        """Return the splits each patient is found in: True is held out."""
        found: dict[str, set[bool]] = defaultdict(set)
        for row in rows:
            held_out = _IS_TEST.get(row[self.split].lower()) if self.split else None
            if held_out is not None:
                found[row[self.patient]].add(held_out)
        return found


def _black(_path: Path, size: int) -> Rendered:
    """What stands in the place of an image where there is none."""
    return Rendered(np.zeros((size, size), dtype=np.uint8))


def _is_file(path: Path) -> bool:
    """Return whether there is such a file; a cell that is no name, such as a whole report, names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _render(path: Path, size: int) -> tuple[Grey8, Sequence[Code]]:
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise RefusedError(State.QUARANTINED, Code.E_TOO_LARGE)
        if image.mode not in _DISPLAY_MODES:  # 16 or 32 bit, which Pillow would clip rather than scale
            return display.grey_image(np.asarray(image), size=size)
        image.draft("L", (size, size))  # a JPEG is decoded at a half, quarter or eighth where that suffices
        levels = np.asarray(image.convert("L"), dtype=np.float32)
    return fit_square(levels / np.float32(255), size=size), ()
