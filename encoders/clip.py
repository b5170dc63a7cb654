"""One CLIP model with its tokenizer and preprocessing: built, loaded, described, exported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from encoders.errors import EncoderError
from encoders.preprocessing import Preprocessing
from encoders.tokenizer import TextTokenizer, entries_of

DESCRIPTION_VERSION = 1
EMBED_ROWS = 128
IDENTITY_FILE = "clipward.json"


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """A CLIP model that says what it is.

    Guarantees:
        ``ClipEncoder.parse(e.describe(), e.weights())`` embeds images and texts exactly as ``e``.

    Attributes:
        model: The two towers and their projections.
        tokenizer: Text to token ids.
        preprocessing: Packed images to pixel values.
    """

    model: CLIPModel
    tokenizer: TextTokenizer
    preprocessing: Preprocessing

    @classmethod
    def parse(cls, description: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> Self:
        """The encoder that `describe` and `weights` described.

        Raises:
            EncoderError: another version, or weights that do not fit the architecture.
        """
        if description.get("version") != DESCRIPTION_VERSION:
            found = description.get("version")
            raise EncoderError(f"expected model description version {DESCRIPTION_VERSION}, got {found!r}")
        model = _untrained(CLIPConfig(**description["config"]), seed=0)
        _load(model, weights)
        return cls(
            model=model,
            tokenizer=TextTokenizer.parse(description["tokenizer"]),
            preprocessing=Preprocessing.parse(description["preprocessing"]),
        )

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return int(self.model.config.projection_dim)

    @property
    def inverse_temperature(self) -> float:
        """The fixed s of its logits."""
        return float(self.model.logit_scale.detach().exp())

    def of_width(self, width: int, *, seed: int) -> Self:
        """The encoder with embeddings of ``width`` numbers: itself, or one whose projections begin anew.

        Args:
            width: D.
            seed: Of new projections.
        """
        if width == self.width:
            return self
        description = self.describe()
        config = description["config"] | {"projection_dim": width}
        towers = {name: config[name] | {"projection_dim": width} for name in ("text_config", "vision_config")}
        model = _untrained(CLIPConfig(**config | towers), seed=seed)
        kept = {name: value for name, value in self.weights().items() if "projection" not in name}
        fresh = {name: value.numpy() for name, value in model.state_dict().items() if name not in kept}
        _load(model, {**kept, **fresh})
        return replace(self, model=model)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: architecture, tokenizer, preprocessing; no weights."""
        config = self.model.config.to_dict()
        return {
            "version": DESCRIPTION_VERSION,
            "config": {key: config[key] for key in ("text_config", "vision_config", "projection_dim")}
            | {"logit_scale_init_value": float(config["logit_scale_init_value"])},
            "tokenizer": self.tokenizer.describe(),
            "preprocessing": self.preprocessing.describe(),
        }

    def weights(self) -> dict[str, NDArray[Any]]:
        """Every weight by name, float32; a copy."""
        state = self.model.state_dict()
        return {name: value.detach().cpu().to(torch.float32).numpy().copy() for name, value in state.items()}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.model.parameters()).device)

    @torch.no_grad()
    def image_features(self, images: NDArray[np.uint8]) -> Tensor:
        """Pooled output of the image tower before its projection, float32 (N, D_v), of packed images."""
        resized = torch.from_numpy(self.preprocessing.resize(images))
        parts = torch.split(resized, EMBED_ROWS)
        return torch.cat(
            [image_features(self.model, self.preprocessing, part.to(self.device)) for part in parts]
        )

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Pooled output of the text tower before its projection, float32 (N, D_t)."""
        chunks = (texts[start : start + EMBED_ROWS] for start in range(0, len(texts), EMBED_ROWS))
        return torch.cat(
            [text_features(self.model, self.tokenizer(chunk).to(self.device)) for chunk in chunks]
        )

    @torch.no_grad()
    def image_embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D), of packed images, uint8 (N, S, S) or (N, S, S, 3)."""
        embedded = F.normalize(self.model.visual_projection(self.image_features(images)), dim=-1)
        return embedded.cpu().numpy()

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D), of texts."""
        embedded = F.normalize(self.model.text_projection(self.text_features(texts)), dim=-1)
        return embedded.cpu().numpy()

    @torch.no_grad()
    def centre_texts(self, texts: Sequence[str]) -> None:
        """Shift the text tower's features so that those of ``texts`` have mean zero; changes the weights.

        The shift is in the bias of the tower's last norm, so the model stays a plain CLIP model and is
        exported, sent and resumed as one.
        """
        self.model.text_model.final_layer_norm.bias -= self.text_features(texts).mean(0)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder that ``CLIPModel`` and ``CLIPProcessor`` load again.

        ``clipward.json`` beside it holds the identities of tokenizer and preprocessing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        CLIPProcessor(
            image_processor=self.preprocessing.processor(), tokenizer=self.tokenizer.processor()
        ).save_pretrained(folder)
        identity = {
            "version": DESCRIPTION_VERSION,
            "tokenizer": self.tokenizer.digest,
            "preprocessing": self.preprocessing.digest,
            "prompt_tokens": self.tokenizer.prompt_tokens,
        }
        (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")


def image_features(model: CLIPModel, preprocessing: Preprocessing, resized: Tensor) -> Tensor:
    """Image tower on resized uint8 images (B, H, H) or (B, H, H, 3): pooled output (B, D_v)."""
    pooled: Tensor = model.vision_model(pixel_values=preprocessing.normalise(resized)).pooler_output
    return pooled


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Text tower on token ids (B, L): pooled output (B, D_t).

    No attention mask: the tower is causal and pools the first end token, so padding after it is never seen.
    """
    pooled: Tensor = model.text_model(input_ids=ids).pooler_output
    return pooled


