"""HL7 v2 result messages (ORU^R01), as interface engines store them: one or many to a file, framed or not.

The little that a report needs is here. A library for HL7 brings the rest of the standard, builds an object
for every component of every message, and refuses messages that break rules which no report depends on.

Source: HL7 v2.5.1 chapter 2 (2.5 delimiters, 2.7 escapes, 2.15.9 MSH) and 7 (7.3.1 ORU, 7.4 OBR and OBX).
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from client.cohort.errors import CohortSettingsError
from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.reports.files import NOT_REPORT, TOO_LARGE, UNREADABLE, ReportFiles, decoded, outcome_of
from client.reports.headings import ADDENDUM, HEADINGS, KNOWN
from client.reports.markup import plain_text
from client.reports.report import Report, Status, moment

# IHE RAD TF-2 4.28 carries the accession number in OBR-18; IPC-1 is its place since v2.5.1; most other
# systems fill OBR-3, the filler's order number, with it.
ACCESSION_FIELDS = ("IPC-1", "OBR-18", "OBR-3", "ORC-3")
MAX_MESSAGE_BYTES = 64 * 2**20  # with a PDF inside; a text alone is a few kilobytes
MAX_SKIPPED = 80  # blanks for one escape sequence: a line

_COMPONENTS = 5  # of a field that are looked at; damage may leave a million
_FRAME = "\n\x00\x0b\x1c"  # MLLP puts 0x0B before a message and 0x1C 0x0D after it
_BATCH = ("FHS", "BHS", "BTS", "FTS")
_FIELD = re.compile(r"(?P<segment>[A-Z][A-Z0-9]{2})-(?P<number>[1-9]\d?)")
# HL7 table 0211, where Python has another name; exports also write Python's.
_CHARSETS: Mapping[str, str] = {
    "": "utf-8",
    "ASCII": "ascii",
    "UNICODE UTF-8": "utf-8",
    "UNICODE": "utf-8",
    "ISO IR14": "iso2022_jp_2",
    "ISO IR87": "iso2022_jp_2",
    "ISO IR159": "iso2022_jp_2",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    **{f"8859/{part}": f"iso8859_{part}" for part in (*range(1, 12), *range(13, 17))},
}
# HL7 tables 0123 (OBR-25) and 0085 (OBX-11) agree where they share a letter, but for D, W and U.
_STATUS: Mapping[str, Status] = {
    **dict.fromkeys(("", "F", "U", "N"), Status.FINAL),
    "C": Status.CORRECTED,
    **dict.fromkeys(("P", "R", "S", "I", "A", "O", "B", "V"), Status.PRELIMINARY),
    **dict.fromkeys(("X", "D", "W", "Y", "Z"), Status.WITHDRAWN),
}
_TEXT_TYPES = ("TX", "FT", "ST", "ED")
_STUDY_UID = re.compile(r"[0-9.]{3,64}")
_STUDY_UID_CODES = ("113014", "110180")  # DCM: DICOM Study, Study Instance UID


@dataclass(frozen=True, repr=False)
class Hl7Reports(ReportFiles):
    """ORU messages; every OBR with text gives one report.

    Attributes:
        path: A file of messages or a folder of such files.
        accession_fields: Where the accession number is looked for; the first field with a value counts. Only
            IPC-1 brings an issuer: OBR-3 names an application instead.

    Raises:
        CohortSettingsError: A field is not written like ``OBR-18``.
    """

    accession_fields: Sequence[str] = ACCESSION_FIELDS

    def __post_init__(self) -> None:
        for name in self.accession_fields:
            if not _FIELD.fullmatch(name):
                raise CohortSettingsError(f"expected HL7 fields such as 'OBR-18', got {name!r}")

    def _outcomes(self, path: Path) -> Iterator[Report | Rejected]:
        for lines in _messages(path):
            if lines is None:
                yield TOO_LARGE
                continue
            try:
                message = _Message.of(lines)
                orders = message.orders()
            except RefusedError as refusal:
                yield refusal.rejected
                continue
            except Exception:  # any type on a damaged message, which must not cost the next one
                yield UNREADABLE
                continue
            for order in orders:
                yield outcome_of(partial(_report, message, order, self.accession_fields))
            if not orders:
                yield NOT_REPORT


def _messages(path: Path) -> Iterator[list[bytes] | None]:
    """Yield the lines of each message, or None for one that is too large; memory holds one at a time."""
    lines: list[bytes] = []
    size = 0
    # Latin-1 keeps every byte, and universal line ends split at CR, LF and both.
    with open(path, encoding="latin-1") as file:
        for line in iter(partial(file.readline, MAX_MESSAGE_BYTES), ""):
            text = line.strip(_FRAME).removeprefix("ï»¿")
            starts = text.startswith("MSH")
            if starts and lines:
                yield lines if size <= MAX_MESSAGE_BYTES else None
            if starts:
                lines, size = [], 0
            if text.startswith(_BATCH) or not (starts or lines):
                continue
            size += len(text)
            if size <= MAX_MESSAGE_BYTES:
                lines.append(text.encode("latin-1"))
    if lines:
        yield lines if size <= MAX_MESSAGE_BYTES else None


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """One line of a message, split by the message's own delimiters."""

    fields: Sequence[str]
    delimiters: str  # component, repetition, escape, subcomponent
    charset: str

    def field(self, number: int) -> str:
        """Return a field as it was sent, empty where it is absent."""
        return self.fields[number] if number < len(self.fields) else ""

    def repetitions(self, number: int) -> list[str]:
        return self.field(number).split(self.delimiters[1])

    def components(self, number: int) -> list[str]:
        """Return the first five components of the first repetition, without escapes."""
        return self.split(self.repetitions(number)[0])

    def split(self, repetition: str) -> list[str]:
        parts = repetition.split(self.delimiters[0], _COMPONENTS)[:_COMPONENTS]
        return [self.plain(part).strip() for part in parts] + [""] * (_COMPONENTS - len(parts))

    def plain(self, text: str) -> str:
        """Return ``text`` with its escape sequences resolved; an unknown one stays as it is."""
        mark = re.escape(self.delimiters[2])
        return re.sub(
            rf"{mark}([FSTREPHN]|X(?:[0-9A-Fa-f]{{2}})+|[CMZ][0-9A-Fa-f]+|\.[a-z]{{2}} ?[+-]?\d*){mark}",
            self._escaped,
            text,
        )

    def _escaped(self, found: re.Match[str]) -> str:
        name = found[1]
        delimiters = {"S": 0, "R": 1, "E": 2, "T": 3}
        if name in delimiters:
            return self.delimiters[delimiters[name]]
        if name[0] == "X":
            return _of_charset(bytes.fromhex(name[1:]), self.charset)
        if name.startswith((".br", ".sp", ".ce", ".fi", ".nf")):
            return "\n"
        if skipped := re.fullmatch(r"\.sk ?\+?(\d*)", name):
            return " " * min(int(skipped[1][-9:] or 1), MAX_SKIPPED)
        return {"F": self.fields[0], "P": "#"}.get(name, "")  # the rest is highlighting and character sets


