"""Book-keeping equals a loop over patients, operation by operation, or refuses by name."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from privacy.bookkeeping import BookKeepingEngine
from privacy.contributions import Dense, Outer, Rows, product, together
from privacy.engine import Batch, clip_factors
from privacy.errors import UnsoundTraining

WIDTH, TOKENS, VOCABULARY = 6, 4, 9
RATIOS = st.sampled_from([0.0, 0.99, 1.0, 1.001, 4.0])
Gradients = list[dict[str, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Wrapped(nn.Module):
    """A body as the module of an engine: its output for ``images``, each row as one vector, twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.body(images).flatten(1)
        return rows, rows


def losses(call: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """Something curved of every output; a patient's studies weighted and added up."""
    outputs, _ = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
    slopes = torch.linspace(-1, 2, outputs.shape[1], dtype=outputs.dtype)
    each = (outputs * slopes).sin().sum(1) + (outputs * slopes.flip(0)).square().mean(1)
    return (batch["weights"] * each.view_as(batch["weights"])).sum(1)


def seeded(module: nn.Module, *, spread: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(spread * torch.randn(value.shape, generator=generator))
    return module


def batch_of(
    *shape: int, patients: int, studies: int, seed: int = 0, vocabulary: int | None = None
) -> dict[str, Tensor]:
    """Random rows in float64, or ids below ``vocabulary``; no two patients weigh the same."""
    generator = torch.Generator().manual_seed(seed)
    size = (patients, studies, *shape)
    rows = torch.randn(size, generator=generator, dtype=torch.float64)
    if vocabulary is not None:
        rows = torch.randint(vocabulary, size, generator=generator)
    weights = torch.rand(patients, studies, generator=generator, dtype=torch.float64) + 0.5
    return {"images": rows, "texts": torch.zeros(patients, studies), "weights": weights}


def in_precision(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def loop(module: nn.Module, batch: Batch, loss: Any = losses) -> Gradients:
    """Each patient's gradient by an ordinary backward pass."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = []
    for patient in range(len(batch["weights"])):
        alone = {name: value[[patient]] for name, value in batch.items()}
        raw = torch.autograd.grad(
            loss(module, alone)[0], list(trained.values()), allow_unused=True, materialize_grads=True
        )
        found.append(dict(zip(trained, raw, strict=True)))
    return found


def norm(arrays: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in arrays.values()))


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return norm({name: value.double() - second[name].double() for name, value in first.items()})


def reference_sum(gradients: Gradients, bound: float) -> dict[str, Tensor]:
    factors = [min(1.0, bound / max(norm(gradient), 1e-300)) for gradient in gradients]
    return {
        name: sum((f * g[name].double() for f, g in zip(factors, gradients, strict=True)), torch.tensor(0.0))
        for name in gradients[0]
    }


def check(module: nn.Module, batch: Batch, *, loss: Any = losses, rel: float = 1e-9) -> None:
    """Norms and sums in float64, then in float32, with the bound among the norms."""
    module.to(torch.float64)
    gradients = loop(module, batch, loss)
    norms = [norm(gradient) for gradient in gradients]
    assert min(norms) > 1e-6
    bound = sorted(norms)[len(norms) // 2]
    expected = reference_sum(gradients, bound)
    engine = BookKeepingEngine(module, loss)
    assert engine.raw_norms(batch).tolist() == pytest.approx(norms, rel=rel)
    assert difference(engine.clipped_sum(batch, max_grad_norm=bound), expected) <= rel * len(norms) * bound
    single = BookKeepingEngine(module.to(torch.float32), loss)
    rounded = in_precision(batch, torch.float32)
    assert single.raw_norms(rounded).tolist() == pytest.approx(norms, rel=1e-4)
    assert difference(single.clipped_sum(rounded, max_grad_norm=bound), expected) <= 1e-4 * len(norms) * bound
    module.to(torch.float64)


# --- operations ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Any:
        return self.layer(self.layer(rows).tanh()) + self.layer(rows)


class Adapted(nn.Module):
    """A frozen matrix with a trained one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first, self.second = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, rows: Tensor) -> Any:
        return self.base(rows) + 2.0 * self.second(self.first(rows))


class BiasOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(TOKENS, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3))
        for name, value in self.named_parameters():
            value.requires_grad_(name.endswith("bias"))

    def forward(self, rows: Tensor) -> Any:
        return self.layers(rows).tanh()


class Direct(nn.Module):
    """Parameters met without a layer, as class tokens, positions and scales are."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(WIDTH))
        self.second = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, TOKENS + 2, WIDTH))
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.shift = nn.Parameter(torch.empty(TOKENS + 2, 1))
        self.gain = nn.Parameter(torch.empty(()))

    def forward(self, rows: Tensor) -> Any:
        tokens = self.token.expand(len(rows), 1, -1), self.second.repeat(len(rows), 1, 1)
        joined = torch.cat([*tokens, rows.to(self.token.dtype)], dim=1) + self.positions
        joined = self.scale * joined.tanh() - self.shift
        joined += self.positions
        return torch.mul(joined, self.gain) + self.scale.expand_as(joined)


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 2))

    def forward(self, rows: Tensor) -> Any:
        return self.layers(rows)


class Flattened(nn.Module):
    """Rows and tokens on one axis, rows first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, rows: Tensor) -> Any:
        return self.layer(rows.flatten(0, 1)).view(len(rows), -1)


