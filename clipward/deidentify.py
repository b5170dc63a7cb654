"""`clipward cohort deidentify`: a copy of a DICOM folder without what dicognito knows to identify.

Nothing in Clipward relies on it. Training reads a fixed list of attributes, never writes source DICOM, and
lets only noised updates leave, whether a folder was de-identified or not. This is for copies that others will
hold, and it says what it cannot see: writing in the pixels and names in free text.
"""

import csv
import io
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

_FREE_TEXT = frozenset({"LT", "ST", "UT"})  # PS3.5 6.2: paragraphs, not codes or names
_MADE_UP = "InstitutionAddress"  # by dicognito
_OVERLAYS = range(0x6000, 0x6100)
# PS3.15 Table E.1-1 removes these or gives them a dummy; dicognito 0.19 keeps them. Of a specimen, the
# container's identifier is the accession number.
_ALSO_REMOVED = ("DeviceSerialNumber", "ContainerIdentifier", "SpecimenIdentifier")
_FILE_META = (
    *("SourceApplicationEntityTitle", "SendingApplicationEntityTitle", "ReceivingApplicationEntityTitle"),
    *("SourcePresentationAddress", "SendingPresentationAddress", "ReceivingPresentationAddress"),
    *("PrivateInformation", "PrivateInformationCreatorUID"),
)
_KEYS = ("AccessionNumber", "StudyInstanceUID", "PatientID")
KEYS_HEADER = ("accession_number", "study_instance_uid", "patient_id",
               "new_accession_number", "new_study_instance_uid", "new_patient_id")  # fmt: skip


class DeidentifyError(ValueError):
    """A folder cannot be de-identified; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What became of a folder.

    Attributes:
        files: Files copied.
        refused: Files not copied, by reason.
        left: What is still in the copies and may identify somebody, by kind, in files.
        keys: Old and new accession numbers, study UIDs and patient ids: with them reports find their images,
            and whoever has them undoes the work.
    """

    files: int
    refused: Counter[str]
    left: Counter[str]
    keys: frozenset[tuple[str, ...]] = field(repr=False)


def deidentify(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Folder of DICOM files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the copies.")],
    secret_file: Annotated[
        Path | None, typer.Option(help="Secret that gives the same new ids again: `openssl rand -hex 32`.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="Write old and new ids here, to translate the reports. It undoes the work: keep it apart."
        ),
    ] = None,
) -> None:
    """Copy a DICOM folder without names, ids, dates, private attributes and file names, by dicognito.

    Training does not need it and no promise of Clipward rests on it. Writing in the pixels, overlays and free
    text are copied as they are: the command counts them, and a person has to look.

    Example: clipward cohort deidentify export export-without-names --keys ../translation.csv
    """
    from client.cohort import CohortError
    from client.cohort.overlap import Key
    from clipward.console import errors_in_one_line, progress_bars
    from strategies.files import write_text

    with errors_in_one_line((CohortError, DeidentifyError, OSError)), progress_bars() as show:
        seed = Key.read(secret_file).secret if secret_file is not None else secrets.token_bytes(32)
        copied = copy_folder(
            source, out, seed=seed, on_progress=lambda done, total: show("copy", done, total)
        )
        if keys is not None:
            write_text(keys, _table(copied), mode=0o600)
    typer.echo(f"{copied.files:8} files copied to {out}")
    for reason, count in sorted(copied.refused.items()):
        typer.echo(f"{count:8} not copied: {reason}")
    for kind, count in sorted(copied.left.items()):
        typer.echo(f"{count:8} still with {kind}")
    typer.echo("what was not looked for: writing in the pixels, names in free text. A person has to look.")


