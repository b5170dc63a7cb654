"""HL7 v2 messages as interface engines leave them."""

import base64
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.errors import CohortSettingsError
from client.cohort.outcomes import Code, Rejected, State
from client.reports import hl7
from client.reports.hl7 import Hl7Reports
from client.reports.report import Report, Status

MSH = r"MSH|^~\&|RIS|H|CDR|X|20240102030405||ORU^R01|1|P|2.5||||||UNICODE UTF-8"
PID = "PID|1||77^^^SSN^SS~p1^^^H^MR||DOE^JANE"
NOT_REPORT = Rejected(State.IGNORED, Code.E_NOT_REPORT)


def obr(accession: str = "A1", *, number: int = 3, **fields: str) -> str:
    values = {number: accession, **{int(name[1:]): value for name, value in fields.items()}}
    return "|".join(["OBR", *(values.get(place, "") for place in range(1, 26))])


def obx(value: str, name: str = "&GDT^FINDINGS", kind: str = "TX", status: str = "F") -> str:
    return f"OBX|1|{kind}|{name}||{value}||||||{status}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def outcomes(
    folder: Path, *segments: str, encoding: str = "utf-8", end: str = "\r"
) -> list[Report | Rejected]:
    path = folder / "m.hl7"
    path.write_bytes(end.join(segments).encode(encoding))
    return [entry.outcome for entry in Hl7Reports(path).read()]


def report(folder: Path, *segments: str, encoding: str = "utf-8", end: str = "\r") -> Report:
    (outcome,) = outcomes(folder, *segments, encoding=encoding, end=end)
    assert isinstance(outcome, Report)
    return outcome


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_a_message_is_read_with_any_line_end(folder: Path, end: str) -> None:
    lines = (
        MSH,
        PID,
        obr(),
        obx("Heart normal."),
        obx("Lungs clear."),
        obx("Normal.", "&IMP^IMPRESSION"),
        "",
    )
    assert report(folder, *lines, end=end) == Report(
        source="hl7",
        accession="A1",
        patient="p1",
        text="FINDINGS:\nHeart normal.\nLungs clear.\n\nIMPRESSION:\nNormal.",
        when="20240102030405",
    )


def test_the_messages_own_delimiters_are_honoured(folder: Path) -> None:
    lines = (
        line.translate(str.maketrans("|^~\\&", "#*@!%")) for line in (MSH, PID, obr(), obx(r"a\S\b\T\c"))
    )
    found = report(folder, *lines)
    assert (found.text, found.patient) == ("FINDINGS:\na*b%c", "p1")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"a\F\b\S\c\T\d\R\e\E\f", "a|b^c&d~e\\f"),
        (r"one\.br\two\.sp\three\.sp 2\four", "one\ntwo\nthree\nfour"),
        (r"a\.sk3\b\.sk+1\c\.sk\d\.sk+\e\.sk-9\f", "a   b c d ef"),
        ("a\\.sk" + "9" * 5000 + "\\b", "a" + " " * 80 + "b"),
        (r"\H\bold\N\ \.in+4\text", "bold text"),
        (r"\X41C3A9\ \X0D\end", "Aé \rend"),
        (r"\C2842\\M2442\x\Zfoo\ 1\2 \q\ c:\dir", r"x\Zfoo\ 1\2 \q\ c:\dir"),
        ("first~second", "first\nsecond"),
        ("", ""),
    ],
)
def test_escapes_and_repetitions(folder: Path, sent: str, read: str) -> None:
    found = report(folder, MSH, PID, obr(), obx(sent), obx("end", "&IMP^IMPRESSION"))
    assert found.text == (f"FINDINGS:\n{read}\n\n" if read else "") + "IMPRESSION:\nend"


