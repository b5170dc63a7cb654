"""Parts come out as they went in, however the network cuts them up."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.outcomes import Code
from client.pacs.errors import ItemFailed
from client.pacs.multipart import MAX_HEADER_BYTES, parts

TYPE = 'multipart/related; type="application/dicom"; boundary="b--1"'


def answer(bodies: list[bytes], *, header: bytes = b"Content-Type: application/dicom\r\n") -> bytes:
    whole = b"".join(b"\r\n--b--1\r\n" + header + b"\r\n" + body for body in bodies)
    return whole + b"\r\n--b--1--\r\n"


def pieces(whole: bytes, size: int) -> Iterator[bytes]:
    return (whole[start : start + size] for start in range(0, len(whole), size))


def read(content_type: str, whole: bytes, size: int = 7) -> list[bytes]:
    return [b"".join(part) for part in parts(content_type, pieces(whole, size))]


# Bodies that look like delimiters as far as they may.
body = st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--", b"b--1", b"\r\n--b--", b"\r\n\r\n", b"x"])).map(
    b"".join
)


@given(
    bodies=st.lists(body.filter(lambda part: b"\r\n--b--1" not in b"\r\n" + part)), size=st.integers(1, 40)
)
def test_every_part_comes_out_as_it_went_in(bodies: list[bytes], size: int) -> None:
    assert read(TYPE, answer(bodies), size) == bodies


@pytest.mark.parametrize("before", [b"", b"a preamble\r\n"])
def test_the_first_delimiter_may_open_the_answer(before: bytes) -> None:
    whole = answer([b"1", b"2"])[2 if not before else 0 :]
    assert read(TYPE, before + whole) == [b"1", b"2"]


def test_parts_may_have_no_headers() -> None:
    assert read(TYPE, answer([b"1"], header=b"")) == [b"1"]


@given(cut=st.integers(0, len(answer([b"one", b"two"])) - len("--\r\n") - 1))
def test_an_answer_cut_anywhere_is_no_answer(cut: int) -> None:
    with pytest.raises(ItemFailed) as failure:
        read(TYPE, answer([b"one", b"two"])[:cut])
    assert failure.value.rejected.code is Code.E_FETCH_CUT
    assert failure.value.passing


def test_a_bare_object_is_one_part() -> None:
    assert read("application/dicom", b"anything") == [b"anything"]


@pytest.mark.parametrize("content_type", ["text/html", "", "multipart/related", "a;;b=\x00"])
def test_any_other_answer_is_refused(content_type: str) -> None:
    with pytest.raises(ItemFailed):
        read(content_type, b"<html>")


def test_headers_without_end_are_not_gathered() -> None:
    with pytest.raises(ItemFailed):
        read(TYPE, b"--b--1\r\n" + b"x" * (2 * MAX_HEADER_BYTES), size=1000)


def test_no_part_is_held_in_memory() -> None:
    def stream() -> Iterator[bytes]:
        yield b"--b--1\r\n\r\n"
        for _ in range(1000):
            yield bytes(2**16)
        yield b"\r\n--b--1--"

    (largest,) = (max(map(len, part)) for part in parts(TYPE, stream()))
    assert largest <= 2**16 + 8
