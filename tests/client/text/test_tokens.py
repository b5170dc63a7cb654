"""The ids in a cohort are those that the model's tokenizer gives, or they are not used."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from client.text.tokens import BATCH, pieces_of, rules_of, shipped_pipeline
from encoders.tokenizer import BOS, EOS, TextTokenizer, TokenisedTexts, train_vocabulary

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["Small left pleural effusion.", "", "No pneumothorax, no edema; heart size normal 12/2020.", "Ödem?"]
WORDS = st.sampled_from(
    [*TEXTS, BOS, EOS, "<|prompt0|>", "it's", "ﬁ", "é", "\N{COMBINING ACUTE ACCENT}", "\n"]
)


@cache
def tokenizer(max_tokens: int, prompts: int) -> TextTokenizer:
    plain = TextTokenizer.shipped(max_tokens=max_tokens)
    return plain.prompted(prompts) if prompts else plain


def rules(of: TextTokenizer) -> str:
    return rules_of(of.hugging_face.backend_tokenizer)


@pytest.mark.parametrize("prompts", [0, 4])
def test_the_rules_written_here_are_those_of_the_model_s_tokenizer(prompts: int) -> None:
    """Once more after it was called: a call sets how it cuts off and pads."""
    ours = tokenizer(12, prompts)
    assert rules(ours) == rules_of(shipped_pipeline())
    ours(TEXTS)
    assert rules(ours) == rules_of(shipped_pipeline())


def test_another_vocabulary_or_rule_is_another_identity() -> None:
    own = shipped_pipeline()
    other = TextTokenizer.parse({**train_vocabulary(TEXTS, size=520), "max_tokens": 12})
    unnormalised = type(own).from_str(own.to_str())
    unnormalised.normalizer = None
    assert len({rules_of(own), rules(other), rules_of(unnormalised)}) == 3


@given(
    st.lists(
        st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=4).map("".join)), min_size=1, max_size=5
    ),
    st.sampled_from([7, 12, 64]),
    st.sampled_from([0, 1, 4]),
)
@example([""], 7, 4)
@example([" ".join(TEXTS)], 7, 4)
@example([EOS + " after"], 12, 1)
def test_ids_are_equal_to_tokenising_anew(texts: list[str], max_tokens: int, prompts: int) -> None:
    ours = tokenizer(max_tokens, prompts)
    known = TokenisedTexts(texts=texts, pieces=list(pieces_of(texts)), tokenizer=ours.digest)
    ids = ours(known)
    assert torch.equal(ids, ours(texts))
    assert ids.dtype == torch.int64


def test_pieces_are_used_by_the_tokenizer_they_are_for_and_by_no_other() -> None:
    ours, longer, prompted = tokenizer(12, 0), tokenizer(64, 0), tokenizer(12, 4)
    wrong = [np.array([300 + row], dtype=np.int32) for row in range(len(TEXTS))]
    stale = TokenisedTexts(texts=TEXTS, pieces=wrong, tokenizer=ours.digest)
    assert not torch.equal(ours(stale), ours(TEXTS))
    for other in (longer, prompted):
        assert torch.equal(other(stale), other(TEXTS))


def test_some_of_the_texts_have_their_own_pieces() -> None:
    known = TokenisedTexts(texts=TEXTS, pieces=list(pieces_of(TEXTS)), tokenizer=tokenizer(12, 0).digest)
    assert list(known) == TEXTS
    assert torch.equal(tokenizer(12, 0)(known[2:]), tokenizer(12, 0)(TEXTS[2:]))
    assert isinstance(known[2:], TokenisedTexts)


def test_texts_are_cut_batch_by_batch_and_in_order() -> None:
    many = [f"Effusion of {number} ml." for number in range(2 * BATCH + 1)]
    pieces = list(pieces_of(many))
    assert len(pieces) == len(many)
    for place in (0, BATCH - 1, BATCH, 2 * BATCH):
        np.testing.assert_array_equal(pieces[place], next(pieces_of([many[place]])))
    assert list(pieces_of([])) == []


def test_a_build_brings_no_model_library() -> None:
    script = (
        "import sys, client.site, clipward.cli; from client.text.tokens import pieces_of; "
        "list(pieces_of(['x'])); print(*({'torch', 'transformers', 'peft', 'opacus'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
