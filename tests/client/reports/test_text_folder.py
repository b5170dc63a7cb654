"""Text files whose paths name the study."""

from pathlib import Path

import pytest

from client.cohort.errors import CohortSettingsError, SourceMissingError
from client.cohort.outcomes import Code, Rejected, State
from client.reports.report import MAX_TEXT_CHARACTERS, Report
from client.reports.text_folder import TextFolder

UNRELATED = Rejected(State.IGNORED, Code.E_NOT_REPORT)


def write(root: Path, name: str, data: bytes = b"Text.") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def test_the_paths_of_mimic_name_patient_and_study(tmp_path: Path) -> None:
    root = tmp_path / "files"
    write(root, "p10/p10000032/s50414267.txt", " FINAL REPORT\n Größe".encode())
    write(root, "p10/p10000032/s1.txt", b"")
    write(root, "p10/p10000032/index.html")
    write(root, "p10/p10000032/s2.txt", b"a" * (MAX_TEXT_CHARACTERS + 1))
    found = {entry.name: entry.outcome for entry in TextFolder(root).read()}
    assert found == {
        "files/p10/p10000032/index.html": UNRELATED,
        "files/p10/p10000032/s1.txt": Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY),
        "files/p10/p10000032/s2.txt": Rejected(State.QUARANTINED, Code.E_REPORT_TOO_LARGE),
        "files/p10/p10000032/s50414267.txt": Report(
            source="text", patient="10000032", study_id="50414267", text=" FINAL REPORT\n Größe"
        ),
    }


def test_a_hospital_names_its_own_pattern(tmp_path: Path) -> None:
    write(tmp_path / "notes", "2024/A17_1.2.3.txt", "Erguß".encode("cp1252"))
    folder = TextFolder(tmp_path / "notes", r"(?P<accession>\w+)_(?P<study_uid>[\d.]+)\.txt")
    (entry,) = folder.read()
    assert entry.outcome == Report(source="text", accession="A17", study_uid="1.2.3", text="Erguß")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "expected a regular expression"),
        (r"(?P<patient>\d+)\.txt", "names no study"),
        (r"(?P<study_id>\d+)\.txt", "names no study"),
        (r"(?P<accesion>\d+)\.txt", "has the groups accesion; known are accession, patient"),
    ],
)
def test_a_pattern_that_names_no_study_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(CohortSettingsError, match=message):
        TextFolder(Path("x"), pattern)


def test_stamps_change_with_the_files(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a.txt")
    before = list(TextFolder(tmp_path / "notes").stamps())
    write(tmp_path / "notes", "a.txt", b"Other text.")
    assert before != list(TextFolder(tmp_path / "notes").stamps())


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"expected the file .*/none"):
        list(TextFolder(tmp_path / "none").read())