@pytest.mark.parametrize(
    ("declared", "encoding", "remarks"),
    [
        ("UNICODE UTF-8", "utf-8", ()),
        (" 8859/1", "latin-1", ()),
        ("8859/15", "iso8859-15", ()),
        ("ISO-8859-1", "latin-1", ()),
        ("CP1252", "cp1252", ()),
        ("", "utf-8", ()),
        ("", "cp1252", (Code.W_CHARSET,)),
        ("ASCII", "utf-8", (Code.W_CHARSET,)),
        ("UNICODE UTF-8", "cp1252", (Code.W_CHARSET,)),
        ("KLINGON", "utf-8", (Code.W_CHARSET,)),
        ("HEX", "utf-8", (Code.W_CHARSET,)),
        ("UNICODE\0UTF-8", "utf-8", (Code.W_CHARSET,)),
    ],
)
def test_a_character_set_is_believed_if_it_can_be(
    folder: Path, declared: str, encoding: str, remarks: tuple[Code, ...]
) -> None:
    header = MSH.replace("UNICODE UTF-8", declared)
    found = report(folder, header, obr(), obx("Erguß é"), encoding=encoding)
    assert (found.text, found.remarks) == ("FINDINGS:\nErguß é", remarks)


def test_a_delimiter_inside_of_a_character_does_not_split(folder: Path) -> None:
    text = "\u8868"  # its second byte in GB 18030 is a letter, in Big5 and Shift-JIS a backslash
    found = report(folder, MSH.replace("UNICODE UTF-8", "BIG-5"), obr(), obx("功" + text), encoding="big5")
    assert found.text == "FINDINGS:\n功" + text


@pytest.mark.parametrize(
    ("segments", "accession", "issuer"),
    [
        ((obr("A3"),), "A3", ""),
        (("ORC|RE||A9", obr("A3")), "A3", ""),
        (("ORC|RE||A9^RIS", obr("")), "A9", ""),
        ((obr("A3", f18="A18"),), "A18", ""),
        ((obr("A3^RIS"),), "A3", ""),
        ((obr("A3", f18="A18"), "IPC|AI^H^1.2.3^ISO|RP|1.2.9"), "AI", "1.2.3"),
    ],
)
def test_the_accession_number_is_the_first_field_with_a_value(
    folder: Path, segments: tuple[str, ...], accession: str, issuer: str
) -> None:
    found = report(folder, MSH, *segments, obx("x"))
    assert (found.accession, found.issuer) == (accession, issuer)


def test_a_site_says_where_its_accession_numbers_are(folder: Path) -> None:
    path = folder / "m.hl7"
    path.write_text("\r".join([MSH, obr("A3", f2="A2", f18="A18"), obx("x")]))
    (entry,) = Hl7Reports(path, ["OBR-2"]).read()
    assert isinstance(entry.outcome, Report)
    assert entry.outcome.accession == "A2"
    with pytest.raises(CohortSettingsError, match="such as 'OBR-18', got 'OBR18'"):
        Hl7Reports(path, ["OBR18"])


@pytest.mark.parametrize(
    "segment",
    ["ZDS|1.2.9^RIS^Application^DICOM", "IPC|||1.2.9", "OBX|9|ST|113014^DICOM Study^DCM||1.2.9||||||F"],
)
def test_the_study_uid_is_found_in_its_places(folder: Path, segment: str) -> None:
    found = report(folder, MSH, obr(""), obx("x"), segment)
    assert (found.study_uid, found.accession, found.text) == ("1.2.9", "", "FINDINGS:\nx")


@pytest.mark.parametrize(
    ("order", "observation", "status"),
    [
        ("F", "F", Status.FINAL),
        ("", "F", Status.FINAL),
        ("", "", Status.FINAL),
        ("", "P", Status.PRELIMINARY),
        ("P", "F", Status.PRELIMINARY),
        ("R", "R", Status.PRELIMINARY),
        ("C", "F", Status.CORRECTED),
        ("F", "C", Status.CORRECTED),
        ("X", "F", Status.WITHDRAWN),
        ("F", "D", Status.WITHDRAWN),
        ("F", "W", Status.WITHDRAWN),
    ],
)
def test_status_comes_from_order_and_observations(
    folder: Path, order: str, observation: str, status: Status
) -> None:
    found = report(folder, MSH, obr(f25=order), obx("x", status=observation))
    assert found.status is status
    assert found.text == ("" if status is Status.WITHDRAWN else "FINDINGS:\nx")


