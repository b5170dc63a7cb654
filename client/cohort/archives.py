"""Zip files among the inputs: their members are inputs too, as ``export.zip!/images/1.dcm``.

Nothing is ever unpacked to disk. A member's path exists in no file system: what opens, measures or stamps
inputs asks here first.
"""

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from client.cohort.outcomes import Code, RefusedError, State

# A zip can promise anything. A radiograph of 100 million pixels, or a report, is smaller by far.
MAX_MEMBER_BYTES = 512 * 2**20

_ZIP, _MARK = ".zip", "!/"
_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1  # general purpose bit 0, APPNOTE 4.4.4


def expanded(path: Path) -> Iterator[Path]:
    """Yield the members of a zip by their paths, and any other file, or a zip that is none, as itself."""
    if path.suffix.lower() != _ZIP:
        yield path
        return
    try:
        members = _archive(path, *_state(path)).members
    except Exception:  # zipfile raises any type on a damaged directory
        yield path
        return
    yield from members


def container(path: Path) -> Path:
    """Return the file in which ``path`` lies: the zip of a member, else itself."""
    text = str(path)
    at = text.lower().find(_ZIP + _MARK)
    if at < 0:
        return path
    archive = Path(text[: at + len(_ZIP)])
    return archive if archive.is_file() else path


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a member unpacked.

    Raises:
        OSError: There is no such file.
    """
    archive = container(path)
    return path.stat().st_size if archive == path else _member(archive, path)[1].file_size


@contextmanager
def opened(path: Path, *, whole: bool) -> Iterator[BinaryIO]:
    """Open an input for reading.

    Args:
        path: A file, or a member of a zip.
        whole: Whether all of it is wanted. If not, a member is unpacked only as far as it is read, and has
            no file descriptor.

    Raises:
        OSError: There is no such file.
        RefusedError: It is a member that is too large, locked, or an archive; or a zip that cannot be opened.
    """
    archive = container(path)
    if archive == path:
        with open(path, "rb") as file:
            if path.suffix.lower() == _ZIP and file.peek(len(_MAGIC)).startswith(_MAGIC):
                raise RefusedError(State.QUARANTINED, Code.E_ARCHIVE)
            yield file
        return
    zipped, member = _member(archive, path)
    if member.flag_bits & _ENCRYPTED:
        raise RefusedError(State.QUARANTINED, Code.E_ARCHIVE_LOCKED)
    if member.file_size > MAX_MEMBER_BYTES:
        raise RefusedError(State.QUARANTINED, Code.E_ARCHIVE_TOO_LARGE)
    with zipped.open(member) as packed, io.BufferedReader(packed) as file:  # type: ignore[type-var]
        if file.peek(len(_MAGIC)).startswith(_MAGIC):
            raise RefusedError(State.IGNORED, Code.E_ARCHIVE_NESTED)
        if not whole:
            yield file
            return
        with tempfile.TemporaryFile() if not hasattr(os, "memfd_create") else _in_memory() as copy:
            while chunk := file.read(2**20):  # no more than the size it promises: zipfile sees to that
                copy.write(chunk)
            copy.seek(0)
            yield copy


class _Archive:
    """An open zip and its members by path; of two with one name the later counts, as in every unpacker."""

    def __init__(self, path: Path) -> None:
        self.file = zipfile.ZipFile(path)
        files = (info for info in self.file.infolist() if not info.filename.endswith("/"))
        self.members: Mapping[Path, zipfile.ZipInfo] = {_path(path, info.filename): info for info in files}


def _path(archive: Path, name: str) -> Path:
    path = Path(f"{archive}{_MARK}{name}")  # never joined: a member may be called "/etc/passwd"
    return path if path.parent != archive.parent else path / "_"  # or "", or "."


@lru_cache(maxsize=2)
def _archive(path: Path, size: int, modified: int) -> _Archive:
    """Return the zip, opened once while it stays as it is: its list of members may be long."""
    return _Archive(path)


def _state(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _member(archive: Path, path: Path) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    try:
        found = _archive(archive, *_state(archive))
        return found.file, found.members[path]
    except Exception as error:  # zipfile raises any type on a damaged directory
        raise FileNotFoundError("the zip has changed") from error


def _in_memory() -> BinaryIO:
    """Return a file without a name or a place on disk."""
    return open(os.memfd_create("member"), "w+b")
