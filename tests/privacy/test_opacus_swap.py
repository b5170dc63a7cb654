"""In a plain Opacus loop each row counts once, clipped and noised, or the step is refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privacy.errors import UnsoundTraining
from privacy.opacus_swap import BookKeepingPrivacyEngine, RecordedModule

WIDTH, CLASSES, ROWS = 6, 3, 8
pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:Full backward hook is firing")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, WIDTH, generator=generator)
    return inputs, torch.randint(CLASSES, (rows,), generator=generator)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def private(
    module: nn.Module,
    criterion: Any = None,
    *,
    engine: type[PrivacyEngine] = BookKeepingPrivacyEngine,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "poisson_sampling": False, **options}
    found: tuple[Any, Any, Any, Any] = engine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        criterion=criterion or nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(*data()), batch_size=4),
        grad_sample_mode="ghost",
        **settings,
    )
    return found


def gradient_of(script: tuple[Any, Any, Any, Any], *, scale: float = 1.0, rows: int = ROWS) -> Tensor:
    model, optimizer, criterion, _ = script
    inputs, targets = data(rows)
    optimizer.zero_grad()
    (scale * criterion(model(inputs), targets)).backward()
    optimizer.step()
    return torch.cat([value.grad.flatten() for value in optimizer.params])


# --- what a step is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_that_of_opacus_for_either_reduction_and_a_scaled_loss(
    reduction: str, scale: float
) -> None:
    def script(engine: type[PrivacyEngine]) -> tuple[Any, Any, Any, Any]:
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        return private(linear(), criterion, engine=engine, loss_reduction=reduction)

    expected = gradient_of(script(PrivacyEngine), scale=scale)
    assert torch.allclose(gradient_of(script(BookKeepingPrivacyEngine), scale=scale), expected, rtol=1e-4)


def test_the_loss_is_the_criterions_own() -> None:
    module = linear()
    model, _, criterion, _ = private(module)
    inputs, targets = data()
    expected = F.cross_entropy(module(inputs), targets)
    assert criterion(model(inputs), targets).item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        assert criterion(model(inputs), targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_losses_of_several_places_in_a_row_are_one_loss_a_row() -> None:
    module = nn.Conv1d(1, CLASSES, 2)
    model, optimizer, criterion, _ = private(module, max_grad_norm=1e6)
    inputs, targets = data()[0][:, None], torch.randint(CLASSES, (ROWS, WIDTH - 1))
    expected = torch.autograd.grad(F.cross_entropy(module(inputs), targets), list(module.parameters()))
    criterion(model(inputs), targets).backward()
    optimizer.step()
    for value, other in zip(module.parameters(), expected, strict=True):
        assert value.grad is not None
        assert torch.allclose(value.grad, other * ROWS / 4, rtol=1e-4, atol=1e-6)  # the expected batch is 4


def test_a_physical_batch_bounds_memory_and_not_results() -> None:
    expected = gradient_of(private(linear()))
    model, optimizer, criterion, _ = private(linear())
    loader = DataLoader(TensorDataset(*data()), batch_size=ROWS)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for inputs, targets in parts:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    assert torch.allclose(
        torch.cat([value.grad.flatten() for value in optimizer.params]), expected, rtol=1e-4, atol=1e-7
    )


def test_dropout_keeps_rows_apart_and_is_allowed() -> None:
    gradient_of(private(nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Dropout(0.5)).train()))


def test_nobody_drawn_is_a_step_of_noise_alone_whatever_the_module_makes_of_no_rows() -> None:
    class Fussy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).view(-1, 1, CLASSES).squeeze(1)  # fails on no rows

    script = private(Fussy(WIDTH, CLASSES))
    assert not gradient_of(script, rows=0).any()
    assert gradient_of(private(Fussy(WIDTH, CLASSES), noise_multiplier=1.0), rows=0).all()
    model, _, criterion, _ = script
    inputs, targets = data(0)
    assert criterion(model(inputs), targets).item() == 0


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
def test_a_target_epsilon_sets_the_noise_as_in_opacus() -> None:
    def noise_multiplier(engine: type[PrivacyEngine]) -> float:
        module = linear()
        _, optimizer, *_ = engine(accountant="rdp").make_private_with_epsilon(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(*data()), batch_size=4),
            target_epsilon=8.0,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
        )
        return float(optimizer.noise_multiplier)

    assert noise_multiplier(BookKeepingPrivacyEngine) == noise_multiplier(PrivacyEngine)


def test_the_module_is_its_own_again() -> None:
    module = linear()
    names = list(module.state_dict())
    script = private(module)
    gradient_of(script)
    assert script[0].to_standard_module() is module
    assert list(module.state_dict()) == names
    assert not any(hasattr(value, "grad_sample") for value in module.parameters())


# --- noise and sampling -------------------------------------------------------------------------------------


def seeded_noise(**options: Any) -> list[Tensor]:
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        script = private(linear(), noise_multiplier=1.0, **options)
        torch.manual_seed(7)
        found.append(gradient_of(script))
    return found


def test_a_training_seed_does_not_repeat_the_noise() -> None:
    first, second = seeded_noise()
    assert not torch.isclose(first, second).any()


def test_it_does_in_opacus_and_where_a_generator_is_given() -> None:
    assert torch.equal(*seeded_noise(engine=PrivacyEngine))
    first, second = (
        gradient_of(private(linear(), noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(7)))
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_nor_does_a_training_seed_repeat_who_is_drawn() -> None:
    def drawn(engine: type[PrivacyEngine]) -> list[list[int]]:
        *_, loader = private(linear(), engine=engine, poisson_sampling=True)
        torch.manual_seed(7)
        return [batch for _ in range(20) for batch in loader.batch_sampler]

    assert drawn(PrivacyEngine) == drawn(PrivacyEngine)
    assert drawn(BookKeepingPrivacyEngine) != drawn(BookKeepingPrivacyEngine)


# --- refusals -----------------------------------------------------------------------------------------------


def infonce(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def detached_negatives(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.detach().T, torch.arange(len(outputs)), reduction="none")


def earlier_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.cumsum(0), targets, reduction="none")


def detached_earlier_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs + outputs.detach().cumsum(0), targets, reduction="none")


def detached_later_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs + outputs.detach().flip(0).cumsum(0).flip(0), targets, reduction="none")


def divided_by_the_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none") / len(outputs)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (infonce, r"gives other rows a gradient in '2\.weight': in-batch negatives"),
        (detached_negatives, "changed when other rows left the batch"),
        (earlier_rows, r"gives other rows a gradient in '2\.weight'"),
        (detached_earlier_rows, "the loss of a row changed when other rows left"),
        (detached_later_rows, "the loss of a row changed when other rows left"),
        (divided_by_the_batch, "changed when other rows left the batch"),
        (lambda outputs, targets: F.cross_entropy(outputs, targets), r"each of the 8 rows, got shape \(\)"),
    ],
    ids=[
        "infonce",
        "detached negatives",
        "earlier rows",
        "detached earlier rows",
        "detached later rows",
        "divided by the batch",
        "a mean",
    ],
)
def test_a_loss_that_couples_rows_is_refused_at_the_first_step(criterion: Any, text: str) -> None:
    with pytest.raises(UnsoundTraining, match=text):
        gradient_of(private(linear(), criterion))


class Centred(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs - outputs.detach().mean(0)


class Cumulated(nn.Linear):
    def __init__(self, *, backwards: bool) -> None:
        super().__init__(WIDTH, CLASSES)
        self._backwards = backwards

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        seen = outputs.detach().flip(0).cumsum(0).flip(0) if self._backwards else outputs.detach().cumsum(0)
        return outputs + seen


class AllInOneRow(nn.Module):
    """Each row is scaled alike, but by copies of the scale that are all counted as one row's."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self._row = row

    def forward(self, inputs: Tensor) -> Tensor:
        rows = len(inputs)
        return (inputs * self.scale.expand(rows, rows, -1)[self._row])[:, :CLASSES]


