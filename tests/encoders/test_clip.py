"""A model says what it is, comes back the same, and leaves as the Hugging Face folder everyone can load."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from encoders.clip import ARCHITECTURES, Architecture, ClipEncoder, build, load
from encoders.errors import EncoderError
from tests.encoders.micro import EMBEDDING, IMAGE_SIZE, TEXTS, micro_encoder, micro_tokenizer, random_images

MICRO = Architecture(
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    patch=16,
    text_width=16,
    text_layers=1,
    text_heads=2,
    embedding=8,
)
IMAGES = random_images(3, size=40)


def built(**changes: Any) -> ClipEncoder:
    settings = {"image_size": 32, "max_tokens": 12, "seed": 0, "inverse_temperature": 14.0} | changes
    return build("micro", **settings)


def same_embeddings(first: ClipEncoder, second: ClipEncoder) -> bool:
    return bool(
        np.array_equal(first.image_embeddings(IMAGES), second.image_embeddings(IMAGES))
        and np.array_equal(first.text_embeddings(TEXTS), second.text_embeddings(TEXTS))
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "micro", MICRO)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    micro_encoder().export(tmp_path)
    return tmp_path


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """What someone saved with transformers alone: 48 pixels, ImageNet's means, half precision."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer(
        vocab=micro_tokenizer().describe()["vocabulary"], merges=[], model_max_length=20
    )
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 20,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={**tower, "image_size": 48, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(tmp_path)
    return tmp_path


def hugging_face_outputs(folder: Path) -> tuple[torch.Tensor, NDArray[Any], NDArray[Any]]:
    """Pixel values, image and text embeddings as transformers alone makes them."""
    model = CLIPModel.from_pretrained(folder).float().eval()
    processor = CLIPProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image).convert("RGB") for image in IMAGES]
    inputs = processor(text=list(TEXTS), images=pictures, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return inputs["pixel_values"], outputs.image_embeds.numpy(), outputs.text_embeds.numpy()


def test_a_described_model_embeds_identically() -> None:
    encoder = micro_encoder()
    description = json.loads(json.dumps(encoder.describe()))
    assert same_embeddings(encoder, ClipEncoder.parse(description, encoder.weights()))


def test_centred_texts_have_features_around_zero_and_embeddings_farther_apart() -> None:
    encoder = built(seed=3)
    before = encoder.text_embeddings(TEXTS)
    images = encoder.image_embeddings(IMAGES)
    encoder.centre_texts(TEXTS)
    features = encoder.text_features(TEXTS)
    assert features.mean(0).numpy() == pytest.approx(0, abs=1e-5)
    after = encoder.text_embeddings(TEXTS)
    assert np.linalg.norm(after.mean(0)) < 0.5 * np.linalg.norm(before.mean(0))
    assert np.array_equal(encoder.image_embeddings(IMAGES), images)


def test_centred_texts_are_a_plain_models(tmp_path: Path) -> None:
    encoder = built()
    encoder.centre_texts(["a large heart", "clear lungs"])
    encoder.export(tmp_path)
    _, _, texts = hugging_face_outputs(tmp_path)
    assert texts == pytest.approx(encoder.text_embeddings(TEXTS), abs=1e-5)
    assert same_embeddings(encoder, ClipEncoder.parse(encoder.describe(), encoder.weights()))


def test_weights_are_a_copy() -> None:
    encoder = micro_encoder()
    before = encoder.image_embeddings(IMAGES)
    for value in encoder.weights().values():
        value[...] = 0
    assert np.array_equal(encoder.image_embeddings(IMAGES), before)


def test_embeddings_are_unit_vectors_that_tell_inputs_apart() -> None:
    encoder = micro_encoder()
    for rows in (encoder.image_embeddings(IMAGES), encoder.text_embeddings(TEXTS)):
        assert rows.dtype == np.float32
        assert rows.shape == (len(rows), EMBEDDING)
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)
        assert len(np.unique(rows.round(4), axis=0)) == len(rows)


def test_a_row_is_embedded_alike_in_any_company() -> None:
    encoder = micro_encoder()
    together = encoder.image_embeddings(random_images(130))
    alone = encoder.image_embeddings(random_images(130)[129:])
    assert together[129:] == pytest.approx(alone, abs=1e-6)


def test_an_exported_model_is_what_transformers_loads(folder: Path) -> None:
    encoder = micro_encoder()
    pixels, images, texts = hugging_face_outputs(folder)
    ours = encoder.preprocessing.normalise(torch.from_numpy(encoder.preprocessing.resize(IMAGES)))
    torch.testing.assert_close(pixels, ours, rtol=1e-5, atol=1e-5)
    assert images == pytest.approx(encoder.image_embeddings(IMAGES), abs=1e-5)
    assert texts == pytest.approx(encoder.text_embeddings(TEXTS), abs=1e-5)


def test_an_exported_model_comes_back_and_names_its_tokenizer_and_preprocessing(folder: Path) -> None:
    encoder, again = micro_encoder(), load(folder)
    assert same_embeddings(encoder, again)
    identity = json.loads((folder / "clipward.json").read_text())
    assert identity == {
        "version": 1,
        "tokenizer": encoder.tokenizer.digest,
        "preprocessing": encoder.preprocessing.digest,
        "prompt_tokens": 0,
    }
    assert (again.tokenizer.digest, again.preprocessing.digest) == (
        identity["tokenizer"],
        identity["preprocessing"],
    )


