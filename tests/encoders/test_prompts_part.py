"""Learned prompts stand in every text, travel alone, and end up in a plain CLIP model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from encoders.clip import ClipEncoder, load
from encoders.errors import EncoderError
from encoders.parts import WORD_TABLE, PromptsPart
from tests.encoders.micro import TEXTS, micro_encoder, random_images

IMAGES = random_images(len(TEXTS), size=40)
TOKENS = 3
PROMPTS = f"{WORD_TABLE}.prompts.weight"


def moved() -> PromptsPart:
    part = PromptsPart(micro_encoder(), tokens=TOKENS)
    shape = part.arrays()[PROMPTS].shape
    part.load({PROMPTS: np.random.default_rng(0).standard_normal(shape).astype(np.float32)})
    return part


def embedded(part: PromptsPart, *, trimmed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    images, texts = part.inputs(IMAGES, TEXTS)
    with torch.no_grad():
        both = part.module(images, part.trimmed(texts) if trimmed else texts)
    return both[0].numpy(), both[1].numpy()


def test_the_prompts_alone_travel_and_are_trained() -> None:
    part = PromptsPart(micro_encoder(), tokens=TOKENS)
    assert {name: value.shape[0] for name, value in part.arrays().items()} == {PROMPTS: TOKENS}
    trained = [name for name, value in part.module.named_parameters() if value.requires_grad]
    assert trained == [PROMPTS]


def test_the_prompts_start_alike_everywhere() -> None:
    one, other = (PromptsPart(micro_encoder(), tokens=TOKENS).arrays()[PROMPTS] for _ in "ab")
    assert np.array_equal(one, other)


def test_every_text_holds_each_prompt_once_behind_its_start() -> None:
    part = PromptsPart(micro_encoder(), tokens=TOKENS)
    plain, (_, ids) = micro_encoder().tokenizer(TEXTS), part.inputs(IMAGES, TEXTS)
    first = micro_encoder().tokenizer.vocabulary_size
    assert ids[:, 1 : 1 + TOKENS].tolist() == [list(range(first, first + TOKENS))] * len(TEXTS)
    rest = torch.cat([ids[:, :1], ids[:, 1 + TOKENS :]], dim=1)
    width = min(rest.shape[1], plain.shape[1])
    assert torch.equal(rest[:, : width - 1], plain[:, : width - 1])


def test_a_text_cannot_spell_a_prompt() -> None:
    tokenizer = PromptsPart(micro_encoder(), tokens=TOKENS).encoder.tokenizer
    ids = tokenizer(["<|prompt0|> effusion"])[0].tolist()
    assert ids.count(tokenizer.vocabulary_size - TOKENS) == 1


def test_the_prompts_change_texts_and_leave_images() -> None:
    part = moved()
    images, texts = embedded(part)
    assert images == pytest.approx(micro_encoder().image_embeddings(IMAGES), abs=1e-6)
    assert np.abs(texts - micro_encoder().text_embeddings(TEXTS)).max() > 1e-2
    assert np.array_equal(texts, embedded(part, trimmed=True)[1])


def test_every_prompt_gets_a_gradient_and_nothing_else_does() -> None:
    part = moved()
    images, texts = part.inputs(IMAGES, TEXTS)
    image_embeddings, text_embeddings = part.module(images, texts)
    (image_embeddings * text_embeddings).sum().backward()
    gradient = part.parameters()[PROMPTS].grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()
    assert {name for name, value in part.module.named_parameters() if value.grad is not None} == {PROMPTS}


def test_the_merged_model_is_the_part_and_can_be_described() -> None:
    part = moved()
    merged = part.merged()
    _, texts = embedded(part)
    assert merged.text_embeddings(TEXTS) == pytest.approx(texts, abs=1e-6)
    again = ClipEncoder.parse(merged.describe(), merged.weights())
    assert np.array_equal(again.text_embeddings(TEXTS), merged.text_embeddings(TEXTS))


def test_the_export_is_loaded_by_hugging_face_and_by_us(tmp_path: Path) -> None:
    merged = moved().merged()
    merged.export(tmp_path)
    expected = merged.text_embeddings(TEXTS)
    assert np.array_equal(load(tmp_path).text_embeddings(TEXTS), expected)
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    for text, embedding in zip(TEXTS, expected, strict=True):
        ids = processor(text=[text], return_tensors="pt", truncation=True)["input_ids"]
        with torch.no_grad():
            found = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        assert (found / found.norm()).numpy() == pytest.approx(embedding, abs=1e-5)


def test_a_model_with_rows_that_no_token_has_loses_only_those() -> None:
    encoder = micro_encoder()
    weights, table = encoder.weights(), f"{WORD_TABLE}.weight"
    weights[table] = np.pad(weights[table], ((0, 5), (0, 0)))
    described = encoder.describe()
    described["config"]["text_config"]["vocab_size"] += 5
    part = PromptsPart(ClipEncoder.parse(described, weights), tokens=TOKENS)
    assert part.merged().text_embeddings(TEXTS) == pytest.approx(embedded(part)[1], abs=1e-6)


def test_an_encoder_without_room_for_the_prompts_is_refused() -> None:
    room = micro_encoder().tokenizer.max_tokens - 3
    with pytest.raises(EncoderError, match=rf"max_tokens={room + 3} >= {room + 4}: start, {room + 1} prompt"):
        PromptsPart(micro_encoder(), tokens=room + 1)


def test_prompts_are_not_prompted_again() -> None:
    merged = moved().merged()
    with pytest.raises(EncoderError, match=f"has {TOKENS} prompt tokens already"):
        PromptsPart(merged, tokens=1)
