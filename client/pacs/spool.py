"""Fetched files: one per instance, named by a hash of its UID, whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from client.cohort.dicom_file import read_dataset
from client.cohort.outcomes import Code
from client.pacs.errors import ItemFailed, SpoolError
from strategies.files import sync

SUFFIX = ".dcm"


class Spool:
    """The folder of fetched files, which ``DicomFolder`` reads, and beside it a desk for what is unfinished.

    Guarantees:
        ``folder`` holds whole files alone, at every moment, killed or not. Only their owner may read them,
        and no path holds a value of a patient. Methods may be called from several threads.
    """

    def __init__(self, folder: Path) -> None:
        """Use ``folder``; nothing is made before ``locked``."""
        self.folder = folder
        self.desk = folder.parent / f".{folder.name}.fetch"  # beside it: DicomFolder reads all in ``folder``
        self.drafts = self.desk / "drafts"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folders and hold the right to fill them.

        Raises:
            SpoolError: Another fetch holds it, or the folder holds files that were not fetched.
        """
        if not self.desk.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise SpoolError(
                f"{self.folder} holds files that were not fetched; name a new folder in cohort.dicom"
            )
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.desk):
            folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_dev != self.desk.stat().st_dev:
            raise SpoolError(
                f"{self.folder} is a file system of its own; name a folder inside it in cohort.dicom"
            )
        with os.fdopen(os.open(self.desk / "lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SpoolError(f"another fetch is filling {self.folder}; wait for it") from None
            shutil.rmtree(self.drafts, ignore_errors=True)
            self.drafts.mkdir(mode=0o700)
            yield

    def path(self, uid: str) -> Path:
        """Return where the instance ``uid`` lies, or would."""
        name = digest(uid).hex()
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def has(self, uid: str) -> bool:
        """Return whether the instance is there."""
        return self.path(uid).exists()

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Offer an empty file to write into; what ``keep`` has not taken is removed."""
        handle, name = tempfile.mkstemp(dir=self.drafts)  # mode 0600
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def keep(self, draft: Path, uid: str) -> None:
        """Make a written draft the file of the instance ``uid``, durably."""
        target = self.path(uid)
        draft.chmod(0o600)
        sync(draft)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        draft.replace(target)
        sync(target.parent)

    def keep_only(self, is_listed: Callable[[bytes], bool]) -> int:
        """Remove every file by whose ``digest`` ``is_listed`` is false; return how many those were."""
        removed = 0
        for folder in sorted(self.folder.iterdir()):
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                if not is_listed(bytes.fromhex(path.stem)):
                    path.unlink()
                    removed += 1
        return removed


def digest(uid: str) -> bytes:
    """Return what names the file of the instance ``uid``, 32 bytes."""
    return hashlib.sha256(uid.encode()).digest()


def instance_of(draft: Path) -> str:
    """Return the SOP instance UID of a received file.

    Raises:
        ItemFailed: It is no DICOM object, or one without a UID.
    """
    try:
        dataset, _ = read_dataset(draft, keywords=["SOPInstanceUID"], pixels=False)
        found = str(dataset.SOPInstanceUID).strip(" \0")
    except Exception:  # pydicom raises any type on a damaged header
        raise ItemFailed(Code.E_FETCH_CUT, passing=True) from None
    if not found:
        raise ItemFailed(Code.E_FETCH_CUT)
    return found
