"""What coordinator and site say to each other: record names, dtypes, encode and decode.

Everything that crosses the hospital's wall is a field of a class in this file. Nothing computed from
patients and not yet clipped and noised (its name would start with ``raw_``) has a field here.

All exchanges are started by the coordinator, and a site may answer each with a `Refusal`:

==========  =========================  ====================================
action      request                    reply
==========  =========================  ====================================
hello       `Hello`                    `SiteFacts`
install     `PublicBundle`             `Installed`
train       `TrainRequest`             `Release`
==========  =========================  ====================================

In a secure sum (`strategies.secure_sum`) the request names its terms, and the release follows in masks:

==========  =========================  ====================================
train       `TrainRequest` with terms  `Ready`
deal        `Deal`                     `Dealt`
mask        `Mask`                     `Masked`
consent     `Agree`                    `Agreed`
reveal      `Unmask`                   `Revealed`
==========  =========================  ====================================
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError
from privacy.signing import Anchor
from strategies.handover import Unwritten
from strategies.secure_sum.messages import Consent, KeyOffer, Reveal, SealedShare, Terms

MESSAGE_VERSION = 1
HELLO = "query.hello"
INSTALL = "query.install"
TRAIN = "train"
DEAL, MASK, CONSENT, REVEAL = "query.deal", "query.mask", "query.consent", "query.reveal"

Arrays = dict[str, NDArray[Any]]
Part = Literal["full", "image-tower", "lora", "heads", "image-head", "prompts"]
Shared = Literal["full", "image-tower", "lora", "heads", "image-head", "prompts", "prototypes"]
LoraTrain = Literal["alternating", "b"]
Personal = Literal["norms", "heads"]
Wire = Literal["fp32", "bf16", "int8"]
Phase = Literal["centre", "prototypes", "losses", "train"]
Objective = Literal["anchored", "microbatch", "infonce"]
OptimizerName = Literal["sgd", "adamw", "dp-adambc"]
T = TypeVar("T")
WIRE_DTYPES = ("float32", "int64", "uint8", "uint16", "uint32", "int8")
PROTOTYPE_SUMS = "prototype_sums"
MEAN_LOSS = "mean_loss"
CENTRE_SUM = "centre_sum"
_DIGEST, _SHA256 = "-digest", "sha256"
_OTHERS = ("correction", "prototypes")  # records of arrays beside "arrays"
_ANCHOR_IMAGES, _WEIGHTS, _PROTOTYPES = "anchor_images", "weights/", "prototypes/"

# What a site says about itself reaches logs, metrics and weights: bounded, and of one line.
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Patients = Annotated[int, Field(ge=1, le=10**9)]
Session = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MOST_SITES = 1000


class MessageError(ValueError):
    """A message does not follow this file; the text names the field, never its content."""


class RefusalCode(StrEnum):
    """Why a site did not do what it was asked: the closed list of all it ever says about a failure."""

    BUDGET = "budget"
    POLICY = "policy"
    COHORT = "cohort"
    MODEL = "model"
    LEDGER = "ledger"
    MESSAGE = "message"
    DEADLINE = "deadline"
    FAILED = "failed"


class Facts(BaseModel):
    """Base of the JSON part of a message: public, finite values only, frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrototypePlan(Facts):
    """Prototypes that every site releases at the start of a round, with the round's weights.

    Where nothing else is shared, the first round has none: what models that never met say of a concept points
    nowhere in common, so that round goes by the prompts.

    Attributes:
        concepts: Their names, as `tasks.concepts` writes them.
        noise_multiplier: Noise standard deviation over ``max_norm``, in every release of a run with privacy.
        max_norm: Bound on what a patient adds to all sums and counts together.
        count_weight: What a patient of one concept adds to its count, in the units of embeddings.
        every: They are released in round 1 and every so many rounds; the rounds between train with the last.
        wire: How the sums travel. In bfloat16 they lose nothing that their noise left, and without noise one
            part in 256; secure sums are made of fp32.
    """

    concepts: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    noise_multiplier: float = Field(gt=0)
    max_norm: float = Field(gt=0)
    count_weight: float = Field(gt=0)
    every: int = Field(default=1, ge=1)
    wire: Wire = "bf16"


