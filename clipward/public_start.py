"""The public start: a model trained on public data, without a budget, before any hospital is asked."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from client.cohort import Cohort, CohortSettings, build_cohort
from client.reports.settings import ReportSettings
from client.text.sections import training_text
from clipward.synthetic.pairs import synthetic_pairs
from encoders.clip import ClipEncoder
from encoders.fitting import Pairs, fit_infonce
from encoders.parts import trainable_part
from server.banks import PublicAnchors
from server.evaluation import EvaluationSet
from server.federation import AnchorSource, Federation, PublicData, PublicStart
from server.start import (
    Prepared,
    build_encoder,
    bundle_of,
    load_prepared,
    save_prepared,
    start_folder,
)

PACKED_PIXELS = 128
SYNTHETIC_SEED = 0
WARM_UP = 0.1

Progress = Callable[[str, int, int], None]


def prepare_start(federation: Federation, *, cache: Path, on_progress: Progress | None = None) -> Prepared:
    """The start of ``federation``, from ``cache`` where it is there and its public data are unchanged.

    Args:
        federation: Its model, public data and anchors decide the start.
        cache: Folder that keeps starts.
        on_progress: Told what is being done, steps done, steps in all.

    Raises:
        CohortError: the public data cannot be used.
    """
    tell = on_progress or _silent
    folder = start_folder(federation, cache)
    public = _packed(federation.public_start, folder / "public", tell)
    measured = _packed(federation.evaluation.data, folder / "evaluation", tell)
    source = hashlib.sha256(json.dumps([c.identity for c in (public, measured) if c]).encode()).hexdigest()
    kept = load_prepared(folder)
    if kept is not None and kept.source == source:
        return kept
    encoder = build_encoder(federation)
    rng = np.random.default_rng(federation.model.seed)
    sources: dict[AnchorSource, PublicAnchors] = {}
    if public is not None and federation.public_start is not None:
        _train(encoder, federation, federation.public_start, public, rng, tell)
        sources["public"] = _public_anchors(encoder, public, federation.objective.anchors, rng)
    if "synthetic" in federation.anchor_sources:
        sources["synthetic"] = _synthetic_anchors(encoder, federation.objective.anchors, tell)
    bundle = bundle_of(federation, encoder, prepared=sources)
    evaluation = None if measured is None else evaluation_set(measured, np.arange(len(measured)))
    prepared = Prepared(bundle=bundle, public_start=public is not None, source=source, evaluation=evaluation)
    save_prepared(folder, prepared)
    return prepared


def evaluation_set(cohort: Cohort, rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> EvaluationSet:
    """The given rows of a cohort as something to measure on."""
    return EvaluationSet(
        images=np.array(cohort.images[rows]),
        texts=tuple(cohort.texts[row] for row in rows),
        labels={name: values[rows] for name, values in cohort.labels.items()},
    )


def _packed(data: PublicData | None, folder: Path, tell: Progress) -> Cohort | None:
    if data is None:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = CohortSettings(
        dicom=data.dicom,
        reports=ReportSettings.of(data, Path()),
        table=data.table,
        where=data.where,
        labels=data.labels,
        image_size=PACKED_PIXELS,
        test_fraction=0.0,
        salt="public",
    )
    return build_cohort(
        settings, folder, on_progress=lambda done, total: tell("read public data", done, total)
    )


def _train(
    encoder: ClipEncoder,
    federation: Federation,
    start: PublicStart,
    cohort: Cohort,
    rng: np.random.Generator,
    tell: Progress,
) -> None:
    part = trainable_part(encoder, "full", lora_rank=1)
    texts = list(cohort.texts)
    steps = max(1, start.epochs * round(len(texts) / start.batch))
    optimizer = torch.optim.AdamW(part.parameters().values(), lr=start.learning_rate, weight_decay=0.05)
    warm_up = max(WARM_UP, 2 / (steps + 1))  # of less than two steps, torch's schedule divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, start.learning_rate, total_steps=steps + 1, pct_start=warm_up
    )

    def stepped(step: int) -> None:
        schedule.step()
        tell("train the public start", step + 1, steps)

    fit_infonce(
        part,
        Pairs.of(part, encoder.preprocessing.resize(cohort.images), texts),
        optimizer=optimizer,
        steps=steps,
        batch=start.batch,
        inverse_temperature=federation.objective.inverse_temperature,
        augmented=True,
        rng=rng,
        on_step=stepped,
    )


def _public_anchors(
    encoder: ClipEncoder, cohort: Cohort, count: int, rng: np.random.Generator
) -> PublicAnchors:
    """At most ``count`` public pairs, each text once."""
    texts = cohort.texts
    distinct = {texts[row].lower(): int(row) for row in rng.permutation(len(texts))}
    rows = list(distinct.values())[:count]
    return PublicAnchors(
        texts=tuple(texts[row] for row in rows), images=encoder.preprocessing.resize(cohort.images[rows])
    )


def _synthetic_anchors(encoder: ClipEncoder, count: int, tell: Progress) -> PublicAnchors:
    images, reports = synthetic_pairs(
        count,
        seed=SYNTHETIC_SEED,
        on_progress=lambda done, total: tell("draw synthetic anchors", done, total),
    )
    return PublicAnchors(
        texts=tuple(training_text(report) for report in reports), images=encoder.preprocessing.resize(images)
    )


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
