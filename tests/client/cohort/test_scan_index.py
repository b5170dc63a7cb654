"""What is known of files, kept between builds."""

import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort import facts
from client.cohort.outcomes import Code, Rejected, Rendered, State
from client.cohort.packed_images import PackedImages
from client.cohort.scan_index import BATCH, SCAN, TRY_AGAIN, ScanIndex
from client.cohort.sources import Candidate
from client.cohort.workers import Workers
from client.reports.report import Report, Status

NAMES = [f"{number}.dcm" for number in range(5)]
IN_ORDER = Workers(1, items=0).map


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in NAMES:
        (tmp_path / "in" / name).write_text(name)
    return tmp_path / "in"


class Reader:
    """Reads a file as an image of that name, and notes that it did."""

    def __init__(self, *, code: Code | None = None) -> None:
        self.read: list[str] = []
        self._code = code

    def __call__(self, path: Path) -> Candidate | Rejected:
        self.read.append(path.name)
        if self._code is not None:
            return Rejected(State.QUARANTINED, self._code, "why")
        return candidate(path)


def candidate(path: Path, **changes: Any) -> Candidate:
    keys = {"accession_number": "A1"}
    whole = Candidate(
        path=path, patient="Jörg", study="1.2", keys=keys, uid=path.name, remarks=(Code.W_CHARSET,)
    )
    return replace(whole, **changes)


def scan(archive: Path, reader: Reader, *, rules: str = "1", names: list[str] = NAMES) -> list[facts.Outcome]:
    with ScanIndex(archive.parent / "out" / SCAN, root=archive) as index:
        paths = [archive / name for name in names]
        found: list[facts.Outcome] = [*index.headers(IN_ORDER, rules=rules)(reader, paths)]
        index.forget_the_rest()
    return found


def test_what_is_known_is_not_read_again(archive: Path) -> None:
    first, second = Reader(), Reader()
    assert scan(archive, first) == scan(archive, second) == [candidate(archive / name) for name in NAMES]
    assert (first.read, second.read) == (NAMES, [])


@pytest.mark.parametrize("change", ["content", "time", "rules"])
def test_what_has_changed_is(archive: Path, change: str) -> None:
    scan(archive, Reader())
    if change == "content":
        (archive / "2.dcm").write_text("longer")
    elif change == "time":
        os.utime(archive / "2.dcm", (1, 1))
    reader = Reader()
    scan(archive, reader, rules="2" if change == "rules" else "1")
    assert reader.read == (NAMES if change == "rules" else ["2.dcm"])


def test_an_archive_that_has_moved_is_still_known(archive: Path) -> None:
    scan(archive, Reader())
    moved = archive.rename(archive.with_name("moved"))
    assert scan(moved, reader := Reader()) == [candidate(moved / name) for name in NAMES]
    assert reader.read == []


def test_files_that_are_gone_are_forgotten(archive: Path) -> None:
    scan(archive, Reader())
    scan(archive, Reader(), names=NAMES[:2])
    assert "4.dcm" not in (archive.parent / "out" / SCAN).read_bytes().decode("latin-1")
    scan(archive, reader := Reader())
    assert reader.read == NAMES[2:]


def test_a_file_that_vanishes_is_read_and_not_kept(archive: Path) -> None:
    scan(archive, reader := Reader(), names=["none"])
    scan(archive, reader, names=["none"])
    assert reader.read == ["none", "none"]


@pytest.mark.parametrize("code", [Code.E_TRUNCATED, *TRY_AGAIN])
def test_what_may_be_the_machines_fault_is_tried_again(archive: Path, code: Code) -> None:
    found = scan(archive, Reader(code=code))
    assert scan(archive, reader := Reader(code=code)) == found
    assert reader.read == (NAMES if code in TRY_AGAIN else [])


def test_known_and_unknown_files_come_in_their_order(archive: Path) -> None:
    names = [f"{number:05}" for number in range(BATCH + 10)]
    for name in names:
        (archive / name).touch()
    scan(archive, Reader(), names=names[::3])
    found = scan(archive, reader := Reader(), names=names)
    assert [one.uid for one in found if isinstance(one, Candidate)] == names
    assert reader.read == [name for number, name in enumerate(names) if number % 3]


def test_only_the_owner_may_read_it(archive: Path) -> None:
    scan(archive, Reader())
    (path,) = (archive.parent / "out").iterdir()
    assert (path.name, stat.S_IMODE(path.stat().st_mode)) == (SCAN, 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["noise", "half", "layout"])
def test_an_index_that_cannot_be_used_is_made_anew(archive: Path, damage: str) -> None:
    scan(archive, Reader())
    path = archive.parent / "out" / SCAN
    if damage == "noise":
        path.write_bytes(b"not a database" * 1000)
    elif damage == "half":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 77")
        database.close()
    scan(archive, reader := Reader())
    assert reader.read == NAMES


