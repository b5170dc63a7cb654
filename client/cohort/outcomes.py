"""What becomes of every input: one state, one reason, and remarks that cost nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class State(StrEnum):
    """Where an input ends; every input seen ends in exactly one of these."""

    USED = "used"
    DUPLICATE = "duplicate"
    UNPAIRED = "unpaired"
    UNSUPPORTED = "unsupported"
    QUARANTINED = "quarantined"
    IGNORED = "ignored"
    REPORT = "report"


class Code(StrEnum):
    """Why. ``E_`` keeps an input out of the cohort, ``W_`` is a remark on one that is used."""

    meaning: str

    E_NOT_DICOM = "E_NOT_DICOM", "not a DICOM file"
    E_NOT_IMAGE = "E_NOT_IMAGE", "a DICOM object without pixels (report, directory, presentation state)"
    E_NOT_FRONTAL = "E_NOT_FRONTAL", "a lateral or oblique projection"
    E_LOCALIZER = "E_LOCALIZER", "a CT localizer, which is no slice"
    E_EMPTY_FILE = "E_EMPTY_FILE", "the file has zero bytes"
    E_FILE_MISSING = "E_FILE_MISSING", "the table names an image that is not there"
    E_UNREADABLE = "E_UNREADABLE", "the file cannot be parsed"
    E_TRUNCATED = "E_TRUNCATED", "the file ends before its pixels do; export it again"
    E_TAG_MISSING = "E_TAG_MISSING", "a required attribute is absent"
    E_SOP_CLASS = (
        "E_SOP_CLASS",
        "not a projection image (MR and the like are not read; CT is, with ct-windows)",
    )
    E_FOR_PROCESSING = "E_FOR_PROCESSING", "raw detector data; export the FOR PRESENTATION image"
    E_TRANSFER_SYNTAX = "E_TRANSFER_SYNTAX", "a compression that cannot be read, such as video"
    E_DECODER_MISSING = "E_DECODER_MISSING", "no decoder is installed for this compression"
    E_DECODE = "E_DECODE", "the pixels cannot be decoded"
    E_CRASHED = "E_CRASHED", "the decoder died on this file"
    E_TIMEOUT = "E_TIMEOUT", "reading it took longer than a file may take"
    E_TOO_LARGE = "E_TOO_LARGE", "more pixels than an image may have"
    E_BLANK = "E_BLANK", "every pixel has the same value"
    E_BURNED_IN = "E_BURNED_IN", "patient data may be burned into the pixels"
    E_DUPLICATE_SOP = "E_DUPLICATE_SOP", "an earlier file has the same SOPInstanceUID"
    E_DUPLICATE_ROW = "E_DUPLICATE_ROW", "an earlier row has the same image and text"
    E_NO_REPORT = "E_NO_REPORT", "no report carries this accession number or study UID"
    E_REPORT_EMPTY = "E_REPORT_EMPTY", "the report holds no findings, no impression and no other text"
    E_REPORT_CONFLICT = "E_REPORT_CONFLICT", "accession number and study UID name different reports"
    E_NO_PATIENT = "E_NO_PATIENT", "no patient id, so no patient's privacy can be promised"
    E_PATIENT_MISMATCH = "E_PATIENT_MISMATCH", "image and report name different patients"
    E_NOT_REPORT = "E_NOT_REPORT", "nothing in it is a radiology report"
    E_NO_KEY = "E_NO_KEY", "the report names neither accession number nor study UID"
    E_REPORT_FORM = "E_REPORT_FORM", "the report is a PDF, a picture or a link; export it as text"
    E_REPORT_TOO_LARGE = "E_REPORT_TOO_LARGE", "more text or deeper nesting than a report may have"
    E_REPORT_PARTIAL = "E_REPORT_PARTIAL", "a structured report that does not call itself complete"
    E_REPORT_WITHDRAWN = "E_REPORT_WITHDRAWN", "the report was cancelled or entered in error"
    E_MEASUREMENTS = "E_MEASUREMENTS", "a structured report of measurements, without sentences"
    E_ADDENDUM_ONLY = "E_ADDENDUM_ONLY", "an addendum without the report it adds to"
    E_DUPLICATE_REPORT = "E_DUPLICATE_REPORT", "an earlier report has the same keys, time and text"
    E_BAD_SPLIT = "E_BAD_SPLIT", "the split column holds neither train nor test"
    E_FETCH_LIST = "E_FETCH_LIST", "the PACS does not tell what the study holds"
    E_FETCH_STATUS = "E_FETCH_STATUS", "the PACS answers with an error instead of the object"
    E_FETCH_CUT = "E_FETCH_CUT", "what the PACS sends breaks off or is no DICOM object"
    E_FETCH_SILENT = "E_FETCH_SILENT", "the PACS does not answer in time"
    E_FETCH_MISSING = "E_FETCH_MISSING", "the PACS lists it and does not send it"
    E_FETCH_UNKNOWN = "E_FETCH_UNKNOWN", "the PACS has no study of this accession number or UID"
    E_DICOMDIR = "E_DICOMDIR", "a DICOMDIR; the files it lists are found without it"
    E_ARCHIVE = "E_ARCHIVE", "a zip that cannot be opened; export it again or unpack it"
    E_ARCHIVE_NESTED = "E_ARCHIVE_NESTED", "an archive inside an archive; unpack the outer one"
    E_ARCHIVE_LOCKED = "E_ARCHIVE_LOCKED", "the zip needs a password; unpack it"
    E_ARCHIVE_TOO_LARGE = "E_ARCHIVE_TOO_LARGE", "larger unpacked than a file in a zip may be; unpack it"
    W_NO_PREFIX = "W_NO_PREFIX", "read without the DICM prefix"
    W_CHARSET = "W_CHARSET", "unknown or wrong character set"
    W_HEADER = "W_HEADER", "an attribute breaks the standard and was read anyway"
    W_WINDOW_FALLBACK = "W_WINDOW_FALLBACK", "no usable window; 0.5 to 99.5 percentiles shown"
    W_MULTIFRAME = "W_MULTIFRAME", "only the middle frame is used"
    W_PRELIMINARY = "W_PRELIMINARY", "the report is preliminary or unverified; there is no final one"
    W_STATUS = "W_STATUS", "an unknown report status, read as preliminary"
    W_SPLIT_CONFLICT = "W_SPLIT_CONFLICT", "the patient is in both splits; all rows go to training"

    def __new__(cls, value: str, meaning: str) -> "Code":
        """Keep the value a plain string and the meaning beside it."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


@dataclass(frozen=True)
class Rejected:
    """An input that does not enter the cohort.

    Attributes:
        state: Any state but ``USED`` and ``REPORT``.
        code: The reason.
        detail: A DICOM keyword or a package name that makes the reason precise; never a value from the file.
    """

    state: State
    code: Code
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Rendered:
    """An image as it is packed, uint8, (S, S) or (S, S, 3); the remarks made on it; a key to find it by."""

    pixels: NDArray[np.uint8]
    remarks: Sequence[Code] = ()
    key: bytes = b""


class RefusedError(Exception):
    """Raised deep inside the reading of one file; carries what becomes of that file."""

    def __init__(self, state: State, code: Code, detail: str = "") -> None:
        super().__init__(code)
        self.rejected = Rejected(state, code, detail)