class Pooling(nn.Module):
    """The attention pooling of SigLIP: a learned probe asks, the tokens answer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 2, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

    def forward(self, rows: Tensor) -> Any:
        probe = self.probe.repeat(len(rows), 1, 1)
        return self.attention(probe, rows, rows)[0]


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool, masked: bool, need_weights: bool = False) -> None:
        super().__init__()
        self.batch_first, self.masked, self.need_weights = batch_first, masked, need_weights
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, rows: Tensor) -> Any:
        masks: dict[str, Tensor] = {}
        if self.masked:
            masks["key_padding_mask"] = rows[..., 0] > 1.5
            masks["key_padding_mask"][:, 0] = False
            masks["attn_mask"] = torch.zeros(TOKENS, TOKENS, dtype=rows.dtype).fill_diagonal_(0.5)
            masks["key_padding_mask"] = masks["key_padding_mask"].to(rows.dtype) * -3.0
        seen = rows if self.batch_first else rows.transpose(0, 1)
        output, weights = self.attention(seen, seen, seen, need_weights=self.need_weights, **masks)
        output = output if self.batch_first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output, weights], dim=-1)


def normed(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, nn.Tanh())


BODIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear of vectors": (lambda: nn.Linear(WIDTH, 3), (WIDTH,)),
    "linear without bias": (lambda: nn.Linear(WIDTH, 3, bias=False), (WIDTH,)),
    "linear of tokens": (lambda: nn.Linear(WIDTH, 3), (TOKENS, WIDTH)),
    "wide linear of tokens": (lambda: nn.Linear(40, 50), (TOKENS, 40)),
    "linear of a grid": (lambda: nn.Linear(WIDTH, 3), (2, TOKENS, WIDTH)),
    "wide linear of a grid": (lambda: nn.Linear(40, 50), (2, 3, 40)),
    "two linears in place": (Inplace, (WIDTH,)),
    "rows and tokens on one axis": (Flattened, (TOKENS, WIDTH)),
    "layer norm": (lambda: normed(nn.LayerNorm(WIDTH)), (TOKENS, WIDTH)),
    "layer norm without bias": (lambda: normed(nn.LayerNorm(WIDTH, bias=False)), (WIDTH,)),
    "layer norm of two axes": (lambda: normed(nn.LayerNorm((TOKENS, WIDTH))), (2, TOKENS, WIDTH)),
    "rms norm": (lambda: normed(nn.RMSNorm(WIDTH)), (TOKENS, WIDTH)),
    "group norm": (lambda: normed(nn.GroupNorm(2, TOKENS)), (TOKENS, WIDTH)),
    "group norm of vectors": (lambda: normed(nn.GroupNorm(3, WIDTH)), (WIDTH,)),
    "a layer used three times": (Twice, (TOKENS, WIDTH)),
    "a layer of vectors used three times": (Twice, (WIDTH,)),
    "a low-rank adapter": (Adapted, (TOKENS, WIDTH)),
    "biases alone": (BiasOnly, (TOKENS, WIDTH)),
    "parameters without a layer": (Direct, (TOKENS, WIDTH)),
    "attention pooling": (Pooling, (TOKENS, WIDTH)),
    "attention pooling without bias": (lambda: Pooling(bias=False), (TOKENS, WIDTH)),
    "self-attention": (lambda: SelfAttention(batch_first=True, masked=False), (TOKENS, WIDTH)),
    "self-attention with weights": (
        lambda: SelfAttention(batch_first=True, masked=False, need_weights=True),
        (TOKENS, WIDTH),
    ),
    "masked self-attention": (lambda: SelfAttention(batch_first=True, masked=True), (TOKENS, WIDTH)),
    "self-attention, tokens first": (lambda: SelfAttention(batch_first=False, masked=False), (TOKENS, WIDTH)),
}


@pytest.mark.parametrize("studies", [1, 3])
@pytest.mark.parametrize("name", BODIES)
def test_an_operation_gives_the_gradients_of_a_loop_over_patients(name: str, studies: int) -> None:
    make, shape = BODIES[name]
    check(Wrapped(seeded(make())), batch_of(*shape, patients=4, studies=studies))


@pytest.mark.parametrize("name", ["wide linear of tokens", "attention pooling", "parameters without a layer"])
@settings(max_examples=10, deadline=None)
@given(
    ratios=st.lists(RATIOS, min_size=1, max_size=4),
    studies=st.integers(1, 3),
    bound=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_so_it_does_at_and_around_the_bound(
    name: str, ratios: list[float], studies: int, bound: float, seed: int
) -> None:
    make, shape = BODIES[name]
    module = Wrapped(seeded(make())).to(torch.float64)
    batch = batch_of(*shape, patients=len(ratios), studies=studies, seed=seed)
    raw = [norm(gradient) for gradient in loop(module, batch)]
    factors = [ratio * bound / each for ratio, each in zip(ratios, raw, strict=True)]
    batch["weights"] *= torch.tensor(factors, dtype=torch.float64)[:, None]
    expected = reference_sum(loop(module, batch), bound)
    engine = BookKeepingEngine(module, losses)
    assert engine.raw_norms(batch).tolist() == pytest.approx([r * bound for r in ratios], rel=1e-9, abs=1e-15)
    assert difference(engine.clipped_sum(batch, max_grad_norm=bound), expected) <= 1e-9 * bound * len(ratios)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=40, deadline=None)
@given(
    axes=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    studies=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_convolutions_of_any_form_do(
    axes: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int | str,
    dilation: int,
    groups: int,
    widths: tuple[int, int],
    bias: bool,
    studies: int,
    seed: int,
) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d)[axes - 1]
    layer = kind(
        groups * widths[0],
        groups * widths[1],
        kernel[:axes],
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
    )
    size = (7, 6)[:axes]
    check(Wrapped(seeded(layer)), batch_of(groups * widths[0], *size, patients=2, studies=studies, seed=seed))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_so_do_convolutions_that_pad_otherwise(mode: Any) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    check(Wrapped(seeded(layer)), batch_of(2, 5, 5, patients=2, studies=1))


def test_so_does_a_wide_patch_embedding() -> None:
    check(Wrapped(seeded(nn.Conv2d(3, 64, 8, stride=8))), batch_of(3, 16, 16, patients=3, studies=2))


class Words(nn.Module):
    """Embeddings as in CLIP's text tower; ``tied`` predicts with the tokens' matrix as well."""

    position_ids: Tensor

    def __init__(self, *, padding: int | None = None, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.positions = nn.Embedding(TOKENS + 1, WIDTH)
        self.tied = tied
        self.register_buffer("position_ids", torch.arange(TOKENS)[None])

    def forward(self, ids: Tensor) -> Any:
        hidden = (self.tokens(ids) + self.positions(self.position_ids)).tanh()
        return F.linear(hidden, self.tokens.weight) if self.tied else hidden


@pytest.mark.parametrize("studies", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 0, 2, -1])
def test_embeddings_do_with_repeated_ids_padding_and_ties(
    padding: int | None, tied: bool, studies: int
) -> None:
    batch = batch_of(TOKENS, patients=3, studies=studies, vocabulary=3)
    batch["images"][0] = 2  # one patient says the same word all the time
    batch["images"][0, 0, 0] = VOCABULARY - 1
    check(Wrapped(seeded(Words(padding=padding, tied=tied))), batch)


class WordsTwice(Words):
    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids) * self.tokens(ids.flip(1))


def test_an_embedding_used_twice_does() -> None:
    check(Wrapped(seeded(WordsTwice())), batch_of(TOKENS, patients=3, studies=2, vocabulary=4))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

    def forward(self, rows: Tensor) -> Any:
        return self.used(rows)


def test_a_parameter_without_use_has_a_sum_of_zeros() -> None:
    check(Wrapped(seeded(Unused())), batch_of(WIDTH, patients=2, studies=1))


def test_a_loss_without_parameters_has_a_sum_of_zeros() -> None:
    module = Wrapped(seeded(nn.Linear(WIDTH, 2)))

    def constant(call: Any, batch: Batch) -> Tensor:
        return batch["weights"].sum(1)

    batch = in_precision(batch_of(WIDTH, patients=2, studies=1), torch.float32)
    engine = BookKeepingEngine(module, constant)
    assert norm(engine.clipped_sum(batch, max_grad_norm=1.0)) == 0
    assert engine.raw_norms(batch).tolist() == [0, 0]


def two_calls(call: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """Two views of every row, as consistency losses have them, of different numbers of rows."""
    first, _ = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
    last, _ = call(batch["images"][:, -1].flip(-1), batch["texts"][:, -1])
    return first.view(len(last), -1).sin().sum(1) * last.square().mean(1)


def test_a_module_may_be_called_twice() -> None:
    check(Wrapped(seeded(Direct())), batch_of(TOKENS, WIDTH, patients=3, studies=2), loss=two_calls)
    words = batch_of(TOKENS, patients=3, studies=2, vocabulary=VOCABULARY)
    check(Wrapped(seeded(Words())), words, loss=two_calls)


# --- whole models -------------------------------------------------------------------------------------------

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.0,
}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS + 1}
CLIP_TEXT = {**TEXT, "projection_dim": 8, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 2}


class Clip(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        config = CLIPConfig(
            text_config=CLIP_TEXT, vision_config={**VISION, "projection_dim": 8}, projection_dim=8
        )
        self.model = CLIPModel._from_config(config, attn_implementation=attention)
        self.model.logit_scale.requires_grad_(False)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=images, input_ids=ids)
        return outputs.image_embeds, outputs.text_embeds


class Siglip(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        config = SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)
        self.model = SiglipModel._from_config(config, attn_implementation=attention)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        vision, text = self.model.vision_model(pixel_values=images), self.model.text_model(input_ids=ids)
        return vision.pooler_output, text.pooler_output


class VitAndBert(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.vit = ViTModel._from_config(
            ViTConfig(**VISION, hidden_dropout_prob=0.0), attn_implementation=attention
        )
        self.bert = BertModel._from_config(
            BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            attn_implementation=attention,
        )

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.vit(pixel_values=images).pooler_output, self.bert(input_ids=ids).pooler_output


MODELS: dict[str, Callable[[str], nn.Module]] = {"clip": Clip, "siglip": Siglip, "vit and bert": VitAndBert}


@functools.cache
def model_of(name: str, attention: str) -> nn.Module:
    """Weights far from their start, so that nothing embeds alike."""
    return seeded(MODELS[name](attention), spread=0.3).train()


def pairs(*, patients: int, studies: int, seed: int = 0) -> dict[str, Tensor]:
    images = batch_of(3, 16, 16, patients=patients, studies=studies, seed=seed)
    ids = batch_of(TOKENS, patients=patients, studies=studies, seed=seed, vocabulary=VOCABULARY)["images"]
    return {**images, "texts": ids}


def pair_losses(call: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    images, texts = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
    both = F.normalize(torch.cat([images, texts], dim=1), dim=1)
    slopes = torch.linspace(-1, 2, both.shape[1], dtype=both.dtype)
    each = (3 * both * slopes).sin().sum(1)
    return (batch["weights"] * each.view_as(batch["weights"])).sum(1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_gives_the_gradients_of_a_loop_over_patients(name: str, attention: str) -> None:
    # Eager attention takes its softmax in float32 whatever the model's precision is.
    rel = 1e-5 if attention == "eager" else 1e-9
    check(model_of(name, attention), pairs(patients=3, studies=2), loss=pair_losses, rel=rel)


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    module = model_of(name, "sdpa").to(torch.float64)
    batch = pairs(patients=3, studies=2, seed=1)
    engine = BookKeepingEngine(module, pair_losses)
    expected = engine.clipped_sum(batch, max_grad_norm=0.5)
    towers: list[Any] = [each for each in module.children() if hasattr(each, "gradient_checkpointing_enable")]
    for reentrant in (False, True):
        for tower in towers:
            tower.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                tower.enable_input_require_grads()
        found = engine.clipped_sum(batch, max_grad_norm=0.5)
        assert difference(found, expected) <= 1e-12
        for tower in towers:
            tower.gradient_checkpointing_disable()
            if reentrant:
                tower.disable_input_require_grads()


class Checkpointed(nn.Module):
    """Everything inside the checkpoint, the parameters without a layer included."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.runs = 0

    def forward(self, rows: Tensor) -> Any:
        def run(rows: Tensor) -> Any:
            self.runs += 1
            return self.body(rows)

        return checkpoint(run, rows, use_reentrant=False)


