"""What a site keeps ready between rounds: the model's part and the cohort in the form it trains on.

All but an optimizer's state can be made again from the site's folder; keeping it saves minutes in a
simulation and in a long-lived client, and changes no result. Of models one is kept, or a few where sites have
their own, with what was made for them; of sites as many as fit into a number of bytes, so a thousand of them
need no more memory than ten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from client.batches import Rows, TrainingData
from client.cohort import Cohort
from client.cohort.settings import CohortModality
from client.frozen import refuse_mixed_inputs
from client.kept import kept
from client.objectives import Anchors
from client.site import packed_cohort
from client.text.tokens import rules_of
from client.training import OptimizerState
from encoders.clip import ClipEncoder, build
from encoders.fitting import Pairs
from encoders.objectives import same_meaning, soft_positives, text_similarity
from encoders.parts import TrainablePart, trainable_part
from encoders.tokenizer import TextTokenizer, TokenisedTexts
from privacy.noisy_sums import MODALITIES, Modality
from strategies.bundles import BundleStore
from strategies.messages import Arrays, Part, PublicBundle
from strategies.settings import OwnModel
from tasks.concepts import Studies, members, named_concepts

PAIRS_BYTES = 2**30  # 20,000 pairs at 224 pixels: a large hospital, or a thousand small ones
OPTIMIZER_BYTES = 2**32
LOCAL_MODELS = 4  # of the sites of a simulation; a hospital has one


@dataclass(frozen=True, kw_only=True)
class InstalledBundle:
    """A public bundle on a site's disk; equal digests are equal bundles, wherever they lie."""

    digest: str
    store: BundleStore = field(compare=False)

    def load(self) -> PublicBundle:
        """Read it, verified."""
        return self.store.load(self.digest)