def _of_charset(data: bytes, charset: str) -> str:
    """Decode escaped bytes; an encoding that is none for single bytes, such as Python's idna, gives way."""
    try:
        return data.decode(charset, errors="replace")
    except (ValueError, LookupError):
        return decoded(data)


@dataclass(kw_only=True)
class _Order:
    """What belongs to one OBR: its ORC before it, its observations and identifiers after it."""

    patient: str
    segments: dict[str, _Segment] = field(default_factory=dict)
    observations: list[_Segment] = field(default_factory=list)

    @property
    def texts(self) -> list[_Segment]:
        """The observations that hold sentences."""
        return [
            obx
            for obx in self.observations
            if obx.field(2).strip() in _TEXT_TYPES and obx.components(3)[0] not in _STUDY_UID_CODES
        ]


@dataclass(frozen=True, kw_only=True)
class _Message:
    segments: Sequence[tuple[str, _Segment]]
    remarks: tuple[Code, ...]

    @classmethod
    def of(cls, lines: Sequence[bytes]) -> "_Message":
        """Decode and split a message.

        Raises:
            RefusedError: Its first line names no delimiters.
        """
        header = lines[0].decode("latin-1")
        separator = header[3:4]
        encoding = header[4:].partition(separator or " ")[0][:4]
        if separator.isalnum() or not separator.strip() or len(set(encoding + separator)) <= len(encoding):
            raise RefusedError(State.QUARANTINED, Code.E_UNREADABLE, "MSH")
        delimiters = encoding + "^~\\&"[len(encoding) :]
        names = (header.split(separator) + [""] * 18)[17].split(delimiters[1])
        name = names[0].strip().upper()
        charset = _CHARSETS.get(name, name)
        remarks: tuple[Code, ...] = ()
        data = b"\n".join(lines)
        try:
            text = data.decode(charset)
        except (ValueError, LookupError):  # a name with a NUL in it is a ValueError
            text, charset, remarks = decoded(data), "cp1252", (Code.W_CHARSET,)
        # A line that begins no segment goes on with the field before it: texts are sent with bare line ends.
        starts = re.compile(rf"\n(?=[A-Z][A-Z0-9]{{2}}{re.escape(separator)})")
        split = []
        for line in starts.split(text):
            fields = line.split(separator)
            name = fields[0].strip()
            fields[0] = separator
            if name == "MSH":  # MSH-1 is the separator itself
                fields.insert(1, separator)
            split.append((name, _Segment(fields=fields, delimiters=delimiters, charset=charset)))
        return cls(segments=split, remarks=remarks)

    def orders(self) -> list[_Order]:
        """Return the orders of a result message, none for any other message."""
        header = self.segments[0][1]
        if header.components(9)[0] != "ORU":
            return []
        orders: list[_Order] = []
        patient, ended = "", True
        for name, segment in self.segments:
            if name == "PID":
                patient, ended = _patient(segment), True
            if name in ("ORC", "OBR") and orders:
                ended = ended or "OBR" in orders[-1].segments
            if name not in ("ORC", "OBR", "OBX", "ZDS", "IPC"):
                continue
            if ended:
                orders.append(_Order(patient=patient))
                ended = False
            if name == "OBX":
                orders[-1].observations.append(segment)
            else:
                orders[-1].segments.setdefault(name, segment)
        return orders


