"""The text a model learns from, whatever the report looks like."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.text.masks import MASK
from client.text.sections import Rule, parse, training_text


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


@pytest.mark.parametrize(
    "report",
    [
        "Findings: Clear lungs. Impression: Normal.",
        "Chest CT. Technique: Axial. Findings: Clear lungs. Conclusion: Normal.",
        "XR CHEST FINDINGS: Clear lungs. IMPRESSION (preliminary): Normal.",
        "FINDINGS: Clear lungs.IMPRESSION: Normal.",
        "Hallazgos: Clear lungs.\nConclusion: Normal.",
        "RESULTATS : Clear lungs.\nCONCLUSION : Normal.",
        "Referto: Clear lungs.\nCONCLUSIONI: Normal.",
        "Achados: Clear lungs.\nIMPRESSÃO: Normal.",
        "Klinische Angaben: Husten.\nBefund\nClear lungs.\nZusammenfassung\nNormal.",
        "# Findings\nClear lungs.\n# Impression\nNormal.",
    ],
)
def test_headings_are_found_without_line_ends_and_without_accents(report: str) -> None:
    assert training_text(report) == "Normal. Clear lungs."


def test_a_word_alone_in_lower_case_is_a_wrapped_line() -> None:
    assert training_text("FINDINGS: Smaller than in the earlier\nstudy\nof May.").endswith("study of May.")


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            "FINDINGS: Clear.\nIMPRESSION: Normal.\nADDENDUM: Rib broken.",
            "Normal. Rib broken. Clear.",
        ),
        ("FINDINGS: Clear.\nIMPRESSION: Normal.\nADDENDUM:\nIMPRESSION: Fracture.", "Fracture. Clear."),
        (
            "ADDENDUM: Rib broken.\nIMPRESSION: Fracture.\nEXAM: CXR.\nFINDINGS: Clear.\nIMPRESSION: Normal.",
            "Fracture. Rib broken. Clear.",
        ),
        (
            "ADDENDUM: Rib broken.\nFINDINGS: Clear.\nIMPRESSION: Normal.",
            "Normal. Rib broken. Clear.",
        ),
        (
            "ADDENDUM: Rib broken.\nEND OF ADDENDUM\nThe lungs are clear.",
            "The lungs are clear. Rib broken.",
        ),
        (
            "Nachtrag: Fraktur.\nBefund: Frei.\nBeurteilung: Regelrecht.",
            "Regelrecht. Fraktur. Frei.",
        ),
        ("IMPRESSION: Normal.\nADDENDUM:\nIMPRESSION: One.\nADDENDUM:\nIMPRESSION: Two.", "Two."),
    ],
)
def test_an_addendum_replaces_the_impression_and_adds_the_rest(report: str, text: str) -> None:
    parsed = parse(report)
    assert parsed.text == text
    assert parsed.addendum


def test_why_the_study_was_done_is_not_learnt_from_in_an_addendum_either() -> None:
    assert training_text("IMPRESSION: Normal.\nADDENDUM:\nINDICATION: Cough.") == "Normal."


@pytest.mark.parametrize(
    ("report", "rule"),
    [
        ("FINDINGS: Clear.\nIMPRESSION: Normal.", Rule.IMPRESSION_AND_FINDINGS),
        ("FINDINGS: --\nIMPRESSION: Normal.", Rule.IMPRESSION),
        ("FINDINGS: Clear.\nIMPRESSION: ___", Rule.FINDINGS),
        ("The lungs are clear.", Rule.UNHEADED),
        ("INDICATION: Cough.\n\nThe lungs are clear.", Rule.LAST_PARAGRAPH),
        ("ADDENDUM: Rib broken.", Rule.UNHEADED),
        ("INDICATION: Cough.", Rule.NOTHING),
        ("", Rule.NOTHING),
    ],
)
def test_the_rule_says_where_the_text_comes_from(report: str, rule: Rule) -> None:
    assert parse(report).rule is rule


def test_a_parsed_report_does_not_show_its_words() -> None:
    assert "Clear" not in repr(parse("FINDINGS: Clear."))


FRAGMENTS = (
    *("IMPRESSION:", "Findings\n", "Comparison: ", "\n\n", "\n", " clear. ", "XXXX", "__", "[**", "**]", "_"),
    *(
        "ADDENDUM: ",
        "END OF ADDENDUM",
        "wet",
        " read:",
        " REPORT:",
        "Original ",
        "Signed by ",
        "gez.",
        "**",
        "(",
    ),
    *(" History: ", ":", " ", ")", "\x0b", "\u2028"),
)


@given(
    st.text(st.sampled_from("aB:.\n\r \t_X") | st.characters())
    | st.lists(st.sampled_from(FRAGMENTS)).map("".join)
)
def test_result_is_one_line_of_single_spaces_and_its_own_result(report: str) -> None:
    text = training_text(report)
    assert training_text(text) == text
    assert text == " ".join(text.split())
    assert "XXXX" not in text.split()
    assert not text or any(character.isalpha() for character in text)


@pytest.mark.parametrize(
    "report",
    [
        "FINDINGS:" * 10_000,
        "WET " * 10_000 + "READ: " * 10_000,
        ("ADDENDUM " * 10_000) + "FINDINGS: a",
        "[**" * 10_000,
        "(" * 10_000 + ")" * 10_000 + ":",
        "Signed by " * 10_000,
        " \n" * 10_000 + ":",
        "___ " * 10_000,
    ],
)
def test_no_report_takes_long(report: str) -> None:
    started = time.process_time()
    parse(report)
    assert time.process_time() - started < 10