@pytest.mark.parametrize("name", BODIES)
def test_nothing_is_kept_twice_when_a_forward_pass_is_repeated(name: str) -> None:
    make, shape = BODIES[name]
    body = seeded(make())
    module = Wrapped(Checkpointed(body)).to(torch.float64)
    batch = batch_of(*shape, patients=3, studies=2)
    expected = BookKeepingEngine(Wrapped(body), losses).raw_norms(batch)
    engine = BookKeepingEngine(module, losses, physical_batch=3)
    assert engine.raw_norms(batch).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert module.body.runs == 6  # four of them to see that patients are apart


@pytest.mark.parametrize("physical_batch", [1, 2, 5, 9])
def test_the_physical_batch_bounds_memory_and_not_results(physical_batch: int) -> None:
    module, batch = model_of("clip", "sdpa").to(torch.float64), pairs(patients=5, studies=2)
    whole = BookKeepingEngine(module, pair_losses)
    parts = BookKeepingEngine(module, pair_losses, physical_batch=physical_batch)
    expected = whole.clipped_sum(batch, max_grad_norm=0.5)
    assert difference(parts.clipped_sum(batch, max_grad_norm=0.5), expected) <= 1e-12
    assert parts.raw_norms(batch).tolist() == pytest.approx(whole.raw_norms(batch).tolist(), rel=1e-12)


