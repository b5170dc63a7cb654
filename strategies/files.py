"""Making what was written survive a power failure."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
