"""Whatever engine a hospital chooses, the sums are the same."""

from typing import get_args

import numpy as np
import pytest
import torch

from client.batches import made_up_data
from client.engines import engine_maker
from client.objectives import AnchoredObjective, Anchors
from client.site import Device, EngineName, Precision
from encoders.parts import trainable_part
from privacy.bookkeeping import BookKeepingEngine
from privacy.hooks import HooksEngine
from privacy.vmap import VmapEngine
from strategies.settings import SettingsError
from tests.client.test_objectives import ANCHORS, plan_of, random_data
from tests.encoders.micro import micro_encoder

ENGINES: tuple[tuple[EngineName, type], ...] = (
    ("book-keeping", BookKeepingEngine),
    ("hooks", HooksEngine),
    ("vmap", VmapEngine),
)


def made() -> tuple[AnchoredObjective, torch.nn.Module]:
    part = trainable_part(micro_encoder(), "full", lora_rank=1)
    data = made_up_data(part, like=random_data([0]), patients=ANCHORS, studies=1)
    anchors = Anchors(images=data.pairs.images, texts=data.pairs.texts)
    return AnchoredObjective(part, data, anchors, plan_of(part="full", objective="anchored")), part.module


@pytest.mark.parametrize("physical_batch", [2, 64])
def test_all_engines_and_physical_batches_give_the_same_sum(physical_batch: int) -> None:
    objective, module = made()
    batch = objective.made_up()
    sums = []
    for engine_name, kind in ENGINES:
        engine = engine_maker(engine_name, physical_batch=physical_batch)(module, objective.losses)
        assert isinstance(engine, kind)
        sums.append(engine.clipped_sum(batch, max_grad_norm=1.0))
    for found in sums[1:]:
        for name, value in sums[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_half_precision_gives_nearly_the_same_sum() -> None:
    objective, module = made()
    batch = objective.made_up()
    whole, half = (
        engine_maker(precision=precision)(module, objective.losses).clipped_sum(batch, max_grad_norm=1.0)
        for precision in get_args(Precision)
    )
    exact, rough = (
        np.concatenate([value.flatten().numpy() for value in each.values()]) for each in (whole, half)
    )
    assert rough.dtype == np.float32
    cosine = float(exact @ rough / np.linalg.norm(exact) / np.linalg.norm(rough))
    assert 0.99 < cosine < 1 - 1e-9


def test_what_a_site_may_choose() -> None:
    chosen = Device.parse({"engine": "hooks", "physical-batch": 8}, source="site.toml")
    assert (chosen.engine, chosen.physical_batch, chosen.precision) == ("hooks", 8, "float32")
    assert Device().engine == "book-keeping"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"engine": "ghost"}, "'book-keeping', 'hooks' or 'vmap'"),
        ({"physical-batch": 0}, "greater than or equal to 1"),
        ({"precision": "float16"}, "'float32' or 'bfloat16'"),
        ({"precision": "bfloat16", "engine": "vmap"}, "'bfloat16' is for engine 'book-keeping'"),
    ],
)
def test_what_a_site_cannot_choose(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        Device.parse(wrong, source="site.toml")
