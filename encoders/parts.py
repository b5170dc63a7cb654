"""Which weights are trained and travel: all, the image tower's, LoRA factors, projection heads, or prompts.

A `TrainablePart` is the model seen by a training step: a module whose trainable parameters are the part,
the inputs it wants for each image-text pair, and the part's arrays by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from encoders.clip import EMBED_ROWS, ClipEncoder, image_features, text_features
from encoders.errors import EncoderError
from encoders.preprocessing import Preprocessing

LORA_TARGETS = ["q_proj", "v_proj"]
PartName = Literal["full", "image-tower", "lora", "heads", "image-head", "prompts"]
PARTS: tuple[PartName, ...] = get_args(PartName)
WORD_TABLE = "text_model.embeddings.token_embedding"
IMAGE_SHIFT = "image_shift"
IMAGE_BIAS = "vision_model.post_layernorm.bias"
PROMPT_STD = 0.02  # of initial prompt tokens, as in Zhou et al. (2022)
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


_IMAGE_SIDE = ("vision_model.", "visual_projection.")


def of_image_side(name: str) -> bool:
    """Whether a parameter of a part belongs to the images' tower or head; else it belongs to the texts'."""
    return name.startswith(_IMAGE_SIDE)


class Module(nn.Module, ABC):
    """Inputs of a part to unit embeddings; row i of an output depends on row i of the input alone."""

    @abstractmethod
    def embed_images(self, inputs: Tensor) -> Tensor:
        """Unit image embeddings (B, D)."""

    @abstractmethod
    def embed_texts(self, inputs: Tensor) -> Tensor:
        """Unit text embeddings (B, D)."""

    def forward(self, image_inputs: Tensor, text_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for pairs."""
        return self.embed_images(image_inputs), self.embed_texts(text_inputs)


class TrainablePart(ABC):
    """One way to train a CLIP model.

    Attributes:
        encoder: The model the part belongs to; `load` changes its weights in place.
        module: Embeds the part's inputs; its parameters with ``requires_grad`` are the part.
    """

    def __init__(self, encoder: ClipEncoder, module: Module) -> None:
        self.encoder = encoder
        self.module = module
        self._names = [name for name, value in module.named_parameters() if value.requires_grad]

    @abstractmethod
    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the module wants for packed images and their texts: two tensors of N rows."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The part's parameters by the name under which they travel."""
        named = dict(self.module.named_parameters())
        return {name.removeprefix("model."): named[name] for name in self._names}

    def constants(self) -> dict[str, Tensor]:
        """Arrays that travel to the sites with the part's parameters, and that no training changes."""
        return {}

    def train_only(self, names: Collection[str]) -> None:
        """From now on only these of `parameters` require a gradient.

        Raises:
            EncoderError: a name is no parameter of the part.
        """
        own = self.parameters()
        if unknown := sorted(set(names) - set(own)):
            raise EncoderError(f"{unknown[0]!r} is no parameter of this part")
        for name, value in own.items():
            value.requires_grad_(name in names)
            value.grad = None

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The part's weights and constants, float32; a copy."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._travelling().items()}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put ``arrays`` in place of the part's weights and constants.

        Raises:
            EncoderError: other names or shapes than the part's.
        """
        own = self._travelling()
        if {name: tuple(value.shape) for name, value in own.items()} != {
            name: value.shape for name, value in arrays.items()
        }:
            raise EncoderError(f"expected the {len(own)} arrays of this part, got {len(arrays)} others")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.tensor(np.asarray(arrays[name])))

    def _travelling(self) -> dict[str, Tensor]:
        return {**self.parameters(), **self.constants()}

    def trimmed(self, text_inputs: Tensor) -> Tensor:
        """The same text inputs without padding that no row of them needs; the outputs stay the same."""
        return text_inputs

    def merged(self) -> ClipEncoder:
        """The encoder with the part's weights inside, ready to embed and to export."""
        return self.encoder


