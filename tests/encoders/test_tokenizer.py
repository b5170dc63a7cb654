"""Whatever a report says becomes tokens that end with the end token, the same on every machine."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from encoders.errors import EncoderError
from encoders.tokenizer import TextTokenizer, train_vocabulary
from tests.encoders.micro import MAX_TOKENS, TEXTS, micro_encoder, micro_tokenizer

SHIPPED = TextTokenizer.shipped(max_tokens=32)
AGAIN = TextTokenizer.parse(json.loads(json.dumps(SHIPPED.describe())))

any_text = st.text(max_size=60) | st.text(st.sampled_from("abz <|>éß肺🫁\u0301\u200d\n\t.1"), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_any_text_ends_with_the_one_end_token(text: str) -> None:
    for tokenizer in (SHIPPED, micro_tokenizer()):
        (ids,) = tokenizer([text]).tolist()
        assert ids[0] == tokenizer.hugging_face.bos_token_id
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        assert len(ids) <= tokenizer.max_tokens
        assert max(ids) < tokenizer.vocabulary_size


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|startoftext|>", "x <|endoftext|>"])
def test_a_text_that_spells_a_special_token_does_not_end_there(text: str) -> None:
    (ids,) = SHIPPED([text]).tolist()
    assert ids.count(SHIPPED.eos_token_id) == ids.count(SHIPPED.hugging_face.bos_token_id) == 1


def test_bytes_known_only_within_words_would_end_a_text_early() -> None:
    description = micro_tokenizer().describe()
    entries = {key: i for key, i in description["vocabulary"].items() if key != "z</w>"}
    broken = TextTokenizer.parse({**description, "vocabulary": entries})
    assert broken.eos_token_id in broken(["z lungs"])[0, :-1].tolist()


def test_texts_that_differ_have_different_tokens() -> None:
    rows = {tuple(SHIPPED([text])[0].tolist()) for text in (*TEXTS, "肺", "肝", "🫁", "🫀", "z", "q")}
    assert len(rows) == len(TEXTS) + 6


def test_the_empty_text_is_start_and_end() -> None:
    assert SHIPPED([""]).tolist() == [[SHIPPED.hugging_face.bos_token_id, SHIPPED.eos_token_id]]


def test_a_long_text_is_cut_and_keeps_its_end() -> None:
    (ids,) = SHIPPED(["effusion " * 500]).tolist()
    assert len(ids) == 32
    assert ids[-1] == SHIPPED.eos_token_id
    assert SHIPPED.eos_token_id not in ids[:-1]


def test_case_and_white_space_make_no_difference() -> None:
    ids = SHIPPED(["Clear Lungs.", "clear \n\t lungs."])
    assert torch.equal(ids[0], ids[1])


def test_ids_are_int64_and_padded_with_the_end_token() -> None:
    ids = SHIPPED(["", "large heart"])
    assert ids.dtype == torch.int64
    assert (ids[0, 1:] == SHIPPED.eos_token_id).all()


def test_padding_does_not_change_an_embedding() -> None:
    encoder = micro_encoder()
    together = encoder.text_embeddings(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        assert encoder.text_embeddings([text])[0] == pytest.approx(row, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(text=any_text)
def test_a_described_tokenizer_encodes_the_same(text: str) -> None:
    assert torch.equal(AGAIN([text]), SHIPPED([text]))
    assert AGAIN.digest == SHIPPED.digest


def test_the_digest_knows_every_part() -> None:
    description = micro_tokenizer().describe()
    changed = [
        {**description, "max_tokens": MAX_TOKENS - 1},
        {**description, "merges": description["merges"][:-1]},
        {**description, "vocabulary": {**description["vocabulary"], "new": len(description["vocabulary"])}},
    ]
    digests = {TextTokenizer.parse(each).digest for each in (description, *changed)}
    assert len(digests) == 4


def test_training_is_deterministic_and_keeps_to_its_size() -> None:
    first, second = (train_vocabulary(TEXTS * 5, size=540) for _ in range(2))
    assert first == second
    assert len(first["vocabulary"]) <= 540
    assert sorted(first["vocabulary"].values()) == list(range(len(first["vocabulary"])))


@pytest.mark.parametrize("max_tokens", [-1, 0, 2])
def test_a_length_without_room_for_a_token_is_refused(max_tokens: int) -> None:
    with pytest.raises(EncoderError, match=f"expected max_tokens={max_tokens} >= 3"):
        TextTokenizer(CLIPTokenizer(), max_tokens=max_tokens)
