"""A model in which one patient's row reaches another's releases nothing, whatever is asked of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from client import workbench
from client.answers import answer_train
from client.releases import RELEASES
from client.site import Site
from encoders.clip import ClipEncoder
from encoders.parts import TrainablePart, trainable_part
from privacy.errors import UnsoundTraining
from strategies.messages import CentrePlan, LossPlan, Phase, PrototypePlan, TrainRequest
from tests.small_hospitals import ready, request

PLANS: dict[str, Any] = {
    "prototypes": PrototypePlan(
        concepts=("effusion present",), noise_multiplier=9.0, max_norm=2.0, count_weight=0.5
    ),
    "losses": LossPlan(noise_multiplier=9.0, max_loss=9.0),
    "centre": CentrePlan(noise_multiplier=9.0, max_norm=1.5, count_weight=0.5),
}
IMAGES, TEXTS = "vision_model.post_layernorm", "text_model.final_layer_norm"
FROZEN: list[tuple[Phase, str, str]] = [
    ("centre", "image-head", IMAGES),
    ("prototypes", "heads", IMAGES),
    ("prototypes", "heads", TEXTS),
    ("prototypes", "prototypes", IMAGES),
    ("losses", "image-tower", TEXTS),
    ("losses", "prompts", IMAGES),
    ("train", "heads", IMAGES),
    ("train", "image-head", TEXTS),
]
TRAINED: list[tuple[Phase, str, str]] = [
    ("prototypes", "full", IMAGES),
    ("prototypes", "image-tower", IMAGES),
    ("prototypes", "prompts", TEXTS),
    ("losses", "full", TEXTS),
    ("losses", "image-tower", IMAGES),
    ("train", "full", IMAGES),
    ("train", "lora", TEXTS),
]


def less_the_mean(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def attention_across_the_batch(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    weights = torch.softmax(flat @ flat.T / flat.shape[1] ** 0.5, dim=-1)
    return (weights @ flat).view_as(rows)


def batch_norm_in_training_mode(rows: Tensor) -> Tensor:
    return F.batch_norm(rows.flatten(0, -2), None, None, training=True).view_as(rows)


Coupling = Callable[[Tensor], Tensor]
Plant = Callable[[str, Coupling], None]
COUPLINGS: list[Coupling] = [less_the_mean, attention_across_the_batch, batch_norm_in_training_mode]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Couple the rows behind a layer of every model that sites build from now on."""

    def planted(layer: str, coupling: Coupling) -> None:
        def built(encoder: ClipEncoder, *given: Any, **settings: Any) -> TrainablePart:
            part = trainable_part(encoder, *given, **settings)
            for model in {encoder.model, part.encoder.model}:  # some parts train a copy
                model.get_submodule(layer).register_forward_hook(lambda *seen: coupling(seen[-1]))
            return part

        monkeypatch.setattr(workbench, "trainable_part", built)

    forget_models()
    yield planted
    forget_models()


def forget_models() -> None:
    workbench.part_of.cache_clear()
    workbench.local_model.cache_clear()


@pytest.fixture
def site(hospitals: Path) -> Site:
    return ready(hospitals / "hospitals" / "site-1")


def asked(phase: Phase, part: str) -> TrainRequest:
    besides = {phase: PLANS[phase]} if phase in PLANS else {}
    first = 2 if (phase, part) == ("prototypes", "prototypes") else 1
    return replace(request(server_round=first, part=part, prompt_tokens=4, **besides), phase=phase)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("phase", "part", "layer"), FROZEN)
def test_a_frozen_tower_that_mixes_rows_releases_and_costs_nothing(
    phase: Phase, part: str, layer: str, coupling: Coupling, site: Site, plant: Plant
) -> None:
    plant(layer, coupling)
    for _ in range(2):  # asked again it is no better
        with pytest.raises(UnsoundTraining, match="changed when other rows left the batch"):
            answer_train(site, asked(phase, part))
    assert site.ledger().charges() == []
    assert not (site.folder / RELEASES).exists()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("phase", "part", "layer"), TRAINED)
def test_a_trained_tower_that_mixes_rows_releases_nothing_and_the_try_is_charged(
    phase: Phase, part: str, layer: str, coupling: Coupling, site: Site, plant: Plant
) -> None:
    plant(layer, coupling)
    with pytest.raises(UnsoundTraining, match="changed when other rows left the batch"):
        answer_train(site, asked(phase, part))
    assert [charge.outcome for charge in site.ledger().charges()] == ["abandoned"]
    assert not (site.folder / RELEASES).exists()


@pytest.mark.parametrize(("phase", "part"), sorted({(phase, part) for phase, part, _ in [*FROZEN, *TRAINED]}))
def test_towers_that_keep_rows_apart_release(phase: Phase, part: str, site: Site, plant: Plant) -> None:
    plant(IMAGES, lambda rows: 2 * rows)
    answer_train(site, asked(phase, part))
    assert [charge.outcome for charge in site.ledger().charges()] == ["released"]


def test_the_layer_that_mixes_rows_is_named(site: Site, plant: Plant) -> None:
    plant(IMAGES, less_the_mean)
    with pytest.raises(UnsoundTraining, match=f"outputs of layer 'model.{IMAGES}' for a row changed"):
        answer_train(site, asked("centre", "image-head"))


def test_a_models_frozen_towers_are_probed_once(site: Site, plant: Plant) -> None:
    plant(IMAGES, lambda rows: rows)
    answer_train(site, asked("centre", "image-head"))
    answer_train(site, asked("train", "image-head"))
    info = workbench.require_rows_apart.cache_info()
    assert (info.hits, info.misses) == (1, 1)
