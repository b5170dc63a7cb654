"""What Opacus would get wrong in silence is refused by name, and the module it is shown stays as it is."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.parts import trainable_part
from privacy.engine import Batch
from privacy.errors import UnsoundTraining
from privacy.hooks import HooksEngine, repaired_copy
from tests.encoders.micro import micro_encoder
from tests.privacy.test_engine import (
    KINDS,
    autograd_loop,
    batch_of,
    difference,
    loss_with,
    part_of,
    reference_sum,
)

WIDTH, TOKENS = 4, 3
Call = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Toy(nn.Module):
    """Rows (B, L, D) through one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(first), second


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.linear(rows.transpose(0, 1)).transpose(0, 1)
        return outputs


class AllInOneRow(nn.Module):
    """Gives its layer a copy of the batch for each row, and takes one copy: all gradients land in its row."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self._row = row

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.linear(rows.expand(len(rows), *rows.shape))[self._row]
        return outputs


class Positions(nn.Module):
    """Position ids (L,), which no axis of says what the rows are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = rows * self.table(torch.arange(TOKENS))
        return outputs


class Bypassed(nn.Module):
    """Uses its layer's weight outside the layer, once or besides."""

    def __init__(self, *, besides: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self._besides = besides

    def forward(self, rows: Tensor) -> Tensor:
        inside = self.linear(rows) if self._besides else rows
        return F.linear(inside, self.linear.weight)


class Tied(nn.Module):
    """One weight in two layers, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.first(self.first(rows).tanh()).tanh())
        return outputs


class Scaled(nn.Module):
    """A scale beside a layer and a buffer: what a CLIP model with a trained logit scale looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.ids = nn.Buffer(torch.arange(3))

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.logit_scale * self.linear(rows)
        return outputs


def layer_state(layer: nn.Module) -> tuple[object, ...]:
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    return layer.training, sorted(vars(layer)), [dict(each) for each in hooks], list(layer._parameters)


def toy_losses(call: Call, batch: Batch) -> Tensor:
    outputs, weights = call(batch["rows"], batch["weights"])
    return (weights * outputs.flatten(1).sin().sum(1)).flatten()


def toy_batch(patients: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(patients, TOKENS, WIDTH, generator=generator),
        "weights": torch.rand(patients, generator=generator),
    }


def toy_loop(module: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    named = {name: value for name, value in module.named_parameters() if value.requires_grad}
    losses = toy_losses(module, batch)
    found = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return [dict(zip(named, each, strict=True)) for each in found]


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_a_loop_over_patients_of_several_studies(kind: str) -> None:
    batch = batch_of(kind, torch.float64, patients=5, studies=3, seed=1)
    gradients = autograd_loop(kind, torch.float64, batch)
    engine = HooksEngine(part_of(kind, torch.float64).module, loss_with(torch.float64))
    for bound in (1e-3, 1.0, 50.0):
        found = engine.clipped_sum(batch, max_grad_norm=bound)
        assert difference(found, reference_sum(gradients, bound)) <= 1e-9 * bound


@pytest.mark.parametrize("physical_batch", [1, 2, 5, 7])
def test_the_physical_batch_bounds_memory_and_not_results(physical_batch: int) -> None:
    module, losses = part_of("full", torch.float64).module, loss_with(torch.float64)
    batch = batch_of("full", torch.float64, patients=5, studies=2, seed=1)
    whole = HooksEngine(module, losses).clipped_sum(batch, max_grad_norm=0.5)
    parts = HooksEngine(module, losses, physical_batch=physical_batch)
    assert difference(whole, parts.clipped_sum(batch, max_grad_norm=0.5)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_stays_as_it_is(kind: str) -> None:
    module = trainable_part(micro_encoder(), kind, lora_rank=2).module  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layers = [layer_state(layer) for layer in module.modules()]
    state = torch.random.get_rng_state()
    engine = HooksEngine(module, loss_with(torch.float32))
    engine.clipped_sum(batch_of(kind, torch.float32, patients=2, studies=1, seed=0), max_grad_norm=1.0)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert layers == [layer_state(layer) for layer in module.modules()]
    for value in module.parameters():
        assert value.grad is None
        assert not hasattr(value, "grad_sample")


def test_dropout_of_a_module_that_evaluates_stays_off() -> None:
    module = Toy(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))).eval()
    batch = toy_batch(4)
    found = HooksEngine(module, toy_losses).clipped_sum(batch, max_grad_norm=0.5)
    assert difference(found, reference_sum(toy_loop(module, batch), 0.5)) <= 1e-5


def test_a_weight_in_two_layers_and_a_layer_used_twice_are_right() -> None:
    module, batch = Toy(Tied()), toy_batch(4)
    found = HooksEngine(module, toy_losses).clipped_sum(batch, max_grad_norm=0.5)
    assert difference(found, reference_sum(toy_loop(module, batch), 0.5)) <= 1e-5


def test_a_parameter_the_loss_does_not_use_gets_zeros() -> None:
    module = Toy(nn.Linear(WIDTH, WIDTH))
    module.spare = nn.Linear(WIDTH, 1)
    found = HooksEngine(module, toy_losses).clipped_sum(toy_batch(2), max_grad_norm=1.0)
    assert not found["spare.weight"].any()
    assert found["layer.weight"].any()


def test_the_copy_shares_its_weights_and_gives_the_same_outputs() -> None:
    part = trainable_part(micro_encoder(), "full", lora_rank=1)
    copied, parameters = repaired_copy(part.module)
    batch = batch_of("full", torch.float32, patients=3, studies=1, seed=0)
    inputs = batch["images"].flatten(0, 1), batch["texts"].flatten(0, 1)
    for _ in range(2):
        for expected, found in zip(part.module(*inputs), copied(*inputs), strict=True):
            assert torch.equal(expected, found)
        with torch.no_grad():
            for value in part.module.parameters():
                value.mul_(0.9)
    assert parameters.keys() == {n for n, p in part.module.named_parameters() if p.requires_grad}


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patients", [2, TOKENS, 5])
@pytest.mark.parametrize(
    ("layer", "name"), [(TokensFirst(), "layer.linear.weight"), (Positions(), "layer.table.weight")]
)
def test_layers_without_the_rows_first_are_refused(layer: nn.Module, name: str, patients: int) -> None:
    with pytest.raises(UnsoundTraining, match=f"parameter '{name}': .* rows first"):
        HooksEngine(Toy(layer), toy_losses).clipped_sum(toy_batch(patients), max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("besides", "text"),
    [(False, "no gradient of each of the 2 rows"), (True, "do not add up to its gradient")],
)
def test_a_weight_used_outside_its_layer_is_refused(besides: bool, text: str) -> None:
    with pytest.raises(UnsoundTraining, match=rf"parameter 'layer\.linear\.weight': .*{text}"):
        HooksEngine(Toy(Bypassed(besides=besides)), toy_losses).clipped_sum(toy_batch(2), max_grad_norm=1.0)


def test_a_padding_token_whose_gradient_torch_drops_is_refused() -> None:
    module = Toy(nn.Embedding(5, WIDTH, padding_idx=0))
    batch = {"rows": torch.tensor([[0, 1], [2, 3]]), "weights": torch.ones(2)}
    with pytest.raises(UnsoundTraining, match=r"parameter 'layer\.weight': .*padding_idx"):
        HooksEngine(module, toy_losses).clipped_sum(batch, max_grad_norm=1.0)


def test_a_trained_logit_scale_is_refused_by_name() -> None:
    with pytest.raises(
        UnsoundTraining, match=r"'layer\.logit_scale' stands directly in a Scaled .*; freeze it"
    ):
        HooksEngine(Toy(Scaled()), toy_losses)
    frozen = Scaled()
    frozen.logit_scale.requires_grad_(False)
    HooksEngine(Toy(frozen), toy_losses)


def test_a_loss_that_couples_patients_is_refused() -> None:
    def coupled(call: Call, batch: Batch) -> Tensor:
        logits = call(batch["rows"].flatten(1), batch["weights"])[0]
        return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="none")

    engine = HooksEngine(Toy(nn.Linear(TOKENS * WIDTH, WIDTH)), coupled)
    with pytest.raises(UnsoundTraining, match="the loss of one patient has gradient in the rows of others"):
        engine.clipped_sum(toy_batch(4), max_grad_norm=1.0)


