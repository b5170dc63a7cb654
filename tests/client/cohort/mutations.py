"""Damage done to files, by kind of file and by name.

It is what disks, networks, interface engines and export scripts do, and what somebody might do on purpose.
Every mutation depends on its generator and the bytes alone: the same seed gives the same bytes again.
"""

import base64
import copy
import json
import re
import string
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pydicom.tag import Tag
from pydicom.uid import AllTransferSyntaxes

Mutation = Callable[[Random, bytes], bytes]
Mutations = dict[str, Mutation]

MOST_AT_ONCE = 3
LARGEST = 2**22  # bytes of a damaged file
LARGE = 2**18  # bytes that one part is repeated to: what takes quadratic time shows in seconds
DEPTHS = (2, 40, 900, 20_000)  # on either side of every limit of recursion
CODECS = (
    *("utf-16", "utf-32", "utf-7", "punycode", "idna", "undefined", "unicode_escape", "raw_unicode_escape"),
    *("rot13", "zlib", "hex", "mbcs", "ISO IR87", "GB 18030-2000", "\0", "../x", "x" * 300, "UNICODE"),
)


def damaged(kind: str, data: bytes, *, number: int) -> tuple[bytes, tuple[str, ...]]:
    """Return the damaged bytes and the names of the mutations; ``number`` decides on everything.

    The first mutation goes round with the number, so each one is tried; one or two more may follow.
    """
    rng, table = Random(f"{kind} {number}"), MUTATIONS[kind]  # noqa: S311 - not a secret
    names = [list(table)[number % len(table)]]
    names += rng.choices(list(table), k=rng.randrange(MOST_AT_ONCE))
    for name in names:
        data = table[name](rng, data)[:LARGEST]
    return data, tuple(names)


# Any bytes


def _part(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 1024)))


