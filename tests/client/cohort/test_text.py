"""The text a model learns from, whatever the report looks like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.text import MASK, training_text


def test_impression_comes_before_findings() -> None:
    report = "FINDINGS: Heart is normal.\nLungs: clear.\n\nIMPRESSION: No acute disease."
    assert training_text(report) == "No acute disease. Heart is normal. Lungs: clear."


@pytest.mark.parametrize(
    "report",
    [
        "FINDINGS:\nClear lungs.\nIMPRESSION:\nNormal.",
        "findings: Clear lungs.\nimpression: Normal.",
        "   Findings:   Clear\n   lungs.\n\n   Impression:  Normal.",
        "\t FINDINGS\n Clear lungs.\n\n IMPRESSION\n Normal.",
        "**Findings:** Clear lungs.\n**Impression:** Normal.",
        "FINDINGS: Clear lungs. IMPRESSION: Normal.",
        "EXAM: chest. FINDINGS: Clear lungs. IMPRESSION: Normal.",
        "FINDINGS: Clear lungs.\r\nIMPRESSION: Normal.\r\nRECOMMENDATION: None.",
        "Befund: Clear lungs.\nBeurteilung: Normal.",
        "HALLAZGOS: Clear lungs.\nCONCLUSIÓN: Normal.",
    ],
)
def test_headings_are_found_in_any_case_indent_and_language(report: str) -> None:
    assert training_text(report) == "Normal. Clear lungs."


def test_last_impression_wins_because_addenda_follow() -> None:
    report = "IMPRESSION: Normal.\nADDENDUM:\nIMPRESSION: Small nodule.\nIMPRESSION:\n"
    assert training_text(report) == "Small nodule."


def test_findings_alone_are_enough() -> None:
    assert training_text("INDICATION: cough\nFINDINGS: Clear.\nIMPRESSION:") == "Clear."


def test_unknown_headings_stay_in_their_section() -> None:
    assert training_text("FINDINGS:\nLUNGS: clear.\nHEART: normal.") == "LUNGS: clear. HEART: normal."


def test_a_sentence_that_mentions_an_impression_is_no_heading() -> None:
    assert training_text("There is an impression: the lungs are clear.").startswith("There is an impression")


def test_text_without_headings_is_taken_whole() -> None:
    assert training_text("  Axial CT\nof the   chest. ") == "Axial CT of the chest."


def test_unheaded_paragraph_after_the_comparison_is_the_report() -> None:
    report = "INDICATION: Cough.\n\nCOMPARISON: None.\n \nThe lungs are clear.\n\nNo effusion."
    assert training_text(report) == "The lungs are clear. No effusion."


def test_a_report_that_only_asks_a_question_is_empty() -> None:
    assert training_text("INDICATION: Cough.\nCOMPARISON: None.") == ""


@pytest.mark.parametrize("mask", ["___", "______", "XXXX", "XXXXXXX", "[**Name 1**]", "[** Date\n2 **]"])
def test_masks_are_unified(mask: str) -> None:
    assert training_text(f"IMPRESSION: Compared to {mask} unchanged.") == f"Compared to {MASK} unchanged."


@pytest.mark.parametrize("report", ["", "  \n", "___", "XXXX.", "FINDINGS: .\nIMPRESSION: --", "1. 2."])
def test_nothing_to_learn_from_is_empty(report: str) -> None:
    assert training_text(report) == ""


def test_signature_lines_are_dropped() -> None:
    report = "IMPRESSION: Normal.\nElectronically signed by Dr. A. Person\nDictated by: B"
    assert training_text(report) == "Normal."


@given(
    st.text(st.sampled_from("aB:.\n\r \t_X") | st.characters())
    | st.lists(
        st.sampled_from(["IMPRESSION:", "Findings\n", "Comparison: ", "\n\n", "\n", " clear. ", "XXXX", "__"])
    ).map("".join)
)
def test_result_is_one_line_of_single_spaces(report: str) -> None:
    text = training_text(report)
    assert text == " ".join(text.split())
    assert "XXXX" not in text.split()
    assert not text or any(character.isalpha() for character in text)