def _report(message: _Message, order: _Order, accession_fields: Sequence[str]) -> Report:
    accession, issuer = _accession(order, accession_fields)
    header = message.segments[0][1]
    issued = order.segments["OBR"].components(22)[0] if "OBR" in order.segments else ""
    status, unknown = _status(order)
    addendum, text = _text(order)
    if addendum and status is not Status.WITHDRAWN:
        status = Status.ADDENDUM
    return Report(
        source="hl7",
        accession=accession,
        issuer=issuer,
        study_uid=_study_uid(order),
        patient=order.patient,
        text=text if status is not Status.WITHDRAWN else "",
        status=status,
        when=moment(issued) or moment(header.components(7)[0]),
        language=header.components(19)[0],
        remarks=message.remarks + ((Code.W_STATUS,) if unknown else ()),
    )


def _patient(segment: _Segment) -> str:
    """Return the medical record number of PID-3, else its first identifier."""
    identifiers = [segment.split(repetition) for repetition in segment.repetitions(3)]
    return next((parts[0] for parts in identifiers if parts[4] == "MR"), identifiers[0][0])


def _accession(order: _Order, accession_fields: Sequence[str]) -> tuple[str, str]:
    for name in accession_fields:
        segment = order.segments.get(name[:3])
        if segment is not None and (parts := segment.components(int(name[4:])))[0]:
            return parts[0], (parts[2] or parts[1]) if name == "IPC-1" else ""
    return "", ""


