"""Texts that say the same have one key, and others do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.text.keys import text_key


@pytest.mark.parametrize(
    "text",
    [
        "NO ACUTE DISEASE, COMPARED TO XXXX",
        "No acute\n disease;  compared to [**Date 1**].",
        "no acute disease - compared to ___ ___",
        " No acute disease. Compared to ______!",
    ],
)
def test_case_blanks_punctuation_and_masks_do_not_matter(text: str) -> None:
    assert text_key(text) == text_key("No acute disease. Compared to ___.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Nodule of 1.5 cm", "Nodule of 15 cm"),
        ("Nodule <5 mm", "Nodule >5 mm"),
        ("Pneumonia?", "Pneumonia."),
        ("Left effusion", "Right effusion"),
        ("No effusion", "Effusion"),
        ("Seen by ___", "Seen by"),
    ],
)
def test_what_differs_in_meaning_differs(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)


@given(st.text(), st.sampled_from([str.upper, str.strip, lambda text: f" \n{text}\t "]))
def test_a_key_is_stable(text: str, change: object) -> None:
    assert len(text_key(text)) == 32
    assert text_key(f"  {text}\n") == text_key(text)


def test_nothing_has_one_key() -> None:
    assert text_key("") == text_key(" .,-") == text_key("___")
