"""One patient moves the clipped sum by at most the bound; every planted way to break that is caught."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders.objectives import anchored_loss, infonce_loss
from encoders.parts import TrainablePart, trainable_part
from privacy.bookkeeping import BookKeepingEngine
from privacy.engine import (
    Batch,
    ClippingEngine,
    PatientLosses,
    clip_factors,
    raw_norms,
    refuse_batch_statistics,
)
from privacy.errors import UnsoundTraining
from privacy.hooks import HooksEngine
from privacy.vmap import VmapEngine
from tests.encoders.micro import EMBEDDING, TEXTS, micro_encoder, random_images

KINDS = ("heads", "lora", "full")
SCALE, BANK = 10.0, 6
RATIOS = st.sampled_from([0.0, 0.99, 1.0, 1.001, 4.0])
NOT_FINITE = (math.nan, math.inf, -math.inf, 1e38)


@pytest.fixture(autouse=True, scope="module")
def _small_and_exact() -> Iterator[None]:
    """One thread; attention as plain products, which vmap can batch and float64 keeps in float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.set_num_threads(threads)


@functools.cache
def part_of(kind: Any, dtype: torch.dtype) -> TrainablePart:
    part = trainable_part(micro_encoder(), kind, lora_rank=2)
    part.module.to(dtype)
    if dtype is torch.float64:  # the eager attention's softmax is single precision whatever the model's is
        part.encoder.model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # LoRA's second factor starts at zero, which would hide the first one's gradient
        for name, value in part.module.named_parameters():
            if "lora_B" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return part


def anchors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = torch.randn(2, BANK, EMBEDDING, generator=torch.Generator().manual_seed(2))
    first, second = F.normalize(rows.to(dtype), dim=-1)
    return first, second


def loss_with(dtype: torch.dtype) -> PatientLosses:
    image_anchors, text_anchors = anchors(dtype)

    def patient_losses(call: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        weights = batch["weights"]
        images, texts = call(batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1))
        losses = anchored_loss(
            images,
            texts,
            text_anchors=text_anchors,
            image_anchors=image_anchors,
            masked=batch["masked"].flatten(0, 1),
            inverse_temperature=SCALE,
        )
        return (weights * losses.view_as(weights)).sum(1)

    return patient_losses


class MakesEngine(Protocol):
    """Every engine, with the patients it takes at a time."""

    def __call__(
        self, module: nn.Module, patient_losses: PatientLosses, *, chunk: int = 16
    ) -> ClippingEngine: ...


def bookkeeping(module: nn.Module, patient_losses: PatientLosses, *, chunk: int = 16) -> ClippingEngine:
    return BookKeepingEngine(module, patient_losses, physical_batch=chunk)


def hooks(module: nn.Module, patient_losses: PatientLosses, *, chunk: int = 16) -> ClippingEngine:
    return HooksEngine(module, patient_losses, physical_batch=chunk)


all_engines = pytest.mark.parametrize("makes", [bookkeeping, hooks, VmapEngine])


def engine_of(
    kind: str, dtype: torch.dtype, *, makes: MakesEngine = bookkeeping, chunk: int = 16
) -> ClippingEngine:
    return makes(part_of(kind, dtype).module, loss_with(dtype), chunk=chunk)


def batch_of(kind: str, dtype: torch.dtype, *, patients: int, studies: int, seed: int) -> dict[str, Tensor]:
    """Random patients; the last study of every second patient is padding of weight 0."""
    rng = np.random.default_rng(seed)
    rows = patients * studies
    words = [TEXTS[row] for row in rng.integers(0, len(TEXTS), size=rows)]
    images, texts = part_of(kind, torch.float32).inputs(random_images(rows, seed=seed), words)
    weights = rng.uniform(0.5, 1.0, size=(patients, studies)) / studies
    if studies > 1:
        weights[::2, -1] = 0
    batch = {
        "images": images.view(patients, studies, *images.shape[1:]),
        "texts": texts.view(patients, studies, *texts.shape[1:]),
        "masked": torch.from_numpy(rng.random((patients, studies, BANK)) < 0.2),
        "weights": torch.from_numpy(weights),
    }
    return in_precision(batch, dtype)


