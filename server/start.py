"""What a run starts from: the public bundle, prepared beforehand or made from the settings alone."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.clip import ClipEncoder, build
from encoders.parts import PartEmbedder, TrainablePart, trainable_part
from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError
from server.banks import PublicAnchors, anchor_bank, label_prompts, noise_images, view_texts
from server.errors import RunError
from server.evaluation import EvaluationSet, evaluator
from server.federation import AnchorSource, Federation
from server.prototypes import Prototypes
from server.rounds import Evaluate, Start
from strategies.bundles import BundleStore
from strategies.files import sync, write_text
from strategies.messages import Arrays, Part, PublicBundle
from strategies.share import IMAGE_SHIFT, shared
from tasks.concepts import Concept, concept_prompts
from tasks.views import view_sentences

VERSION = 1
STARTS = ".starts"  # beside the runs


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared start on the coordinator's disk.

    Attributes:
        bundle: Model and anchors.
        public_start: The model was trained on public data.
        source: Identity of that data, empty without it.
        evaluation: Public data to measure on, if the federation file names any.
    """

    bundle: PublicBundle
    public_start: bool
    source: str
    evaluation: EvaluationSet | None


def start_folder(federation: Federation, cache: Path) -> Path:
    """Where the start of this federation is kept: runs with equal model, public data and anchors share it."""
    encoder = Path(federation.model.encoder)
    relevant: dict[str, Any] = federation.model_dump(
        mode="json",
        include={
            "model": True,
            "public_start": True,
            "evaluation": {"data"},
            "objective": {"inverse_temperature", "anchors", "anchors_from"},
        },
    )
    if federation.model.centre_texts or "views" in federation.anchor_sources:
        relevant["views"] = view_sentences()
    if encoder.is_dir():  # a model trained on under the same name is another start
        files = sorted((path.name, path.stat()) for path in encoder.iterdir())
        relevant["encoder files"] = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return cache / hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def save_prepared(folder: Path, prepared: Prepared) -> None:
    """Keep a start; a crash leaves a whole one or none."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = BundleStore(folder=folder).store(prepared.bundle)
    if prepared.evaluation is not None:
        partial = folder / ".evaluation.partial.npz"
        prepared.evaluation.save(partial)
        sync(partial)
        os.replace(partial, folder / "evaluation.npz")
    facts = {
        "version": VERSION,
        "bundle": digest,
        "public_start": prepared.public_start,
        "source": prepared.source,
    }
    write_text(folder / "start.json", json.dumps(facts))


def load_prepared(folder: Path) -> Prepared | None:
    """The start kept in ``folder``, or None."""
    if not (folder / "start.json").is_file():
        return None
    facts = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    if facts.get("version") != VERSION:
        raise RunError(
            f"{folder} holds a start of version {facts.get('version')}: delete the folder to make it anew"
        )
    evaluation = folder / "evaluation.npz"
    return Prepared(
        bundle=BundleStore(folder=folder).load(facts["bundle"]),
        public_start=facts["public_start"],
        source=facts["source"],
        evaluation=EvaluationSet.load(evaluation) if evaluation.is_file() else None,
    )


def prepare_from_settings(federation: Federation) -> Prepared:
    """A start that needs no public data: initial or loaded weights, anchors made from the settings.

    Raises:
        RunError: the file takes anchors from a source that must be prepared.
    """
    bundle = bundle_of(federation, build_encoder(federation), prepared={})
    return Prepared(bundle=bundle, public_start=False, source="", evaluation=None)


def bundle_of(
    federation: Federation, encoder: ClipEncoder, *, prepared: Mapping[AnchorSource, PublicAnchors]
) -> PublicBundle:
    """Model and anchor bank; ``prepared`` holds the sources that the settings alone cannot make.

    Raises:
        RunError: a source of the federation's anchors is not there.
    """
    count, size = federation.objective.anchors, encoder.preprocessing.image_size
    sources: dict[AnchorSource, PublicAnchors] = {
        "prompts": label_prompts(),
        "views": view_texts(),
        "noise": noise_images(count, size=size),
        **prepared,
    }
    if missing := [name for name in federation.anchor_sources if name not in sources]:
        raise RunError(f"anchors from {missing[0]!r} must be prepared: run 'clipward start' with this file")
    bank = anchor_bank([sources[name] for name in federation.anchor_sources], count=count)
    return PublicBundle(
        model=encoder.describe(),
        weights=encoder.weights(),
        anchor_texts=bank.texts,
        anchor_images=bank.images,
    )


def build_encoder(federation: Federation) -> ClipEncoder:
    """The untrained or loaded model that the federation file names, its texts centred if the file says so."""
    encoder = build(
        federation.model.encoder,
        image_size=federation.model.image_size,
        max_tokens=federation.model.max_tokens,
        seed=federation.model.seed,
        inverse_temperature=federation.objective.inverse_temperature,
    )
    if federation.model.centre_texts:
        encoder.centre_texts(view_sentences())
    return encoder


def prepared_start(federation: Federation, *, cache: Path) -> Prepared:
    """The start kept for this federation, or one that needs no preparation.

    Raises:
        RunError: the file names public data or synthetic anchors, and nobody has prepared the start.
    """
    prepared = load_prepared(start_folder(federation, cache))
    if prepared is not None:
        return prepared
    if federation.public_start is not None or federation.evaluation.data is not None:
        raise RunError(
            f"the federation file names public data, and no start was prepared from it under {cache}: "
            "run 'clipward start' with this file first"
        )
    return prepare_from_settings(federation)


def start_of(federation: Federation, prepared: Prepared) -> Start:
    """Round 0 of the federation from a prepared start, with the prototypes that its file names.

    Where features are centred, the shift is the centre of the public anchors' images at first.

    Raises:
        RunError: the prototypes cannot be read, or are not of this model's width.
    """
    part, bundle = part_of(federation, prepared.bundle), prepared.bundle
    if federation.objective.prototypes is not None:
        try:
            prototypes = PrototypeBank.load(federation.objective.prototypes)
            prototypes.require_width(part.encoder.width)
        except PrivacyError as error:
            raise RunError(f"objective.prototypes: {error}") from error
        bundle = replace(bundle, prototypes=prototypes)
    arrays = part.arrays()
    if IMAGE_SHIFT in arrays:  # what is public of the centre; the sites release the way from there
        features, _ = part.inputs(bundle.anchor_images, [""])
        arrays[IMAGE_SHIFT] = features.mean(0).cpu().numpy()
    names = shared(arrays, federation.plan())
    return Start(
        bundle=bundle,
        arrays={name: value for name, value in arrays.items() if name in names},
        public_start=prepared.public_start,
        prototypes=_prototypes(federation, part),
    )


def _prototypes(federation: Federation, part: TrainablePart) -> Prototypes | None:
    plan = federation.plan().prototypes
    if plan is None or federation.prototypes is None:
        return None
    size, start = part.encoder.preprocessing.image_size, part.arrays()
    embedder = PartEmbedder(part, np.zeros((1, size, size), dtype=np.uint8))

    def embed(arrays: Arrays, concepts: tuple[Concept, ...]) -> NDArray[np.float32]:
        part.load({**start, **arrays})
        return concept_prompts(concepts, embedder.text_embeddings)

    return Prototypes(
        plan=plan,
        width=part.encoder.width,
        least_cosine=federation.prototypes.least_cosine,
        least_patients=federation.prototypes.least_patients,
        embed=embed,
        private=federation.privacy.mode == "dp",
        shares_weights=federation.plan().shares_weights,
    )


def part_of(federation: Federation, bundle: PublicBundle) -> TrainablePart:
    """The part of the bundle's model that the federation trains, for use at the coordinator."""
    return trained_part(federation, ClipEncoder.parse(bundle.model, bundle.weights))


def trained_part(federation: Federation, encoder: ClipEncoder) -> TrainablePart:
    """The part of ``encoder`` that the federation trains.

    Where prototypes alone are shared, no weights come back: the coordinator embeds prompts by it, and it is
    the part that sites without a model of their own train.
    """
    share = federation.share
    part: Part = "heads" if share.part == "prototypes" else share.part
    return trainable_part(encoder, part, lora_rank=share.lora_rank, prompt_tokens=share.prompt_tokens)


def evaluator_of(federation: Federation, prepared: Prepared) -> Evaluate | None:
    """Measures on the prepared public data, if there are any and the coordinator is sent weights."""
    if prepared.evaluation is None or federation.share.part == "prototypes":
        return None
    return evaluator(part_of(federation, prepared.bundle), prepared.evaluation)