def _times(part: bytes, times: int) -> bytes:
    return part * min(times, LARGEST // max(1, len(part)))


def flip_bits(rng: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32)) if data else 0):
        found[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut_off(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + data[end:]


def repeat_part(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:end] + _times(data[start:end], rng.choice((1, 2, 50))) + data[end:]


def enlarge(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    times = LARGE // max(1, end - start) if rng.random() < 0.2 else 1
    return data[:start] + data[start:end] * times + data[end:]


def put_zeros(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def insert_zeros(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + bytes(rng.choice((1, 2, 3, 4096))) + data[start:]


def put_noise(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def put_ones(rng: Random, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + b"\xff" * (end - start) + data[end:]


ANY: Mutations = {
    mutation.__name__: mutation
    for mutation in (
        *(flip_bits, cut_off, cut_out, repeat_part, enlarge, put_zeros, insert_zeros, put_noise, put_ones),
    )
}


# DICOM

_ITEM, _ITEM_END, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_VRS = (*sorted(_LONG), b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT",
        b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US", b"??", b"\0\0")  # fmt: skip
_UNDEFINED = b"\xff" * 4
_NESTING = ("ContentSequence", "SharedFunctionalGroupsSequence", "VOILUTSequence", "ConceptNameCodeSequence",
            "IssuerOfAccessionNumberSequence", "ReferencedRequestSequence")  # fmt: skip
_SIZES = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
          "PixelRepresentation", "PlanarConfiguration", "PixelPaddingValue")  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 12, 16, 17, 31, 32, 33, 64, 255, 256, 4097, 32767, 32768, 65535)
_WORDS = (
    *(
        b"",
        b" ",
        b"-1",
        b"0",
        b"1e999",
        b"-1e-999",
        b"nan",
        b"inf",
        b"1" * 400,
        b"\\" * 9,
        b"1\\x\\",
        b"\0" * 4,
    ),
    *(
        b"\xff" * 6,
        b"\x1b$B\x1b(J\x1b",
        b"^=^=\\^",
        b"\xed\xa0\x80",
        b"A" * 65_534,
        b"2147483648",
        b"20249999",
    ),
)
_CHARSETS = (
    *(b"ISO_IR 192", b"ISO 2022 IR 87\\ISO 2022 IR 149", b"\\", b"GB18030", b"ISO 2022 IR 6\\ISO_IR 192"),
    *(b"latin_1", b"punycode", b"\\ISO 2022 IR 58", b"ISO-IR 100", b"utf_16"),
)


@dataclass(frozen=True)
class _Element:
    """Where the header of an element or item lies; ``value`` is behind it."""

    start: int
    value: int
    length: int

    @property
    def is_short(self) -> bool:
        return self.value - self.start == 8


def _elements(data: bytes) -> list[_Element]:
    """Find the headers at every depth, as far as they can be followed; little endian only."""
    place, found = (132 if data[128:132] == b"DICM" else 0), []
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 6]
        if data[place : place + 2] == b"\xfe\xff" or not (kind.isalpha() and kind.isupper()):
            header, length = 8, data[place + 4 : place + 8]
        elif kind in _LONG:
            header, length = 12, data[place + 8 : place + 12]
        else:
            header, length = 8, data[place + 6 : place + 8]
        inside = kind == b"SQ" or length == _UNDEFINED or data[place : place + 4] == _ITEM
        size = 0 if inside else int.from_bytes(length, "little")
        found.append(_Element(place, place + header, size))
        place += header + size
    return found or [_Element(0, min(8, len(data)), 0)]


def _tag(keyword: str) -> bytes:
    tag = Tag(keyword)
    return struct.pack("<HH", tag.group, tag.elem)


def _named(data: bytes, keyword: str) -> list[_Element]:
    tag = _tag(keyword)
    return [each for each in _elements(data) if data[each.start : each.start + 4] == tag]


def _with_value(data: bytes, element: _Element, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    has_kind = data[element.start + 4 : element.start + 6].isalpha()
    width = 2 if element.is_short and has_kind else 4
    length = (len(value) % (1 << 8 * width)).to_bytes(width, "little")
    return data[: element.value - width] + length + value + data[element.value + element.length :]


def wrong_length(rng: Random, data: bytes) -> bytes:
    element = rng.choice(_elements(data))
    true = element.length
    length = rng.choice((0, 1, true + 1, true - 1, 2 * true, 2**15, 2**31 - 1, 2**32 - 2, 2**32 - 1))
    width = rng.choice((2, 4))
    field = (length % (1 << 8 * width)).to_bytes(width, "little")
    return data[: element.value - width] + field + data[element.value :]


def wrong_tag(rng: Random, data: bytes) -> bytes:
    every = _elements(data)
    element, other = rng.choice(every), rng.choice(every)
    known = (_ITEM, _ITEM_END, _SEQUENCE_END, b"\xe0\x7f\x10\x00", b"\x08\x00\x05\x00", bytes(4), b"\xff" * 4)
    tag = rng.choice((*known, *(data[other.start : other.start + 4],) * 5))
    return data[: element.start] + tag + data[element.start + 4 :]


def swapped_tags(rng: Random, data: bytes) -> bytes:
    every, found = _elements(data), bytearray(data)
    one, other = (slice(each.start, each.start + 4) for each in (rng.choice(every), rng.choice(every)))
    found[one], found[other] = data[other], data[one]
    return bytes(found)


def wrong_kind(rng: Random, data: bytes) -> bytes:
    element = rng.choice(_elements(data))
    return data[: element.start + 4] + rng.choice(_VRS) + data[element.start + 6 :]


def wrong_value(rng: Random, data: bytes) -> bytes:
    return _with_value(data, rng.choice(_elements(data)), rng.choice(_WORDS))


def wrong_size(rng: Random, data: bytes) -> bytes:
    if found := _named(data, rng.choice(_SIZES)):
        return _with_value(data, found[0], rng.choice(_NUMBERS).to_bytes(2, "little"))
    return data


def huge_image(rng: Random, data: bytes) -> bytes:
    for keyword in ("Rows", "Columns"):
        if found := _named(data, keyword):
            side = rng.choice((9_999, 10_000, 30_000, 65_535))
            data = _with_value(data, found[0], side.to_bytes(2, "little"))
    return data


def wrong_frames(rng: Random, data: bytes) -> bytes:
    words = (b"0", b"-1", b"2", b"3.5", b"2147483647", b"9" * 30, b"", b"x")
    header = b"\x28\x00\x08\x00IS" + bytes(2)
    for element in _named(data, "NumberOfFrames") or _named(data, "Rows"):
        if data[element.start : element.start + 4] == header[:4]:
            return _with_value(data, element, rng.choice(words))
        new = _with_value(header, _Element(0, 8, 0), rng.choice(words))
        return data[: element.start] + new + data[element.start :]
    return data


def other_syntax(rng: Random, data: bytes) -> bytes:
    if found := _named(data, "TransferSyntaxUID"):
        return _with_value(data, found[0], rng.choice(AllTransferSyntaxes).encode())
    return data


def other_charset(rng: Random, data: bytes) -> bytes:
    element = next(
        (each for each in _elements(data) if data[each.start : each.start + 2] == b"\x08\x00"), None
    )
    if element is None:
        return data
    charset = _with_value(b"\x08\x00\x05\x00CS\0\0", _Element(0, 8, 0), rng.choice(_CHARSETS))
    return data[: element.start] + charset + data[element.start :]


def repeated_elements(rng: Random, data: bytes) -> bytes:
    every = _elements(data)
    first = rng.randrange(len(every))
    last = min(len(every) - 1, first + rng.choice((0, 1, 5)))
    part = data[every[first].start : every[last].value + every[last].length]
    return data[: every[first].start] + _times(part, rng.choice((2, 3, 300))) + data[every[first].start :]


def nested_sequences(rng: Random, data: bytes) -> bytes:
    tag, depth = _tag(rng.choice(_NESTING)), rng.choice(DEPTHS)
    begin = tag + b"SQ\0\0" + _UNDEFINED + _ITEM + _UNDEFINED
    end = (_ITEM_END + bytes(4) + _SEQUENCE_END + bytes(4)) * rng.choice((0, 1))
    place = rng.choice(_elements(data)).start
    return data[:place] + begin * depth + end * depth + data[place:]


def many_items(rng: Random, data: bytes) -> bytes:
    items = (_ITEM + bytes(4)) * rng.choice((3, 1000, 30_000))
    place = rng.choice(_elements(data)).start
    head = b"\x40\x00\x30\xa7SQ\0\0" + len(items).to_bytes(4, "little")
    return data[:place] + head + items + data[place:]


DICOM: Mutations = ANY | {
    mutation.__name__: mutation
    for mutation in (
        *(
            wrong_length,
            wrong_tag,
            swapped_tags,
            wrong_kind,
            wrong_value,
            wrong_size,
            huge_image,
            wrong_frames,
        ),
        *(other_syntax, other_charset, repeated_elements, nested_sequences, many_items),
    )
}


# HL7

_ESCAPES = (
    *(b"\\.sk+\\", b"\\.sk-9\\", b"\\.sp" + b"9" * 5000 + b"\\", b"\\.sk" + b"9" * 5000 + b"\\", b"\\X\\"),
    *(
        b"\\XFF" + b"00" * 99 + b"\\",
        b"\\XF\\",
        b"\\Zff\\",
        b"\\C2842\\",
        b"\\H\\\\N\\",
        b"\\F\\",
        b"\\E\\" * 99,
    ),
    *(b"\\.br\\" * 99, b"\\", b"\\\\", b"\\.in+4\\", b"\\.xx\\"),
)
_PUNCTUATION = string.punctuation.encode() + b" \t\0\xe9A1"


def _segments(data: bytes) -> list[bytes]:
    return re.split(rb"(?<=[\r\n])(?=[A-Z])", data)


def moved_segments(rng: Random, data: bytes) -> bytes:
    parts = _segments(data)
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    parts[one], parts[other] = parts[other], parts[one]
    return b"".join(parts)


def repeated_segments(rng: Random, data: bytes) -> bytes:
    parts = _segments(data)
    place = rng.randrange(len(parts))
    return b"".join([*parts[:place], _times(parts[place], rng.choice((2, 9, 2000))), *parts[place:]])


def lost_segment(rng: Random, data: bytes) -> bytes:
    parts = _segments(data)
    parts.pop(rng.randrange(len(parts)))
    return b"".join(parts)


def other_delimiters(rng: Random, data: bytes) -> bytes:
    marks = bytes(rng.choices(_PUNCTUATION, k=rng.choice((1, 5, 5, 5))))
    if rng.random() < 0.5:  # told in MSH and used everywhere
        return data.translate(bytes.maketrans(b"|^~\\&"[: len(marks)], marks))
    return data.replace(b"|^~\\&", marks, 1)


def escapes(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 5))):
        marks = [found.end() for found in re.finditer(rb"[|^]", data)] or [0]
        place = rng.choice(marks)
        data = data[:place] + rng.choice(_ESCAPES) + data[place:]
    return data


def other_codec(rng: Random, data: bytes) -> bytes:
    first, *others = data.split(b"\r")
    fields = (first.split(b"|") + [b""] * 18)[:18]
    fields[17] = rng.choice(CODECS).encode()
    return b"\r".join([b"|".join(fields), *others])


def frames(rng: Random, data: bytes) -> bytes:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    marks = (
        b"\x0b",
        b"\x1c\r",
        b"\rMSH",
        b"\nMSH|^~\\&|\r",
        b"\rBTS|1\r",
        b"\rFHS|^~\\&\r",
        b"\rOBX|",
        b"\rOBR",
    )
    for place in reversed(places):
        data = data[:place] + rng.choice(marks) + data[place:]
    return data


def moved_fields(rng: Random, data: bytes) -> bytes:
    fields = data.split(b"|")
    one, other = rng.randrange(len(fields)), rng.randrange(len(fields))
    fields[one], fields[other] = fields[other], fields[one]
    return b"|".join(fields)


def other_lines(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\r", rng.choice((b"\n", b"\r\n", b"\n\r", b"\x85", b"\x0b", b"\x1c", b"")))


def other_encoding(rng: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "cp1252", "cp500")), errors="replace")


HL7: Mutations = ANY | {
    mutation.__name__: mutation
    for mutation in (
        *(moved_segments, repeated_segments, lost_segment, other_delimiters, escapes, other_codec, frames),
        *(moved_fields, other_lines, other_encoding),
    )
}


# FHIR


def _nodes(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with every key or index in it."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in pairs:
            yield holder, key
            if isinstance(value, dict | list) and value:
                waiting.append(value)


_JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1e308,
        float("nan"),
        10**400,
        "",
        " ",
        "\0",
        "\ud800",
        "\u202e",
        "urn:oid:",
        "#",
        "x" * 99,
    ),
    *([], {}, [None], [[]], [{}], {"": ""}, {"reference": "#self"}, [{"coding": [{"code": 5}]}]),
)


def _edited(change: Callable[[Random, Any, Any], None]) -> Mutation:
    """Return the mutation that changes one node of one line's JSON; what is no JSON any more stays."""

    def mutation(rng: Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        place = rng.randrange(len(lines))
        whole = rng.random() < 0.5 or not lines[place]
        try:
            document = json.loads(data if whole else lines[place])
            holder, key = rng.choice(list(_nodes(document)))
            change(rng, holder, key)
            text = json.dumps(document).encode()
        except (ValueError, IndexError, TypeError, RecursionError):
            return data
        return text if whole else b"\n".join([*lines[:place], text, *lines[place + 1 :]])

    return mutation


def _junk(rng: Random, holder: Any, key: Any) -> None:
    holder[key] = rng.choice(_JUNK)


def _half_a_character(rng: Random, holder: Any, key: Any) -> None:
    if isinstance(holder[key], str):
        holder[key] += "\ud800"


def _repeated(rng: Random, holder: Any, key: Any) -> None:
    part = json.dumps(holder[key]).encode()
    holder[key] = [holder[key]] * (len(_times(part, rng.choice((0, 2, 2000)))) // len(part))


def _in_itself(rng: Random, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(holder)


def _renamed(rng: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        names = (
            "resourceType",
            "entry",
            "resource",
            "contained",
            "identifier",
            "presentedForm",
            "data",
            "study",
        )
        holder[rng.choice(names)] = holder.pop(key)


def _as_form(rng: Random, holder: Any, key: Any) -> None:
    text = rng.choice(
        (b"", b"<p>" * 9000, b"<![if" * 9000, b"&#x110000;&#55296;", b"\xff\xfe", b"<!--" * 9000)
    )
    kind = rng.choice(("text/html", "text/plain", "application/pdf", ""))
    data = base64.b64encode(text).decode() + rng.choice(("", "=", "!", "\u00e9"))
    form = {"contentType": f"{kind}; charset={rng.choice(CODECS)}", "data": data}
    (holder if isinstance(holder, dict) else {})["presentedForm"] = rng.choice((form, [form, form]))


def deep_json(rng: Random, data: bytes) -> bytes:
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice(((b"[", b"]"), (b'{"entry":', b"}"), (b'{"resource":{"entry":[', b"]}}")))
    return opening * depth + rng.choice((data.replace(b"\n", b","), b"0")) + closing * rng.choice((0, depth))


def several_lines(rng: Random, data: bytes) -> bytes:
    return data.replace(b",", rng.choice((b",\n", b"\n", b",,", b"")), rng.choice((1, -1)))


FHIR: Mutations = ANY | {
    "junk": _edited(_junk),
    "half_a_character": _edited(_half_a_character),
    "repeated": _edited(_repeated),
    "in_itself": _edited(_in_itself),
    "renamed": _edited(_renamed),
    "as_form": _edited(_as_form),
    "deep_json": deep_json,
    "several_lines": several_lines,
    "other_encoding": other_encoding,
}


# Tables

_CELLS = (
    *(b"", b'"', b'""', b"\0", b"-1", b"nan", b"1e999", b"yes", b"x" * 5000, b"../../x", b"/", b".", b"\xff"),
    *(b"12.0", b"=1+1", b"a\nb", b'"a\nb"', b"\xe2\x80\xa8", b"test", b"9" * 5000, b"\xef\xbb\xbf"),
)


def other_cells(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 4))):
        cells = re.split(rb"([,;\t\n])", data)
        cells[2 * rng.randrange((len(cells) + 1) // 2)] = rng.choice(_CELLS)
        data = b"".join(cells)
    return data


def other_columns(rng: Random, data: bytes) -> bytes:
    header, line, rest = data.partition(b"\n")
    names = header.split(b",")
    for _ in range(2):
        names[rng.randrange(len(names))] = rng.choice(
            (rng.choice(names), b"", b"Accession", b"REPORT", b" ", b"\0")
        )
    return b",".join(names) + line + rest


def other_separator(rng: Random, data: bytes) -> bytes:
    return data.replace(
        rng.choice((b",", b"\n", b'"')), rng.choice((b";", b"\t", b"|", b"\r", b"\r\n", b"\0", b'"'))
    )


def quotes(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 2, 9))):
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.choice((b'"', b'""', b"'", b'"x')) + data[place:]
    return data


CSV: Mutations = ANY | {
    mutation.__name__: mutation
    for mutation in (other_cells, other_columns, other_separator, quotes, other_encoding)
}

MUTATIONS: Mapping[str, Mutations] = {
    "dicom": DICOM,
    "sr": DICOM,
    "hl7": HL7,
    "fhir": FHIR,
    "csv": CSV,
    "images": CSV,
    "parquet": ANY,
}
