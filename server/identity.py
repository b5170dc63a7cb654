"""Which run a folder holds: what may not change in its life, and what it says of itself."""

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server import checkpoints
from server.checkpoints import Checkpoint
from server.errors import CheckpointError
from server.federation import Federation
from server.prototypes import Prototypes
from strategies.files import write_text
from strategies.messages import Arrays, PublicBundle
from strategies.share import IMAGE_SHIFT
from strategies.strategy import StrategySettings

_LIBRARIES = ("flwr", "numpy", "torch", "opacus", "dp-accounting")
# Of [strategy], what decides when a round counts, and none of its weights.
_PATIENCE = {"min_sites", "deadline_seconds", "retries", "round_retries"}
_HYPER_PARAMETERS = StrategySettings.model_fields.keys() - {"name"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from.

    Attributes:
        bundle: What every site must hold.
        arrays: The trainable weights of round 0.
        public_start: They were trained on public data.
        prototypes: How prototypes are made; null: there are none.
    """

    bundle: PublicBundle
    arrays: Arrays
    public_start: bool
    prototypes: Prototypes | None = None


def resume_point(run_dir: Path, federation: Federation, start: Start, *, resume: bool) -> Checkpoint | None:
    """Where to go on; None: at the start.

    Once the folder is known to be this run's, the settings are written, and a killed life's leavings removed.

    Raises:
        CheckpointError: the folder holds another run, or it holds this one and ``resume`` is false.
    """
    done = checkpoints.load_latest(run_dir) if resume else None
    if done is not None:
        _require_same_run(run_dir, done.manifest, identity(federation, start))
    elif not resume and (found := checkpoints.newest_round(run_dir)) is not None:
        raise CheckpointError(
            f"{run_dir} holds a run that got to round {found}: --resume continues it, "
            "another run folder starts a new one"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.sweep(run_dir)
    settings = federation.model_dump(mode="json", by_alias=True)
    write_text(run_dir / "federation.json", json.dumps(settings, indent=2) + "\n")
    return done


def identity(federation: Federation, start: Start) -> dict[str, Any]:
    """What must not change in the life of a run: all that decides its weights, and which are the best."""
    plan = federation.plan().model_dump(mode="json")
    strategy = federation.strategy.model_dump(mode="json", exclude=_PATIENCE | _HYPER_PARAMETERS)
    settings = {
        "name": federation.name,
        "evaluation.metric": federation.evaluation.metric,  # a checkpoint has its values of all rounds
        **{
            f"strategy.{name}": value
            for name, value in {**strategy, **federation.strategy.parameters}.items()
        },
        **{f"plan.{name}": value for name, value in plan.items()},
    }
    if federation.secure_aggregation is not None:
        settings["secure-aggregation.value-range"] = federation.secure_aggregation.value_range
    return {"bundle": start.bundle.digest, "settings": settings}


def facts(federation: Federation, start: Start, sites: Iterable[str]) -> dict[str, Any]:
    """What a run says of itself when it starts."""
    privacy = federation.privacy
    return {
        "run": federation.name,
        "objective": federation.objective.name,
        "part": federation.share.part,
        "parameters": {
            "total": sum(value.size for value in start.bundle.weights.values()),
            "trainable": sum(value.size for name, value in start.arrays.items() if name != IMAGE_SHIFT),
        },
        "config": federation.public_settings(),
        "rounds": federation.training.rounds,
        "sites": list(sites),
        "privacy": {
            "mode": privacy.mode,
            "unit": "patient",
            "epsilon": privacy.epsilon,
            "formal_guarantee": privacy.mode == "dp",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def _require_same_run(run_dir: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    was, now = ({"bundle": one.get("bundle"), **one.get("settings", {})} for one in (manifest, identity))
    odd = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]
    if odd:
        raise CheckpointError(
            f"{run_dir} holds another run: {'; '.join(odd)}. Use the settings it was started with to resume "
            "it, or another run folder for a new run"
        )