def build(
    encoder: str, *, image_size: int, max_tokens: int, seed: int, inverse_temperature: float
) -> ClipEncoder:
    """The encoder named in a federation file.

    Args:
        encoder: ``tiny`` (about 8 M parameters), ``thumbnail`` (for few images, of 16 pixels: an image tower
            of 0.6 M parameters, and texts embedded in 512 dimensions), ``vit-b-16``, or a local Hugging Face
            folder.
        image_size: Pixels of the square input; a folder knows its own.
        max_tokens: Longest text; a folder knows its own.
        seed: Initial weights; a folder brings its own.
        inverse_temperature: s = 1 / temperature, written into the model as its fixed logit scale.

    Raises:
        EncoderError: an unknown name, or a folder without a CLIP model.
    """
    if encoder in ARCHITECTURES:
        tokenizer = TextTokenizer.shipped(max_tokens=max_tokens)
        preprocessing = Preprocessing(image_size=image_size)
        config = _config(ARCHITECTURES[encoder], tokenizer, image_size=image_size)
        built = ClipEncoder(
            model=_untrained(config, seed=seed), tokenizer=tokenizer, preprocessing=preprocessing
        )
    else:
        built = load(Path(encoder))
    with torch.no_grad():
        built.model.logit_scale.fill_(float(np.log(inverse_temperature)))
    return built


