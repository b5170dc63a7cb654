"""Making what was written survive a power failure."""

import os
import tempfile
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a file's text, as `write_bytes` does its content."""
    write_bytes(path, text.encode(), mode=mode)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file durably; a reader sees the old content or the new one, never half of it.

    Args:
        path: The file.
        content: What it then holds.
        mode: Who may read it; 0o600 for what is its owner's alone.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)  # mkstemp's 0600 would hide the file from the people it is written for
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync(path.parent)