class LossPlan(Facts):
    """A mean loss that every site releases at the start of every round, under the round's weights.

    Attributes:
        noise_multiplier: Noise standard deviation over ``max_loss``, in every release.
        max_loss: Bound on a patient's loss.
    """

    noise_multiplier: float = Field(gt=0)
    max_loss: float = Field(gt=0)


class CentrePlan(Facts):
    """The sum of its images' features that every site releases once, before the first round.

    Of a feature the shift in the request's arrays is taken away, which is public, and the rest is divided by
    the root of its length: about the norm that the image tower's last layer norm gives a feature.

    Attributes:
        noise_multiplier: Noise standard deviation over ``max_norm``.
        max_norm: Bound on what a patient adds to sum and count together.
        count_weight: What a patient adds to the count, in units of the divided features.
    """

    noise_multiplier: float = Field(gt=0)
    max_norm: float = Field(gt=0)
    count_weight: float = Field(gt=0)


class TrainingPlan(Facts):
    """What the coordinator asks every site to do in every round of a run; all of it is public.

    Attributes:
        part: What is trained and travels: all weights, those of the image tower, LoRA factors, the two heads,
            the image projection alone, or prompts. With ``prototypes`` no weight does: every site trains a
            model of its own, and keeps it.
        objective: ``anchored`` decomposes over patients, ``microbatch`` over groups of them (at twice the
            noise); ``infonce`` does neither and never claims an epsilon.
        privacy: ``dp`` or ``none``.
        epsilon: Asked for the whole run, per patient, add/remove; null without DP.
        rounds: Rounds of the whole run, so that the site can plan its noise for all of them.
        steps: Optimizer steps per round, the same at every site.
        epochs: Instead of ``steps``, passes over the site's own pairs per round; only without privacy, since
            the number of steps would then tell the site's size.
        batch: Expected patients per step (a public number; sample rate = batch / declared patients).
        sample_rate: Instead of ``batch``, the probability itself: the same share of every site.
        schedule: Learning rate over the whole run: constant, or a tenth of warm-up and a cosine to zero.
        keep_optimizer: The site goes on with its optimizer's state from the round before, which stays with it
            in memory; only without privacy. A site that was restarted begins anew.
        optimizer: ``dp-adambc`` is Adam that knows the noise in its gradients; only with privacy.
        max_grad_norm: Clipping bound C of one patient's gradient, or one group's.
        studies_per_patient: At most so many pairs of a sampled patient are averaged into its gradient.
        inverse_temperature: Fixed logit scale s = 1 / temperature.
        anchors: How many public anchors each side of the anchored loss uses.
        loss: Form of the anchored loss: one choice among all (softmax), or a yes or no for each (sigmoid).
        logit_bias: b of the sigmoid form, public and fixed.
        soft_positives: Anchors whose text is at least so similar to a pair's own are partly right for it,
            in [0, 0.9); null: those that say the same are left out, and all others are wrong.
        soft_targets: Instead, all are partly right, by `encoders.objectives.soft_targets`: its inverse
            temperature.
        groups: M of the microbatch objective: each drawn patient joins one of so many groups at random.
        lora_rank: Columns of a LoRA factor.
        lora_train: Which factors a round trains: A and B by turns, or B alone. See `strategies.share`.
        prompt_tokens: Learned tokens in every text, for prompts.
        personal: Weights that every site trains and keeps to itself.
        wire: How updates travel; see `strategies.wire`.
        prototypes: What sites release besides their updates; null: nothing.
        losses: The same for a mean loss, where the strategy weighs sites by it.
        centre: What sites release once for the shift of ``image-head``; null: there is none.
        proximal: mu; mu times the way from the round's weights is added to every noised gradient.
        seed: Seeds augmentation and, without DP, sampling. Never the noise.
    """

    part: Shared
    objective: Objective
    privacy: Literal["dp", "none"]
    epsilon: float | None = Field(default=None, gt=0)
    rounds: int = Field(ge=1)
    steps: int = Field(ge=1)
    epochs: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    sample_rate: float | None = Field(default=None, gt=0, le=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    keep_optimizer: bool = False
    optimizer: OptimizerName = "adamw"
    max_grad_norm: float = Field(gt=0)
    studies_per_patient: int = Field(ge=1, le=64)
    inverse_temperature: float = Field(gt=0)
    anchors: int = Field(ge=1)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias: float = -5.0
    soft_positives: float | None = Field(default=None, ge=0, lt=0.9)
    soft_targets: float | None = Field(default=None, gt=0, le=100)
    groups: int = Field(default=16, ge=1)
    augment: bool
    lora_rank: int = Field(ge=1)
    lora_train: LoraTrain = "alternating"
    prompt_tokens: int = Field(default=16, ge=1, le=256)
    personal: tuple[Personal, ...] = ()
    wire: Wire = "fp32"
    prototypes: PrototypePlan | None = None
    losses: LossPlan | None = None
    centre: CentrePlan | None = None
    proximal: float = Field(default=0.0, ge=0)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> Self:
        if (self.batch is None) == (self.sample_rate is None):
            raise ValueError("a step is of a batch or of a sample rate: name one")
        return self

    def share_of(self, members: int) -> float:
        """The probability with which one of so many joins a step."""
        return (self.sample_rate or 0.0) + (self.batch or 0) / members  # one of the two is null

    def batch_of(self, members: int) -> float:
        """How many of so many are expected in a step."""
        return (self.sample_rate or 0.0) * members + (self.batch or 0)

    @property
    def shares_weights(self) -> bool:
        """Whether weights travel; else every site trains a model of its own towards common prototypes."""
        return self.part != "prototypes"

    def releases_prototypes(self, server_round: int) -> bool:
        """Whether a site is asked for prototypes in this round."""
        if self.prototypes is None or (server_round == 1 and not self.shares_weights):
            return False
        return (server_round - 1) % self.prototypes.every == 0

    @property
    def prototype_releases(self) -> int:
        """How often a site releases prototypes in the whole run."""
        return sum(map(self.releases_prototypes, range(1, self.rounds + 1)))


class Hello(Facts):
    """Who are you, and do you hold the public bundle of this digest?"""

    run: str
    bundle: str


class SiteFacts(Facts):
    """What a site says about itself: its name and its declared size, both public constants."""

    site: Label
    patients_declared: Patients
    has_bundle: bool


class Installed(Facts):
    """The site stored the public bundle."""

    site: Label
    bundle: str


class Refusal(Facts):
    """The site will not or could not: a code of the closed list and the number of its local log entry."""

    site: Label
    code: RefusalCode
    incident: Label


@dataclass(frozen=True, kw_only=True)
class PublicBundle:
    """All public things training needs: the model to start from and the anchors.

    Attributes:
        model: JSON-ready description of the encoder (architecture, tokenizer, preprocessing).
        weights: Weights by name, float32 (int64 for index buffers).
        anchor_texts: K public sentences.
        anchor_images: K public images, uint8, shape (K, H, W).
        prototypes: Anchors that are vectors already, released with differential privacy before.
    """

    model: Mapping[str, Any]
    weights: Arrays
    anchor_texts: tuple[str, ...]
    anchor_images: NDArray[np.uint8]
    prototypes: PrototypeBank | None = None

    @cached_property
    def digest(self) -> str:
        """Identity of the content, the same on every machine."""
        facts: list[Any] = [self.model, self.anchor_texts]
        arrays: Arrays = {**self.weights, "\0anchor-images": self.anchor_images}
        if self.prototypes is not None:  # without them it is the digest of before there were any
            facts.append(self.prototypes.facts())
            arrays |= {f"\0prototypes/{name}": value for name, value in self.prototypes.arrays().items()}
        return hashlib.sha256((json.dumps(facts, sort_keys=True) + digest_of(arrays)).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What is no array, JSON-ready."""
        facts = {"model": dict(self.model), "anchor_texts": list(self.anchor_texts)}
        return facts if self.prototypes is None else {**facts, "prototypes": self.prototypes.facts()}

    def arrays(self) -> Arrays:
        """All arrays, by names that do not meet."""
        vectors = {} if self.prototypes is None else self.prototypes.arrays()
        return {
            **{f"{_WEIGHTS}{name}": value for name, value in self.weights.items()},
            **{f"{_PROTOTYPES}{name}": value for name, value in vectors.items()},
            _ANCHOR_IMAGES: self.anchor_images,
        }

    @classmethod
    def parse(cls, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The bundle of these `facts` and `arrays`.

        Raises:
            KeyError: a part is missing.
            TypeError: a part of ``facts`` is of another kind.
            PrivacyError: the prototypes are none.
        """
        rest = {name: value for name, value in arrays.items() if name != _ANCHOR_IMAGES}
        vectors = {
            name.removeprefix(_PROTOTYPES): rest.pop(name) for name in arrays if name.startswith(_PROTOTYPES)
        }
        released = "prototypes" in facts
        return cls(
            anchor_images=arrays[_ANCHOR_IMAGES],
            model=facts["model"],
            weights={name.removeprefix(_WEIGHTS): value for name, value in rest.items()},
            anchor_texts=tuple(facts["anchor_texts"]),
            prototypes=PrototypeBank.parse(facts["prototypes"], vectors) if released else None,
        )


class _TrainFacts(Facts):
    run: str
    server_round: int = Field(ge=1)
    bundle: str
    plan: TrainingPlan
    phase: Phase = "train"
    prototypes: dict[str, Any] | None = None
    deadline_unix_seconds: float | None
    anchor: Anchor | None = None
    secure: Terms | None = None


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Train ``arrays`` by ``plan``, or release with them what else it names.

    Attributes:
        phase: What of the plan is asked for. The update of prototypes is the one array `PROTOTYPE_SUMS`, of
            losses `MEAN_LOSS`, of the centre `CENTRE_SUM`.
        prototypes: Of this round, more anchors beside the bundle's.
        arrays: The shared weights of the global model, float32.
        correction: Added to every gradient of the asked site, by names of ``arrays``; see `client.drift`.
        deadline_unix_seconds: A reply later than this is not used; null: no deadline.
        anchor: The last that the coordinator knows of the asked site's ledger; null: none.
        secure: The terms of the secure sum that the answer is for; null: it may be seen by itself.
    """

    run: str
    server_round: int
    bundle: str
    plan: TrainingPlan
    arrays: Arrays
    phase: Phase = "train"
    prototypes: PrototypeBank | None = None
    correction: Arrays = field(default_factory=dict)
    deadline_unix_seconds: float | None = None
    anchor: Anchor | None = None
    secure: Terms | None = None

    @cached_property
    def arrays_digest(self) -> str:
        """Of the arrays alone."""
        return digest_of(self.arrays)

    @cached_property
    def digest(self) -> str:
        """Identity of the request; deadline, anchor and terms are no part: asked again, it is the same."""
        facts = [self.run, self.server_round, self.bundle, self.plan.model_dump(mode="json"), self.phase]
        digests = [self.arrays_digest, digest_of(self.correction)]
        if self.prototypes is not None:
            facts.append(self.prototypes.facts())
            digests.append(digest_of(self.prototypes.arrays()))
        return hashlib.sha256(json.dumps([facts, digests], sort_keys=True).encode()).hexdigest()


class ReleaseFacts(Facts):
    """The public half of a release: settings of the mechanism and what the ledger says, no measurement.

    Attributes:
        patients_declared: The weight of this site in the average.
        seconds: Duration, rounded up to 10 s under DP (true batch sizes show in exact times).
        epsilon: Spent so far by the site's cohort, all runs; null without DP.
        epsilon_max: The cohort's budget; null without DP.
        noise_multiplier: Noise standard deviation over sensitivity; null without DP.
        anchor: How far the site's ledger has got, signed; null without DP.
        insecure_seed: The noise came from a fixed seed: a test, no guarantee.
        replayed: The same request was answered before; these are the same bytes, at no cost.
    """

    site: Label
    server_round: int
    patients_declared: Patients
    steps: int = Field(ge=0, le=10**9)
    seconds: float = Field(ge=0)
    epsilon: float | None
    epsilon_max: float | None
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    max_grad_norm: float | None
    anchor: Anchor | None
    insecure_seed: bool
    replayed: bool


@dataclass(frozen=True, kw_only=True)
class Release:
    """What left the site: how far this round moved what it trains, in the wire form of the plan."""

    facts: ReleaseFacts
    update: Arrays


class Ready(Facts):
    """The site has made its release for a secure sum, and keeps it until it is masked."""

    facts: ReleaseFacts
    offer: KeyOffer


class Deal(Facts):
    """All keys of an attempt: deal shares of your secrets to their owners."""

    session: Session
    offers: tuple[KeyOffer, ...] = Field(max_length=MOST_SITES)


class Dealt(Facts):
    """Sealed shares, one for each site."""

    site: Label
    shares: tuple[SealedShare, ...] = Field(max_length=MOST_SITES)


class Mask(Facts):
    """What was dealt to you: send your update under all masks."""

    session: Session
    shares: tuple[SealedShare, ...] = Field(max_length=MOST_SITES)


class _MaskedFacts(Facts):
    site: Label


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A site's update in fixed point under all masks, uint32."""

    site: str
    arrays: Arrays


class Agree(Facts):
    """Whom the sum is of: agree to it."""

    session: Session
    survivors: tuple[Label, ...] = Field(max_length=MOST_SITES)


class Agreed(Facts):
    """The site agrees to the sum."""

    consent: Consent


class Unmask(Facts):
    """All who agreed: send what unmasks the sum."""

    session: Session
    consents: tuple[Consent, ...] = Field(max_length=MOST_SITES)


class Revealed(Facts):
    """Shares of what unmasks the sum."""

    reveal: Reveal


Said = Facts | PublicBundle | TrainRequest | Release | Masked
_KINDS: Mapping[str, type[Facts]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, SiteFacts, Installed, Refusal),
        *(Ready, Deal, Dealt, Mask, Agree, Agreed, Unmask, Revealed),
    )
}