def in_precision(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def without(batch: Batch, row: int) -> dict[str, Tensor]:
    return {name: torch.cat([value[:row], value[row + 1 :]]) for name, value in batch.items()}


def at_ratios(batch: dict[str, Tensor], raw: list[float], ratios: list[float], bound: float) -> None:
    """Rescale each patient's loss so that their gradient is ``ratio`` times the bound."""
    factors = [ratio * bound / norm for ratio, norm in zip(ratios, raw, strict=True)]
    batch["weights"] = batch["weights"] * torch.tensor(factors, dtype=batch["weights"].dtype)[:, None]


def autograd_loop(kind: str, dtype: torch.dtype, batch: Batch) -> list[dict[str, Tensor]]:
    """Gradients by one backward pass per patient: no vmap, no functional call."""
    module, patient_losses = part_of(kind, dtype).module, loss_with(dtype)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = []
    for patient in range(len(batch["weights"])):
        alone = {name: value[[patient]] for name, value in batch.items()}
        (loss,) = patient_losses(module, alone)
        raw = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(trained, raw, strict=True)))
    return found


def norm(arrays: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().pow(2).sum()) for value in arrays.values()))


def reference_sum(gradients: list[dict[str, Tensor]], bound: float) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in gradients[0].items()}
    for gradient in gradients:
        factor = min(1.0, bound / max(norm(gradient), 1e-300))
        for name, value in gradient.items():
            total[name] += factor * value.double()
    return total


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return norm({name: value.double() - second[name].double() for name, value in first.items()})


def largest_change(engine: ClippingEngine, batch: Batch, bound: float) -> float:
    """How far one patient's leaving moves the sum, in units of the bound."""
    whole = engine.clipped_sum(batch, max_grad_norm=bound)
    return max(
        difference(whole, engine.clipped_sum(without(batch, row), max_grad_norm=bound)) / bound
        for row in range(len(batch["weights"]))
    )


