"""Sentences end where a reader ends them, and those that teach nothing are known."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.text.sentences import Kind, learnable_sentences, sentences, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" .  ... -- ", ()),
        ("Lungs are clear. Heart is normal.", ("Lungs are clear.", "Heart is normal.")),
        ("lungs are clear. heart is normal", ("lungs are clear.", "heart is normal")),
        ("Lungs are clear.Heart is normal.", ("Lungs are clear.", "Heart is normal.")),
        ("Effusion? No. Heart normal!", ("Effusion?", "No.", "Heart normal!")),
        ("A 1.5 cm nodule, 2.0 x 3.1 mm.", ("A 1.5 cm nodule, 2.0 x 3.1 mm.",)),
        ("Seen by Dr. Smith vs. none.", ("Seen by Dr. Smith vs. none.",)),
        ("Seen by J. R. Smith. Clear.", ("Seen by J. R. Smith.", "Clear.")),
        ("Rib No. 5 broken. No. 6 intact.", ("Rib No. 5 broken.", "No. 6 intact.")),
        ("Approx. 5 mm (e.g. a cyst). Clear.", ("Approx. 5 mm (e.g. a cyst).", "Clear.")),
        ("Measures 5. The heart is big.", ("Measures 5.", "The heart is big.")),
        ("Fraktur der 5. Rippe li. basal. Z.n. OP.", ("Fraktur der 5. Rippe li. basal.", "Z.n. OP.")),
        ("Am 12. März z. B. kein Erguss. Herz o.B.", ("Am 12. März z. B. kein Erguss.", "Herz o.B.")),
        ("Nódulo de aprox. 5 mm. Sin derrame.", ("Nódulo de aprox. 5 mm.", "Sin derrame.")),
        ("Vu par Mme. Curie. Pas d'épanchement.", ("Vu par Mme. Curie.", "Pas d'épanchement.")),
        ("Nodulo di ca. 5 mm. Non versamento.", ("Nodulo di ca. 5 mm.", "Non versamento.")),
        ("Nódulo à dir. de 5 mm. Sem derrame.", ("Nódulo à dir. de 5 mm.", "Sem derrame.")),
        ("1. Edema. 2. No effusion.", ("Edema.", "No effusion.")),
        ("1) Edema 2) No effusion 3) Nodule, 2 mm", ("Edema", "No effusion", "Nodule, 2 mm")),
        ("Clear\n- Edema\n- Effusion\n\nHeart", ("Clear", "Edema", "Effusion", "Heart")),
        ("A line\nwrapped here.", ("A line wrapped here.",)),
        ('He said "clear." Then left.', ('He said "clear."', "Then left.")),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: tuple[str, ...]) -> None:
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    "sentence",
    [
        "Clinical correlation is recommended.",
        "Follow up is advised.",
        "Suggest repeat imaging.",
        "Control is suggested.",
        "Please compare with clinical findings.",
        "These findings were discussed with Dr. ___ at ___.",
        "Dr. ___ was notified by telephone.",
        "Thank you for this referral.",
        "PA and lateral views of the chest were obtained.",
        "I have personally reviewed the images and agree with the above.",
        "Mit freundlichen kollegialen Grüßen",
        "Verlaufskontrolle empfohlen.",
        "Se recomienda control.",
        "À confronter à la clinique.",
        "Si consiglia controllo.",
        "Sugere-se controle.",
    ],
)
def test_sentences_about_somebodys_work_are_boilerplate(sentence: str) -> None:
    assert [each.kind for each in sentences(sentence)] == [Kind.BOILERPLATE]


@pytest.mark.parametrize(
    "sentence",
    [
        "Compared to prior study of ___, no change.",
        "No significant interval change.",
        "Unchanged.",
        "Comparison is made with the chest radiograph of ___.",
        "Im Vergleich zur Voraufnahme vom ___ keine wesentliche Änderung.",
        "Sin cambios significativos respecto al estudio previo.",
        "Aspect inchangé par rapport à l'examen du ___.",
        "Quadro invariato rispetto al precedente esame.",
        "Sem alterações em relação ao exame anterior.",
    ],
)
def test_sentences_about_change_alone_are_comparisons(sentence: str) -> None:
    assert [each.kind for each in sentences(sentence)] == [Kind.COMPARISON]


@pytest.mark.parametrize(
    "sentence",
    [
        "No acute cardiopulmonary process.",
        "Stable cardiomegaly.",
        "The effusion is unchanged compared to the prior study.",
        "Normal chest radiograph.",
        "No pneumothorax.",
        "Recommend removal of the misplaced tube in the right bronchus.",
        "Reviewed are a nodule and an effusion.",
        "Unveränderter Pleuraerguss rechts.",
    ],
)
def test_sentences_about_the_image_are_kept(sentence: str) -> None:
    assert learnable_sentences(sentence) == (sentence,)


def test_learnable_sentences_leave_the_others_out_in_order() -> None:
    text = "1. Small effusion. 2. No interval change. Dr. ___ was notified. 3. Clear apex."
    assert learnable_sentences(text)[0] == "Small effusion."
    assert learnable_sentences(text)[-1].endswith("Clear apex.")
    assert len(learnable_sentences(text)) == 2


def test_a_sentence_does_not_show_its_words() -> None:
    assert "clear" not in repr(sentences("Lungs are clear."))


@given(
    st.text()
    | st.lists(
        st.sampled_from(["1. ", "2) ", "Dr. ", " 5. ", "Rippe", "clear.", "\n", "- ", "\n\n", "z. B. ", "? "])
    ).map("".join)
)
def test_no_word_is_lost(text: str) -> None:
    made = split_sentences(text)
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in made)
    letters = [character for character in text if character.isalpha()]
    assert [character for character in "".join(made) if character.isalpha()] == letters


@pytest.mark.parametrize(
    "text",
    [
        "a." * 10_000,
        "1. " * 10_000,
        "- \n" * 10_000,
        ". " * 10_000,
        "findings " * 5_000,
        "view " * 5_000 + "!",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    sentences(text)
    assert time.process_time() - started < 10


def test_the_patterns_are_in_lower_case_without_accents() -> None:
    from client.text.sentences import _LISTS  # a pattern in capitals would never be found

    patterns = [pattern for each in _LISTS["boilerplate"].values() for pattern in each]
    assert patterns
    assert all(pattern.isascii() and re.compile(pattern) for pattern in patterns)
