"""A site for tests: speaks the messages, "trains" with NumPy, stores its releases as a real one does."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from server.federation import Federation
from server.rounds import Start
from strategies.messages import (
    Arrays,
    Hello,
    Installed,
    PublicBundle,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    TrainRequest,
    decode,
    encode,
)

MARKER = "Doe^John 1.2.840.99"  # stands for patient data in an exception's text

Reaction = Callable[[TrainRequest, Release], Release | Refusal | RecordDict]


def federation(**changes: Any) -> Federation:
    """A small federation of the given tables, without DP."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "privacy": {"mode": "none"},
        "objective": {"name": "infonce"},
        "training": {"rounds": 3, "steps": 1, "batch": 4},
        "strategy": {"min-sites": 2, "deadline-seconds": 30.0},
    }
    for table, values in changes.items():
        document[table] = {**document.get(table, {}), **values} if isinstance(values, dict) else values
    return Federation.parse(document, source="test")


def start(size: int = 5) -> Start:
    """Weights of round 0 and a bundle of a few bytes."""
    arrays = {"a": np.linspace(-1, 1, size, dtype=np.float32), "b": np.ones((2, 3), dtype=np.float32)}
    bundle = PublicBundle(
        model={"kind": "fake"},
        weights={"w": np.arange(4, dtype=np.float32)},
        anchor_texts=("clear lungs",),
        anchor_images=np.zeros((1, 2, 2), dtype=np.uint8),
    )
    return Start(bundle=bundle, arrays=arrays, public_start=True)


def trained(request: TrainRequest, site: str) -> Arrays:
    """What a site learns: depends on the weights, the round and the site, and is not exact in float32."""
    rng = np.random.default_rng([request.server_round, *site.encode()])
    return {
        name: (0.1 * np.sin(value) + rng.normal(size=value.shape)).astype(np.float32)
        for name, value in request.arrays.items()
    }


class FakeSites:
    """All sites of a test as one ClientApp; what each does comes from its node config.

    Args:
        folder: Where the sites store releases and bundles, as files, so that they outlive a "crash".
        reactions: By site name, what it answers instead of its release.
    """

    def __init__(self, folder: Path, reactions: Mapping[str, Reaction] | None = None) -> None:
        self.folder = folder
        self.reactions = dict(reactions or {})
        self.app = ClientApp()
        for action, handle in (("hello", self.hello), ("install", self.install)):
            self.app.query(action)(handle)
        self.app.train()(self.train)

    @staticmethod
    def configs(*names: str) -> list[dict[str, str | int]]:
        return [{"site": name, "patients": 10 * (index + 1)} for index, name in enumerate(names)]

    def hello(self, message: Message, context: Context) -> Message:
        hello = decode(message.content)
        assert isinstance(hello, Hello)
        site = str(context.node_config["site"])
        facts = SiteFacts(
            site=site,
            patients_declared=int(context.node_config["patients"]),
            has_bundle=(self.folder / f"{site}-{hello.bundle}").exists(),
        )
        return Message(encode(facts), reply_to=message)

    def install(self, message: Message, context: Context) -> Message:
        bundle = decode(message.content)
        assert isinstance(bundle, PublicBundle)
        site = str(context.node_config["site"])
        (self.folder / f"{site}-{bundle.digest}").touch()
        return Message(encode(Installed(site=site, bundle=bundle.digest)), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        request = decode(message.content)
        assert isinstance(request, TrainRequest)
        site = str(context.node_config["site"])
        if not (self.folder / f"{site}-{request.bundle}").exists():
            lacking = Refusal(site=site, code=RefusalCode.MODEL, incident="0badcafe")
            return Message(encode(lacking), reply_to=message)
        stored = self.folder / f"{site}-{request.digest}.npz"
        replayed = stored.exists()
        if not replayed:
            self.count(site)
            np.savez(stored, allow_pickle=False, **trained(request, site))
        with np.load(stored) as file:
            release = Release(
                facts=facts(site, request.server_round, int(context.node_config["patients"]), replayed),
                update={name: file[name] for name in file.files},
            )
        answer = self.reactions.get(site, behave)(request, release)
        return Message(answer if isinstance(answer, RecordDict) else encode(answer), reply_to=message)

    def count(self, site: str) -> None:
        with (self.folder / f"{site}.trained").open("a") as file:
            file.write(json.dumps(os.getpid()) + "\n")

    def trainings(self, site: str) -> int:
        """How often a site really trained, replays left out."""
        return len((self.folder / f"{site}.trained").read_text().splitlines())


def facts(site: str, server_round: int, patients: int, replayed: bool = False) -> ReleaseFacts:
    return ReleaseFacts(
        site=site,
        server_round=server_round,
        patients_declared=patients,
        steps=1,
        seconds=0.0,
        epsilon=None,
        epsilon_max=None,
        delta=None,
        noise_multiplier=None,
        sample_rate=None,
        max_grad_norm=None,
        anchor=None,
        insecure_seed=False,
        replayed=replayed,
    )


def behave(request: TrainRequest, release: Release) -> Release:
    return release


def refuse(code: RefusalCode) -> Reaction:
    return lambda _, release: Refusal(site=release.facts.site, code=code, incident="0badcafe")


def crash(request: TrainRequest, release: Release) -> Release:
    raise ValueError(f"cannot read the file of {MARKER}")


def send_nan(request: TrainRequest, release: Release) -> Release:
    release.update["a"][0] = np.nan
    return release


def send_wrong_shape(request: TrainRequest, release: Release) -> Release:
    return Release(facts=release.facts, update={**release.update, "a": np.zeros(2, dtype=np.float32)})


def send_wrong_names(request: TrainRequest, release: Release) -> Release:
    return Release(facts=release.facts, update={"c": release.update["a"], "b": release.update["b"]})


def send_for_another_site(request: TrainRequest, release: Release) -> Release:
    return Release(facts=release.facts.model_copy(update={"site": "somebody else"}), update=release.update)


def send_old_round(request: TrainRequest, release: Release) -> Release:
    return Release(facts=release.facts.model_copy(update={"server_round": 99}), update=release.update)


def send_garbage(request: TrainRequest, release: Release) -> RecordDict:
    broken = Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=b"not an array")
    record = encode(release)
    record["arrays"] = ArrayRecord({"a": broken})
    return record


def send_nothing(request: TrainRequest, release: Release) -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"version": 1})})