def test_an_unknown_status_is_remarked_on(folder: Path) -> None:
    found = report(folder, MSH, obr(f25="Q"), obx("x"))
    assert (found.status, found.remarks) == (Status.PRELIMINARY, (Code.W_STATUS,))


def test_one_withdrawn_line_is_left_out_and_the_rest_stays(folder: Path) -> None:
    found = report(folder, MSH, obr(f25="C"), obx("wrong", status="D"), obx("right", status="C"))
    assert found.text == "FINDINGS:\nright"


def test_an_addendum_alone_is_one(folder: Path) -> None:
    found = report(folder, MSH, obr(), obx("Later seen.", "&ADT^Addendum"))
    assert (found.status, found.text) == (Status.ADDENDUM, "Later seen.")


def test_the_time_is_that_of_the_result(folder: Path) -> None:
    assert report(folder, MSH, obr(f22="20240301"), obx("x")).when == "20240301000000"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("71020^XR CHEST", "71020^XR CHEST"), "a\nb"),
        (("", ""), "a\nb"),
        (("18782-3^^LN", "19005-8^^LN"), "FINDINGS:\na\n\nIMPRESSION:\nb"),
        (("71020&GDT", "71020&IMP"), "FINDINGS:\na\n\nIMPRESSION:\nb"),
        (("1^Befund", "1^Beurteilung"), "BEFUND:\na\n\nBEURTEILUNG:\nb"),
        (("1^Impression", "1^Impression"), "IMPRESSION:\na\nb"),
    ],
)
def test_headings_come_from_what_observations_are_called(
    folder: Path, names: tuple[str, str], text: str
) -> None:
    assert report(folder, MSH, obr(), obx("a", names[0]), obx("b", names[1])).text == text


def test_encapsulated_text_is_decoded(folder: Path) -> None:
    data = base64.b64encode("Größe normal.".encode()).decode()
    html = base64.b64encode(b"<p>One</p><p>Two</p>").decode()
    assert report(folder, MSH, obr(), obx(f"RIS^TEXT^PLAIN^Base64^{data}", "", "ED")).text == "Größe normal."
    assert report(folder, MSH, obr(), obx(f"^TEXT^HTML^Base64^{html}", "", "ED")).text == "One\n\nTwo"
    pdf = obx(f"RIS^Application^PDF^Base64^{data}", "", "ED")
    assert outcomes(folder, MSH, obr(), pdf) == [Rejected(State.UNSUPPORTED, Code.E_REPORT_FORM)]
    assert report(folder, MSH, obr(), pdf, obx("typed", "")).text == "typed"


def test_numbers_and_codes_are_no_sentences(folder: Path) -> None:
    found = outcomes(folder, MSH, obr(), obx("12.5", "DOSE", "NM"), obx("1^x^y", "CODE", "CE"))
    assert found == [Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)]


def test_bare_line_ends_inside_a_text_belong_to_it(folder: Path) -> None:
    found = report(folder, MSH, obr(), obx("one\nTWO\n\nthree"), obx("four"))
    assert found.text == "FINDINGS:\none\nTWO\n\nthree\nfour"


def test_one_file_holds_many_messages_framed_batched_or_neither(folder: Path) -> None:
    single = [f"{MSH}\r{obr(f'A{number}')}\r{obx('x')}\r" for number in range(3)]
    for data in (
        "".join(single),
        "".join(f"\x0b{message}\x1c\r" for message in single),
        "\ufeff" + "".join(single),
        "FHS|^~\\&\rBHS|^~\\&\r" + "".join(single) + "BTS|3\rFTS|1\r",
    ):
        (folder / "m.hl7").write_bytes(data.encode())
        entries = list(Hl7Reports(folder / "m.hl7").read())
        assert [entry.name for entry in entries] == ["m.hl7", "m.hl7#2", "m.hl7#3"]
        found = [entry.outcome for entry in entries if isinstance(entry.outcome, Report)]
        assert [report.accession for report in found] == ["A0", "A1", "A2"]
        assert {report.text for report in found} == {"FINDINGS:\nx"}