def test_dropout_is_drawn_row_by_row() -> None:
    module = Wrapped(nn.Sequential(seeded(nn.Linear(WIDTH, 40)), nn.Dropout(0.5))).to(torch.float64).train()
    batch = batch_of(WIDTH, patients=4, studies=1)
    engine = BookKeepingEngine(module, losses)
    engine.raw_norms(batch)  # the first use checks that patients are apart, which draws
    torch.manual_seed(0)
    found = engine.raw_norms(batch)
    torch.manual_seed(0)
    outputs = []

    def keep(call: Any, batch: Batch) -> Tensor:
        outputs.append(losses(call, batch))
        return outputs[0]

    trained = list(module.parameters())
    each = keep(module, batch)
    for patient in range(4):
        alone = torch.autograd.grad(each[patient], trained, retain_graph=True)
        expected = norm({str(i): value for i, value in enumerate(alone)})
        assert float(found[patient]) == pytest.approx(expected, rel=1e-9)


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("autocast", "loss_scale", "within"),
    [(torch.bfloat16, 1.0, 0.02), (torch.float16, 128.0, 0.003), (None, 128.0, 1e-5)],
)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_that_of_autocast_with_exact_clipping(
    name: str, autocast: torch.dtype | None, loss_scale: float, within: float
) -> None:
    module = model_of(name, "sdpa").to(torch.float32)
    batch = in_precision(pairs(patients=3, studies=2), torch.float32)
    engine = BookKeepingEngine(module, pair_losses, autocast=autocast, loss_scale=loss_scale)
    found = engine.raw_norms(batch)

    def as_autocast(call: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return pair_losses(call, batch)

    gradients = loop(module, batch, as_autocast)
    norms = [norm(gradient) for gradient in gradients]
    assert found.tolist() == pytest.approx(norms, rel=within)
    bound = sorted(norms)[1]
    clipped = engine.clipped_sum(batch, max_grad_norm=bound)
    assert difference(clipped, reference_sum(gradients, bound)) <= 3 * within * bound
    assert {value.dtype for value in clipped.values()} == {torch.float32}
    for patient in range(3):
        alone = {name: value[[patient]] for name, value in batch.items()}
        assert norm(engine.clipped_sum(alone, max_grad_norm=0.01)) == pytest.approx(0.01, rel=1e-5)


def test_a_patient_who_overflows_in_half_precision_counts_as_zero() -> None:
    module = Wrapped(seeded(nn.Linear(WIDTH, 3)))
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    batch["weights"][1] = 1e7
    engine = BookKeepingEngine(module, losses, autocast=torch.float16, loss_scale=16.0)
    assert not engine.raw_norms(batch)[1].isfinite()
    others = {name: value[[0, 2]] for name, value in batch.items()}
    expected = engine.clipped_sum(others, max_grad_norm=0.1)
    assert difference(engine.clipped_sum(batch, max_grad_norm=0.1), expected) <= 1e-6


@pytest.mark.parametrize("loss_scale", [1.0, 3.0, 2.0**16])
def test_no_factor_is_too_small_for_its_loss_scale(loss_scale: float) -> None:
    module = Wrapped(seeded(nn.Linear(WIDTH, 3)))
    batch = in_precision(batch_of(WIDTH, patients=1, studies=1), torch.float32)
    engine = BookKeepingEngine(module, losses, loss_scale=loss_scale)
    for exponent in range(20, 34):
        louder = {**batch, "weights": batch["weights"] * 10.0**exponent}
        for bound in (1e-12, 1e-8, 1e-4, 3.7):
            assert norm(engine.clipped_sum(louder, max_grad_norm=bound)) <= bound * (1 + 1e-6)


def test_sums_of_a_half_precision_module_are_single() -> None:
    module = Wrapped(nn.Sequential(seeded(nn.Linear(WIDTH, 3)), nn.LayerNorm(3))).to(torch.bfloat16)
    batch = in_precision(batch_of(WIDTH, patients=3, studies=2), torch.bfloat16)
    found = BookKeepingEngine(module, losses).clipped_sum(batch, max_grad_norm=0.1)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert norm(found) > 0.05


def outer(inputs: Tensor, gradients: Tensor) -> Outer:
    (_, places, d), p = inputs.shape, gradients.shape[2]
    return Outer(inputs=inputs, gradients=gradients, places=places, shape=torch.Size([p, d]))


@settings(max_examples=80, deadline=None)
@given(
    places=st.sampled_from([1, 2, 7, 64]),
    widths=st.sampled_from([(40, 50), (700, 300), (3000, 64)]),
    cancelled=st.sampled_from([0.0, 0.9, 0.999, 1 - 1e-5, 1.0]),
    equal=st.booleans(),
    exponents=st.tuples(st.integers(-25, 25), st.integers(-25, 25)),
    seed=st.integers(0, 10**6),
)
def test_however_much_cancels_no_clipped_contribution_is_longer_than_the_bound(
    places: int,
    widths: tuple[int, int],
    cancelled: float,
    equal: bool,
    exponents: tuple[int, int],
    seed: int,
) -> None:
    """Pairs of places that take each other back, up to rounding; equal numbers round the same way."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for width, exponent in zip(widths, exponents, strict=True):
        rows = torch.rand(1, places, width, generator=generator) if not equal else torch.full((1, 1, 1), 1.3)
        factors.append((rows.expand(1, places, width) * 10.0**exponent).contiguous())
    inputs, gradients = factors
    if places > 1:
        half = places // 2
        inputs[:, half : 2 * half] = inputs[:, :half]
        gradients[:, half : 2 * half] = -cancelled * gradients[:, :half]
    form = outer(inputs, gradients)
    squares = form.squared_norms()
    if not squares.isfinite():
        squares = form.squared_norms(torch.float64)
    exact = norm({"": outer(inputs.double(), gradients.double()).dense()})
    assert float(squares.sqrt()) >= exact * (1 - 1e-6)
    for bound in (1e-6, 1.0, 1e3):
        clipped = form.weighted_sum(clip_factors(squares.sqrt(), max_grad_norm=bound))
        assert norm({"": clipped}) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("width", [64, 256, 768, 3072])
def test_nor_where_only_one_of_two_that_cancel_is_rounded_down(width: int) -> None:
    """Squares of 1.3 are rounded, those of 1.25 are not: what float32 finds can be less than nothing."""
    inputs, gradients = torch.empty(1, 2, width), torch.empty(1, 2, 64)
    inputs[:, 0], inputs[:, 1] = 1.3, 1.25
    under = 0.0
    for left in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        gradients[:, 0], gradients[:, 1] = 1.0, -(1 - left) * 1.3 / 1.25
        form = outer(inputs, gradients)
        exact = norm({"": gradients.double().mT @ inputs.double()})
        grams = (inputs @ inputs.mT) * (gradients @ gradients.mT)
        under = min(under, float(grams.sum()) - exact**2)
        assert float(form.squared_norms().sqrt()) >= exact * (1 - 1e-6)
        clipped = form.weighted_sum(clip_factors(form.squared_norms().sqrt(), max_grad_norm=1.0))
        assert norm({"": clipped}) <= 1 + 1e-6
    assert under < 0  # without the bound on rounding


@settings(max_examples=50, deadline=None)
@given(
    size=st.sampled_from([1, 5, 256, 257, 300_000]),
    exponent=st.integers(-38, 38),
    equal=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_nor_is_one_held_as_it_is(size: int, exponent: int, equal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((2, size), 1.3) if equal else torch.randn(2, size, generator=generator)
    form = Dense(values=values * 10.0**exponent)
    squares = form.squared_norms()
    wider = form.squared_norms(torch.float64)
    found = torch.where(squares.isfinite(), squares, wider).sqrt()
    exact = form.values.double().square().sum(1).sqrt()
    assert bool((found >= exact * (1 - 1e-6)).all())
    assert found.tolist() == pytest.approx(exact.tolist(), rel=2e-6, abs=1e-15)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_faster_products_allowed_elsewhere_are_not_used_for_norms(precision: str) -> None:
    module = Wrapped(seeded(nn.Linear(400, 300)))
    batch = in_precision(batch_of(TOKENS, 400, patients=3, studies=1), torch.float32)
    engine = BookKeepingEngine(module, losses)
    seen = []

    def watched(call: Any, batch: Batch) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return losses(call, batch)

    torch.set_float32_matmul_precision(precision)
    try:
        found = BookKeepingEngine(module, watched).clipped_sum(batch, max_grad_norm=1e-3)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {precision}
    assert difference(found, engine.clipped_sum(batch, max_grad_norm=1e-3)) <= 2e-5


# --- forms of a contribution --------------------------------------------------------------------------------


def forms(*, seed: int) -> list[Any]:
    """The same parameter's gradients of three patients in each form: P = 3, parameter 5 x 4."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size([5, 4])

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    owners, ids = torch.tensor([0, 0, 1, 0, 2, 2]), torch.tensor([1, 1, 4, 0, 3, 3])
    return [
        Dense(values=numbers(3, 5, 4)),
        outer(numbers(3, 2, 4), numbers(3, 2, 5)),
        Rows.of(owners, ids, numbers(6, 4), patients=3, shape=shape),
    ]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_forms_agree_and_add_up(first: int, second: int) -> None:
    uses = [forms(seed=1)[first], forms(seed=2)[second], forms(seed=3)[first]]
    whole = together(uses)
    dense = sum(use.dense() for use in uses)
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(whole.dense(), dense)
    assert torch.allclose(whole.squared_norms(), dense.flatten(1).square().sum(1))
    assert torch.allclose(whole.weighted_sum(factors), torch.einsum("p,pij->ij", factors, dense))
    kept = torch.tensor([True, False, True])
    assert torch.allclose(whole.only(kept).dense(), dense[kept])
    assert whole.only(~kept).squared_norms().tolist() == pytest.approx(whole.squared_norms()[1:2].tolist())
    nobody = whole.only(torch.zeros(3, dtype=torch.bool))
    assert torch.equal(nobody.weighted_sum(factors[:0]), torch.zeros(5, 4, dtype=torch.float64))


def test_a_product_takes_the_smaller_form() -> None:
    wide = product(torch.randn(2, 3, 40), torch.randn(2, 3, 50), torch.Size([50, 40]))
    narrow = product(torch.randn(2, 3, 40), torch.randn(2, 3, 2), torch.Size([2, 40]))
    assert isinstance(wide, Outer)
    assert isinstance(narrow, Dense)
    assert isinstance(together([wide] * 40), Dense)


# --- places without a gradient ------------------------------------------------------------------------------

FELT = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


def partly_felt(
    felt: list[list[bool]], *, width: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor, torch.Size]:
    """Inputs and gradients, the latter zero where not ``felt``, of one place more that nobody feels."""
    generator = torch.Generator().manual_seed(seed)
    mask = F.pad(torch.tensor(felt), (0, 1))
    inputs, gradients = torch.randn(2, *mask.shape, width, generator=generator, dtype=torch.float64)
    return inputs, gradients * mask[..., None], torch.Size([width, width])


@settings(max_examples=60, deadline=None)
@given(felt=FELT, width=st.sampled_from([3, 40]), seed=st.integers(0, 10**6))
def test_places_without_a_gradient_are_left_out_and_nothing_changes(
    felt: list[list[bool]], width: int, seed: int
) -> None:
    inputs, gradients, shape = partly_felt(felt, width=width, seed=seed)
    found = product(inputs, gradients, shape)
    dense = gradients.mT @ inputs
    assert torch.allclose(found.dense(), dense, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.squared_norms(), dense.flatten(1).square().sum(1), rtol=1e-9, atol=1e-200)
    factors = torch.linspace(0.5, 1.0, len(felt), dtype=torch.float64)
    assert torch.allclose(found.weighted_sum(factors), torch.einsum("p,pij->ij", factors, dense))


@settings(max_examples=60, deadline=None)
@given(
    felt=FELT,
    place=st.integers(0, 5),
    width=st.sampled_from([3, 40]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_whether_a_patient_counts_is_not_for_the_places_of_others_to_say(
    felt: list[list[bool]], place: int, width: int, value: float
) -> None:
    inputs, gradients, shape = partly_felt(felt, width=width)
    inputs[0, place, 1] = value
    found = product(inputs, gradients, shape).squared_norms().isfinite()
    alone = product(inputs[:1], gradients[:1], shape).squared_norms().isfinite()
    assert found.tolist() == [False] + [True] * (len(felt) - 1)
    assert not alone


@pytest.mark.parametrize(("width", "uses"), [(10, 1), (20, 2)])
def test_nor_is_the_form_which_says_what_overflows(width: int, uses: int) -> None:
    """Multiplied out a gradient may be infinite where its factors are not."""
    inputs, gradients, shape = partly_felt([[True, *[False] * 4], [True] * 5], width=width)
    both, alone = (
        together([product(inputs[:patients], gradients[:patients], shape)] * uses) for patients in (2, 1)
    )
    assert isinstance(both, Dense)
    assert isinstance(alone, Dense)


def test_of_the_last_layer_of_a_pooled_tower_only_that_place_is_kept() -> None:
    inputs, gradients, shape = partly_felt([[False, False, True, False, False]] * 3)
    found = product(inputs, gradients, shape)
    assert isinstance(found, Outer)
    assert found.inputs.shape == (3, 1, 40)
    assert torch.equal(found.gradients, gradients[:, 2:3])


def test_a_gradient_whose_square_is_zero_is_a_gradient() -> None:
    inputs, gradients, shape = partly_felt([[True, False, False, False, False]] * 2)
    gradients[:, 3, 0], gradients[:, 4, 1] = 1e-30, -1e-42
    found = product(inputs.float(), gradients.float(), shape)
    assert isinstance(found, Outer)
    assert found.inputs.shape == (2, 3, 40)


def test_a_layer_without_features_has_a_product_too() -> None:
    for d, p in ((0, 3), (3, 0)):
        found = product(torch.ones(2, 4, d), torch.zeros(2, 4, p), torch.Size([p, d]))
        assert found.squared_norms().tolist() == pytest.approx([0, 0], abs=1e-30)


class Pooled(nn.Module):
    """The first token after layers that all tokens go through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        tokens: Tensor = self.second(self.first(rows).relu())
        return tokens[:, 0]


def test_a_pooled_tower_gives_the_gradients_of_a_loop_over_patients() -> None:
    check(Wrapped(seeded(Pooled())), batch_of(TOKENS, WIDTH, patients=4, studies=2))


def test_a_patient_who_overflows_where_nothing_is_felt_counts_as_zero() -> None:
    module = Wrapped(seeded(Pooled())).float()
    batch = in_precision(batch_of(TOKENS, WIDTH, patients=3, studies=1), torch.float32)
    batch["images"][0, :, 1] = 3e38
    found = BookKeepingEngine(module, losses).clipped_sum(batch, max_grad_norm=1.0)
    others = {name: value[1:] for name, value in batch.items()}
    expected = BookKeepingEngine(module, losses).clipped_sum(others, max_grad_norm=1.0)
    assert difference(found, expected) <= 1e-6


# --- refusals -----------------------------------------------------------------------------------------------


class Uses(nn.Module):
    """One parameter, used as a test says."""

    def __init__(self, use: Callable[[nn.Parameter, Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, rows: Tensor) -> Any:
        used: Tensor = self.use(self.weight, rows)
        return used


def assigned(weight: nn.Parameter, rows: Tensor) -> Tensor:
    found = torch.zeros_like(rows)
    found[:] = weight
    return found * rows


REFUSED: dict[str, tuple[Callable[[nn.Parameter, Tensor], Any], str]] = {
    "exponential": (lambda w, x: x * w.exp(), r"'body\.weight' is used by torch\.Tensor\.exp"),
    "transposed": (lambda w, x: x @ torch.diag(w).T, r"'body\.weight' is used by torch\.diag"),
    "slice": (lambda w, x: x[:, :2] + w[:2], r"'body\.weight' is used by torch\.Tensor\.__getitem__"),
    "in a list": (lambda w, x: torch.cat([w[None], x]), r"'body\.weight' is used by"),
    "product of matrices": (lambda w, x: x @ w, r"'body\.weight' is used by torch\.Tensor\.matmul"),
    "square": (lambda w, x: x + w * w, r"is used by torch\.Tensor\.mul, where no rows of the batch meet it"),
    "times a number": (
        lambda w, x: x * (2 * w),
        r"is used by torch\.Tensor\.mul, where no rows of the batch",
    ),
    "dtype change": (lambda w, x: x * w.double().float(), r"'body\.weight' is used by torch\.Tensor\.double"),
    "assigned": (assigned, r"'body\.weight' got a gradient of the whole batch: .* an assignment"),
    "as input": (
        lambda w, x: F.linear(w, x),
        r"'body\.weight' is the input of torch\.nn\.functional\.linear",
    ),
    "computed weight": (
        lambda w, x: F.linear(x, (w * x).sum(0).expand(WIDTH, WIDTH), w),
        r"linear uses parameter 'body\.weight' beside a weight that is computed",
    ),
    "expanded without rows": (lambda w, x: x + w.expand(1, -1), r"meets 1 rows in torch\.Tensor\.expand"),
    "expanded over rows": (
        lambda w, x: x[:, :1] * w.expand(len(x), len(x), -1)[0],
        r"one patient's loss gives another patient a gradient in 'body\.weight'",
    ),
    "expanded over rows, of which the last is used": (
        lambda w, x: x[:, :1] * w.expand(len(x), len(x), -1)[-1],
        r"one patient's loss gives another patient a gradient in 'body\.weight'",
    ),
    "one row for all": (
        lambda w, x: F.layer_norm(x.mean(0, keepdim=True), (WIDTH,), w),
        r"'body\.weight' meets 1 rows in torch\.nn\.functional\.layer_norm, .* no multiple of the 2 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    use, text = REFUSED[name]
    batch = in_precision(batch_of(WIDTH, patients=2, studies=1), torch.float32)
    engine = BookKeepingEngine(Wrapped(Uses(use, WIDTH)), losses)
    with pytest.raises(UnsoundTraining, match=text):
        engine.clipped_sum(batch, max_grad_norm=1.0)


def test_what_only_looks_at_a_parameter_is_allowed() -> None:
    def looks(weight: nn.Parameter, rows: Tensor) -> Tensor:
        rows = rows.to(weight.dtype).type_as(weight) * (weight.detach().sum() + weight.numel() + len(weight))
        with torch.no_grad():
            rows = rows + weight.exp()
        return rows * weight.to(rows.dtype).contiguous() + torch.zeros_like(weight)

    check(Wrapped(seeded(Uses(looks, WIDTH))), batch_of(WIDTH, patients=2, studies=1))


class TokensFirst(nn.Module):
    """A layer that sees (tokens, rows, width): its first axis is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, rows: Tensor) -> Any:
        return self.layer(rows.transpose(0, 1)).transpose(0, 1)


def contrasted(call: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    outputs, _ = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
    return (outputs @ outputs.T).logsumexp(1)


def test_a_batch_that_is_not_the_first_axis_is_refused() -> None:
    batch = in_precision(batch_of(TOKENS, WIDTH, patients=TOKENS, studies=1), torch.float32)
    engine = BookKeepingEngine(Wrapped(seeded(TokensFirst())), losses)
    for _ in range(2):  # it does not get used to it
        with pytest.raises(
            UnsoundTraining, match=r"gives another patient a gradient in 'body\.layer\.weight'"
        ):
            engine.clipped_sum(batch, max_grad_norm=1.0)


def test_a_loss_that_contrasts_the_batch_is_refused() -> None:
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    engine = BookKeepingEngine(Wrapped(seeded(nn.Linear(WIDTH, 3))), contrasted)
    with pytest.raises(UnsoundTraining, match="the loss or the module mixes patients"):
        engine.clipped_sum(batch, max_grad_norm=1.0)


def test_patients_are_looked_at_until_one_has_a_gradient() -> None:
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    silent = {**batch, "weights": batch["weights"] * torch.tensor([[0.0], [1.0], [1.0]])}
    mixing = True

    def sometimes(call: Any, batch: Batch) -> Tensor:
        found = losses(call, batch)
        return found * found.detach().sum() + (found.sum() if mixing else 0) * batch["weights"].sum(1)

    engine = BookKeepingEngine(Wrapped(seeded(nn.Linear(WIDTH, 3))), sometimes)
    engine.clipped_sum({name: value[:1] for name, value in silent.items()}, max_grad_norm=1.0)
    engine.clipped_sum(silent, max_grad_norm=1.0)
    with pytest.raises(UnsoundTraining, match="the loss or the module mixes patients"):
        engine.clipped_sum(batch, max_grad_norm=1.0)


def test_a_scripted_module_is_refused() -> None:
    module = Wrapped(torch.jit.script(nn.Linear(WIDTH, 2)))
    batch = in_precision(batch_of(WIDTH, patients=2, studies=1), torch.float32)
    with pytest.raises(
        UnsoundTraining, match=r"'body\.\w+' got a gradient of the whole batch: .*scripted module"
    ):
        BookKeepingEngine(module, losses).clipped_sum(batch, max_grad_norm=1.0)
    assert all(value.grad is None for value in module.parameters())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_module_runs_uncompiled_and_exactly(backend: str) -> None:
    body = seeded(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))).to(torch.float64)
    batch = batch_of(TOKENS, WIDTH, patients=3, studies=1)
    expected = BookKeepingEngine(Wrapped(body), losses).raw_norms(batch)
    compiled: Any = torch.compile(body, backend=backend)
    compiled(batch["images"][:, 0])
    module = Wrapped(compiled)
    engine = BookKeepingEngine(module, losses)
    assert engine.raw_norms(batch).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"physical_batch": 0}, "expected physical_batch=0 >= 1"),
        ({"loss_scale": 0.0}, r"expected loss_scale=0\.0 > 0 and finite"),
        ({"loss_scale": math.nan}, "expected loss_scale=nan > 0 and finite"),
        ({"loss_scale": math.inf}, "expected loss_scale=inf > 0 and finite"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsoundTraining, match=text):
        BookKeepingEngine(Wrapped(nn.Linear(WIDTH, 2)), losses, **options)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_looks_at_the_batch_is_refused(options: dict[str, Any]) -> None:
    module = Wrapped(nn.Embedding(VOCABULARY, WIDTH, **options))
    batch = in_precision(batch_of(TOKENS, patients=2, studies=1, vocabulary=VOCABULARY), torch.float32)
    with pytest.raises(
        UnsoundTraining, match=r"embedding 'body\.weight' .* unset max_norm and scale_grad_by_freq"
    ):
        BookKeepingEngine(module, losses).clipped_sum(batch, max_grad_norm=1.0)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 4}])
