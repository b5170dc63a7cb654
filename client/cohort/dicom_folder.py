"""A folder of DICOM files, as exported from a PACS: any names, any depth, anything in between."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import tee
from pathlib import Path

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    BreastProjectionXRayImageStorageForPresentation,
    ComputedRadiographyImageStorage,
    DigitalIntraOralXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from client.cohort import display
from client.cohort.archives import expanded
from client.cohort.dicom_file import is_compressed, quietly, read_dataset, uid_name
from client.cohort.errors import SourceMissingError
from client.cohort.on_disk import SetOnDisk
from client.cohort.outcomes import Code, RefusedError, Rejected, Rendered, State
from client.cohort.pixels import check_decodable, frame_count
from client.cohort.sources import Candidate, Entry, OrderedMap, stamp
from client.reports.report import Report
from client.reports.sr import REPORT_CLASSES, issuer_of, read_report
from client.text.known import HEADER

PROJECTIONS = frozenset(
    {
        ComputedRadiographyImageStorage,
        DigitalXRayImageStorageForPresentation,
        DigitalMammographyXRayImageStorageForPresentation,
        BreastProjectionXRayImageStorageForPresentation,
        DigitalIntraOralXRayImageStorageForPresentation,
    }
)
# These carry a patient's name in their pixels as a habit, and say so rarely: absent is not "NO".
OFTEN_BURNED_IN = frozenset(
    {
        SecondaryCaptureImageStorage,
        UltrasoundImageStorage,
        XRayAngiographicImageStorage,
        XRayRadiofluoroscopicImageStorage,
    }
)
# Terms of PS3.3 C.8.1.1.1 (CR) but for AP, PA and the decubitus views, and spellings found in archives.
NOT_FRONTAL = frozenset({"LL", "RL", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "LAT", "LATERAL", "OBLIQUE"})

_REQUIRED = (
    "SOPInstanceUID",
    "StudyInstanceUID",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "PhotometricInterpretation",
)
_HEADER_KEYWORDS = (
    *_REQUIRED,
    "SOPClassUID",
    "AccessionNumber",
    "BurnedInAnnotation",
    "ImageType",
    "IssuerOfAccessionNumberSequence",
    "NumberOfFrames",
    "PatientID",
    "PresentationIntentType",
    "SpecificCharacterSet",
    "StudyID",
    "ViewPosition",
    *HEADER,
)


@dataclass(frozen=True, repr=False)
class DicomFolder:
    """Every file below ``root`` but those ``without`` which it is; links to folders are not followed.

    The members of a zip are files too, as ``export.zip!/name``; a DICOMDIR is not asked what there is.

    Attributes:
        root: The folder.
        without: Files below it that are read as something else, such as a table of reports.
        ct_windows: What CT images are shown by; without any, CT is not read.
    """

    root: Path
    without: Collection[Path] = frozenset()
    ct_windows: Sequence[display.Window] = ()

    def _files(self) -> Iterator[Path]:
        if not self.root.is_dir():
            raise SourceMissingError(f"expected the DICOM folder {self.root}, and there is none")
        files = (path for path in _files_below(self.root) if path not in self.without)
        return (path for file in files for path in expanded(file))

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._files())

    def __len__(self) -> int:
        return self._count

    def stamps(self) -> Iterator[str]:
        """Yield name, size and modification time of every file."""
        return (stamp(path, self._name(path)) for path in self._files())

    def may_end_process(self) -> bool:
        """Return whether any file has compressed pixels: some decoders die of a damaged stream."""
        return any(map(is_compressed, self._files()))

    def scan(self, ordered_map: OrderedMap) -> Iterable[Entry]:
        """Yield one entry per file by path; of files with one SOPInstanceUID the first is the candidate."""
        paths, to_read = tee(self._files())
        read = partial(read_header, with_ct=True) if self.ct_windows else read_header
        with SetOnDisk() as seen:
            for path, outcome in zip(paths, ordered_map(read, to_read), strict=True):
                if isinstance(outcome, Candidate) and not seen.add(outcome.uid):
                    outcome = Rejected(State.DUPLICATE, Code.E_DUPLICATE_SOP)
                yield Entry(self._name(path), outcome)

    def renderer(self, size: int) -> Callable[[Path], Rendered | Rejected]:
        """Return what makes the packed image of a path."""
        return partial(self.render, size=size, ct_windows=self.ct_windows)

    @staticmethod
    def render(path: Path, size: int, ct_windows: Sequence[display.Window] = ()) -> Rendered | Rejected:
        """Read what display needs and no more, and make the packed image; no file makes this raise."""
        try:
            with quietly([]):  # the scan has made its remarks on this file
                dataset, _ = read_dataset(path, keywords=display.KEYWORDS, pixels=True)
                pixels, remarks = display.display_image(dataset, size=size, ct_windows=ct_windows)
        except RefusedError as refusal:
            return refusal.rejected
        except EOFError:
            return Rejected(State.QUARANTINED, Code.E_TRUNCATED)
        except Exception:  # decoders raise any type on a damaged stream
            return Rejected(State.QUARANTINED, Code.E_DECODE)
        return Rendered(pixels, remarks)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def read_header(path: Path, *, with_ct: bool = False) -> Candidate | Report | Rejected:
    """Judge a file by its header, and read all of a structured report; no file makes this raise."""
    remarks: list[Code] = []
    try:
        with quietly(remarks):
            dataset, noted = read_dataset(path, keywords=_HEADER_KEYWORDS, pixels=False)
            if dataset.get("SOPClassUID") in REPORT_CLASSES:
                return read_report(path)
            accession, study, patient, uid = _judge(dataset, with_ct=with_ct)
            issuer, study_id = issuer_of(dataset), _text(dataset, "StudyID")
            if frame_count(dataset) > 1:
                noted.append(Code.W_MULTIFRAME)
            header = _identifiers(dataset)
    except RefusedError as refusal:
        return refusal.rejected
    except EOFError:
        return Rejected(State.QUARANTINED, Code.E_TRUNCATED)
    except Exception:  # pydicom raises any type on a damaged header
        return Rejected(State.QUARANTINED, Code.E_UNREADABLE)
    return Candidate(
        path=path,
        patient=patient,
        study=study,
        keys={
            "accession_number": accession,
            "issuer": issuer,
            "study_instance_uid": study,
            "study_id": study_id,
        },
        uid=uid,
        header=header,
        remarks=(*noted, *remarks),
    )


def _judge(dataset: Dataset, *, with_ct: bool) -> tuple[str, str, str, str]:
    """Return accession number, study UID, patient id and SOP instance UID of an image that may be used."""
    sop_class = UID(_text(dataset, "SOPClassUID"))
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise RefusedError(State.IGNORED, Code.E_DICOMDIR)
    wanted = PROJECTIONS | OFTEN_BURNED_IN | (display.CT_CLASSES if with_ct else frozenset())
    if "Rows" not in dataset and sop_class not in wanted:
        raise RefusedError(State.IGNORED, Code.E_NOT_IMAGE)
    if not sop_class:
        raise RefusedError(State.QUARANTINED, Code.E_TAG_MISSING, "SOPClassUID")
    if _text(dataset, "PresentationIntentType") == "FOR PROCESSING":  # a SOP class of its own for some
        raise RefusedError(State.UNSUPPORTED, Code.E_FOR_PROCESSING)
    if sop_class not in wanted:
        raise RefusedError(State.UNSUPPORTED, Code.E_SOP_CLASS, uid_name(sop_class))
    if sop_class in display.CT_CLASSES and "LOCALIZER" in (dataset.get("ImageType") or ()):
        raise RefusedError(State.IGNORED, Code.E_LOCALIZER)
    for keyword in _REQUIRED:
        if dataset.get(keyword) in (None, ""):
            raise RefusedError(State.QUARANTINED, Code.E_TAG_MISSING, keyword)
    if _text(dataset, "ViewPosition").upper() in NOT_FRONTAL:
        raise RefusedError(State.IGNORED, Code.E_NOT_FRONTAL)
    burned_in = _text(dataset, "BurnedInAnnotation").upper()
    if burned_in == "YES" or (sop_class in OFTEN_BURNED_IN and burned_in != "NO"):
        raise RefusedError(State.QUARANTINED, Code.E_BURNED_IN)
    check_decodable(dataset)
    study, uid = _text(dataset, "StudyInstanceUID"), _text(dataset, "SOPInstanceUID")
    return _text(dataset, "AccessionNumber"), study, _text(dataset, "PatientID"), uid


def _identifiers(dataset: Dataset) -> dict[str, str]:
    """What the header says that a report must not repeat; several values as DICOM writes them.

    A value that breaks the standard costs neither the image nor a remark: nothing else is read from it.
    """
    found: dict[str, str] = {}
    with quietly([]):
        for keyword in HEADER:
            with suppress(Exception):  # pydicom raises any type on a damaged value
                value = dataset.get(keyword)
                several = value if isinstance(value, MultiValue) else [value]
                if text := "\\".join(str(each).strip() for each in several if each):
                    found[keyword] = text
    return found


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield files in the order of their paths, with the names of one folder a level in memory."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((one.name, one.is_dir(follow_symlinks=False), one.is_file()) for one in entries)
    except OSError as error:
        raise SourceMissingError(f"cannot read the folder {folder}: {error.strerror}") from error
    for name, is_folder, is_file in found:
        if is_folder:
            yield from _files_below(folder / name)
        elif is_file:
            yield folder / name