def duplicates_and_an_outlier(kind: str, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """Six times the same patient beside another one: what moves a coupled loss most."""
    two = batch_of(kind, dtype, patients=2, studies=1, seed=seed)
    return {name: value[[0, 0, 0, 1, 0, 0, 0]] for name, value in two.items()}


# --- the sum is the sum -------------------------------------------------------------------------------------


@all_engines
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    ratios=st.lists(RATIOS, min_size=1, max_size=4),
    studies=st.integers(1, 3),
    bound=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_the_clipped_sum_is_that_of_a_loop_over_patients(
    makes: MakesEngine, kind: str, ratios: list[float], studies: int, bound: float, seed: int
) -> None:
    batch = batch_of(kind, torch.float64, patients=len(ratios), studies=studies, seed=seed)
    at_ratios(batch, [norm(raw) for raw in autograd_loop(kind, torch.float64, batch)], ratios, bound)
    gradients = autograd_loop(kind, torch.float64, batch)
    assert [norm(gradient) / bound for gradient in gradients] == pytest.approx(ratios, rel=1e-9)
    expected = reference_sum(gradients, bound)
    found = engine_of(kind, torch.float64, makes=makes).clipped_sum(batch, max_grad_norm=bound)
    assert found.keys() == expected.keys()
    assert difference(found, expected) <= 1e-9 * bound
    single = engine_of(kind, torch.float32, makes=makes)
    rounded = single.clipped_sum(in_precision(batch, torch.float32), max_grad_norm=bound)
    assert difference(rounded, expected) <= 1e-4 * bound * max(1, len(ratios))


@all_engines
@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_array_is_in_the_sum_and_has_a_gradient(makes: MakesEngine, kind: str) -> None:
    module = part_of(kind, torch.float64).module
    batch = batch_of(kind, torch.float64, patients=4, studies=2, seed=0)
    found = engine_of(kind, torch.float64, makes=makes).clipped_sum(batch, max_grad_norm=1.0)
    trained = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    assert {name: value.shape for name, value in found.items()} == trained
    silent = {name for name, value in found.items() if not value.abs().max() > 1e-12}
    assert all(name.endswith("k_proj.bias") for name in silent)  # softmax ignores what all keys share


@all_engines
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_bounds_memory_and_not_results(makes: MakesEngine, kind: str) -> None:
    batch = batch_of(kind, torch.float64, patients=5, studies=2, seed=1)
    whole = engine_of(kind, torch.float64, chunk=16, makes=makes).clipped_sum(batch, max_grad_norm=0.5)
    for chunk in (1, 2, 5):
        parts = engine_of(kind, torch.float64, chunk=chunk, makes=makes).clipped_sum(batch, max_grad_norm=0.5)
        assert difference(whole, parts) <= 1e-12


@all_engines
@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_weight_zero_changes_nothing(makes: MakesEngine, kind: str) -> None:
    batch = batch_of(kind, torch.float64, patients=3, studies=2, seed=2)
    engine = engine_of(kind, torch.float64, makes=makes)
    expected = engine.clipped_sum(batch, max_grad_norm=0.5)
    other = batch_of(kind, torch.float64, patients=3, studies=2, seed=3)
    padding = batch["weights"] == 0
    refilled = {name: value.clone() for name, value in batch.items()}
    shared = min(batch["texts"].shape[-1], other["texts"].shape[-1])
    refilled["images"][padding] = other["images"][padding]
    refilled["texts"][padding, :shared] = other["texts"][padding, :shared]
    assert difference(expected, engine.clipped_sum(refilled, max_grad_norm=0.5)) <= 1e-12


@all_engines
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_drawn_gives_zeros_without_a_forward_pass(
    makes: MakesEngine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(kind, torch.float32, makes=makes)
    batch = batch_of(kind, torch.float32, patients=1, studies=2, seed=0)
    module = part_of(kind, torch.float32).module

    def refuse(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        pytest.fail("a forward pass on nobody")

    monkeypatch.setattr(module, "forward", refuse)
    empty = engine.clipped_sum({name: value[:0] for name, value in batch.items()}, max_grad_norm=1.0)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert empty.keys() == trained.keys()
    for name, value in empty.items():
        assert torch.equal(value, torch.zeros_like(trained[name]))


@all_engines
def test_weights_loaded_later_are_the_ones_differentiated(makes: MakesEngine) -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    engine = makes(part.module, loss_with(torch.float32))
    batch = batch_of("heads", torch.float32, patients=2, studies=1, seed=0)
    first = engine.clipped_sum(batch, max_grad_norm=1.0)
    part.load({name: value[::-1].copy() for name, value in part.arrays().items()})
    assert difference(first, engine.clipped_sum(batch, max_grad_norm=1.0)) > 1e-3


# --- one patient moves it by at most the bound --------------------------------------------------------------


@all_engines
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    ratios=st.lists(RATIOS, min_size=2, max_size=4),
    bound=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_one_patient_moves_the_sum_by_at_most_the_bound(
    makes: MakesEngine, kind: str, ratios: list[float], bound: float, seed: int
) -> None:
    engine = engine_of(kind, torch.float64, makes=makes)
    batch = batch_of(kind, torch.float64, patients=len(ratios), studies=2, seed=seed)
    at_ratios(batch, [norm(raw) for raw in autograd_loop(kind, torch.float64, batch)], ratios, bound)
    assert largest_change(engine, batch, bound) <= 1 + 1e-9


@all_engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nor_do_duplicates_beside_an_outlier_however_large(
    makes: MakesEngine, kind: str, dtype: torch.dtype
) -> None:
    engine = engine_of(kind, dtype, makes=makes)
    batch = duplicates_and_an_outlier(kind, dtype)
    for loudness in (1.0, 1e6, 1e30):
        louder = {**batch, "weights": batch["weights"] * loudness}
        slack = 1e-9 if dtype is torch.float64 else 1e-5
        assert largest_change(engine, louder, 0.1) == pytest.approx(1, abs=slack)


@all_engines
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_without_a_finite_gradient_counts_as_zero_and_poisons_nobody(
    makes: MakesEngine, kind: str, value: float
) -> None:
    engine = engine_of(kind, torch.float32, makes=makes)
    batch = batch_of(kind, torch.float32, patients=4, studies=2, seed=4)
    batch["weights"][2] = value
    found = engine.clipped_sum(batch, max_grad_norm=0.1)
    others = engine.clipped_sum(without(batch, 2), max_grad_norm=0.1)
    assert norm(others) > 1e-3
    assert difference(found, others) <= (0.1 * (1 + 1e-5) if value == 1e38 else 1e-6)


@all_engines
@pytest.mark.parametrize("value", NOT_FINITE)
def test_nor_does_a_patient_whose_inputs_are_not_finite(makes: MakesEngine, value: float) -> None:
    engine = engine_of("heads", torch.float32, makes=makes)
    batch = batch_of("heads", torch.float32, patients=4, studies=2, seed=4)
    batch["images"][1, 0, 3] = value
    found = engine.clipped_sum(batch, max_grad_norm=0.1)
    others = engine.clipped_sum(without(batch, 1), max_grad_norm=0.1)
    assert math.isfinite(norm(found))
    assert difference(found, others) <= 0.1 * (1 + 1e-5)


# --- planted mistakes ---------------------------------------------------------------------------------------


class Loose:
    """Clips 10 % too late."""

    def __init__(self, engine: ClippingEngine) -> None:
        self._engine = engine

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        return self._engine.clipped_sum(batch, max_grad_norm=1.1 * max_grad_norm)


class Mean(Loose):
    """Divides by the true batch, then multiplies by a public one of 8."""

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        total = self._engine.clipped_sum(batch, max_grad_norm=max_grad_norm)
        return {name: 8 * value / max(1, len(batch["weights"])) for name, value in total.items()}


class RawGradients:
    """Per-patient gradients clipped as ``_factors`` says; correct if that is the engine's rule."""

    def __init__(self, gradients: Callable[[Batch], list[dict[str, Tensor]]]) -> None:
        self._gradients = gradients

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[str, Tensor]:
        rows = [self._clipped(raw, max_grad_norm) for raw in self._gradients(batch)]
        return {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]}

    def _clipped(self, raw: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
        factor = min(1.0, bound / max(norm(raw), 1e-300))
        return {name: factor * value for name, value in raw.items()}


class ArrayByArray(RawGradients):
    """Clips each array to the bound instead of all of them together."""

    def _clipped(self, raw: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
        alone = super()._clipped
        return {name: alone({name: value}, bound)[name] for name, value in raw.items()}


class Unclipped(RawGradients):
    """Only multiplies."""

    def _clipped(self, raw: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
        return raw


def loop_gradients(batch: Batch) -> list[dict[str, Tensor]]:
    return autograd_loop("heads", torch.float64, batch)


def in_batch_gradients(batch: Batch) -> list[dict[str, Tensor]]:
    """What hooks on InfoNCE call a per-sample gradient: through one row's own copy of the weights."""
    module = part_of("heads", torch.float64).module
    patients = len(batch["weights"])
    copies = {
        name: value.detach().expand(patients, *value.shape) for name, value in module.named_parameters()
    }

    def loss(weights: dict[str, Tensor]) -> Tensor:
        images, texts = torch.func.vmap(lambda own, *inputs: functional_call(module, own, inputs))(
            weights, batch["images"], batch["texts"]
        )
        nothing = torch.eye(patients, dtype=torch.bool)
        return patients * infonce_loss(
            images[:, 0], texts[:, 0], same_text=nothing, inverse_temperature=SCALE
        )

    stacked = torch.func.grad(loss)(copies)
    return [{name: value[row] for name, value in stacked.items()} for row in range(patients)]


def test_the_same_attack_leaves_a_right_engine_alone() -> None:
    batch = duplicates_and_an_outlier("heads", torch.float64)
    assert largest_change(RawGradients(loop_gradients), batch, 1e-3) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("broken", "at_least"),
    [
        (Loose(engine_of("heads", torch.float64)), 1.09),
        (Mean(engine_of("heads", torch.float64)), 1.1),
        (ArrayByArray(loop_gradients), 1.3),
        (Unclipped(loop_gradients), 10.0),
        (RawGradients(in_batch_gradients), 2.0),
    ],
    ids=["ten percent loose", "mean", "array by array", "unclipped", "in-batch negatives"],
)
def test_the_attack_breaks_every_planted_mistake(broken: ClippingEngine, at_least: float) -> None:
    batch = duplicates_and_an_outlier("heads", torch.float64)
    small = {name: value[2:5] for name, value in batch.items()}
    assert max(largest_change(broken, each, 1e-3) for each in (batch, small)) > at_least


@pytest.mark.parametrize("mistake", [Loose, Mean])
def test_the_comparison_with_the_loop_sees_mistakes_too(mistake: type[Loose]) -> None:
    batch = batch_of("heads", torch.float64, patients=3, studies=1, seed=0)
    expected = reference_sum(loop_gradients(batch), 1e-3)
    found = mistake(engine_of("heads", torch.float64)).clipped_sum(batch, max_grad_norm=1e-3)
    assert difference(found, expected) > 1e-5


# --- norms and factors --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    exponent=st.floats(-30, 30),
    bound=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    width=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_a_clipped_float32_row_is_at_most_the_bound(
    exponent: float, bound: float, width: int, seed: int
) -> None:
    rows = {
        name: torch.randn(2, width, generator=torch.Generator().manual_seed(seed + side)) * 10**exponent
        for side, name in enumerate("ab")
    }
    norms = raw_norms(rows)
    factors = clip_factors(norms, max_grad_norm=bound)
    for row in range(2):
        clipped = {name: factors.float()[row] * value[row] for name, value in rows.items()}
        raw = norm({name: value[row] for name, value in rows.items()})
        assert float(norms[row]) == pytest.approx(raw, rel=1e-12)
        assert norm(clipped) <= bound * (1 + 1e-6)
        assert norm(clipped) == pytest.approx(min(raw, bound), rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(exponent=st.floats(-300, 42), bound=st.sampled_from([1e-12, 1e-6, 1.0, 1e12]))
def test_no_factor_is_rounded_past_the_bound(exponent: float, bound: float) -> None:
    norms = torch.tensor([10.0**exponent], dtype=torch.float64)
    factor = clip_factors(norms, max_grad_norm=bound).float().double()
    assert 0 <= float(factor * norms) <= bound * (1 + 1e-6)


def test_a_factor_float32_cannot_hold_would_have_passed_the_bound() -> None:
    norms = torch.tensor([1.33e41], dtype=torch.float64)
    naive = (1e-4 / norms).float().double() * norms
    assert float(naive) > 1.8e-4
    assert clip_factors(norms, max_grad_norm=1e-4).tolist() == [0]


def test_factors_at_the_edges() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, math.inf, math.nan], dtype=torch.float64)
    assert clip_factors(norms, max_grad_norm=1.0).tolist() == [1, 1, 1, 0.5, 0, 0]


def test_long_vectors_are_not_under_estimated() -> None:
    value = torch.full((1, 4_000_000), 0.1)
    expected = float(torch.tensor(0.1).double()) * 2000
    assert float(raw_norms({"a": value})) == pytest.approx(expected, rel=1e-12)


# --- refusals -----------------------------------------------------------------------------------------------


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.stem(images), texts


@all_engines
@pytest.mark.parametrize("trained", [True, False])
def test_batch_norm_is_refused_by_name_even_when_frozen(makes: MakesEngine, trained: bool) -> None:
    module = WithBatchNorm()
    module.stem[1].requires_grad_(trained)
    with pytest.raises(UnsoundTraining, match=r"layer 'stem\.1' is BatchNorm1d: .* GroupNorm or LayerNorm"):
        makes(module, loss_with(torch.float32))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.SyncBatchNorm(2)])
def test_every_kind_of_batch_norm_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsoundTraining, match="its statistics mix patients"):
        refuse_batch_statistics(nn.Sequential(layer))


@pytest.mark.parametrize("layer", [nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.Linear(2, 2)])
def test_layers_that_keep_rows_apart_are_accepted(layer: nn.Module) -> None:
    refuse_batch_statistics(nn.Sequential(layer))


@all_engines
def test_nothing_to_train_is_refused(makes: MakesEngine) -> None:
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    part.module.requires_grad_(False)
    with pytest.raises(UnsoundTraining, match="no parameter of the module requires a gradient"):
        makes(part.module, loss_with(torch.float32))


@all_engines
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused(makes: MakesEngine, bound: float) -> None:
    batch = batch_of("heads", torch.float32, patients=1, studies=1, seed=0)
    with pytest.raises(UnsoundTraining, match=r"expected max_grad_norm=.* > 0"):
        engine_of("heads", torch.float32, makes=makes).clipped_sum(batch, max_grad_norm=bound)
