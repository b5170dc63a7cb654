"""Small federations for tests: synthetic hospitals of a few patients, and a model of a few weights."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from flwr.app import Message, RecordDict

from client.app import app
from client.site import SITE_FILE, Site
from encoders.parts import trainable_part
from server.federation import Federation
from strategies.bundles import BundleStore
from strategies.in_process import InProcessGrid
from strategies.messages import (
    HELLO,
    INSTALL,
    TRAIN,
    Hello,
    PublicBundle,
    TrainingPlan,
    TrainRequest,
    encode,
)
from tests.encoders.micro import TEXTS, micro_encoder, random_images

SITES, PATIENTS = 3, 25
ROUNDS, STEPS, BATCH, EPSILON = 3, 2, 10, 8.0
Asked = Hello | PublicBundle | TrainRequest
ACTIONS: Mapping[type[Asked], str] = {Hello: HELLO, PublicBundle: INSTALL, TrainRequest: TRAIN}


def document(root: Path, **changes: Any) -> dict[str, Any]:
    """A federation file over ``root/hospitals`` and the model ``root/micro``; changes go into its tables."""
    whole: dict[str, Any] = {
        "version": 1,
        "name": "small",
        "model": {"encoder": str(root / "micro"), "image-size": 32, "max-tokens": 12},
        "privacy": {"epsilon": EPSILON},
        "training": {"rounds": ROUNDS, "steps": STEPS, "batch": BATCH},
        "simulation": {"sites": str(root / "hospitals")},
    }
    return _changed(whole, changes)


def federation(root: Path, **changes: Any) -> Federation:
    return Federation.parse(document(root, **changes), source="test")


def without_claim(**changes: Any) -> dict[str, Any]:
    """Changes that make a federation one without differential privacy."""
    return _changed({"privacy": {"mode": "none", "epsilon": None}, "objective": {"name": "infonce"}}, changes)


def write_federation(root: Path, **changes: Any) -> Path:
    path = root / "federation.toml"
    path.write_text(tomli_w.dumps(document(root, **changes)))
    return path


def change_site(folder: Path, **changes: Any) -> Path:
    """Change tables of a site's file; None takes a key away."""
    settings = tomllib.loads((folder / SITE_FILE).read_text())
    (folder / SITE_FILE).write_text(tomli_w.dumps(_changed(settings, changes)))
    return folder


def _changed(whole: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, values in changes.items():
        key = name.replace("_", "-")
        whole[key] = _changed(dict(whole.get(key, {})), values) if isinstance(values, dict) else values
        if values is None:
            del whole[key]
    return whole


def bundle() -> PublicBundle:
    encoder = micro_encoder()
    return PublicBundle(
        model=encoder.describe(),
        weights=encoder.weights(),
        anchor_texts=TEXTS[:3],
        anchor_images=random_images(3),
    )


def plan(**changes: Any) -> TrainingPlan:
    facts: dict[str, Any] = {
        "part": "heads",
        "objective": "anchored",
        "privacy": "dp",
        "epsilon": EPSILON,
        "rounds": ROUNDS,
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "studies_per_patient": 2,
        "inverse_temperature": 14.3,
        "anchors": 3,
        "augment": False,
        "lora_rank": 2,
        "seed": 0,
    }
    return TrainingPlan(**{**facts, **changes})


def plain_plan(**changes: Any) -> TrainingPlan:
    return plan(**{"privacy": "none", "objective": "infonce", "epsilon": None, **changes})


def request(*, server_round: int = 1, run: str = "small", **changes: Any) -> TrainRequest:
    """A request of `bundle`'s weights; ``changes`` go into the plan."""
    asked = plan(**changes)
    if asked.part == "prototypes":
        return TrainRequest(run=run, server_round=server_round, bundle=bundle().digest, plan=asked, arrays={})
    tokens = min(asked.prompt_tokens, micro_encoder().tokenizer.max_tokens - 3)
    part = trainable_part(micro_encoder(), asked.part, lora_rank=asked.lora_rank, prompt_tokens=tokens)
    return TrainRequest(
        run=run,
        server_round=server_round,
        bundle=bundle().digest,
        plan=asked,
        arrays={name: np.asarray(value) for name, value in part.arrays().items()},
    )


def ready(folder: Path) -> Site:
    """The site in ``folder`` once it holds `bundle`."""
    BundleStore(folder=folder / "bundles").store(bundle())
    return Site.open(folder)


def ask(folder: Path, asked: Asked | RecordDict, *, action: str | None = None) -> Message:
    """What the ClientApp of the site in ``folder`` replies, by the way of a real run."""
    content, action = (
        (asked, action or TRAIN)
        if isinstance(asked, RecordDict)
        else (encode(asked), action or ACTIONS[type(asked)])
    )
    (reply,) = InProcessGrid(app, [{"site": str(folder)}]).send_and_receive([Message(content, 1, action)])
    return reply
