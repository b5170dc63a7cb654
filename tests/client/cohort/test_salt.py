"""The site's secret."""

import stat
from pathlib import Path

import pytest

from client.cohort.errors import SaltError
from client.cohort.salt import SALT_BYTES, SALT_FILE, open_or_make_salt
from client.cohort.store import VERSION


def test_a_secret_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    salt = open_or_make_salt(tmp_path, cohort=tmp_path / "cohort")
    assert len(salt) == SALT_BYTES
    assert open_or_make_salt(tmp_path, cohort=tmp_path / "cohort") == salt
    assert [path.name for path in tmp_path.iterdir()] == [SALT_FILE]
    assert stat.S_IMODE((tmp_path / SALT_FILE).stat().st_mode) == 0o600
    (tmp_path / "other").mkdir()
    assert open_or_make_salt(tmp_path / "other", cohort=tmp_path / "cohort") != salt


@pytest.mark.parametrize("version", [VERSION, VERSION - 1, 2])
def test_a_lost_secret_is_not_replaced_under_a_cohort(tmp_path: Path, version: int) -> None:
    """Nor under one that has to be built again: its patients would be held out by another secret."""
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort/cohort.json").write_text(f'{{"version": {version}, "fingerprint": "f"}}')
    with pytest.raises(SaltError, match=r"cohort.salt is gone, .*restore it from the site's back-up"):
        open_or_make_salt(tmp_path, cohort=tmp_path / "cohort")
    assert not (tmp_path / SALT_FILE).exists()
    (tmp_path / "cohort/cohort.json").write_text('{"version": 1, "fingerprint": "f"}')  # it had a public one
    open_or_make_salt(tmp_path, cohort=tmp_path / "cohort")


@pytest.mark.parametrize("content", [b"", bytes(SALT_BYTES - 1), bytes(SALT_BYTES + 1)])
def test_a_damaged_secret_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SALT_FILE).write_bytes(content)
    (tmp_path / SALT_FILE).chmod(0o600)
    with pytest.raises(SaltError, match=f"expected 32 bytes in .*, got {len(content)}: restore"):
        open_or_make_salt(tmp_path, cohort=tmp_path / "cohort")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / SALT_FILE).write_bytes(bytes(SALT_BYTES))
    (tmp_path / SALT_FILE).chmod(0o640)
    with pytest.raises(SaltError, match="has mode 640, so others can tell pseudonyms: chmod 600"):
        open_or_make_salt(tmp_path, cohort=tmp_path / "cohort")