def encode(message: Said) -> RecordDict:
    """The message as Flower records: one ``facts`` record and, where there are arrays, ``arrays``."""
    if isinstance(message, Facts):
        return _records(type(message).__name__, message.model_dump(mode="json"), {})
    if isinstance(message, PublicBundle):
        return _records("PublicBundle", message.facts(), message.arrays())
    if isinstance(message, TrainRequest):
        request = _TrainFacts(
            run=message.run,
            server_round=message.server_round,
            bundle=message.bundle,
            plan=message.plan,
            phase=message.phase,
            prototypes=None if message.prototypes is None else message.prototypes.facts(),
            deadline_unix_seconds=message.deadline_unix_seconds,
            anchor=message.anchor,
            secure=message.secure,
        )
        vectors = {} if message.prototypes is None else message.prototypes.arrays()
        return _records(
            "TrainRequest",
            request.model_dump(mode="json"),
            message.arrays,
            correction=message.correction,
            prototypes=vectors,
        )
    if isinstance(message, Masked):
        return _records("Masked", _MaskedFacts(site=message.site).model_dump(mode="json"), message.arrays)
    return _records("Release", message.facts.model_dump(mode="json"), message.update)


def addressed(
    content: RecordDict, anchor: Anchor | None = None, *, correction: Arrays | None = None
) -> RecordDict:
    """An encoded `TrainRequest` for one site, with its own anchor and correction.

    The arrays of the request are shared, not copied.
    """
    facts = content["facts"]
    text = json.dumps({**json.loads(str(facts["json"])), "anchor": asdict(anchor) if anchor else None})
    own = _array_records("correction", correction or {})
    return RecordDict({**content, "facts": ConfigRecord({**facts, "json": text}), **own})


