"""The public sentences: many, each once, of every region and technique."""

from tasks.views import PLANES, REGIONS, TECHNIQUES, view_sentences


def test_every_region_is_seen_with_every_technique_and_no_sentence_comes_twice() -> None:
    sentences = view_sentences()
    assert len(set(sentences)) == len(sentences) == len(REGIONS) * len(TECHNIQUES)
    for word in (*REGIONS, *TECHNIQUES, *PLANES):
        assert any(f"{word} " in sentence or f"{word}:" in sentence for sentence in sentences), word


def test_the_sentences_are_the_same_every_time_and_read_like_captions() -> None:
    assert view_sentences() == view_sentences()
    assert view_sentences()[0] == "Axial CT of the head: mild opacity in the left upper lung."