class _Towers(Module):
    """Both towers from resized images, uint8 (B, H, H) or (B, H, H, 3), and token ids (B, L)."""

    def __init__(self, model: CLIPModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self._preprocessing = preprocessing

    def embed_images(self, inputs: Tensor) -> Tensor:
        pooled = image_features(self.model, self._preprocessing, inputs)
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_texts(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.model.text_projection(text_features(self.model, inputs)), dim=-1)


class _ImageTower(_Towers):
    """The image tower from resized images (B, H, H) uint8; texts are unit embeddings (B, D) already."""

    def embed_texts(self, inputs: Tensor) -> Tensor:
        return inputs


class _Heads(Module):
    """The two projections, on pooled features of frozen towers."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.visual_projection = model.visual_projection
        self.text_projection = model.text_projection

    def embed_images(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(inputs), dim=-1)

    def embed_texts(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.text_projection(inputs), dim=-1)


class _ImageHead(Module):
    """The image projection on shifted features of a frozen tower; texts are embeddings (B, D) already."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.visual_projection = model.visual_projection
        self.register_buffer(IMAGE_SHIFT, torch.zeros_like(self.visual_projection.weight[0]))

    def embed_images(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(inputs - self.get_buffer(IMAGE_SHIFT)), dim=-1)

    def embed_texts(self, inputs: Tensor) -> Tensor:
        return inputs


class FullPart(TrainablePart):
    """Every weight but the logit scale, which is public and fixed."""

    def __init__(self, encoder: ClipEncoder) -> None:
        for name, value in encoder.model.named_parameters():
            value.requires_grad_(self._trains(name))
        super().__init__(encoder, self._module(encoder))

    @staticmethod
    def _trains(name: str) -> bool:
        return name != "logit_scale"

    @staticmethod
    def _module(encoder: ClipEncoder) -> Module:
        return _Towers(encoder.model, encoder.preprocessing)

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Resized images, uint8 (N, H, H) or (N, H, H, 3), and token ids, int64 (N, L)."""
        resized = torch.from_numpy(self.encoder.preprocessing.resize(images))
        return resized.to(self.encoder.device), self.encoder.tokenizer(texts).to(self.encoder.device)

    def trimmed(self, text_inputs: Tensor) -> Tensor:
        """Token ids (…, L) cut behind the longest text's first end token."""
        return _trimmed(text_inputs, self.encoder)


class ImageTowerPart(FullPart):
    """The image tower and its projection. The text side is frozen, so texts are embedded once per run.

    Fixed text embeddings are the same question at every site, and a step costs the image tower alone.

    Source:
        A locked text tower, Zhai et al. (2022), arXiv:2111.07991 (LiT), with the towers' roles exchanged.
    """

    @staticmethod
    def _trains(name: str) -> bool:
        return name.startswith(("vision_model.", "visual_projection."))

    @staticmethod
    def _module(encoder: ClipEncoder) -> Module:
        return _ImageTower(encoder.model, encoder.preprocessing)

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Resized images, uint8 (N, H, H) or (N, H, H, 3), and unit text embeddings, float32 (N, D)."""
        resized = torch.from_numpy(self.encoder.preprocessing.resize(images))
        embedded = torch.from_numpy(self.encoder.text_embeddings(texts))
        return resized.to(self.encoder.device), embedded.to(self.encoder.device)

    def trimmed(self, text_inputs: Tensor) -> Tensor:
        """Embeddings have no padding."""
        return text_inputs


class HeadsPart(TrainablePart):
    """The two projections. The towers are frozen, so their outputs are computed once per run."""

    def __init__(self, encoder: ClipEncoder) -> None:
        encoder.model.requires_grad_(False)
        module = _Heads(encoder.model)
        module.requires_grad_(True)
        super().__init__(encoder, module)

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pooled features of the frozen towers, float32 (N, D_v) and (N, D_t)."""
        return self.encoder.image_features(images), self.encoder.text_features(texts)


class ImageHeadPart(TrainablePart):
    """The image projection alone, on features less a shift that is the same for all images.

    The features of an untrained tower are one long vector and a little beside it (of lengths 15.8 and 2.4 on
    the images of VQA-Med): clipped gradients are spent on what they share, unless it is taken away. Both
    towers and the text projection are frozen, so features and text embeddings are computed once per run.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        encoder.model.requires_grad_(False)
        module = _ImageHead(encoder.model)
        module.requires_grad_(True)
        super().__init__(encoder, module)

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pooled features of the frozen image tower (N, D_v), unshifted, and unit text embeddings (N, D)."""
        embedded = torch.from_numpy(self.encoder.text_embeddings(texts))
        return self.encoder.image_features(images), embedded.to(self.encoder.device)

    def constants(self) -> dict[str, Tensor]:
        """The shift, shape (D_v,): zero until it is loaded."""
        return {IMAGE_SHIFT: self.module.get_buffer(IMAGE_SHIFT)}

    def merged(self) -> ClipEncoder:
        """A plain CLIP model whose last norm of the image tower subtracts the shift."""
        weights = self.encoder.weights()
        weights[IMAGE_BIAS] = weights[IMAGE_BIAS] - self.arrays()[IMAGE_SHIFT]
        return ClipEncoder.parse(self.encoder.describe(), weights)


class LoraPart(FullPart):
    """LoRA factors on the attention's queries and values, and the two projections.

    Source:
        Hu et al. (2022), arXiv:2106.09685, section 4.2.
    """

    def __init__(self, encoder: ClipEncoder, *, rank: int) -> None:
        copy = ClipEncoder.parse(encoder.describe(), encoder.weights())
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the first factor's start is public, the same at every site
            inject_adapter_in_model(config, copy.model)
        copy.model.to(encoder.device)
        super().__init__(copy)

    @staticmethod
    def _trains(name: str) -> bool:
        return "lora_" in name or name in PROJECTIONS

    def merged(self) -> ClipEncoder:
        """A plain CLIP model with W + scale * B A in place of each adapted W."""
        weights: dict[str, NDArray[Any]] = {}
        for name, value in self.encoder.weights().items():
            if "lora_" not in name:
                weights[name.replace(".base_layer", "")] = value
        for name, layer in self.encoder.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.get_delta_weight("default").detach().cpu().numpy()
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
        return ClipEncoder.parse(self.encoder.describe(), weights)


class _PromptedEmbedding(nn.Module):
    """A frozen table of tokens, and the learned ones from the id ``first`` on."""

    def __init__(self, table: nn.Embedding, prompts: nn.Embedding, *, first: int) -> None:
        super().__init__()
        self.table, self.prompts, self._first = table, prompts, first

    def forward(self, ids: Tensor) -> Tensor:
        learned = self.prompts((ids - self._first).clamp(min=0))
        plain = self.table(ids.clamp(max=self._first - 1))
        return torch.where((ids >= self._first).unsqueeze(-1), learned, plain)


class _Prompts(Module):
    """Image embeddings (B, D) that are computed already, and token ids (B, L) with prompts among them."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.text_model = model.text_model
        self.text_projection = model.text_projection

    def embed_images(self, inputs: Tensor) -> Tensor:
        return inputs

    def embed_texts(self, inputs: Tensor) -> Tensor:
        pooled = self.text_model(input_ids=inputs).pooler_output
        return F.normalize(self.text_projection(pooled), dim=-1)


class PromptsPart(TrainablePart):
    """Learned tokens behind the start of every text; both towers are frozen, so images are embedded once.

    Source:
        Context vectors of CoOp, Zhou et al. (2022), arXiv:2109.01134, section 3.2, shared by all texts.
    """

    def __init__(self, encoder: ClipEncoder, *, tokens: int) -> None:
        self._plain = encoder
        copy = ClipEncoder.parse(encoder.describe(), encoder.weights())
        tokenizer = copy.tokenizer.prompted(tokens)
        text = copy.model.text_model
        text.eos_token_id = tokenizer.eos_token_id  # the id 2 of old files means "the highest", now a prompt
        table = text.embeddings.token_embedding
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the prompts' start is public, the same at every site
            prompts = nn.Embedding(tokens, table.embedding_dim)
            nn.init.normal_(prompts.weight, std=PROMPT_STD)
        copy.model.requires_grad_(False)
        self._first = tokenizer.vocabulary_size - tokens
        text.embeddings.token_embedding = _PromptedEmbedding(table, prompts, first=self._first)
        copy.model.to(encoder.device)
        prompted = ClipEncoder(model=copy.model, tokenizer=tokenizer, preprocessing=copy.preprocessing)
        super().__init__(prompted, _Prompts(copy.model))

    def inputs(self, images: NDArray[np.uint8], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the frozen image tower, float32 (N, D), and token ids, int64 (N, L)."""
        embedded = torch.from_numpy(self._plain.image_embeddings(images))
        return embedded.to(self.encoder.device), self.encoder.tokenizer(texts).to(self.encoder.device)

    def trimmed(self, text_inputs: Tensor) -> Tensor:
        """Token ids (…, L) cut behind the longest text's first end token."""
        return _trimmed(text_inputs, self.encoder)

    def merged(self) -> ClipEncoder:
        """A plain CLIP model with the prompts in its vocabulary, which its tokenizer puts into texts."""
        weights, table = self._plain.weights(), f"{WORD_TABLE}.weight"
        (prompts,) = self.arrays().values()
        weights[table] = np.concatenate([weights[table][: self._first], prompts])
        description, tokenizer = self._plain.describe(), self.encoder.tokenizer
        text = {
            **description["config"]["text_config"],
            "vocab_size": tokenizer.vocabulary_size,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = {**description["config"], "text_config": text}
        described = {**description, "config": config, "tokenizer": tokenizer.describe()}
        return ClipEncoder.parse(described, weights)


def _trimmed(ids: Tensor, encoder: ClipEncoder) -> Tensor:
    lengths = (ids != encoder.tokenizer.eos_token_id).sum(-1)
    return ids[..., : int(lengths.max()) + 1]


def trainable_part(
    encoder: ClipEncoder, part: PartName, *, lora_rank: int = 4, prompt_tokens: int = 16
) -> TrainablePart:
    """The part of ``encoder`` that a federation trains.

    Raises:
        EncoderError: the model's texts are too short for so many prompt tokens.
    """
    match part:
        case "full":
            return FullPart(encoder)
        case "image-tower":
            return ImageTowerPart(encoder)
        case "heads":
            return HeadsPart(encoder)
        case "image-head":
            return ImageHeadPart(encoder)
        case "lora":
            return LoraPart(encoder, rank=lora_rank)
        case "prompts":
            return PromptsPart(encoder, tokens=prompt_tokens)


class PartEmbedder:
    """Embeds one fixed set of images, and any texts, with the part's current weights.

    The part's inputs are computed once, so measuring the same data every round costs little where the towers
    are frozen.
    """

    def __init__(self, part: TrainablePart, images: NDArray[np.uint8]) -> None:
        self._part = part
        self._images = images
        self._image_inputs, _ = part.inputs(images, [""])
        self._text_inputs: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def image_embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D), of the images given at the start.

        Raises:
            EncoderError: these are other images.
        """
        if images is not self._images:
            raise EncoderError("this embedder was made for one set of images, and these are others")
        rows = [self._part.module.embed_images(part) for part in torch.split(self._image_inputs, EMBED_ROWS)]
        return torch.cat(rows).cpu().numpy()

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D)."""
        key = tuple(texts)
        if key not in self._text_inputs:
            _, self._text_inputs[key] = self._part.inputs(self._images[:1], texts)
        rows = torch.split(self._text_inputs[key], EMBED_ROWS)
        return torch.cat([self._part.module.embed_texts(part) for part in rows]).cpu().numpy()