def decode(content: RecordDict) -> Said:
    """The message in ``content``.

    Raises:
        MessageError: another version, an unknown kind, a missing or unknown field, a foreign dtype.
    """
    try:
        record = content["facts"]
        version, kind, facts = record["version"], str(record["kind"]), json.loads(str(record["json"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise MessageError("a message needs a 'facts' record with version, kind and json") from None
    if version != MESSAGE_VERSION:
        raise MessageError(
            f"expected message version {MESSAGE_VERSION}, got {version!r}: update the older side"
        )
    arrays, others = _arrays(content, "arrays"), {name: _arrays(content, name) for name in _OTHERS}
    try:
        return _build(kind, facts, arrays, others)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, mistake["loc"])) for mistake in error.errors())
        raise MessageError(f"{kind}: wrong fields: {fields}") from None
    except (KeyError, TypeError) as error:
        raise MessageError(f"{kind}: missing part {error}") from None
    except PrivacyError as error:
        raise MessageError(f"{kind}: {error}") from None


def _build(kind: str, facts: dict[str, Any], arrays: Arrays, others: Mapping[str, Arrays]) -> Said:
    if kind in _KINDS:
        return _KINDS[kind].model_validate(facts)
    if kind == "PublicBundle":
        return PublicBundle.parse(facts, arrays)
    if kind == "TrainRequest":
        request = _TrainFacts.model_validate(facts)
        bank, vectors = request.prototypes, others["prototypes"]
        return TrainRequest(
            run=request.run,
            server_round=request.server_round,
            bundle=request.bundle,
            plan=request.plan,
            phase=request.phase,
            arrays=arrays,
            prototypes=None if bank is None else PrototypeBank.parse(bank, vectors),
            correction=others["correction"],
            deadline_unix_seconds=request.deadline_unix_seconds,
            anchor=request.anchor,
            secure=request.secure,
        )
    if kind == "Masked":
        return Masked(site=_MaskedFacts.model_validate(facts).site, arrays=arrays)
    if kind == "Release":
        return Release(facts=ReleaseFacts.model_validate(facts), update=arrays)
    raise MessageError(f"unknown kind of message {kind[:40]!r}")