@pytest.mark.parametrize("row", [0, -1])
def test_gradients_that_all_land_in_one_row_are_refused(row: int) -> None:
    with pytest.raises(UnsoundTraining, match="the loss of one row gives other rows a gradient in 'scale'"):
        gradient_of(private(AllInOneRow(row)))


@pytest.mark.parametrize("silent", [0, -1])
def test_rows_are_looked_at_until_both_ends_have_a_gradient(silent: int) -> None:
    model, optimizer, criterion, _ = script = private(AllInOneRow(silent))
    inputs, targets = data()
    ignored = torch.where(torch.arange(ROWS) == silent % ROWS, targets, criterion._criterion.ignore_index)
    criterion(model(inputs), ignored).backward()  # nothing reaches the row but its own loss
    optimizer.step()
    with pytest.raises(UnsoundTraining, match="the loss of one row gives other rows a gradient in 'scale'"):
        gradient_of(script)


def test_a_row_that_is_not_finite_hides_no_coupling() -> None:
    couple = torch.ones(ROWS, ROWS).tril()
    couple[:, 2] = 0.0

    def earlier_but_one(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(couple @ outputs.nan_to_num(), targets, reduction="none")

    module = nn.Linear(WIDTH, CLASSES, bias=False)  # a bias does not meet the input that is not finite
    model, _, criterion, _ = private(module, earlier_but_one)
    inputs, targets = data()
    inputs[2] = torch.nan
    with pytest.raises(UnsoundTraining, match="gives other rows a gradient"):
        criterion(model(inputs), targets)


@pytest.mark.parametrize(
    "module",
    [Centred(WIDTH, CLASSES), Cumulated(backwards=False), Cumulated(backwards=True)],
    ids=["centred", "earlier rows", "later rows"],
)
def test_a_module_that_mixes_rows_is_refused(module: nn.Module) -> None:
    with pytest.raises(UnsoundTraining, match="the module's outputs for a row changed"):
        gradient_of(private(module))


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(UnsoundTraining, match=r"is BatchNorm1d: .* GroupNorm or LayerNorm"):
        private(nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.BatchNorm1d(CLASSES)))


