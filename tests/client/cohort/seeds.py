"""Small intact files of every kind that a site may have, to be damaged; the same ones on every day."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pydicom
from pyarrow import parquet
from pydicom import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests.client.cohort.conftest import dataset_of

LIBRARY = Path(pydicom.__file__).parent / "data"
LARGEST = 64 * 2**10  # of the library's files: damage to a larger one hits little but its pixels
TEXT = (
    "INDICATION: Cough.\nFINDINGS: Small left effusion.\nNo pneumothorax.\nIMPRESSION: Effusion. Dr. Jane Doe"
)


def write_seeds(folder: Path) -> Mapping[str, Sequence[Path]]:
    """Write the files into ``folder`` and return them by kind, pydicom's own among them."""
    found: dict[str, list[Path]] = {}
    for name, data in _made():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found.setdefault(path.parent.name, []).append(path)
    for path in sorted(LIBRARY.glob("*/*.dcm")):
        if path.stat().st_size <= LARGEST:
            found["sr" if "SR" in path.name else "dicom"].append(path)
    return found


def _made() -> Iterator[tuple[str, bytes]]:
    for name, dataset in _images():
        yield f"dicom/{name}.dcm", _written(dataset)
    for name, syntax in (("explicit", ExplicitVRLittleEndian), ("implicit", ImplicitVRLittleEndian)):
        yield f"sr/{name}.dcm", _written(_structured_report(syntax))
    for number, message in enumerate(_messages()):
        yield f"hl7/{number}.hl7", message
    one, bundle = _diagnostic_report(), _bundle()
    yield "fhir/one.json", json.dumps(one, indent=1).encode()
    yield "fhir/bundle.json", json.dumps(bundle, indent=1).encode()
    yield "fhir/lines.ndjson", b"\n".join(json.dumps(each).encode() for each in (one, bundle, one))
    yield from _tables()


def _written(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _images() -> Iterator[tuple[str, Dataset]]:
    colours = np.arange(24 * 24 * 3, dtype=np.uint16).reshape(24, 24, 3).astype(np.uint8)
    syntaxes = {
        "explicit": ExplicitVRLittleEndian,
        "implicit": ImplicitVRLittleEndian,
        "big": ExplicitVRBigEndian,
        "deflated": DeflatedExplicitVRLittleEndian,
        "rle": RLELossless,
        "jpeg2000": JPEG2000Lossless,
    }
    for name, syntax in syntaxes.items():
        yield name, _image(syntax=syntax)
    yield "window", _image(WindowCenter=["2000", "1000"], WindowWidth=["900", "1"], VOILUTFunction="SIGMOID",
                           RescaleSlope="1", RescaleIntercept="-1024", PixelPaddingValue=0)  # fmt: skip
    yield "tables", _image(VOILUTSequence=_table(12), ModalityLUTSequence=_table(16))
    yield (
        "frames",
        _image(np.arange(24 * 24 * 3, dtype=np.uint16).reshape(72, 24), Rows=24, NumberOfFrames="3"),
    )
    yield (
        "ct",
        _image(SOPClassUID=CTImageStorage, RescaleSlope="1", RescaleIntercept="-1024", RescaleType="HU"),
    )
    yield "colours", _image(colours, bits=8, PhotometricInterpretation="RGB", SamplesPerPixel=3,
                            PlanarConfiguration=0)  # fmt: skip


def _image(
    pixels: Any = None, *, bits: int = 12, syntax: UID = ExplicitVRLittleEndian, **attributes: Any
) -> Dataset:
    issuer = Dataset()
    issuer.LocalNamespaceEntityID = "north"
    header = {
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Jane",
        "PatientBirthDate": "19500102",
        "IssuerOfAccessionNumberSequence": Items([issuer]),
    }
    return dataset_of(pixels, bits=bits, syntax=syntax, **(header | attributes))


def _table(bits: int) -> Items:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = np.arange(4096, dtype="<u2").tobytes()
    item["LUTData"].VR = "OW"
    item.ModalityLUTType = "US"
    return Items([item])


def _structured_report(syntax: UID) -> Dataset:
    def item(kind: str, code: str, meaning: str, **values: Any) -> Dataset:
        name, found = Dataset(), Dataset()
        name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = code, "DCM", meaning
        found.RelationshipType, found.ValueType, found.ConceptNameCodeSequence = (
            "CONTAINS",
            kind,
            Items([name]),
        )
        for keyword, value in values.items():
            setattr(found, keyword, value)
        return found

    sections = [
        item(
            "CONTAINER", code, meaning, ContentSequence=Items([item("TEXT", "0", "Comment", TextValue=text)])
        )
        for code, meaning, text in (
            ("121070", "Findings", "Small effusion."),
            ("121076", "Conclusions", "Effusion of the Müller kind."),
        )
    ]
    dataset = _image(syntax=syntax, SOPClassUID=BasicTextSRStorage, CompletionFlag="COMPLETE",
                     VerificationFlag="VERIFIED", ContentDate="20240102", ContentTime="030405",
                     ContentSequence=Items(sections))  # fmt: skip
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"):
        delattr(dataset, keyword)
    dataset.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    return dataset


def _messages() -> Iterator[bytes]:
    header = r"MSH|^~\&|RIS|H|CDR|X|20240102030405||ORU^R01|1|P|2.5||||||8859/1"
    patient = "PID|1||77^^^SSN^SS~p1^^^H^MR||MÜLLER^JANE"
    order = "OBR|1||A1||||20240102|||||||||||A1|||20240102||||F"
    texts = (
        r"OBX|1|TX|&GDT^FINDINGS||Heart normal.\.br\Lungs \T\ pleura \XE4\.||||||F",
        "OBX|2|FT|&IMP^IMPRESSION||Normal.~No effusion.||||||F",
    )
    page = base64.b64encode(b"<html><p>FINDINGS:<br>Clear &amp; dry</p></html>").decode()
    form = f"OBX|3|ED|18748-4^Report^LN||^TEXT^HTML^Base64^{page}||||||C"
    uid = "OBX|4|HD|113014^DICOM Study^DCM||1.2.3.4||||||F"
    yield "\r".join([header, patient, "ORC|RE|P1|A1", order, *texts, uid, ""]).encode("latin-1")
    yield "\r\n".join([header, patient, order, form, order.replace("A1", "A2"), texts[1], ""]).encode(
        "latin-1"
    )
    batch = [
        "FHS|^~\\&",
        "BHS|^~\\&",
        *[header.replace("8859/1", "UNICODE UTF-8"), patient, order, *texts] * 2,
    ]
    yield b"\x0b" + "\r".join([*batch, "BTS|2", "FTS|1", "\x1c", ""]).encode()


def _diagnostic_report(**elements: Any) -> dict[str, Any]:
    accession = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]}
    page = base64.b64encode(TEXT.encode()).decode()
    return {
        "resourceType": "DiagnosticReport",
        "status": "final",
        "identifier": [{"type": accession, "value": "A1", "system": "urn:oid:1.2.3"}],
        "subject": {"reference": "Patient/1"},
        "basedOn": [{"reference": "#self"}],
        "contained": [{"resourceType": "ServiceRequest", "id": "self", "identifier": [{"value": "A2"}]}],
        "imagingStudy": [{"identifier": {"system": "urn:dicom:uid", "value": "urn:oid:1.2.9"}}],
        "issued": "2024-01-02T03:04:05+01:00",
        "presentedForm": [{"contentType": "text/plain; charset=utf-8", "data": page}],
        "conclusion": "Effusion, Müller type.",
    } | elements