def test_a_folder_saved_by_transformers_alone_is_loaded_with_its_own_settings(plain_folder: Path) -> None:
    encoder = load(plain_folder)
    assert encoder.preprocessing.image_size == 48
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)
    assert encoder.preprocessing.std == (0.229, 0.224, 0.225)
    assert encoder.tokenizer.max_tokens == 20
    assert {value.dtype for value in encoder.model.parameters()} == {torch.float32}
    _, images, texts = hugging_face_outputs(plain_folder)
    assert encoder.image_embeddings(IMAGES) == pytest.approx(images, abs=1e-5)
    assert encoder.text_embeddings(TEXTS) == pytest.approx(texts, abs=1e-5)


def test_a_half_precision_folder_is_described_and_parsed_in_full_precision(plain_folder: Path) -> None:
    encoder = load(plain_folder)
    description = encoder.describe()
    description["config"]["dtype"] = "float16"  # nor can a coordinator ask for it
    again = ClipEncoder.parse(description, encoder.weights())
    assert {value.dtype for value in again.model.parameters()} == {torch.float32}
    assert same_embeddings(encoder, again)


def test_building_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = built()
    assert torch.equal(torch.rand(2), expected)
    assert same_embeddings(first, built())
    assert not same_embeddings(first, built(seed=1))


def test_the_shipped_end_token_is_where_the_text_tower_pools() -> None:
    encoder = built()
    text = encoder.model.config.text_config
    assert text.eos_token_id == encoder.tokenizer.eos_token_id
    assert text.eos_token_id != 2  # transformers would pool the token of the highest id instead
    rows = encoder.text_embeddings(["effusion", "effusion today", "large heart"])
    assert len(np.unique(rows, axis=0)) == 3


@pytest.mark.parametrize("inverse_temperature", [1.0, 14.3, 100.0])
def test_the_temperature_is_written_into_the_model(inverse_temperature: float) -> None:
    encoder = built(inverse_temperature=inverse_temperature)
    assert float(encoder.model.logit_scale.detach().exp()) == pytest.approx(inverse_temperature, rel=1e-5)


def test_a_folder_is_built_with_its_own_sizes(folder: Path) -> None:
    encoder = build(str(folder), image_size=224, max_tokens=77, seed=3, inverse_temperature=10.0)
    assert encoder.preprocessing.image_size == IMAGE_SIZE
    assert same_embeddings(encoder, micro_encoder())


def test_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(
        EncoderError, match=r"no encoder 'vit-b-61': use tiny, thumbnail, vit-b-16, .* or a Hugging Face"
    ):
        build("vit-b-61", image_size=32, max_tokens=12, seed=0, inverse_temperature=10.0)


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(EncoderError, match="image_size=40 to be a multiple of the patch size 16"):
        built(image_size=40)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(EncoderError, match="holds a 'bert' model; only 'clip' can be loaded"):
        load(folder)


def test_a_folder_without_preprocessing_is_refused(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"has no preprocessor_config\.json"):
        load(folder)


def test_weights_missing_from_a_folder_are_never_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 weights of its model, first text_projection\.weight"):
        load(folder)


def test_an_end_token_the_text_tower_would_not_find_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], "eos_token_id": 49407})
    with pytest.raises(EncoderError, match="at token 49407, and the tokenizer ends texts with 1;"):
        load(folder)


def test_a_preprocessor_of_another_size_than_the_model_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["crop_size"] = {"height": 64, "width": 64}
    edit(folder / "processor_config.json", **settings)
    with pytest.raises(EncoderError, match="takes images of 32 pixels, its preprocessor makes 64"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    built().tokenizer.hugging_face.save_pretrained(other)
    shutil.copytree(other, folder, dirs_exist_ok=True)
    with pytest.raises(EncoderError, match=r"the tokenizer has 8192 tokens, the model \d+"):
        load(folder)


def test_weights_of_another_architecture_are_refused() -> None:
    encoder = micro_encoder()
    weights = encoder.weights()
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:-1]
    with pytest.raises(EncoderError, match=r"do not fit .*: 2 differences, first \('visual_projection"):
        ClipEncoder.parse(encoder.describe(), weights)
    del weights["visual_projection.weight"]
    with pytest.raises(EncoderError, match="1 differences"):
        ClipEncoder.parse(encoder.describe(), weights)


@pytest.mark.parametrize("version", [None, 0, 2])
def test_another_version_of_the_description_is_refused(version: int | None) -> None:
    encoder = micro_encoder()
    with pytest.raises(EncoderError, match=f"expected model description version 1, got {version}"):
        ClipEncoder.parse({**encoder.describe(), "version": version}, encoder.weights())


def test_another_width_leaves_the_towers_and_draws_the_projections_anew() -> None:
    encoder = micro_encoder()
    assert encoder.of_width(encoder.width, seed=1) is encoder
    wider = encoder.of_width(24, seed=1)
    again = ClipEncoder.parse(wider.describe(), wider.weights())
    before, after = encoder.weights(), wider.weights()
    assert wider.image_embeddings(random_images(2)).shape == (2, 24)
    assert np.array_equal(wider.text_embeddings(["a"]), again.text_embeddings(["a"]))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        "visual_projection.weight",
        "text_projection.weight",
    }
    assert np.array_equal(
        after["visual_projection.weight"], encoder.of_width(24, seed=1).weights()["visual_projection.weight"]
    )