@lru_cache(maxsize=1)
def part_of(
    installed: InstalledBundle, part: Part, lora_rank: int, prompt_tokens: int, device: str
) -> TrainablePart:
    """The trainable part of an installed bundle's model. Its weights are whatever was loaded last.

    Raises:
        BundleMissing: the bundle was never installed here, or was changed on the disk.
        EncoderError: its model cannot be built.
        PrivacyError: its prototypes are of another width than its model's embeddings.
    """
    for made_for_a_part in (training_pairs, training_data, anchors_of, require_rows_apart):
        made_for_a_part.cache_clear()
    bundle = installed.load()
    encoder = ClipEncoder.parse(bundle.model, bundle.weights)
    if bundle.prototypes is not None:
        bundle.prototypes.require_width(encoder.width)
    encoder.model.to(device)
    return trainable_part(encoder, part, lora_rank=lora_rank, prompt_tokens=prompt_tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalModel:
    """A model of a site's own.

    Attributes:
        part: What of it is trained. Its weights are whatever was loaded last.
        start: Those before the first round; public.
    """

    part: TrainablePart
    start: Arrays


@lru_cache(maxsize=LOCAL_MODELS)
def local_model(
    installed: InstalledBundle, own: OwnModel | None, lora_rank: int, prompt_tokens: int, device: str
) -> LocalModel:
    """The model that a site trains where prototypes alone are shared.

    Guarantees:
        Its embeddings are as wide as those of the bundle's model, and it starts from public values alone.

    Args:
        installed: The run's public bundle, whose model is the space of the prototypes.
        own: What the site's file names; None: the bundle's model and its two heads.
        lora_rank: Of a part with LoRA factors.
        prompt_tokens: Of a part with prompts.
        device: Where it is trained.

    Raises:
        BundleMissing: the bundle was never installed here, or was changed on the disk.
        EncoderError: a model cannot be built.
    """
    if local_model.cache_info().currsize == LOCAL_MODELS:  # one is forgotten now
        for made_for_a_part in (training_pairs, training_data, anchors_of, require_rows_apart):
            made_for_a_part.cache_clear()
    bundle = installed.load()
    encoder = ClipEncoder.parse(bundle.model, bundle.weights)
    if own is not None:
        encoder = build(
            own.encoder,
            image_size=own.image_size,
            max_tokens=own.max_tokens,
            seed=own.seed,
            inverse_temperature=encoder.inverse_temperature,
        ).of_width(encoder.width, seed=own.seed)
    encoder.model.to(device)
    kind = "heads" if own is None else own.part
    part = trainable_part(encoder, kind, lora_rank=lora_rank, prompt_tokens=prompt_tokens)
    return LocalModel(part=part, start=part.arrays())


@lru_cache(maxsize=LOCAL_MODELS)
def require_rows_apart(part: TrainablePart) -> None:
    """`refuse_mixed_inputs`, asked once of a part: its frozen towers stay as they are.

    Raises:
        UnsoundTraining: a frozen tower mixes rows, so nothing may be claimed for what is made of its outputs.
    """
    refuse_mixed_inputs(part)


@dataclass(frozen=True, kw_only=True)
class TrainingPairs:
    """A site's training pairs, and what is known of each.

    Attributes:
        pairs: N of them, as inputs of a part.
        modalities: Which side of them is there; the other is a placeholder that nothing may be made of.
        texts: N texts.
        patients: Patient number of each, int, shape (N,).
        labels: By finding, 1 there, 0 ruled out, else unknown, shape (N,).
    """

    pairs: Pairs
    modalities: tuple[Modality, ...]
    texts: list[str]
    patients: Rows
    labels: Mapping[str, NDArray[np.float32]]


@kept(most_bytes=PAIRS_BYTES)
def training_pairs(folder: Path, part: TrainablePart, modality: CohortModality = "pairs") -> TrainingPairs:
    """The training patients of the site in ``folder`` as inputs of ``part``."""
    cohort = packed_cohort(folder)
    rows = cohort.train()
    texts = [cohort.texts[row] for row in rows]
    return TrainingPairs(
        pairs=Pairs.of(
            part,
            cohort.images[rows[:1] if modality == "texts" else rows],
            tokenised(cohort, rows[:1] if modality == "images" else rows, part.encoder.tokenizer),
        ),
        modalities={"pairs": MODALITIES, "images": ("image",), "texts": ("text",)}[modality],
        texts=texts,
        patients=cohort.patients[rows],
        labels={finding: values[rows] for finding, values in cohort.labels.items()},
    )


def tokenised(cohort: Cohort, rows: Rows, tokenizer: TextTokenizer) -> Sequence[str]:
    """The texts of ``rows``, with the token ids that the cohort holds if ``tokenizer`` would give the same.

    It does if its vocabulary and its rules are those that the cohort was tokenised by; how long a text may be
    and the prompt tokens at its start are the tokenizer's own.
    """
    texts = [cohort.texts[row] for row in rows]
    if rules_of(tokenizer.hugging_face.backend_tokenizer) != cohort.tokens.rules:
        return texts
    pieces = [cohort.tokens[number] for number in cohort.text_ids[rows].tolist()]
    return TokenisedTexts(texts=texts, pieces=pieces, tokenizer=tokenizer.digest)


@kept(most_bytes=PAIRS_BYTES)
def training_data(
    folder: Path,
    part: TrainablePart,
    anchor_texts: tuple[str, ...],
    soft_from: float | None = None,
    wordings: tuple[tuple[str, ...], ...] = (),
    modality: CohortModality = "pairs",
    concepts: tuple[str, ...] = (),
    drawn: bool = False,
    all_partly_right: bool = False,
) -> TrainingData:
    """`training_pairs` beside the anchors.

    Args:
        folder: The site's.
        part: Whose inputs they are.
        anchor_texts: The public bank.
        soft_from: Anchors from this similarity on are positives to a degree; None: those that say the same
            as a pair are left out for it.
        wordings: Of prototypes of before behind the bank, which are as near a text as the nearest of theirs.
        modality: Of the site's rows.
        concepts: Names of this round's prototypes behind the bank. A row belongs to those that its own labels
            and text state, as it does where they are released.
        drawn: Whether it is drawn to them without ``soft_from`` too, instead of leaving them out.
        all_partly_right: Whether no anchor is left out, because the objective says how right each is.
    """
    known = training_pairs(folder, part, modality)
    pairs, texts, patients, device = known.pairs, known.texts, known.patients, known.pairs.images.device
    said = [*((text,) for text in anchor_texts), *wordings]
    sentences = [text for each in said for text in each]
    first = np.cumsum([0, *map(len, said)])[:-1]
    if soft_from is None:
        masked = np.maximum.reduceat(same_meaning(texts, sentences), first, axis=1)
        shares = np.zeros(masked.shape, dtype=np.float32) if drawn else None
    else:
        similarity = np.maximum.reduceat(text_similarity(texts, sentences), first, axis=1)
        shares = soft_positives(similarity, least=soft_from)
        masked = np.zeros(shares.shape, dtype=bool)
    if concepts:
        stated = members(named_concepts(concepts), Studies(known.labels, texts))
        if shares is not None:
            shares = np.hstack([shares, stated])
        masked = np.hstack([masked, stated > 0 if shares is None else np.zeros_like(stated, dtype=bool)])
    if all_partly_right:
        masked = np.zeros_like(masked)
    return TrainingData(
        pairs=pairs,
        patients=patients,
        masked=torch.from_numpy(masked).to(device),
        positives=None if shares is None else torch.from_numpy(shares).to(device),
        modalities=known.modalities,
    )


@lru_cache(maxsize=LOCAL_MODELS)
def anchors_of(
    installed: InstalledBundle, part: TrainablePart, count: int
) -> tuple[Anchors, tuple[str, ...]]:
    """The first ``count`` public anchors as inputs of ``part``, with all prototypes; and their own texts."""
    bundle = installed.load()
    texts = bundle.anchor_texts[:count]
    images, text_inputs = part.inputs(bundle.anchor_images[:count], texts)
    return Anchors(images=images, texts=text_inputs, prototypes=bundle.prototypes), texts


def device_name(wanted: Literal["auto", "cpu", "cuda"]) -> str:
    """``cuda`` where it is wanted and there, else ``cpu``."""
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@kept(most_bytes=OPTIMIZER_BYTES, told="a site begins a round with a new optimizer")
def kept_optimizer(folder: Path, run: str) -> OptimizerState:
    """The optimizer's state of the site in ``folder`` between the rounds of a run; empty at first."""
    return {}