def test_an_attention_of_another_form_is_refused(options: dict[str, Any]) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

        def forward(self, rows: Tensor) -> Any:
            values = rows[..., : self.attention.vdim]
            found: Tensor = self.attention(rows, rows, values)[0]
            return found

    batch = in_precision(batch_of(TOKENS, WIDTH, patients=2, studies=1), torch.float32)
    with pytest.raises(
        UnsoundTraining, match=r"'body\.attention\.\w+' is used by a form of multi-head attention"
    ):
        BookKeepingEngine(Wrapped(Other()), losses).clipped_sum(batch, max_grad_norm=1.0)


def test_a_parameter_used_outside_of_the_call_is_refused() -> None:
    module = Wrapped(nn.Linear(WIDTH, WIDTH))

    def outside(call: Any, batch: Batch) -> Any:
        return module.body(batch["images"].flatten(1)).sum(1)

    batch = in_precision(batch_of(WIDTH, patients=2, studies=1), torch.float32)
    with pytest.raises(UnsoundTraining, match=r"'body\.weight' is used outside of the module's call"):
        BookKeepingEngine(module, outside).clipped_sum(batch, max_grad_norm=1.0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_loss_with_a_gradient_of_the_module_in_it_is_refused(create_graph: bool) -> None:
    module = Wrapped(nn.Linear(WIDTH, WIDTH))

    def penalised(call: Any, batch: Batch) -> Any:
        rows = batch["images"].flatten(0, 1).requires_grad_(True)
        each = call(rows, rows)[0].square().sum(1)
        (slopes,) = torch.autograd.grad(each.sum(), rows, create_graph=create_graph)
        return each + slopes.square().sum(1)

    batch = in_precision(batch_of(WIDTH, patients=2, studies=1), torch.float32)
    with pytest.raises(UnsoundTraining, match="the loss differentiates the module itself"):
        BookKeepingEngine(module, penalised).clipped_sum(batch, max_grad_norm=1.0)


def test_inputs_without_equal_rows_for_each_patient_are_refused() -> None:
    module = Wrapped(nn.Linear(WIDTH, WIDTH))

    def uneven(call: Any, batch: Batch) -> Any:
        rows = batch["images"].flatten(0, 1)
        return call(rows[:-1], rows[:-1])[0].sum(1)

    batch = in_precision(batch_of(WIDTH, patients=2, studies=2), torch.float32)
    with pytest.raises(UnsoundTraining, match=r"rows for each of 2 patients, got \[3\] rows"):
        BookKeepingEngine(module, uneven).clipped_sum(batch, max_grad_norm=1.0)


def test_losses_of_another_shape_are_refused() -> None:
    module = Wrapped(nn.Linear(WIDTH, WIDTH))

    def mean(call: Any, batch: Batch) -> Tensor:
        return losses(call, batch).mean()

    batch = in_precision(batch_of(WIDTH, patients=2, studies=2), torch.float32)
    with pytest.raises(UnsoundTraining, match=r"expected one loss a patient, shape \(2,\), got \(\)"):
        BookKeepingEngine(module, mean).clipped_sum(batch, max_grad_norm=1.0)


# --- nothing stays behind -----------------------------------------------------------------------------------


def test_gradients_hooks_and_modes_are_as_before() -> None:
    module = Wrapped(seeded(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))))
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    own = {name: torch.full_like(value, 3.0) for name, value in module.named_parameters()}
    for name, value in module.named_parameters():
        value.grad = own[name]
    attributes = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    engine = BookKeepingEngine(module, losses)
    engine.clipped_sum(batch, max_grad_norm=1.0)

    def fails(call: Any, batch: Batch) -> Tensor:
        losses(call, batch)
        raise KeyError("a loss of one's own")

    with pytest.raises(KeyError, match="a loss of one's own"):
        BookKeepingEngine(module, fails).clipped_sum(batch, max_grad_norm=1.0)
    for name, value in module.named_parameters():
        assert value.grad is own[name]
        assert bool((value.grad == 3.0).all())
    assert {name: dict(vars(layer)) for name, layer in module.named_modules()} == attributes
    assert not torch._C._is_torch_function_mode_enabled()
    torch.autograd.backward(losses(module, batch).sum())  # ordinary training goes on


