import shutil
from pathlib import Path

import pytest

import client
from client.own_code import PACKAGES, code_digest, digest_of_folders


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    """The packages as another installation has them, with what Python and editors leave there."""
    root = Path(client.__path__[0]).parent
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(root / name, tmp_path / name, ignore=ignore)
    return {name: tmp_path / name for name in PACKAGES}


def test_the_same_files_have_the_same_digest_wherever_they_lie(copies: dict[str, Path]) -> None:
    (copies["client"] / "__pycache__").mkdir()
    (copies["client"] / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"compiled")
    (copies["client"] / "notes.txt").write_text("no source")
    assert digest_of_folders(copies) == code_digest()


@pytest.mark.parametrize("name", PACKAGES)
def test_one_changed_letter_is_another_digest(name: str, copies: dict[str, Path]) -> None:
    changed = next(path for path in sorted(copies[name].rglob("*.py")) if path.stat().st_size)
    changed.write_text(changed.read_text() + "#")
    assert digest_of_folders(copies) != code_digest()


def test_a_file_more_or_less_or_renamed_is_another_digest(copies: dict[str, Path]) -> None:
    seen = {digest_of_folders(copies)}
    added = copies["privacy"] / "extra.py"
    added.write_text("")
    seen.add(digest_of_folders(copies))
    added.rename(copies["strategies"] / "extra.py")
    seen.add(digest_of_folders(copies))
    (copies["strategies"] / "extra.py").rename(copies["strategies"] / "other.py")
    seen.add(digest_of_folders(copies))
    (copies["encoders"] / "vocabulary" / "radiology_bpe.json").unlink()
    seen.add(digest_of_folders(copies))
    assert len(seen) == 5


def test_all_of_ours_that_a_site_imports_is_in_the_digest() -> None:
    root = Path(client.__path__[0]).parent
    sources = "".join(path.read_text() for name in PACKAGES for path in (root / name).rglob("*.py"))
    ours = {"clipward", "client", "encoders", "privacy", "server", "strategies", "tasks"}
    imported = {name for name in ours if f"\nfrom {name}." in sources or f"\nimport {name}" in sources}
    assert imported == set(PACKAGES)
