"""Two changed lines, the same gradients, the same epsilon, beside Opacus itself: a classifier and CLIP."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from encoders.parts import trainable_part
from privacy.hooks import repaired_copy
from privacy.opacus_swap import BookKeepingPrivacyEngine
from tests.encoders.micro import EMBEDDING, TEXTS, micro_encoder, random_images

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "opacus_swap.py"))
ROWS, BATCH = 48, 12
Task = Callable[[], tuple[nn.Module, Any, TensorDataset]]
pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:Full backward hook is firing")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classifier() -> tuple[nn.Module, Any, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    return model, nn.CrossEntropyLoss(), TensorDataset(torch.randn(ROWS, 1, 8, 8), torch.randint(3, (ROWS,)))


class Pairs(nn.Module):
    """Embeddings (B, 2, D) of pairs, so that one loop serves both tasks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return torch.stack(self.module(images, texts), dim=1)


def clip() -> tuple[nn.Module, Any, TensorDataset]:
    torch.manual_seed(0)
    part = trainable_part(micro_encoder(), "full", lora_rank=1)
    words = [TEXTS[row % len(TEXTS)] for row in range(ROWS)]
    anchored = EXAMPLE["AnchoredLoss"](*F.normalize(torch.randn(2, 6, EMBEDDING), dim=-1))

    def criterion(embeddings: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = anchored((embeddings[:, 0], embeddings[:, 1]))
        return losses

    pairs = part.inputs(random_images(ROWS), words)
    return Pairs(part.module), criterion, TensorDataset(*pairs, torch.zeros(ROWS))


TASKS = [classifier, clip]


def prepared(engine: PrivacyEngine, task: Task, **options: Any) -> tuple[Any, Any, Any, Any]:
    """The lines of a script before its loop."""
    module, criterion, data = task()
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if type(engine) is PrivacyEngine:
        module, parameters = repaired_copy(module)
        module.train()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    found: tuple[Any, Any, Any, Any] = engine.make_private(
        module=module,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=DataLoader(data, batch_size=BATCH),
        max_grad_norm=0.5,
        grad_sample_mode="ghost",
        **options,
    )
    return found


def trained(engine: PrivacyEngine, task: Task, *, epochs: int, **options: Any) -> list[list[Tensor]]:
    """The gradients of every step of a plain loop."""
    model, optimizer, criterion, loader = prepared(engine, task, **options)
    steps = []
    for _ in range(epochs):
        for *inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(*inputs), targets)
            loss.backward()
            optimizer.step()
            steps.append([value.grad.clone() for value in optimizer.params])
    return steps


@pytest.mark.parametrize("task", TASKS)
def test_without_noise_every_step_has_the_gradients_of_opacus(task: Task) -> None:
    options: dict[str, Any] = {"epochs": 2, "noise_multiplier": 0.0, "poisson_sampling": False}
    expected = trained(PrivacyEngine(), task, **options)
    found = trained(BookKeepingPrivacyEngine(), task, **options)
    assert len(found) == len(expected) == 2 * ROWS // BATCH
    for ours, theirs in zip(found, expected, strict=True):
        first, second = (torch.cat([each.flatten() for each in arrays]) for arrays in (ours, theirs))
        assert float((first - second).norm() / second.norm()) <= 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_the_same_settings_give_the_same_epsilon(task: Task) -> None:
    options: dict[str, Any] = {"noise_multiplier": 1.0, "poisson_sampling": True, "epochs": 1}
    engines = PrivacyEngine(accountant="rdp"), BookKeepingPrivacyEngine(accountant="rdp")
    for engine in engines:
        trained(engine, task, **options)
    expected, found = (engine.get_epsilon(1e-5) for engine in engines)
    assert found == pytest.approx(expected, rel=1e-12)
    assert engines[0].accountant.history == engines[1].accountant.history


def test_the_example_runs_and_says_what_was_spent(capsys: pytest.CaptureFixture[str]) -> None:
    EXAMPLE["main"]()
    printed = capsys.readouterr().out
    assert "classifier: loss" in printed
    assert "CLIP: loss" in printed
    assert printed.count("epsilon") == 2