def check_update(update: Mapping[str, NDArray[Any]], like: Mapping[str, NDArray[Any]]) -> None:
    """Refuse an update whose names, shapes or dtypes differ from ``like``, or that is not finite.

    Raises:
        MessageError: naming the array and the rule.
    """
    if set(update) != set(like):
        odd = sorted(set(update) ^ set(like))
        raise MessageError(f"update and model differ in {len(odd)} names, first {odd[0]!r}")
    for name, value in update.items():
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            wanted, got = (f"{array.dtype}{array.shape}" for array in (like[name], value))
            raise MessageError(f"array {name!r}: expected {wanted}, got {got}")
        if not np.isfinite(value).all():
            raise MessageError(f"array {name!r} is not finite")


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of order."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        value = np.asarray(arrays[name], order="C")
        total.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        total.update(value.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def bytes_of(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Payload of the arrays in bytes, without the envelope."""
    return sum(value.nbytes for value in arrays.values())


def _records(
    kind: str,
    facts: dict[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    **others: Mapping[str, NDArray[Any]],
) -> RecordDict:
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    records = RecordDict({"facts": ConfigRecord({"version": MESSAGE_VERSION, "kind": kind, "json": text})})
    for name, values in {"arrays": arrays, **others}.items():
        records.update(_array_records(name, values))
    return records


def _array_records(name: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, ArrayRecord]:
    """The arrays, and their digest beside them; nothing where there are none."""
    if not arrays:
        return {}
    sent = {key: Unwritten.of(value) for key, value in arrays.items()}

    def digest() -> NDArray[np.uint8]:
        text = digest_of({key: value.numpy() for key, value in sent.items()})
        return np.frombuffer(bytes.fromhex(text), dtype=np.uint8)

    beside = {_SHA256: Unwritten(digest, dtype="uint8", shape=(32,))}
    return {name: _record(sent), name + _DIGEST: _record(beside)}


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of these very arrays; given them all at once, it would write each."""
    record = ArrayRecord()
    for key, value in arrays.items():
        record[key] = value
    return record


def _arrays(content: RecordDict, name: str) -> Arrays:
    """The arrays of a record; their digest is verified unless all were handed over in this process."""
    if name not in content:
        return {}
    record, digest = content[name], content.get(name + _DIGEST)
    if not isinstance(record, ArrayRecord):
        raise MessageError(f"the {name!r} record holds no arrays")
    arrays = {key: _values(key, value) for key, value in record.items()}
    if all(isinstance(value, Unwritten) for value in record.values()):
        return arrays
    told = (
        _values(_SHA256, digest[_SHA256]) if isinstance(digest, ArrayRecord) and _SHA256 in digest else None
    )
    if told is None or told.tobytes().hex() != digest_of(arrays):
        raise MessageError(f"the {name!r} record is not the one whose digest came with it")
    return arrays


def _values(key: str, array: Array) -> NDArray[Any]:
    if array.dtype not in WIRE_DTYPES:
        raise MessageError(f"array {key!r}: dtype {array.dtype} does not travel; use one of {WIRE_DTYPES}")
    if not isinstance(array, Unwritten) and not array.data.startswith(np.lib.format.MAGIC_PREFIX):
        raise MessageError(f"array {key!r} cannot be read")  # NumPy might take it for an archive
    try:
        return np.asarray(array.numpy())
    except (TypeError, ValueError, EOFError, OSError, MemoryError):
        raise MessageError(f"array {key!r} cannot be read") from None


def require(message: object, expected: type[T]) -> T:
    """``message`` if it is what was expected.

    Raises:
        MessageError: it is another kind of message.
    """
    if not isinstance(message, expected):
        raise MessageError(f"expected {expected.__name__}, got {type(message).__name__}")
    return message