def test_images_are_found_in_what_was_packed(archive: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    rendered: list[str] = []

    def render(path: Path) -> Rendered | Rejected:
        rendered.append(path.name)
        if path.name == "3.dcm":
            return Rejected(State.QUARANTINED, Code.E_BLANK)
        return Rendered(pixels + int(path.stem), [Code.W_WINDOW_FALLBACK])

    def show(packed: PackedImages, *, rules: str = "1", secret: bytes = b"s") -> list[Rendered | Rejected]:
        with ScanIndex(archive.parent / SCAN, root=archive) as index:
            displays = index.displays(IN_ORDER, rules=rules, packed=packed, secret=secret)
            return list(displays(render, [archive / name for name in NAMES]))

    first = show(PackedImages(shape=(4, 4)))
    images = [one for one in first if isinstance(one, Rendered)]
    np.save(archive.parent / "images.npy", np.array([one.pixels for one in images[1:]]))
    (archive.parent / "keys.bin").write_bytes(b"".join(one.key for one in images[1:]))
    assert {len(one.key) for one in images} == {16}
    rendered.clear()
    second = show(PackedImages([archive.parent], shape=(4, 4)))
    assert rendered == ["0.dcm"]  # known, but its pixels are not there
    for one, other in zip(first, second, strict=True):
        if isinstance(one, Rendered) and isinstance(other, Rendered):
            np.testing.assert_array_equal(one.pixels, other.pixels)
            assert (one.key, list(one.remarks)) == (other.key, list(other.remarks))
        else:
            assert one == other
    packed = PackedImages([archive.parent], shape=(4, 4))
    rendered.clear()
    show(packed, secret=b"t")
    assert rendered == [name for name in NAMES if name != "3.dcm"]
    rendered.clear()
    show(packed, rules="2")
    assert rendered == NAMES


def test_packed_images_that_do_not_fit_are_no_images(tmp_path: Path) -> None:
    def packed(images: np.ndarray[Any, Any], keys: int, size: int = 4) -> int:
        np.save(tmp_path / "images.npy", images)
        (tmp_path / "keys.bin").write_bytes(os.urandom(16 * keys))
        return len(PackedImages([tmp_path, tmp_path / "none"], shape=(size, size)))

    images = np.zeros((3, 4, 4), dtype=np.uint8)
    assert packed(images, 3) == 3
    assert packed(images, 2) == 2  # a packing that was killed
    assert packed(images, 5) == 3
    assert packed(images, 3, size=8) == 0
    assert packed(images.astype(np.int8), 3) == 0
    assert packed(np.asfortranarray(images), 3) == 0
    assert packed(images[:0], 0) == 0
    (tmp_path / "images.npy").write_bytes(b"")
    assert len(PackedImages([tmp_path], shape=(4, 4))) == 0


@given(st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=20))
def test_every_key_finds_its_own_image(tmp_path_factory: pytest.TempPathFactory, keys: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("packed")
    np.save(folder / "images.npy", np.arange(len(keys), dtype=np.uint8).repeat(4).reshape(-1, 2, 2))
    (folder / "keys.bin").write_bytes(b"".join(keys))
    packed = PackedImages([folder], shape=(2, 2))
    for number, key in enumerate(keys):
        found = packed.find(key)
        assert (found is None) if key == bytes(16) else (found is not None and (found == number).all())
    assert packed.find(b"another key here") is None or b"another key here" in keys


_TEXT = st.text(max_size=8)
_CODES = st.lists(st.sampled_from(list(Code)), max_size=3).map(tuple)
_LABELS = st.dictionaries(_TEXT, st.floats(0, 1), max_size=3)
_OUTCOMES = st.one_of(
    st.builds(
        Candidate,
        path=st.just(Path("x")),
        patient=_TEXT,
        study=_TEXT,
        keys=st.dictionaries(_TEXT, _TEXT, max_size=3),
        uid=_TEXT,
        text=st.none() | _TEXT,
        text_rule=_TEXT,
        labels=_LABELS,
        is_test=st.none() | st.booleans(),
        remarks=_CODES,
    ),
    st.builds(
        Report, source=_TEXT, text=_TEXT, status=st.sampled_from(list(Status)), labels=_LABELS, remarks=_CODES
    ),
    st.builds(Rejected, state=st.sampled_from(list(State)), code=st.sampled_from(list(Code)), detail=_TEXT),
)


@given(_OUTCOMES)
def test_an_outcome_is_kept_whole(outcome: facts.Outcome) -> None:
    assert facts.decode(facts.encode(outcome), Path("x")) == outcome


def test_the_layout_names_every_field() -> None:
    for kind, rest in ((Candidate, "text_rule"), (Report, "language"), (Rejected, "detail")):
        assert f'"{rest}"' in facts.LAYOUT, kind
    assert '"path"' not in facts.LAYOUT