def load(folder: Path) -> ClipEncoder:
    """A CLIP model from a local Hugging Face folder; nothing is fetched.

    Raises:
        EncoderError: no such folder, another kind of model in it, or parts that do not belong together.
    """
    if not (folder / "config.json").is_file():
        known = ", ".join(ARCHITECTURES)
        raise EncoderError(
            f"no encoder {str(folder)!r}: use {known}, or a Hugging Face folder with a config.json"
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise EncoderError(f"{folder} holds a {kind!r} model; only 'clip' can be loaded")
    model, loading = CLIPModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager", output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise EncoderError(f"{folder} lacks {len(missing)} weights of its model, first {missing[0]}")
    loaded = ClipEncoder(
        model=model.to(torch.float32).eval(),
        tokenizer=_saved_tokenizer(folder, max_tokens=model.config.text_config.max_position_embeddings),
        preprocessing=_saved_preprocessing(folder),
    )
    _check_parts_fit(loaded, folder)
    return loaded


def _saved_tokenizer(folder: Path, *, max_tokens: int) -> TextTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    identity = folder / IDENTITY_FILE
    prompts = json.loads(identity.read_text()).get("prompt_tokens", 0) if identity.is_file() else 0
    if prompts:  # an export of `export`, whose tokenizer class is a general one
        return TextTokenizer.parse(
            {**entries_of(tokenizer), "max_tokens": max_tokens, "prompt_tokens": prompts}
        )
    if not isinstance(tokenizer, CLIPTokenizer):
        raise EncoderError(f"{folder}: expected a CLIP tokenizer, got {type(tokenizer).__name__}")
    return TextTokenizer(tokenizer, max_tokens=max_tokens)


def _check_parts_fit(encoder: ClipEncoder, folder: Path) -> None:
    text, tokenizer = encoder.model.config.text_config, encoder.tokenizer
    if tokenizer.vocabulary_size > text.vocab_size:
        raise EncoderError(
            f"{folder}: the tokenizer has {tokenizer.vocabulary_size} tokens, the model {text.vocab_size}"
        )
    # Configurations older than transformers 4.31 say 2 and mean the token with the highest id.
    pooled = tokenizer.vocabulary_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != pooled:
        raise EncoderError(
            f"{folder}: the model reads the text's embedding at token {pooled}, and the tokenizer ends texts "
            f"with {tokenizer.eos_token_id}; correct eos_token_id in config.json"
        )
    expected, found = encoder.model.config.vision_config.image_size, encoder.preprocessing.image_size
    if expected != found:
        raise EncoderError(
            f"{folder}: the model takes images of {expected} pixels, its preprocessor makes {found}"
        )


def _saved_preprocessing(folder: Path) -> Preprocessing:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text())
            if key is None or key in settings:
                return Preprocessing.from_processor(settings[key] if key else settings)
    raise EncoderError(f"{folder} has no preprocessor_config.json; the model cannot be fed without it")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the two towers."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    text_width: int
    text_layers: int
    text_heads: int
    embedding: int


ARCHITECTURES = {
    "tiny": Architecture(
        vision_width=256, vision_layers=4, vision_heads=4, patch=32,
        text_width=256, text_layers=2, text_heads=4, embedding=128,
    ),
    "thumbnail": Architecture(
        vision_width=128, vision_layers=3, vision_heads=4, patch=4,
        text_width=512, text_layers=2, text_heads=4, embedding=512,
    ),
    # ViT-B/16 of Radford et al. (2021), table 20.
    "vit-b-16": Architecture(
        vision_width=768, vision_layers=12, vision_heads=12, patch=16,
        text_width=512, text_layers=12, text_heads=8, embedding=512,
    ),
}  # fmt: skip


def _config(sizes: Architecture, tokenizer: TextTokenizer, *, image_size: int) -> CLIPConfig:
    if image_size % sizes.patch:
        raise EncoderError(f"expected {image_size=} to be a multiple of the patch size {sizes.patch}")
    text = {
        "vocab_size": tokenizer.vocabulary_size,
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "max_position_embeddings": tokenizer.max_tokens,
        "bos_token_id": tokenizer.hugging_face.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "projection_dim": sizes.embedding,
    }
    vision = {
        "image_size": image_size,
        "patch_size": sizes.patch,
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "projection_dim": sizes.embedding,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embedding)


def _untrained(config: CLIPConfig, *, seed: int) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights only; noise never comes from torch's global generator
        model = CLIPModel._from_config(config, attn_implementation="eager")
    return model.to(torch.float32).eval()


def _load(model: CLIPModel, weights: Mapping[str, NDArray[Any]]) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))
        raise EncoderError(f"weights do not fit the architecture: {len(odd)} differences, first {odd[0]}")
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
