"""The public sentences: many, each once, of every region and technique."""

from tasks.views import VIEW_KINDS, VIEWS, example_sentences, view_sentences


def test_every_region_is_seen_with_every_technique_and_no_sentence_comes_twice() -> None:
    sentences = view_sentences()
    assert len(set(sentences)) == len(sentences) == len(VIEWS["regions"]) * len(VIEWS["techniques"])
    for word in (word.lower() for kind in VIEW_KINDS for word in VIEWS[kind]):
        assert any(f"{word} " in text.lower() or f"{word}:" in text.lower() for text in sentences), word


def test_the_sentences_are_the_same_every_time_and_read_like_captions() -> None:
    assert view_sentences() == view_sentences()
    assert view_sentences()[0] == "Axial CT of the head: mild opacity in the left upper lung."


def test_every_term_has_example_sentences_of_its_own() -> None:
    assert example_sentences("planes", "axial")[0] == "Axial CT."
    assert example_sentences("techniques", "plain radiograph")[0] == "Plain radiograph of the head."
    assert example_sentences("regions", "liver")[0] == "CT of the liver."
    for kind in VIEW_KINDS:
        for term in VIEWS[kind]:
            assert all(term.lower() in sentence.lower() for sentence in example_sentences(kind, term))
