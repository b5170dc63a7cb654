"""Which file each row of a packed cohort comes from, for the hospital's own eyes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.cohort.packed_images import KEY_BYTES, KEYS
from client.cohort.packing import locked
from client.cohort.scan_index import SCAN, ScanIndex
from client.cohort.sources import Candidate


@dataclass(frozen=True, kw_only=True, repr=False)
class Origin:
    """Where a row comes from.

    Attributes:
        name: The file, from the archive's folder on; empty where that is not known any more.
        uid: SOPInstanceUID, empty for images of a table.
        ids: Every name it goes by: that, the study's UID, the accession number, the file's name with and
            without what follows its last dot.
    """

    name: str = ""
    uid: str = ""
    ids: frozenset[str] = frozenset()


def origins(cohort: Path, *, secret: bytes) -> Sequence[Origin]:
    """Return the origin of every row of the cohort packed in the folder ``cohort``.

    Args:
        cohort: The folder.
        secret: The site's, as in ``CohortSettings.key``.
    """
    rows = defaultdict[bytes, list[int]](list)
    keys = (cohort / KEYS).read_bytes()
    for row, start in enumerate(range(0, len(keys), KEY_BYTES)):
        rows[keys[start : start + KEY_BYTES]].append(row)
    found = [Origin()] * (len(keys) // KEY_BYTES)
    with locked(cohort), ScanIndex(cohort / SCAN, root=cohort) as index:
        for key, name, header in index.packed(secret):
            for row in rows.get(key, ()):
                found[row] = _origin(name, header if isinstance(header, Candidate) else None)
    return found


def _origin(name: str, image: Candidate | None) -> Origin:
    path = Path(name)
    ids = {path.name, path.stem}
    if image is None:
        return Origin(name=name, ids=frozenset(ids))
    ids |= {image.uid, image.keys.get("study_instance_uid", ""), image.keys.get("accession_number", "")}
    return Origin(name=name, uid=image.uid, ids=frozenset(ids - {""}))