def copy_folder(
    source: Path, out: Path, *, seed: bytes, on_progress: Callable[[int, int], None] | None = None
) -> Copied:
    """Copy every DICOM file below ``source`` into the new folder ``out``, numbered in the order of its path.

    Guarantees:
        Files keep their relations: equal ids and UIDs become equal ones, dates of all files move by one
        number of days. What is no DICOM, a DICOMDIR, and what cannot be read or written is not copied.

    Args:
        source: The folder.
        out: The copies' folder; made here, for its owner alone.
        seed: Secret from which all new values follow.
        on_progress: Called with files done and files in all.

    Raises:
        DeidentifyError: ``out`` is there already or lies in ``source``, or there is no folder ``source``.
    """
    from dicognito.anonymizer import Anonymizer

    if not source.is_dir():
        raise DeidentifyError(f"expected the DICOM folder {source}, and there is none")
    if out.exists():
        raise DeidentifyError(f"{out} is there already: name a new folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise DeidentifyError(f"expected {out} outside of {source}")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    anonymizer = Anonymizer(seed=seed.hex())
    refused, left, keys, files = Counter[str](), Counter[str](), set[tuple[str, ...]](), 0
    out.mkdir(mode=0o700, parents=True)
    for number, path in enumerate(paths):
        try:
            dataset = _read(path)
            before = _key_values(dataset)
            _anonymize(dataset, anonymizer)
            _write(dataset, out / f"{number:08}.dcm")
        except _NotCopied as reason:
            refused[str(reason)] += 1
        else:
            files += 1
            keys.add((*before, *_key_values(dataset)))
            left.update(_left(dataset))
        if on_progress is not None:
            on_progress(number + 1, len(paths))
    return Copied(files=files, refused=refused, left=left, keys=frozenset(keys))


class _NotCopied(Exception):
    """Why a file is not copied, in words that hold nothing of it."""


def _read(path: Path) -> "Dataset":
    from pydicom import dcmread
    from pydicom.uid import MediaStorageDirectoryStorage

    from client.cohort.dicom_file import quietly, read_dataset
    from client.cohort.outcomes import RefusedError

    try:
        with quietly([]):
            head, _ = read_dataset(path, keywords=("SOPClassUID",), pixels=False)
            dataset = dcmread(path, force=True)
            dataset.decode()
    except RefusedError as refusal:
        raise _NotCopied(refusal.rejected.code.meaning) from None
    except Exception:  # pydicom raises any type on a damaged file
        raise _NotCopied("the file cannot be parsed") from None
    if head.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise _NotCopied("a directory of files (DICOMDIR), which names them")
    dataset.file_meta.TransferSyntaxUID = head.file_meta.TransferSyntaxUID
    return dataset


def _anonymize(dataset: "Dataset", anonymizer: Any) -> None:
    from client.cohort.dicom_file import quietly

    try:
        with quietly([]):
            dataset.remove_private_tags()
            dataset.walk(_remove)
            for keyword in _FILE_META:
                dataset.file_meta.pop(keyword, None)
            dataset.preamble = bytes(128)  # PS3.10 7.1 leaves it to whoever wrote the file
            anonymizer.anonymize(dataset)
    except Exception:  # a value may be anything
        raise _NotCopied("an attribute cannot be replaced") from None


def _remove(dataset: "Dataset", element: "DataElement") -> None:
    if element.keyword in _ALSO_REMOVED:
        del dataset[element.tag]


def _write(dataset: "Dataset", path: Path) -> None:
    from client.cohort.dicom_file import quietly

    data = io.BytesIO()
    try:
        with quietly([]):
            dataset.save_as(data, enforce_file_format=True)
    except Exception:  # what was read by force may not be writable
        raise _NotCopied("the copy cannot be written as DICOM") from None
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data.getbuffer())


def _key_values(dataset: "Dataset") -> tuple[str, ...]:
    return tuple(str(dataset.get(keyword) or "").strip() for keyword in _KEYS)


def _left(dataset: "Dataset") -> Iterator[str]:
    """Yield what is in a copy that may still identify somebody."""
    elements = list(dataset.iterall())
    texts = (element for element in elements if element.VR in _FREE_TEXT and element.value)
    if any(element.keyword != _MADE_UP for element in texts):
        yield "free text"
    if any(element.tag.group in _OVERLAYS for element in elements):
        yield "overlays"
    if "EncapsulatedDocument" in dataset:
        yield "a document inside"
    if "PixelData" in dataset:
        burned_in = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
        if burned_in == "YES":
            yield "writing in the pixels, as the file says"
        elif burned_in != "NO":
            yield "pixels of which the file does not say whether there is writing in them"


def _table(copied: Copied) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(KEYS_HEADER)
    writer.writerows(sorted(copied.keys))
    return text.getvalue()
