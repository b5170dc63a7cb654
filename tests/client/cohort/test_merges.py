"""One patient under several ids."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.errors import ColumnMissingError, SourceMissingError
from client.cohort.merges import PatientMerges

IDS = st.sampled_from([f"p{number:02}" for number in range(12)])


def read(folder: Path, text: str) -> PatientMerges:
    (folder / "merge.csv").write_text(text)
    return PatientMerges.read(folder / "merge.csv")


@given(st.lists(st.tuples(IDS, IDS), max_size=14))
def test_ids_that_are_linked_in_any_way_are_one(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    rows = [",".join(pair) for pair in pairs]
    same_patient = read(tmp_path_factory.mktemp("merge"), "\n".join(["patient_id,same_as", *rows]))
    for start in {one for pair in pairs for one in pair}:
        reached, waiting = {start}, [start]
        while waiting:
            here = waiting.pop()
            for pair in pairs:
                if here in pair and not reached.issuperset(pair):
                    waiting += set(pair) - reached
                    reached |= set(pair)
        assert same_patient(start) == min(reached)


def test_everyone_else_keeps_their_id(tmp_path: Path) -> None:
    same_patient = read(tmp_path, "same_as;patient_id\nb;a\n;c\nd;\n")
    assert [same_patient(one) for one in ("a", "b", "c", "d", "e", "")] == ["a", "a", "c", "d", "e", ""]
    assert PatientMerges.read(None)("x") == "x"


def test_ids_that_nobody_asks_for_are_counted(tmp_path: Path) -> None:
    same_patient = read(tmp_path, "patient_id,same_as\na,b\nb,c\nd,d\n")
    assert same_patient.unknown == 4
    for one in ("a", "a", "c", "z"):
        same_patient(one)
    assert same_patient.unknown == 2
    assert PatientMerges.read(None).unknown == 0


def test_a_table_without_its_columns_is_named(tmp_path: Path) -> None:
    with pytest.raises(ColumnMissingError, match=r"merge.csv has no column 'same_as'"):
        read(tmp_path, "patient_id,other\na,b\n")
    with pytest.raises(SourceMissingError, match=r"expected the table .*none.csv"):
        PatientMerges.read(tmp_path / "none.csv")
