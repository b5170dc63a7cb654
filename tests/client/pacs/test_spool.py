"""Fetched files are whole, private and nameless."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.pacs.errors import ItemFailed, SpoolError
from client.pacs.spool import Spool, digest, instance_of

UID = "1.2.3"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "site" / "incoming")


def store(spool: Spool, uid: str, data: bytes = b"x") -> None:
    with spool.draft() as draft:
        draft.write_bytes(data)
        spool.keep(draft, uid)


def test_only_the_owner_may_read_what_was_fetched(spool: Spool) -> None:
    before = os.umask(0)
    try:
        with spool.locked():
            store(spool, UID)
    finally:
        os.umask(before)
    inside = [spool.folder, spool.desk, *spool.folder.rglob("*"), *spool.desk.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in inside if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in inside if path.is_dir()} == {0o700}


@given(uid=st.text(min_size=1, max_size=64))
def test_no_path_holds_a_value(uid: str) -> None:
    path = Spool(Path("incoming")).path(uid)
    assert path.stem == digest(uid).hex()
    assert path.parent.parent == Path("incoming")


def test_an_abandoned_draft_leaves_nothing(spool: Spool) -> None:
    with spool.locked():
        with spool.draft() as draft:
            draft.write_bytes(b"half")
        assert not any(spool.drafts.iterdir())
        assert not any(spool.folder.iterdir())
        assert not spool.has(UID)


def test_drafts_of_a_killed_fetch_are_cleared(spool: Spool) -> None:
    with spool.locked():
        (spool.drafts / "left").write_bytes(b"half")
    with spool.locked():
        assert not any(spool.drafts.iterdir())


def test_two_fetches_never_fill_one_folder(spool: Spool) -> None:
    with (
        spool.locked(),
        pytest.raises(SpoolError, match=r"another fetch is filling .*incoming; wait"),
        Spool(spool.folder).locked(),
    ):
        pass


def test_a_folder_of_other_files_is_left_alone(spool: Spool) -> None:
    spool.folder.mkdir(parents=True)
    (spool.folder / "mine.dcm").write_bytes(b"x")
    with (
        pytest.raises(SpoolError, match=r"files that were not fetched; name a new folder in cohort\.dicom"),
        spool.locked(),
    ):
        pass
    assert [path.name for path in spool.folder.iterdir()] == ["mine.dcm"]


def test_what_is_no_longer_listed_is_removed(spool: Spool) -> None:
    with spool.locked():
        store(spool, "1.1")
        store(spool, "1.2")
        assert spool.keep_only(lambda name: name == digest("1.2")) == 1
        assert (spool.has("1.1"), spool.has("1.2")) == (False, True)


@pytest.mark.parametrize("data", [b"", b"<html>500</html>", bytes(128) + b"DICM", b"\x08\x00" * 20])
def test_what_is_no_object_has_no_uid(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "draft").write_bytes(data)
    with pytest.raises(ItemFailed):
        instance_of(tmp_path / "draft")
