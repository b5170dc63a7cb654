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
    """Replace a file's text durably; a reader sees the old text or the new one, never half of it.

    Args:
        path: The file.
        text: Its text.
        mode: Who may read it; 0o600 for what is its owner's alone.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)  # mkstemp's 0600 would hide the file from the people it is written for
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync(path.parent)
