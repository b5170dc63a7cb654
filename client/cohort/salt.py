"""The site's secret, which keys pseudonyms, the split and what a cohort is called."""

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from client.cohort.errors import SaltError
from client.cohort.store import stored_version
from strategies.files import sync

SALT_FILE = "cohort.salt"
SALT_BYTES = 32
_FIRST_SECRET = 2  # version of cohorts; those of version 1 had a public salt


def open_or_make_salt(folder: Path, *, cohort: Path) -> bytes:
    """Return the secret in ``folder/cohort.salt``, made if there is none: durable, for its owner alone.

    It is never made for a ``cohort`` that is there: by another secret, patients that were held out would be
    trained on. Two processes that make one at the same moment both get the first's.

    Raises:
        SaltError: It is lost, is no secret of 32 bytes, or others than its owner may read it.
    """
    path = folder / SALT_FILE
    if not path.exists():
        if stored_version(cohort) >= _FIRST_SECRET:
            raise SaltError(
                f"{path} is gone, and with another one other patients would be held out: restore it from the "
                f"site's back-up; if it is lost for good, remove {cohort} and begin with a new split"
            )
        _make(path)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise SaltError(f"{path} has mode {mode:o}, so others can tell pseudonyms: chmod 600 it")
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise SaltError(f"expected {SALT_BYTES} bytes in {path}, got {len(salt)}: restore it from a back-up")
    return salt


def _make(path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SALT_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    sync(path.parent)
