"""The index is an Arrow file that others read too, and damage is never taken for data."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.cohort.index_file import Index, MappedIndex
from client.text.keys import text_key

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5, unique=True)
FINDINGS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just(0), max_size=3)


def index_of(texts: list[str], ids: list[int], labels: dict[str, Any]) -> Index:
    stored = [text.encode() for text in texts]
    return Index(
        texts=np.frombuffer(b"".join(stored), dtype=np.uint8),
        text_ends=np.cumsum([len(text) for text in stored], dtype=np.int64),
        text_keys=np.array([text_key(text) for text in texts], dtype=np.bytes_),
        text_ids=np.array(ids, dtype=np.int32),
        patients=np.arange(len(ids), dtype=np.int32),
        studies=np.arange(len(ids), dtype=np.int32)[::-1],
        is_test=np.arange(len(ids)) % 3 == 0,
        labels=labels,
    )


def write(path: Path, index: Index) -> bytes:
    with open(path, "wb") as file:
        index.write(file, facts={"version": 4, "identity": "ab"})
    return path.read_bytes()


@given(texts=TEXTS, findings=FINDINGS, data=st.data())
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], findings: dict[str, int], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=20))
    values = hnp.arrays(np.float32, len(ids), elements=st.sampled_from([0, 1, np.nan]))
    labels = {name: data.draw(values) for name in findings}
    index, path = index_of(texts, ids, labels), tmp_path_factory.mktemp("index") / "index.arrow"
    assert write(path, index) == write(path, index)
    found = MappedIndex.open(path)
    assert found.facts == {"version": 4, "identity": "ab"}
    assert found.texts == tuple(texts[number] for number in ids)
    assert found.text_keys == tuple(text_key(texts[number]) for number in ids)
    for name in ("text_ids", "patients", "studies", "is_test"):
        assert getattr(found, name).dtype == getattr(index, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(index, name))
    assert list(found.labels) == list(labels)
    for name, column in labels.items():
        assert found.labels[name].dtype == np.float32
        np.testing.assert_array_equal(found.labels[name], column)


def test_equal_texts_are_one_object(tmp_path: Path) -> None:
    write(tmp_path / "x", index_of(["Clear.", "Edema."], [0, 1, 0], {}))
    texts = MappedIndex.open(tmp_path / "x").texts
    assert texts[0] is texts[2]


def test_columns_outlive_the_file_they_are_views_of(tmp_path: Path) -> None:
    write(tmp_path / "x", index_of(["Clear."], [0] * 9, {"edema": np.ones(9, dtype=np.float32)}))
    found = MappedIndex.open(tmp_path / "x")
    (tmp_path / "x").unlink()
    np.testing.assert_array_equal(found.labels["edema"], 1)
    assert not found.patients.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found.patients[0] = 1


def test_any_reader_of_arrow_sees_a_table(tmp_path: Path) -> None:
    write(tmp_path / "x", index_of(["Clear.", "Edema."], [1, 0], {"patient": np.ones(2, dtype=np.float32)}))
    table = pa.ipc.open_file(tmp_path / "x").read_all()
    assert table.column_names == ["text", "text_key", "patient", "study", "is_test", "label: patient"]
    assert table.column("text").to_pylist() == ["Edema.", "Clear."]
    assert table.schema.metadata == {b"clipward.cohort": b'{"version": 4, "identity": "ab"}'}


@pytest.mark.parametrize(
    "columns",
    [{}, {"text": ["a"]}, {"patient": [1], "study": [1]}],
)
def test_another_table_is_refused(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    table = pa.table(columns)
    with pa.ipc.new_file(tmp_path / "x", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="not the columns of an index"):
        MappedIndex.open(tmp_path / "x")


def test_no_damaged_byte_ends_the_process(tmp_path: Path) -> None:
    """Offsets and numbers that point out of the file are what would."""
    whole = write(tmp_path / "x", index_of(["Clear.", "Ödem."], [1, 0, 1], {"edema": np.ones(3, np.float32)}))
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        try:
            assert len(MappedIndex.open(path).texts) <= 3
        except (OSError, ValueError, KeyError):
            refused += 1
        os.unlink(path)
    assert refused > 0.2 * len(whole)
