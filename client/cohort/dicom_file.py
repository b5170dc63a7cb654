"""One DICOM file: read whatever was written, leave large pixels where they lie, and stay quiet about it."""

import logging
import mmap
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydicom import DataElement, Dataset
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from client.cohort.archives import opened
from client.cohort.outcomes import Code, RefusedError, State

_PREFIX_OFFSET, _PREFIX = 128, b"DICM"  # PS3.10 7.1
_PIXEL_DATA, _UNDEFINED = 0x7FE00010, 0xFFFFFFFF  # PS3.5 7.1.1
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")  # 0002, 0008, and 0008 big endian


def read_dataset(path: Path, *, keywords: Collection[str], pixels: bool) -> tuple[Dataset, list[Code]]:
    """Read the named attributes of a file and no others.

    A file without the DICM prefix is read all the same when it begins like a data set.

    Args:
        path: The file, or a member of a zip.
        keywords: Attributes to read.
        pixels: Whether ``PixelData`` is wanted. Uncompressed, it is not read but mapped: its value is a
            memoryview, and a file that loses its end while that is in use ends the process (SIGBUS).

    Returns:
        The data set, and the remarks made while reading.

    Raises:
        RefusedError: The file is empty or not DICOM, or a zip whose members cannot be read.
    """
    remarks: list[Code] = []
    with opened(path, whole=pixels) as file:
        head = file.read(_PREFIX_OFFSET + len(_PREFIX))
        if not head:
            raise RefusedError(State.QUARANTINED, Code.E_EMPTY_FILE)
        if head[_PREFIX_OFFSET:] != _PREFIX:
            if not head.startswith(_FIRST_GROUPS):
                raise RefusedError(State.IGNORED, Code.E_NOT_DICOM)
            remarks.append(Code.W_NO_PREFIX)
        file.seek(0)
        dataset = _parse(file, keywords, pixels=pixels)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset, remarks


def is_compressed(path: Path) -> bool:
    """Return whether the pixels of a file need a decoder; False where the file does not say."""
    try:
        with quietly([]), opened(path, whole=False) as file:
            head: Dataset = read_partial(file, stop_when=lambda *_: True, force=True)
            return bool(UID(head.file_meta.TransferSyntaxUID).is_encapsulated)
    except Exception:  # pydicom raises any type on a damaged header
        return False


def uid_name(uid: UID) -> str:
    """Return the standard's name of a UID. Of any other no more is told: what a file says may be anything."""
    return str(uid.name) if uid.type else "not one of the standard"


def _parse(file: BinaryIO, keywords: Collection[str], *, pixels: bool) -> Dataset:
    """Read to the end, but map an uncompressed ``PixelData``, or stop at it where it is not wanted."""
    size = os.fstat(file.fileno()).st_size if pixels else 0
    start, stop, kind = 0, 0, ""

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal start, stop, kind
        if tag != _PIXEL_DATA or not pixels:
            return tag == _PIXEL_DATA
        # Compressed pixels have no length; a deflated data set has been read to the end of its file.
        if length in (0, _UNDEFINED) or file.tell() == size:
            return False
        start, stop, kind = file.tell(), file.tell() + length, vr or "OW"  # implicit is OW (PS3.5 A.1)
        return True

    tags = [Tag(keyword) for keyword in keywords]
    dataset: Dataset = read_partial(file, stop_when=at_pixels, force=True, specific_tags=tags)
    if stop:
        # Never closed: the mapping ends with the last view of it.
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        dataset.add(DataElement("PixelData", kind, mapped[start:stop], already_converted=True))
    return dataset


@contextmanager
def quietly(remarks: list[Code]) -> Iterator[None]:
    """Turn pydicom's warnings into remarks and hold back its log: both quote values from the file."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.disabled = was_disabled
    texts = (str(warning.message).lower() for warning in caught)
    found = {Code.W_CHARSET if "encoding" in text or "charset" in text else Code.W_HEADER for text in texts}
    remarks.extend(sorted(found))
