"""Several processes of one hospital release what one process would."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.nn import functional as F

from privacy.bookkeeping import BookKeepingEngine
from privacy.distributed import DistributedEngine, release_together
from privacy.engine import Batch
from privacy.errors import UnsoundTraining
from privacy.mechanism import AnchoredDpSgd
from privacy.noise import GaussianNoise

pytestmark = pytest.mark.slow

PROCESSES, PATIENTS, WIDTH = 2, 6, 5
ATTEMPTS = 3
MECHANISM = AnchoredDpSgd(max_grad_norm=0.5, noise_multiplier=2.0, sample_rate=0.1, steps=1)


class Pairs(nn.Module):
    """Two small towers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        for value in self.parameters():
            nn.init.normal_(value, generator=generator)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images).tanh(), self.text(texts).tanh()


def losses(call: Any, batch: Batch) -> Tensor:
    images, texts = call(batch["images"], batch["texts"])
    return F.mse_loss(images, texts, reduction="none").sum(1)


def batch() -> dict[str, Tensor]:
    rows = torch.randn(2, PATIENTS, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"images": rows[0], "texts": rows[1]}


def engine() -> BookKeepingEngine:
    return BookKeepingEngine(Pairs(), losses)


def share(rank: int, cut: int) -> dict[str, Tensor]:
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    return {name: value[part] for name, value in batch().items()}


def whole(bound: float) -> dict[str, Tensor]:
    return engine().clipped_sum(batch(), max_grad_norm=bound)


def largest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def _in_process(rank: int, folder: str) -> None:
    """What one of the processes does; it saves what it saw for the test to judge."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=5),
    )
    together = DistributedEngine(engine())
    seen: dict[str, Any] = {
        f"sum, first {cut}": together.clipped_sum(share(rank, cut), max_grad_norm=0.5)
        for cut in (3, 1, 0, PATIENTS)
    }
    for noise_number in range(2):
        noise = GaussianNoise(insecure_seed=noise_number) if rank == 0 else None
        released = release_together(MECHANISM, seen["sum, first 3"], noise)
        seen[f"released {noise_number}"] = dict(released.arrays)
        seen["noise_std"] = torch.tensor(released.noise_std)
    seen["refusals"] = [
        _refusal(lambda: together.clipped_sum(share(rank, 3), max_grad_norm=0.5 + rank)),
        _refusal(
            lambda: release_together(
                MECHANISM, seen["sum, first 3"], None if rank == 0 else GaussianNoise(insecure_seed=0)
            )
        ),
    ]
    torch.save(seen, os.path.join(folder, f"seen-{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort a process that takes its group down, after all was said


def _refusal(act: Any) -> str:
    try:
        act()
    except UnsoundTraining as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = _ran_together(tmp_path_factory)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(PROCESSES)]


def _ran_together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left what they saw.

    Gloo itself aborts a process now and then (seen with torch 2.13), which says nothing of ours: that is
    tried again. An exception of our code is another one (`ProcessRaisedException`) and fails at once.
    """
    for attempt in range(1, ATTEMPTS + 1):
        folder = tmp_path_factory.mktemp("processes")
        try:
            spawn(_in_process, args=(str(folder),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
        except ProcessExitedException:
            if attempt == ATTEMPTS:
                raise
        else:
            break
    return folder


@pytest.mark.parametrize("cut", [3, 1, 0, PATIENTS])
def test_the_sum_of_the_shares_is_the_sum_of_the_whole(seen: list[dict[str, Any]], cut: int) -> None:
    for process in seen:
        assert process[f"sum, first {cut}"].keys() == whole(0.5).keys()
        assert largest(process[f"sum, first {cut}"], whole(0.5)) < 1e-6


def test_all_processes_have_the_same_bits(seen: list[dict[str, Any]]) -> None:
    for key in ("sum, first 3", "released 0", "released 1"):
        assert largest(seen[0][key], seen[1][key]) == 0


def test_the_noise_is_that_of_one_source_once(seen: list[dict[str, Any]]) -> None:
    for number in range(2):
        alone = MECHANISM.release(seen[0]["sum, first 3"], GaussianNoise(insecure_seed=number))
        assert largest(seen[1][f"released {number}"], alone.arrays) == 0
    assert float(seen[1]["noise_std"]) == MECHANISM.noise_std
    assert largest(seen[0]["released 0"], seen[0]["released 1"]) > 0.1


def test_processes_that_disagree_are_refused_everywhere(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        bound, source = process["refusals"]
        assert "expected the same max_grad_norm and trained numbers in all processes" in bound
        assert "expected a noise source in the first process of the group alone" in source