def test_a_row_in_two_forward_passes_of_one_step_is_refused() -> None:
    model, optimizer, criterion, _ = private(linear())
    for _ in range(2):
        criterion(model(data()[0]), data()[1]).backward()
    with pytest.raises(UnsoundTraining, match="expected one forward and backward pass a step, got 2"):
        optimizer.step()


Loop = Callable[[Any, Any, Any], object]


@pytest.mark.parametrize(
    ("loop", "text"),
    [
        (lambda model, criterion, x: criterion(model(x), data()[1]), "needs loss.backward"),
        (
            lambda model, criterion, x: torch.autograd.backward(F.cross_entropy(model(x), data()[1])),
            "criterion ret",
        ),
        (lambda model, criterion, x: None, "one forward and backward pass a step, got 0"),
    ],
    ids=["no backward", "another criterion", "nothing"],
)
def test_a_step_without_a_loss_of_the_criterion_is_refused(loop: Loop, text: str) -> None:
    model, optimizer, criterion, _ = private(linear())
    loop(model, criterion, data()[0])
    with pytest.raises(UnsoundTraining, match=text):
        optimizer.step()


def test_weight_decay_in_the_loss_is_refused_for_it_would_be_lost() -> None:
    module = linear()
    model, optimizer, criterion, _ = private(module)
    decay = sum(value.square().sum() for value in module.parameters())
    (criterion(model(data()[0]), data()[1]) + decay).backward()
    with pytest.raises(UnsoundTraining, match=r"'0\.weight' got a gradient that was not recorded"):
        optimizer.step()


def test_a_gradient_is_not_used_twice() -> None:
    model, optimizer, criterion, _ = private(linear())
    gradient_of((model, optimizer, criterion, None))
    criterion(model(data()[0]), data()[1]).backward()
    with pytest.raises(ValueError, match="Gradients haven't been cleared"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_first": False}, "batch_first=False"),
        ({"wrap_model": False}, "wrap_model=False"),
        ({"clipping": "per_layer"}, "clipping='per_layer'"),
        ({"loss_reduction": "sum"}, "expected criterion.reduction='sum' as loss_reduction, got 'mean'"),
    ],
)
def test_what_only_opacus_does_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsoundTraining, match=text):
        private(linear(), **options)


def test_a_distributed_mode_is_refused() -> None:
    with pytest.raises(UnsoundTraining, match="grad_sample_mode='ghost_fsdp' is distributed"):
        BookKeepingPrivacyEngine().make_private(grad_sample_mode="ghost_fsdp")


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UnsoundTraining, match="no parameter of the module requires a gradient"):
        RecordedModule(linear().requires_grad_(False), loss_reduction="mean")
