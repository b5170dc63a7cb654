"""The packed cohort on disk."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from client.cohort.errors import EmptyCohortError, StoredCohortError
from client.cohort.outcomes import Code, Rejected, State
from client.cohort.packing import About, CohortWriter, Row, locked
from client.cohort.store import Cohort, open_cohort, stored_fingerprint

SIZE = 4
ABOUT = About(pipeline=1, rules="r", fingerprint="f", unpaired_reports=3)


def row(number: int, *, text: str = "Edema.") -> Row:
    labels = {"edema": float(number % 2)} if number else {}
    patient, study = str(number // 2).encode(), str(number).encode()
    return Row(text=text, patient=patient, study=study, is_test=number < 2, labels=labels)


def write(out: Path, *, rows: int = 5, text: str = "Ödem.", brightness: int = 0, key: bytes = b"k") -> Cohort:
    with CohortWriter(out, image_shape=(SIZE, SIZE), key=key) as writer:
        for number in range(rows):
            pixels = np.full((SIZE, SIZE), number + brightness, dtype=np.uint8)
            writer.add(f"{number}.dcm", row(number, text=text), pixels, [Code.W_CHARSET] * (number == 0) * 2)
        writer.leave_out("x.txt", Rejected(State.IGNORED, Code.E_NOT_DICOM))
        writer.finish(ABOUT)
    return open_cohort(out)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cohort = write(tmp_path / "cohort")
    assert len(cohort) == 5
    assert cohort.images.shape == (5, SIZE, SIZE)
    assert isinstance(cohort.images, np.memmap)
    np.testing.assert_array_equal(cohort.images[:, 0, 0], range(5))
    assert cohort.texts == ("Ödem.",) * 5
    np.testing.assert_array_equal(cohort.patients, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(cohort.studies, range(5))
    np.testing.assert_array_equal(cohort.is_test, [True, True, False, False, False])
    np.testing.assert_array_equal(cohort.labels["edema"], [np.nan, 1, 0, 1, 0])
    assert cohort.patients.dtype == cohort.studies.dtype == np.int32
    assert cohort.labels["edema"].dtype == np.float32
    assert cohort.counts == dict.fromkeys(State, 0) | {State.USED: 5, State.IGNORED: 1}
    assert cohort.codes == {Code.E_NOT_DICOM: 1, Code.W_CHARSET: 1}
    assert cohort.unpaired_reports == 3


def test_train_and_test_share_every_row(tmp_path: Path) -> None:
    cohort = write(tmp_path / "cohort")
    np.testing.assert_array_equal(cohort.train(), [2, 3, 4])
    np.testing.assert_array_equal(cohort.test(), [0, 1])


def test_images_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        write(tmp_path / "cohort").images[0] = 0


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    write(tmp_path / "cohort")
    assert stat.S_IMODE((tmp_path / "cohort").stat().st_mode) == 0o700
    files = list((tmp_path / "cohort").iterdir())
    assert {path.name for path in files} == {
        *("images.npy", "keys.bin", "index.arrow", "tokens.arrow", "cohort.json", "quarantine.csv")
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_quarantine_lists_reasons_and_remarks(tmp_path: Path) -> None:
    write(tmp_path / "cohort")
    assert (tmp_path / "cohort/quarantine.csv").read_text() == (
        "path,state,code,detail\n0.dcm,used,W_CHARSET,\nx.txt,ignored,E_NOT_DICOM,\n"
    )


def test_identity_is_the_contents(tmp_path: Path) -> None:
    original = write(tmp_path / "a").identity
    assert len(bytes.fromhex(original)) == 32
    assert write(tmp_path / "b").identity == original
    assert write(tmp_path / "a").identity == original
    changed = {
        write(tmp_path / "c", text="Oedem.").identity,
        write(tmp_path / "c", brightness=1).identity,
        write(tmp_path / "c", rows=4).identity,
        write(tmp_path / "c", key=b"other").identity,
    }
    assert len(changed | {original}) == 5


def test_a_new_cohort_replaces_the_old_one_whole(tmp_path: Path) -> None:
    old = write(tmp_path / "cohort")
    new = write(tmp_path / "cohort", rows=2)
    assert (len(old), len(new)) == (5, 2)
    assert old.images[4, 0, 0] == 4  # still mapped
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_failed_build_leaves_the_old_cohort_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "cohort")
    with (
        pytest.raises(KeyboardInterrupt),
        CohortWriter(tmp_path / "cohort", image_shape=(SIZE, SIZE), key=b"k"),
    ):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]
    assert len(open_cohort(tmp_path / "cohort")) == 5


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".cohort.partial-dead").mkdir()
    (tmp_path / ".cohort.partial-dead/images.npy").touch()
    write(tmp_path / "cohort")
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_an_empty_cohort_says_why_and_leaves_the_list(tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    with CohortWriter(out, image_shape=(SIZE, SIZE), key=b"k") as writer:
        writer.leave_out("x", Rejected(State.QUARANTINED, Code.E_BLANK))
        with pytest.raises(
            EmptyCohortError, match=r"no usable pair among 1 inputs, see .*: 1 x E_BLANK \(every"
        ):
            writer.finish(ABOUT)
    assert "x,quarantined,E_BLANK" in (out / "quarantine.csv").read_text()
    assert stored_fingerprint(out) is None
    with locked(out):
        assert len(write(out)) == 5


def test_other_peoples_folders_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").touch()
    with pytest.raises(StoredCohortError, match="holds something other than a cohort"), locked(out):
        pass
    with (
        pytest.raises(StoredCohortError, match="holds something other than a cohort"),
        locked(out / "chapter.tex"),
    ):
        pass


def test_opening_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoredCohortError, match="there is no cohort in"):
        open_cohort(tmp_path)


def test_another_version_is_refused_by_number(tmp_path: Path) -> None:
    write(tmp_path / "cohort")
    manifest = json.loads((tmp_path / "cohort/cohort.json").read_text())
    (tmp_path / "cohort/cohort.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(StoredCohortError, match="has version 0, expected 5"):
        open_cohort(tmp_path / "cohort")
    assert stored_fingerprint(tmp_path / "cohort") is None


@pytest.mark.parametrize("name", ["images.npy", "index.arrow", "tokens.arrow", "cohort.json"])
@pytest.mark.parametrize("keep", [0, 40, 200])
def test_damage_is_named(tmp_path: Path, name: str, keep: int) -> None:
    write(tmp_path / "cohort")
    path = tmp_path / "cohort" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoredCohortError, match="is damaged; remove it"):
        open_cohort(tmp_path / "cohort")


@pytest.mark.parametrize("name", ["index.arrow", "tokens.arrow"])
def test_a_file_of_another_cohort_is_damage(tmp_path: Path, name: str) -> None:
    """Of tokens above all: they would be trained on as if they were of these texts."""
    write(tmp_path / "a")
    write(tmp_path / "b", text="Oedem.")
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(StoredCohortError, match="is damaged; remove it"):
        open_cohort(tmp_path / "a")


def test_a_cohort_of_before_gives_way_and_its_images_are_taken_over(tmp_path: Path) -> None:
    out, key = tmp_path / "cohort", b"0123456789abcdef"
    pixels = np.full((SIZE, SIZE), 7, dtype=np.uint8)
    with CohortWriter(out, image_shape=(SIZE, SIZE), key=b"k") as writer:
        writer.add("0.dcm", row(0), pixels, (), key)
        writer.finish(ABOUT)
    manifest = json.loads((out / "cohort.json").read_text())
    (out / "cohort.json").write_text(json.dumps(manifest | {"version": 3}))
    (out / "index.arrow").rename(out / "index.npz")
    with pytest.raises(StoredCohortError, match="has version 3, expected 5; build it again"):
        open_cohort(out)
    with locked(out), CohortWriter(out, image_shape=(SIZE, SIZE), key=b"k") as writer:
        found = writer.packed.find(key)
        assert found is not None
        writer.add("0.dcm", row(0), found, (), key)
        writer.finish(ABOUT)
    assert (open_cohort(out).images == 7).all()
    assert not (out / "index.npz").exists()


def test_repr_shows_no_patient_data(tmp_path: Path) -> None:
    cohort = write(tmp_path / "cohort")
    assert repr(cohort) == f"Cohort(identity={cohort.identity[:8]!r}, image_size=4)"
    assert "Edema" not in repr(row(1))