def test_an_engine_may_run_inside_another() -> None:
    inner_module, module = Wrapped(seeded(nn.Linear(WIDTH, 2))), Wrapped(seeded(nn.Linear(WIDTH, 3)))
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    inner = BookKeepingEngine(inner_module, losses)
    expected = inner.raw_norms(batch)
    found = []

    def nested(call: Any, batch: Batch) -> Tensor:
        found.append(inner.raw_norms(batch))
        return losses(call, batch)

    outer = BookKeepingEngine(module, nested).raw_norms(batch)
    assert torch.equal(outer, BookKeepingEngine(module, losses).raw_norms(batch))
    assert torch.equal(found[-1], expected)


def test_parameters_thawed_or_replaced_later_are_seen() -> None:
    body = Unused()
    module = Wrapped(seeded(body))
    body.used.weight.requires_grad_(False)
    batch = in_precision(batch_of(WIDTH, patients=3, studies=1), torch.float32)
    engine = BookKeepingEngine(module, losses)
    assert "body.used.weight" not in engine.clipped_sum(batch, max_grad_norm=1.0)
    body.used.weight = nn.Parameter(torch.randn(2, WIDTH))
    assert float(engine.clipped_sum(batch, max_grad_norm=1.0)["body.used.weight"].abs().max()) > 1e-3
