"""Texts cut into the pieces of the shipped vocabulary, by CLIP's rules, without a model library.

``transformers`` brings a quarter of a gigabyte that a build of a cohort has no other use for. So the rules
are written down here once more. `rules_of` tells whether they are those of a model's tokenizer: it covers the
whole pipeline, and where that differs in anything, the pieces are not used.

Source:
    Radford et al. (2021), section 2.4; OpenAI's ``clip/simple_tokenizer.py`` for the pattern.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

BATCH = 1024
_VOCABULARY = "vocabulary/radiology_bpe.json"
_UNKNOWN = "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def pieces_of(texts: Iterable[str]) -> Iterator[NDArray[np.int32]]:
    """Yield the ids of each text's pieces, however many: no start, no end, nothing cut off."""
    pipeline, batch = shipped_pipeline(), list[str]()
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield from _encoded(pipeline, batch)
            batch = []
    yield from _encoded(pipeline, batch)


def _encoded(pipeline: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.int32]]:
    for encoded in pipeline.encode_batch_fast(texts, add_special_tokens=False):
        yield np.array(encoded.ids, dtype=np.int32)


@cache
def shipped_pipeline() -> Tokenizer:
    """The pipeline of the shipped vocabulary, up to the ids of pieces."""
    spec = find_spec("encoders")  # where it lies; imported, it would bring the model library
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("expected the package encoders, which holds the vocabulary")
    known = json.loads((Path(spec.submodule_search_locations[0]) / _VOCABULARY).read_text(encoding="utf-8"))
    pipeline = Tokenizer(
        models.BPE(
            vocab=known["vocabulary"],
            merges=[tuple(pair.split(" ")) for pair in known["merges"]],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=_UNKNOWN,
        )
    )
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return pipeline


def rules_of(pipeline: Tokenizer) -> str:
    """Return the identity of all that decides on the ids of a text's pieces."""
    whole = json.loads(pipeline.to_str())
    rules = [whole[part] for part in ("normalizer", "pre_tokenizer", "model")]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
