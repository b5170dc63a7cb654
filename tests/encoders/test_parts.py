"""Each part trains what it says, travels by stable names, and embeds exactly as the model it belongs to."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import encoders.parts
import strategies.share
from encoders.clip import ClipEncoder, load
from encoders.errors import EncoderError
from encoders.parts import IMAGE_SHIFT, PartEmbedder, TrainablePart, trainable_part
from tests.encoders.micro import TEXTS, micro_encoder, random_images

Kind = Literal["full", "image-tower", "lora", "heads", "image-head"]
KINDS: tuple[Kind, ...] = (
    "full",
    "image-tower",
    "lora",
    "heads",
    "image-head",
)  # those that start as their model
HEADS = {"visual_projection.weight", "text_projection.weight"}
IMAGES = random_images(len(TEXTS), size=40)


def part_of(kind: Kind) -> TrainablePart:
    return trainable_part(micro_encoder(), kind, lora_rank=2)


def moved(part: TrainablePart, *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (value + 0.1 * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in part.arrays().items()
    }


def embedded(part: TrainablePart, *, trimmed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    images, texts = part.inputs(IMAGES, TEXTS)
    with torch.no_grad():
        both = part.module(images, part.trimmed(texts) if trimmed else texts)
    return both[0].numpy(), both[1].numpy()


def assert_same(part: TrainablePart, encoder: ClipEncoder, *, within: float = 1e-6) -> None:
    images, texts = embedded(part)
    assert images == pytest.approx(encoder.image_embeddings(IMAGES), abs=within)
    assert texts == pytest.approx(encoder.text_embeddings(TEXTS), abs=within)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_travel_and_come_back(kind: Kind) -> None:
    sender, receiver = part_of(kind), part_of(kind)
    arrays = moved(sender)
    receiver.load(arrays)
    assert list(receiver.arrays()) == list(sender.arrays())
    for name, value in receiver.arrays().items():
        assert value.dtype == np.float32
        assert np.array_equal(value, arrays[name])
    sender.load(arrays)
    for ours, theirs in zip(embedded(sender), embedded(receiver), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_a_copy(kind: Kind) -> None:
    part = part_of(kind)
    before = embedded(part)[0]
    for value in part.arrays().values():
        value[...] = 0
    assert np.array_equal(embedded(part)[0], before)


def test_the_full_part_is_every_weight_but_the_temperature() -> None:
    part = part_of("full")
    assert set(part.arrays()) == set(part.encoder.weights()) - {"logit_scale"}


def test_the_image_tower_is_every_weight_that_an_image_meets() -> None:
    part = part_of("image-tower")
    text_side = {name for name in part.encoder.weights() if name.startswith(("text_model.", "text_proj"))}
    assert set(part.arrays()) == set(part.encoder.weights()) - text_side - {"logit_scale"}
    assert "visual_projection.weight" in part.arrays()


def test_texts_beside_an_image_tower_are_embedded_once_and_stay_where_they_are() -> None:
    part = part_of("image-tower")
    texts = embedded(part)[1]
    part.load(moved(part))
    assert np.array_equal(embedded(part)[1], texts)
    assert np.array_equal(part.inputs(IMAGES, TEXTS)[1].numpy(), texts)


def test_an_exported_image_tower_embeds_like_the_part_with_centred_texts_too(tmp_path: Path) -> None:
    encoder = micro_encoder()
    encoder.centre_texts(TEXTS)
    part = trainable_part(encoder, "image-tower")
    part.load(moved(part))
    part.merged().export(tmp_path / "model")
    assert_same(part, load(tmp_path / "model"), within=1e-5)


def test_the_heads_are_the_two_projections() -> None:
    assert set(part_of("heads").arrays()) == HEADS


def test_the_image_head_is_the_image_projection_and_a_shift_that_does_not_train() -> None:
    part = part_of("image-head")
    assert set(part.arrays()) == {"visual_projection.weight", IMAGE_SHIFT}
    assert set(part.parameters()) == {"visual_projection.weight"}
    assert not part.arrays()[IMAGE_SHIFT].any()
    with pytest.raises(EncoderError, match="'image_shift' is no parameter of this part"):
        part.train_only([IMAGE_SHIFT])
    assert encoders.parts.IMAGE_SHIFT == strategies.share.IMAGE_SHIFT  # one name on both sides of the wall


def test_a_centred_image_head_embeds_what_is_left_of_the_features() -> None:
    part = part_of("image-head")
    features = part.encoder.image_features(IMAGES)
    part.load({**part.arrays(), IMAGE_SHIFT: features.mean(0).numpy()})
    left = (features - features.mean(0)) @ part.encoder.model.visual_projection.weight.T
    assert embedded(part)[0] == pytest.approx(F.normalize(left, dim=-1).detach().numpy(), abs=1e-5)


def test_an_exported_image_head_embeds_like_the_part_and_is_a_plain_model(tmp_path: Path) -> None:
    part = part_of("image-head")
    part.load(moved(part))
    part.merged().export(tmp_path / "model")
    assert_same(part, load(tmp_path / "model"), within=1e-5)
    assert set(part.merged().weights()) == set(micro_encoder().weights())


def test_the_lora_part_is_two_factors_per_query_and_value_and_the_heads() -> None:
    layers = [f"{tower}_model.encoder.layers.0.self_attn" for tower in ("vision", "text")]
    factors = {
        f"{layer}.{target}.lora_{factor}.default.weight"
        for layer in layers
        for target in ("q_proj", "v_proj")
        for factor in "AB"
    }
    assert set(part_of("lora").arrays()) == factors | HEADS


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_is_never_trained(kind: Kind) -> None:
    part = part_of(kind)
    assert not part.encoder.model.logit_scale.requires_grad
    assert not any("logit_scale" in name for name in part.parameters())
    before = float(part.encoder.model.logit_scale)
    part.load(moved(part))
    assert float(part.merged().model.logit_scale.detach()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_the_part_stays_as_it_was(kind: Kind) -> None:
    part = part_of(kind)
    before = part.encoder.weights()
    part.load(moved(part))
    after, own = part.encoder.weights(), set(part.parameters())
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == own


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_starts_as_its_model(kind: Kind) -> None:
    part = part_of(kind)
    assert_same(part, micro_encoder())
    assert_same(part, part.merged())


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_moved_is_its_merged_model_and_no_longer_the_first(kind: Kind) -> None:
    part = part_of(kind)
    part.load(moved(part))
    merged = part.merged()
    assert_same(part, merged, within=1e-5)
    assert np.abs(merged.image_embeddings(IMAGES) - micro_encoder().image_embeddings(IMAGES)).max() > 1e-2
    again = ClipEncoder.parse(merged.describe(), merged.weights())
    assert np.array_equal(again.text_embeddings(TEXTS), merged.text_embeddings(TEXTS))


def test_merged_lora_weights_have_the_names_and_the_rank_of_plain_weights() -> None:
    part = part_of("lora")
    part.load(moved(part))
    before, after = micro_encoder().weights(), part.merged().weights()
    assert set(after) == set(before)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    targets = {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert changed == targets | HEADS
    assert {int(np.linalg.matrix_rank(after[name] - before[name], tol=1e-4)) for name in targets} == {2}


def test_lora_leaves_the_given_model_alone_and_starts_alike_everywhere() -> None:
    encoder = micro_encoder()
    names = set(encoder.weights())
    torch.manual_seed(1)
    first = trainable_part(encoder, "lora", lora_rank=2)
    torch.manual_seed(2)
    second = trainable_part(encoder, "lora", lora_rank=2)
    assert set(encoder.weights()) == names
    for name, value in first.arrays().items():
        assert np.array_equal(value, second.arrays()[name])


def test_the_heads_features_are_made_once_and_hold_for_any_heads() -> None:
    part = part_of("heads")
    images, texts = part.inputs(IMAGES, TEXTS)
    part.load(moved(part))
    full = part.merged()
    with torch.no_grad():
        ours = part.module(images, texts)
    assert ours[0].numpy() == pytest.approx(full.image_embeddings(IMAGES), abs=1e-6)
    assert ours[1].numpy() == pytest.approx(full.text_embeddings(TEXTS), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text("abc <|>endoftx肺", max_size=30), min_size=1, max_size=4))
def test_trimming_changes_no_embedding(kind: Kind, texts: list[str]) -> None:
    part = CACHED[kind]
    long = "a long text that fills the row with more than enough words to be cut"
    _, inputs = part.inputs(IMAGES[:1], [long, *texts])
    rest = inputs[1:]
    shorter = part.trimmed(rest)
    with torch.no_grad():
        torch.testing.assert_close(
            part.module.embed_texts(shorter), part.module.embed_texts(rest), rtol=1e-5, atol=1e-6
        )


def test_trimming_cuts_padding_from_batches_of_any_shape() -> None:
    part = CACHED["full"]
    _, ids = part.inputs(IMAGES[:4], ["", "clear lungs", TEXTS[4], "large heart"])
    short = ids[[0, 1, 3, 3]].view(2, 2, -1)
    trimmed = part.trimmed(short)
    assert trimmed.shape[:2] == (2, 2)
    assert trimmed.shape[-1] < short.shape[-1]
    assert torch.equal(part.trimmed(ids), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_see_the_other_rows(kind: Kind) -> None:
    part = CACHED[kind]
    images, texts = part.inputs(IMAGES, TEXTS)
    with torch.no_grad():
        together = part.module(images, texts)
        changed = part.module(images[[0, 2, 2, 2]], texts[[0, 3, 3, 3]])
    for ours, other in zip(together, changed, strict=True):
        torch.testing.assert_close(ours[0], other[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_other_arrays_than_the_parts_are_refused(kind: Kind) -> None:
    part = part_of(kind)
    arrays = part.arrays()
    name = next(iter(arrays))
    for wrong in (
        {},
        {**arrays, "logit_scale": np.zeros((), dtype=np.float32)},
        {**arrays, name: arrays[name][..., :1]},
    ):
        with pytest.raises(EncoderError, match=rf"expected the {len(arrays)} arrays of this part"):
            part.load(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedder_follows_the_parts_weights(kind: Kind) -> None:
    part = part_of(kind)
    embedder = PartEmbedder(part, IMAGES)
    assert embedder.text_embeddings(TEXTS) == pytest.approx(embedded(part)[1], abs=1e-6)
    part.load(moved(part))
    merged = part.merged()
    assert embedder.image_embeddings(IMAGES) == pytest.approx(merged.image_embeddings(IMAGES), abs=1e-5)
    for texts in (TEXTS, TEXTS[:2], TEXTS):
        assert embedder.text_embeddings(texts) == pytest.approx(merged.text_embeddings(texts), abs=1e-5)


def test_the_embedder_refuses_images_it_was_not_made_for() -> None:
    embedder = PartEmbedder(part_of("heads"), IMAGES)
    with pytest.raises(EncoderError, match="made for one set of images, and these are others"):
        embedder.image_embeddings(IMAGES.copy())


CACHED = {kind: part_of(kind) for kind in KINDS}
