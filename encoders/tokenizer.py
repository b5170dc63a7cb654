"""Text to token ids, offline: CLIP's byte-pair encoding over a vocabulary that ships with the project."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from encoders.errors import EncoderError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
VOCABULARY = "radiology_bpe.json"


@dataclass(frozen=True, kw_only=True)
class TokenisedTexts(Sequence[str]):
    """Texts of which one tokenizer's pieces are known; to any other they are texts.

    Attributes:
        texts: N of them.
        pieces: Ids of each one's pieces, without start and end, however many.
        tokenizer: The digest of the `TextTokenizer` that would cut them so.
    """

    texts: Sequence[str]
    pieces: Sequence[NDArray[np.int32]]
    tokenizer: str

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "TokenisedTexts": ...

    def __getitem__(self, place: int | slice) -> "str | TokenisedTexts":
        if isinstance(place, slice):
            return replace(self, texts=self.texts[place], pieces=self.pieces[place])
        return self.texts[place]


class TextTokenizer:
    """Byte-pair tokenizer with CLIP's rules; unknown words are encoded in pieces.

    Guarantees:
        ``TextTokenizer.parse(t.describe())`` encodes every text exactly as ``t``, on any machine.

    Args:
        tokenizer: Vocabulary and merges; with prompt tokens it is extended in place.
        max_tokens: Longest text, prompt tokens included.
        prompt_tokens: Learned tokens that stand behind the start of every text. Their ids follow the
            vocabulary's; no text can spell them.

    Raises:
        EncoderError: there is no room for a text.
    """

    def __init__(self, tokenizer: CLIPTokenizer, *, max_tokens: int, prompt_tokens: int = 0) -> None:
        if max_tokens < 3 + prompt_tokens:
            prompted = f"{prompt_tokens} prompt tokens, " if prompt_tokens else ""
            raise EncoderError(
                f"expected {max_tokens=} >= {3 + prompt_tokens}: start, {prompted}one token, end"
            )
        self.hugging_face = tokenizer
        self.max_tokens = max_tokens
        self.prompt_tokens = prompt_tokens
        if prompt_tokens:
            _prepend(tokenizer, [f"<|prompt{number}|>" for number in range(prompt_tokens)])

    @classmethod
    def shipped(cls, *, max_tokens: int) -> Self:
        """The project's own vocabulary: radiology wording and the DICOM dictionary."""
        text = resources.files("encoders").joinpath("vocabulary", VOCABULARY).read_text(encoding="utf-8")
        return cls.parse({**json.loads(text), "max_tokens": max_tokens})

    @classmethod
    def parse(cls, description: dict[str, Any]) -> Self:
        """The tokenizer that `describe` described."""
        merges = [tuple(pair.split(" ")) for pair in description["merges"]]
        vocabulary = description["vocabulary"]
        max_tokens = int(description["max_tokens"])
        return cls(
            CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens),
            max_tokens=max_tokens,
            prompt_tokens=int(description.get("prompt_tokens", 0)),
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready: vocabulary, merges, longest text, and prompt tokens if there are any."""
        prompted = {"prompt_tokens": self.prompt_tokens} if self.prompt_tokens else {}
        return {**_entries(self.hugging_face.backend_tokenizer), "max_tokens": self.max_tokens, **prompted}

    def prompted(self, tokens: int) -> "TextTokenizer":
        """This tokenizer with so many learned tokens behind the start of every text.

        Raises:
            EncoderError: it has some already, or there is no room for them.
        """
        if self.prompt_tokens:
            raise EncoderError(f"the tokenizer has {self.prompt_tokens} prompt tokens already")
        return TextTokenizer.parse({**self.describe(), "prompt_tokens": tokens})

    def processor(self) -> CLIPTokenizer | PreTrainedTokenizerFast:
        """What goes into a Hugging Face folder; loaded there, it encodes as this does.

        ``CLIPTokenizer`` builds its rules anew when it is loaded and would lose the prompt tokens.
        """
        if not self.prompt_tokens:
            return self.hugging_face
        kept = {name: getattr(self.hugging_face, name) for name in ("bos_token", "eos_token", "pad_token")}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.hugging_face.backend_tokenizer, model_max_length=self.max_tokens, **kept
        )

    @cached_property
    def digest(self) -> str:
        """Identity of the tokenizer."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return len(self.hugging_face)

    @property
    def eos_token_id(self) -> int:
        """Id of the token whose hidden state is the text's embedding."""
        return int(self.hugging_face.eos_token_id)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64, shape (B, L), L the longest text's length, at most ``max_tokens``."""
        if isinstance(texts, TokenisedTexts) and texts.tokenizer == self.digest:
            return self._assembled(texts.pieces)
        encoded = self.hugging_face(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            split_special_tokens=True,  # a text that spells an end token does not end there
            return_tensors="pt",
        )
        ids: Tensor = encoded["input_ids"]
        return ids.to(torch.int64)

    def _assembled(self, pieces: Sequence[NDArray[np.int32]]) -> Tensor:
        """What the texts with these pieces are encoded as."""
        first = self.vocabulary_size - self.prompt_tokens
        start = [int(self.hugging_face.bos_token_id), *range(first, self.vocabulary_size)]
        room = self.max_tokens - len(start) - 1
        lengths = [min(len(each), room) for each in pieces]
        width = len(start) + max(lengths) + 1
        ids = np.full((len(pieces), width), int(self.hugging_face.pad_token_id), dtype=np.int64)
        ids[:, : len(start)] = start
        for row, each, length in zip(ids, pieces, lengths, strict=True):
            end = len(start) + length
            row[len(start) : end] = each[:length]
            row[end] = self.eos_token_id
        return torch.from_numpy(ids)


def train_vocabulary(texts: Iterable[str], *, size: int) -> dict[str, Any]:
    """A vocabulary of at most ``size`` entries for `TextTokenizer.parse` (without ``max_tokens``).

    The same for the same ``texts`` in every process. Only public text may go in: a vocabulary is released
    with the model.

    Guarantees:
        Every string can be encoded: each byte is an entry, within a word and at its end. A byte without one
        would become CLIP's unknown token, which is its end token, and hide the rest of the text.

    Args:
        texts: What to learn pieces from.
        size: At least 514: both special tokens and each byte twice.

    Source:
        Byte-level BPE with CLIP's normalisation, Radford et al. (2021), section 2.4.
    """
    # Word ends are announced as special tokens because the trainer numbers those first: it numbers what it
    # meets by chance, and breaks ties between merges by number.
    alphabet = sorted(ByteLevel.alphabet())
    announced = [BOS, EOS, *(byte + WORD_END for byte in alphabet)]
    pipeline: Tokenizer = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True) for token in announced],
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    return _entries(pipeline)


def entries_of(folder_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Vocabulary and merges of a tokenizer that was loaded from a folder."""
    return _entries(folder_tokenizer.backend_tokenizer)


def _prepend(tokenizer: CLIPTokenizer, prompts: list[str]) -> None:
    tokenizer.add_tokens(prompts, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(prompts)
    start, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([start, *prompts, "$A", end]),
        special_tokens=[
            (start, tokenizer.bos_token_id),
            (end, tokenizer.eos_token_id),
            *zip(prompts, ids, strict=True),
        ],
    )


def _entries(pipeline: Tokenizer) -> dict[str, Any]:
    model = json.loads(pipeline.to_str())["model"]
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return {"vocabulary": model["vocab"], "merges": list(pairs)}