def test_one_message_holds_many_orders_and_patients(folder: Path) -> None:
    found = outcomes(
        folder, MSH, PID, "ORC|RE", obr("A1"), obx("x"), obr("A2"), obx("y"), "PID|||p2", obr("A3"), obx("z")
    )
    told = [
        (report.accession, report.patient, report.text[-1]) for report in found if isinstance(report, Report)
    ]
    assert told == [("A1", "p1", "x"), ("A2", "p1", "y"), ("A3", "p2", "z")]


def test_what_is_no_result_message_is_ignored(folder: Path) -> None:
    assert outcomes(folder, MSH.replace("ORU^R01", "ADT^A08"), PID) == [NOT_REPORT]
    assert outcomes(folder, "Dear colleague,", "thank you.") == [NOT_REPORT]
    assert outcomes(folder, "") == [Rejected(State.QUARANTINED, Code.E_EMPTY_FILE)]


def test_a_damaged_message_costs_itself(folder: Path) -> None:
    unreadable = Rejected(State.QUARANTINED, Code.E_UNREADABLE, "MSH")
    no_key = Rejected(State.QUARANTINED, Code.E_NO_KEY)
    found = outcomes(folder, "MSH", "MSHxyz", "MSH|^^^^|", MSH, obx("x"), MSH, obr(), obx("x"))
    assert found[:4] == [unreadable, unreadable, unreadable, no_key]
    assert isinstance(found[4], Report)


@pytest.mark.parametrize("charset", ["IDNA", "UNDEFINED", "PUNYCODE", "X\0Y"])
def test_escaped_bytes_in_an_encoding_for_something_else_cost_no_message(folder: Path, charset: str) -> None:
    patient = r"PID|1||p\XFFFE\1"
    message = [MSH.replace("UNICODE UTF-8", charset), patient, obr(), obx(r"a\XFF\b")]
    first, second = outcomes(folder, *message, MSH, PID, obr("A2"), obx("Clear."))
    assert isinstance(first, Report)
    assert isinstance(second, Report)
    assert second.accession == "A2"


def test_whatever_a_message_raises_costs_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def patient(segment: object) -> str:
        raise struct.error("planted")

    monkeypatch.setattr(hl7, "_patient", patient)
    found = outcomes(folder, MSH, PID, obr(), obx("x"), MSH, obr(), obx("x"))
    assert found[0] == Rejected(State.QUARANTINED, Code.E_UNREADABLE)
    assert isinstance(found[1], Report)


def test_a_field_of_a_million_components_takes_no_time(folder: Path) -> None:
    began = time.process_time()
    name = "18748-4^Report" + "^" * 10**6
    assert report(folder, MSH, PID, obr(), *[obx("Clear.", name)] * 4).text
    assert time.process_time() - began < 30


def test_a_message_beyond_all_measure_costs_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hl7, "MAX_MESSAGE_BYTES", 500)
    found = outcomes(folder, MSH, obr(), obx("x" * 600), MSH, obr(), obx("x"))
    assert found[0] == Rejected(State.QUARANTINED, Code.E_REPORT_TOO_LARGE)
    assert isinstance(found[1], Report)


@given(data=st.data())
def test_no_file_makes_reading_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.hl7"
    whole = "\r".join([MSH, PID, "ORC|RE||A", obr(), obx(r"a\X41\b~c"), "ZDS|1.2"]).encode()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(
        whole[:cut] + data.draw(st.binary(max_size=30)) + whole[data.draw(st.integers(0, len(whole))) :]
    )
    assert list(Hl7Reports(path).read())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_survives_being_escaped(text: str) -> None:
    escapes = {"|": r"\F\ ", "^": r"\S\ ", "~": r"\R\ ", "\\": r"\E\ ", "&": r"\T\ "}
    sent = "".join(
        escapes.get(character, character).strip(" ") if character in escapes else character
        for character in text
    )
    message = hl7._Message.of([MSH.encode(), obr().encode(), obx(sent).encode()])
    (order,) = message.orders()
    assert order.texts[0].plain(order.texts[0].field(5)) == text