def _study_uid(order: _Order) -> str:
    candidates = [
        *(order.segments[name].components(number)[0] for name, number in _UIDS if name in order.segments),
        *(obx.components(5)[0] for obx in order.observations if obx.components(3)[0] in _STUDY_UID_CODES),
    ]
    return next((text for text in candidates if _STUDY_UID.fullmatch(text)), "")


_UIDS = (("ZDS", 1), ("IPC", 3))  # IHE RAD TF-2 4.4 (ZDS); HL7 v2.5.1 4.5.6 (IPC)


def _status(order: _Order) -> tuple[Status, bool]:
    """Return the status of the order, or else of its texts, and whether it is an unknown letter."""
    letters = {obx.field(11).strip() for obx in order.texts}
    own = order.segments["OBR"].field(25).strip() if "OBR" in order.segments else ""
    if not own:
        own = next((letter for letter in ("P", "R", "S", "C") if letter in letters), "")
        own = own or (next(iter(letters)) if len(letters) == 1 else "")
    if own == "F" and "C" in letters:
        own = "C"
    status = _STATUS.get(own, Status.PRELIMINARY)
    if letters and all(_STATUS.get(letter) is Status.WITHDRAWN for letter in letters):
        status = Status.WITHDRAWN
    return status, own not in _STATUS


def _text(order: _Order) -> tuple[bool, str]:
    """Return whether all of the text is an addendum, and the text with a heading per section.

    Raises:
        RefusedError: The report is there, but as a PDF or picture.
    """
    parts, unread = [], False
    for obx in order.texts:
        if _STATUS.get(obx.field(11).strip()) is Status.WITHDRAWN:
            continue
        value = _value(obx)
        unread = unread or value is None
        if value and value.strip():
            parts.append((_heading(obx), value))
    if unread and not parts:
        raise RefusedError(State.UNSUPPORTED, Code.E_REPORT_FORM)
    headings = {heading for heading, _ in parts}
    if headings == {ADDENDUM}:
        return True, "\n".join(value for _, value in parts)
    # A single unknown name is the examination's, repeated on every line, and no heading.
    shown = {heading for heading in headings if len(headings) > 1 or heading in KNOWN} - {""}
    sections = [
        (f"{heading}:\n" if heading in shown else "") + "\n".join(value for _, value in group)
        for heading, group in groupby(parts, key=lambda part: part[0])
    ]
    return False, "\n\n".join(sections)


def _heading(obx: _Segment) -> str:
    """Return the section that OBX-3 names by code, suffix or text."""
    code, name, *_ = obx.components(3)
    suffix = obx.plain(obx.repetitions(3)[0].split(obx.delimiters[0])[0].split(obx.delimiters[3])[-1])
    return HEADINGS.get(code) or (name or HEADINGS.get(suffix, "")).upper()


def _value(obx: _Segment) -> str | None:
    """Return the text of OBX-5, a line per repetition, or None where it is no text."""
    if obx.field(2).strip() != "ED":
        return "\n".join(obx.plain(repetition) for repetition in obx.repetitions(5))
    _, kind, subtype, encoding, data = (obx.field(5).split(obx.delimiters[0]) + [""] * 5)[:5]
    kind, subtype = kind.strip().upper(), subtype.strip().upper()
    if kind not in ("TEXT", "TX", "FT", "") or subtype not in ("PLAIN", "TEXT", "HTML", ""):
        return None
    if encoding.strip().upper() == "BASE64":
        text = decoded(base64.b64decode(re.sub(r"\s", "", obx.plain(data))))
    else:
        text = obx.plain(data)
    return plain_text(text) if subtype == "HTML" else text