@pytest.mark.parametrize("patients", [2, 5])
@pytest.mark.parametrize("row", [0, -1])
def test_gradients_that_all_land_in_one_patients_row_are_refused(row: int, patients: int) -> None:
    engine = HooksEngine(Toy(AllInOneRow(row)), toy_losses)
    for _ in range(2):  # it does not get used to it
        with pytest.raises(
            UnsoundTraining, match=r"'layer\.linear\.\w+': the loss of one patient has gradient"
        ):
            engine.clipped_sum(toy_batch(patients), max_grad_norm=1.0)


@pytest.mark.parametrize("silent", [0, -1])
def test_patients_are_looked_at_until_both_ends_have_a_gradient(silent: int) -> None:
    engine = HooksEngine(Toy(AllInOneRow(silent)), toy_losses)
    batch = toy_batch(3)
    batch["weights"][torch.arange(3) != silent % 3] = 0.0  # nothing reaches the row but its own loss
    engine.clipped_sum(batch, max_grad_norm=1.0)
    with pytest.raises(UnsoundTraining, match="the loss of one patient has gradient in the rows of others"):
        engine.clipped_sum(toy_batch(3), max_grad_norm=1.0)


def test_calls_of_different_numbers_of_rows_are_refused() -> None:
    def two_calls(call: Call, batch: Batch) -> Tensor:
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        return toy_losses(call, batch) + toy_losses(call, twice)[: len(batch["rows"])]

    engine = HooksEngine(Toy(nn.Linear(WIDTH, WIDTH)), two_calls)
    with pytest.raises(UnsoundTraining, match=r"same number of rows, .* the 3 patients, got \[3, 6\]"):
        engine.clipped_sum(toy_batch(3), max_grad_norm=1.0)


def test_a_loss_that_is_not_one_a_patient_is_refused() -> None:
    engine = HooksEngine(Toy(nn.Linear(WIDTH, WIDTH)), lambda call, batch: toy_losses(call, batch).mean())
    with pytest.raises(UnsoundTraining, match=r"expected one loss a patient, \(3,\)"):
        engine.clipped_sum(toy_batch(3), max_grad_norm=1.0)


def test_what_no_engine_takes_is_refused() -> None:
    module = Toy(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(UnsoundTraining, match=r"expected physical_batch=0 >= 1"):
        HooksEngine(module, toy_losses, physical_batch=0)
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(UnsoundTraining, match=r"expected max_grad_norm=.* > 0"):
            HooksEngine(module, toy_losses).clipped_sum(toy_batch(1), max_grad_norm=bound)
    with pytest.raises(UnsoundTraining, match="is BatchNorm1d"):
        HooksEngine(Toy(nn.BatchNorm1d(WIDTH)), toy_losses)
    module.requires_grad_(False)
    with pytest.raises(UnsoundTraining, match="no parameter of the module requires a gradient"):
        HooksEngine(module, toy_losses)
