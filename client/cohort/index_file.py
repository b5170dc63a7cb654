"""The packed cohort's index: an Arrow file with one row per image, which tools for tables read as it is.

Opened, it is mapped: columns are views of the file. A text that many rows share is stored once.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

INDEX = "index.arrow"
_FACTS = b"clipward.cohort"  # key of the schema's metadata
_LABEL = "label: "  # before a finding's name: a finding may be called "patient"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Index:
    """What a cohort says beside its images; N rows of D distinct texts.

    Attributes:
        texts: UTF-8 of the distinct texts, one behind the other, uint8.
        text_ends: Where each of them ends, int64, shape (D,).
        text_keys: Key of each, bytes of equal length, shape (D,).
        text_ids: Number of each row's text, int32, shape (N,).
        patients: Patient of each row, int32, shape (N,).
        studies: Study of each row, int32, shape (N,).
        is_test: Whether the row's patient is held out, bool, shape (N,).
        labels: Finding to float32, shape (N,); NaN is unknown.
    """

    texts: NDArray[np.uint8]
    text_ends: NDArray[np.int64]
    text_keys: NDArray[np.bytes_]
    text_ids: NDArray[np.int32]
    patients: NDArray[np.int32]
    studies: NDArray[np.int32]
    is_test: NDArray[np.bool_]
    labels: Mapping[str, NDArray[np.float32]]

    def write(self, file: IO[bytes], *, facts: Mapping[str, Any]) -> None:
        """Write it as one record batch, with ``facts`` as JSON in the schema's metadata."""
        key_ends = np.arange(1, len(self.text_keys) + 1) * self.text_keys.dtype.itemsize
        ids = pa.array(self.text_ids)
        columns = [
            pa.DictionaryArray.from_arrays(ids, _strings(self.texts, self.text_ends)),
            pa.DictionaryArray.from_arrays(ids, _strings(self.text_keys, key_ends)),
            *map(pa.array, (self.patients, self.studies, self.is_test, *self.labels.values())),
        ]
        schema = _schema(self.labels).with_metadata({_FACTS: json.dumps(facts)})
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MappedIndex:
    """An index in its file: the columns of ``Index``, with the text and the key of every row."""

    facts: Mapping[str, Any]
    texts: tuple[str, ...]
    text_keys: tuple[str, ...]
    text_ids: NDArray[np.int32]
    patients: NDArray[np.int32]
    studies: NDArray[np.int32]
    is_test: NDArray[np.bool_]
    labels: Mapping[str, NDArray[np.float32]]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the index at ``path``; numbers and labels are read-only views of it.

        Raises:
            OSError: There is no such file.
            ValueError: It is damaged, or no index.
        """
        try:
            batch, names = _read(path)
        except pa.ArrowException as error:  # children of many types
            raise ValueError(f"damaged: {error}") from error
        text = batch.column("text")
        return cls(
            facts=json.loads((batch.schema.metadata or {}).get(_FACTS, b"{}")),
            texts=_rows(text),
            text_keys=_rows(batch.column("text_key")),
            text_ids=text.indices.to_numpy(),
            patients=batch.column("patient").to_numpy(),
            studies=batch.column("study").to_numpy(),
            is_test=batch.column("is_test").to_numpy(zero_copy_only=False),  # bits in the file
            labels={name: batch.column(_LABEL + name).to_numpy() for name in names},
        )


def _read(path: Path) -> tuple[Any, list[str]]:
    """Return the one record batch, and the findings it has labels of."""
    with pa.memory_map(os.fsencode(path)) as file, pa.ipc.open_file(file) as reader:
        names = [name.removeprefix(_LABEL) for name in reader.schema.names if name.startswith(_LABEL)]
        if not reader.schema.equals(_schema(names)) or reader.num_record_batches != 1:
            raise ValueError("not the columns of an index")
        batch = reader.get_batch(0)
    batch.validate(full=True)  # what it points to lies within it
    return batch, names


def _schema(findings: Iterable[str]) -> Any:
    text = pa.dictionary(pa.int32(), pa.large_utf8())  # large: all texts together may pass 2 GB
    columns = {
        "text": text,
        "text_key": text,
        "patient": pa.int32(),
        "study": pa.int32(),
        "is_test": pa.bool_(),
    }
    columns |= {_LABEL + finding: pa.float32() for finding in findings}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def _strings(data: NDArray[Any], ends: NDArray[np.int64]) -> Any:
    """View strings that lie one behind the other as Arrow's."""
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), ends])
    return pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data))


def _rows(column: Any) -> tuple[str, ...]:
    """Return the string of every row; equal ones are one object, as most normal reports are."""
    distinct = column.dictionary.to_pylist()
    return tuple(map(distinct.__getitem__, column.indices.to_pylist()))