def _bundle() -> dict[str, Any]:
    patient = {"resourceType": "Patient", "id": "1", "identifier": [{"value": "p1"}, {"value": 5}]}
    page = base64.b64encode(b"<p>FINDINGS: Clear.</p>").decode()
    report = _diagnostic_report(presentedForm=[{"contentType": "text/html", "data": page}])
    entries = [{"fullUrl": "urn:uuid:1", "resource": each} for each in (patient, report, report)]
    return {"resourceType": "Bundle", "entry": entries}


def _tables() -> Iterator[tuple[str, bytes]]:
    cell = TEXT.replace("\n", " ")
    lines = [
        "accession_number,patient_id,same_as,report,report_status,report_date,Edema",
        f'A1,p1,p9,"{TEXT}",final,2024-01-02,1',
        f'A2,p2,,"{cell}",C,31.12.2024 10:00,-1',
        "A3,p9,p3,Müller: no effusion.,,,",
    ]
    yield "csv/comma.csv", "\n".join(lines).encode()
    yield "csv/semicolon.csv", "\r\n".join(line.replace(",", ";") for line in lines).encode("cp1252")
    yield "csv/uids.csv", f"study_instance_uid\treport\n1.2.3\t{cell}\n1.2.4\t{cell}\n".encode("utf-8-sig")
    rows = [f'{number % 3}.png,"{TEXT}",p{number},train,s{number},0.5' for number in range(4)]
    yield "images/images.csv", "\n".join(["image,text,patient_id,split,study_id,Edema", *rows]).encode()
    columns = {
        "accession_number": [1.0, None, 3.0],
        "patient_id": ["p1", "p2", None],
        "report": [TEXT, "", cell],
        "report_date": [None, *np.array(["2024-01-02", "2024-01-03"], dtype="datetime64[s]").tolist()],
        "Edema": [1, None, 0],
    }
    for name, codec in (("plain", "NONE"), ("packed", "SNAPPY")):
        file = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), file, compression=codec)
        yield f"parquet/{name}.parquet", file.getvalue()
