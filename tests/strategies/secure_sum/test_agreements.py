import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from strategies.secure_sum.agreements import AgreementBook
from strategies.secure_sum.errors import Malformed, StepRefused
from tests.strategies.secure_sum.hospitals import Attempt, session, terms, updates

SUBJECT, OTHER = "ab" * 32, "cd" * 32


def test_the_first_agreement_stays_also_after_a_restart(tmp_path: Path) -> None:
    assert AgreementBook(folder=tmp_path / "book").first(SUBJECT, "one") == "one"
    assert AgreementBook(folder=tmp_path / "book").first(SUBJECT, "two") == "one"
    assert AgreementBook(folder=tmp_path / "book").first(OTHER, "two") == "two"


def test_a_book_says_whether_anything_was_agreed_to(tmp_path: Path) -> None:
    book = AgreementBook(folder=tmp_path / "book")
    assert not book.has(SUBJECT)
    book.first(SUBJECT, "one")
    assert (book.has(SUBJECT), book.has(OTHER)) == (True, False)
    with pytest.raises(Malformed, match="subject"):
        book.has("../site")


def test_of_many_at_once_one_is_the_first(tmp_path: Path) -> None:
    book = AgreementBook(folder=tmp_path)
    with ThreadPoolExecutor(8) as pool:
        kept = set(pool.map(lambda number: book.first(SUBJECT, str(number)), range(40)))
    assert len(kept) == 1
    assert os.listdir(tmp_path) == [SUBJECT]


def test_a_crash_while_writing_leaves_no_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: Path, __: str) -> None:
        raise OSError("power failure")

    book = AgreementBook(folder=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "hardlink_to", crash)
        with pytest.raises(OSError, match="power failure"):
            book.first(SUBJECT, "one")
    assert os.listdir(tmp_path) == []
    assert book.first(SUBJECT, "two") == "two"


@pytest.mark.parametrize("subject", ["", "../elsewhere", "AB" * 32, "ab" * 33])
def test_a_subject_that_is_no_digest_is_refused(tmp_path: Path, subject: str) -> None:
    with pytest.raises(Malformed, match="expected subject to be 64 lowercase hexadecimal digits"):
        AgreementBook(folder=tmp_path).first(subject, "one")


def test_a_site_keeps_to_its_agreement_after_a_restart_and_writes_no_secret(tmp_path: Path) -> None:
    agreed = terms()
    made = updates(agreed)
    attempt = Attempt(agreed, made)
    attempt.sites["site-1"] = session(agreed, "site-1", agreements=AgreementBook(folder=tmp_path))
    attempt.until("reveal")
    again = Attempt(agreed, made, silent={"site-5": "mask"})
    again.sites["site-1"] = session(agreed, "site-1", agreements=AgreementBook(folder=tmp_path))
    with pytest.raises(StepRefused, match="agreed before"):
        again.until("consent")
    contents = [path.read_text() for path in tmp_path.iterdir()]
    assert len(contents) == 2
    assert all(len(text) == 64 for text in contents)  # digests, and nothing else
