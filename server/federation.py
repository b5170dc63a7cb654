"""The consortium's file, `federation.toml`: which model, which objective, which privacy, how many rounds."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from strategies.messages import (
    CentrePlan,
    LoraTrain,
    LossPlan,
    OptimizerName,
    Personal,
    PrototypePlan,
    Shared,
    TrainingPlan,
    Wire,
)
from strategies.messages import Objective as ObjectiveName
from strategies.settings import ModelSettings, OwnModel, PairSource, Settings
from strategies.strategy import SUMMED, StrategySettings
from tasks.concepts import Concept, ConceptKind, finding_concepts, view_concepts
from tasks.prompts import PROMPTS

DEFAULT_BATCH = 64
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CommonModel(ModelSettings):
    """The model that everyone trains.

    Attributes:
        centre_texts: Whether the mean of the text tower's features over public sentences is taken from all
            of them, in the weights: untrained, they share one large direction, and embeddings differ little.
    """

    centre_texts: bool = False


class PublicData(PairSource):
    """Image-text pairs that are public."""


class PublicStart(PublicData):
    """What the coordinator trains on public data before the first round, without a budget."""

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)


class Share(Settings):
    """What is trained at the sites, what of it travels, and how.

    Attributes:
        part: All weights (``full``), those of the image tower and its projection (``image-tower``), LoRA
            factors and heads (``lora``), the two projection ``heads``, the image projection alone on centred
            features (``image-head``), or ``prompts``: learned tokens in every text. With ``prototypes`` no
            weight travels: sites keep models of their own, which may differ, and train them towards the
            prototypes of all.
        lora_rank: Columns of a LoRA factor.
        lora_train: ``alternating`` trains the factors B and A by turns, ``b`` B alone. Both at once could not
            be averaged exactly.
        prompt_tokens: Learned tokens; they take as many from the longest text.
        keep: Weights that every site trains and keeps: ``norms`` (FedBN), ``heads`` (FedPer).
        wire: Form of the updates: ``fp32``; ``bf16``, half of the bytes; ``int8``, a quarter of them.
    """

    part: Shared = "heads"
    lora_rank: int = Field(default=4, ge=1)
    lora_train: LoraTrain = "alternating"
    prompt_tokens: int = Field(default=16, ge=1, le=256)
    keep: tuple[Personal, ...] = ()
    wire: Wire = "fp32"

    @property
    def moves_by_turns(self) -> bool:
        """Whether a round trains some of the shared weights only."""
        return self.part == "lora" and self.lora_train == "alternating"

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.part == "prompts" and self.keep:
            raise ValueError("prompts are neither norms nor heads: remove share.keep")
        if self.part in ("heads", "image-head") and "heads" in self.keep:
            raise ValueError(f"share.part {self.part!r} with keep = ['heads'] leaves nothing to share")
        if self.part == "prototypes" and self.keep:
            raise ValueError(
                "with share.part = 'prototypes' all weights stay at the sites: remove share.keep"
            )
        return self


AnchorSource = Literal["public", "prompts", "views", "synthetic", "noise"]
TEXT_SOURCES: frozenset[AnchorSource] = frozenset({"public", "prompts", "views", "synthetic"})
IMAGE_SOURCES: frozenset[AnchorSource] = frozenset({"public", "synthetic", "noise"})


class Objective(Settings):
    """The loss.

    Attributes:
        name: ``anchored`` decomposes over patients, so it may claim an epsilon; ``microbatch`` over random
            groups of patients, so it may too, with twice the noise; ``infonce`` may not.
        anchors: At most so many texts and as many images every patient is contrasted with.
        anchors_from: Where they come from, in turn: ``public`` pairs of the public start, label ``prompts``
            and ``views`` of organs (texts), ``synthetic`` pairs of phantoms and their reports, ``noise``
            (images). Without it public pairs if there are any, else prompts and noise.
        prototypes: File of prototypes that were released with differential privacy before; they join the
            anchors, over and above their number. It is not checked that what they cost was charged.
        form: Of the anchored loss: softmax (one choice among partner and anchors) or sigmoid (a yes or no
            for each of them).
        logit_bias: b of the sigmoid form; about -log(anchors) lets partner and anchors weigh alike at first.
        soft_positives: Anchors whose text is at least so similar to a pair's (cosine of word counts) are
            partly right for it; without, those that say the same are left out. With ``infonce`` an image is
            asked for them besides its own text; without soft positives or targets anchors are not used.
        soft_targets: Instead, all anchors are partly right for a pair, the nearer the embeddings of the two
            texts the more: the inverse temperature of the softmax that shares the target among them.
        groups: Of microbatch; batch / groups patients are expected in one.
    """

    name: ObjectiveName = "anchored"
    inverse_temperature: float = Field(default=14.3, gt=0, le=100)
    anchors: int = Field(default=256, ge=1)
    anchors_from: tuple[AnchorSource, ...] | None = None
    prototypes: Path | None = None
    form: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias: float = Field(default=-5.0, allow_inf_nan=False)
    soft_positives: float | None = Field(default=None, ge=0, lt=0.9)
    soft_targets: float | None = Field(default=None, gt=0, le=100)
    groups: int = Field(default=16, ge=1)

    @property
    def uses_anchors(self) -> bool:
        """Whether pairs meet the bank in training; in InfoNCE they do where some of it is right for them."""
        soft = self.soft_positives is not None or self.soft_targets is not None
        return self.name == "anchored" or (self.name == "infonce" and soft)

    @model_validator(mode="after")
    def _one_kind_of_softness(self) -> Self:
        if self.soft_positives is not None and self.soft_targets is not None:
            raise ValueError("name one: soft-positives go by words, soft-targets by embeddings")
        return self

    @model_validator(mode="after")
    def _prototypes_are_anchors(self) -> Self:
        if self.prototypes is not None and self.name != "anchored":
            raise ValueError(
                f"prototypes are anchors, and objective {self.name!r} has none: remove the key, or name "
                "'anchored'"
            )
        return self

    @model_validator(mode="after")
    def _both_sides_have_anchors(self) -> Self:
        sources = self.anchors_from
        if sources is None:
            return self
        if len(set(sources)) < len(sources):
            raise ValueError("anchors-from names a source twice")
        if not TEXT_SOURCES & set(sources) or not IMAGE_SOURCES & set(sources):
            raise ValueError(
                "anchors-from needs a source of texts (public, prompts, views or synthetic) and one of "
                "images (public, synthetic or noise)"
            )
        return self


class Prototypes(Settings):
    """Mean directions of concepts that the sites release, beside their updates, in some rounds or in all.

    The sites' noisy sums are added up; where enough patients stand behind a concept, its direction joins the
    anchors of all sites, as negatives from other hospitals; elsewhere a finding's prompts do, and a view is
    left out. With soft-positives a pair is also drawn to the prototypes of what it states itself.

    Attributes:
        findings: Each is two concepts, there and ruled out. A site reads them in its label columns or, with
            label-reports, from its reports; one without labels takes part with zeros.
        views: What an image shows of whom, and by what technique: each term of ``planes``, ``techniques`` and
            ``regions`` is a concept of the reports that have it, and of ``views`` a plane, a technique
            and a region together. A view that too few patients have is left out.
        noise_multiplier: Noise of a release; what all rounds' cost is taken from the run's epsilon. Without
            privacy there is none.
        count_weight: What a patient adds to a concept's count, an embedding being of length 1.
        max_norm: Bound on what one patient adds; without it, what an image and a report need that state one
            concept of the findings and one of each kind of views.
        every: They are released in round 1 and every so many rounds; the rounds between train with the last.
        least_cosine: Of a direction with the one that it would be without noise.
        least_patients: Smallest noisy count, rounded, of a concept that is used.
    """

    findings: tuple[str, ...] = tuple(PROMPTS)
    views: tuple[ConceptKind, ...] = ()
    noise_multiplier: float = Field(default=10.0, gt=0)
    count_weight: float = Field(default=0.5, gt=0)
    max_norm: float | None = Field(default=None, gt=0)
    every: int = Field(default=1, ge=1)
    least_cosine: float = Field(default=0.5, gt=0, lt=1)
    least_patients: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _concepts_once_each(self) -> Self:
        names = [concept.name for concept in self.concepts]
        if not names:
            raise ValueError("prototypes are of concepts: name findings, or views")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"concept {name!r} is named twice")
        _ = [concept.prompts for concept in self.concepts]  # of a blank finding there are none
        return self

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Findings first."""
        return (*finding_concepts(self.findings), *view_concepts(self.views))

    def plan(self, *, wire: Wire) -> PrototypePlan:
        """What sites are asked for, and in which form."""
        stated = bool(self.findings) + len(self.views)
        fits = math.sqrt(2 * stated * (1 + self.count_weight**2))
        return PrototypePlan(
            concepts=tuple(concept.name for concept in self.concepts),
            noise_multiplier=self.noise_multiplier,
            max_norm=fits if self.max_norm is None else self.max_norm,
            count_weight=self.count_weight,
            every=self.every,
            wire=wire,
        )


class Losses(Settings):
    """Mean losses that sites release in every round, for strategies that weigh sites by them.

    Attributes:
        noise_multiplier: Noise of a release; what all rounds' cost is taken from the run's epsilon.
        max_loss: Bound on a patient's loss; without it, twice that of a blind guess among the anchors.
    """

    noise_multiplier: float = Field(default=10.0, gt=0)
    max_loss: float | None = Field(default=None, gt=0)


class Centre(Settings):
    """What sites release once, before the first round, to find the centre of all their image features.

    It is the way to it from the centre of the public anchors' images, which costs nothing.

    Attributes:
        noise_multiplier: Noise of the release; its cost is taken from the run's epsilon.
        count_weight: What a patient adds to the count, a feature being of length 1.
        max_norm: Bound on what one patient adds; without it, what a count and a way of length 1/2 need.
    """

    noise_multiplier: float = Field(default=5.0, gt=0)
    count_weight: float = Field(default=0.25, gt=0)
    max_norm: float | None = Field(default=None, gt=0)

    def plan(self) -> CentrePlan:
        """What sites are asked for."""
        fits = math.hypot(0.5, self.count_weight)
        return CentrePlan(
            noise_multiplier=self.noise_multiplier,
            max_norm=fits if self.max_norm is None else self.max_norm,
            count_weight=self.count_weight,
        )


class Privacy(Settings):
    """What is asked of every site; a site's own policy can only be stricter.

    Attributes:
        mode: ``dp`` or ``none``; ``none`` has no formal guarantee and says so everywhere.
        epsilon: For the whole run, per patient, add/remove one patient.
        max_grad_norm: Clipping bound of one patient's gradient.
    """

    mode: Literal["dp", "none"] = "dp"
    epsilon: float | None = Field(default=None, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _epsilon_belongs_to_dp(self) -> Self:
        if (self.mode == "dp") != (self.epsilon is not None):
            raise ValueError('mode "dp" needs epsilon; mode "none" has none and makes no claim')
        return self


class Training(Settings):
    """Local training: ``steps`` optimizer steps a round on ``batch`` expected patients each.

    Attributes:
        sample_rate: Instead of ``batch``, the share of its patients that every site expects in a step: sites
            of all sizes then add the same noise to their sums, and the smallest sets no limit to the largest.
        epochs: Instead of ``steps``, passes over the site's own pairs; only without privacy.
        keep_optimizer: Sites go on with their optimizer's state between rounds; only without privacy.
        schedule: Learning rate over the whole run: constant, or a tenth of warm-up and a cosine to zero.
        optimizer: ``sgd``, ``adamw``, or ``dp-adambc``, an Adam that knows the noise in its gradients; that
            one only with privacy.
    """

    rounds: int = Field(default=10, ge=1)
    steps: int = Field(default=20, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    sample_rate: float | None = Field(default=None, gt=0, le=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    keep_optimizer: bool = False
    optimizer: OptimizerName = "adamw"
    studies_per_patient: int = Field(default=2, ge=1, le=64)
    augment: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_size_of_a_step(cls, table: Any) -> Any:
        if not isinstance(table, dict) or table.keys() & {"sample-rate", "sample_rate"}:
            return table
        return {"batch": DEFAULT_BATCH, **table}

    @model_validator(mode="after")
    def _batch_or_rate(self) -> Self:
        if (self.batch is None) == (self.sample_rate is None):
            raise ValueError("name one: batch, or sample-rate")
        return self


class Strategy(StrategySettings):
    """Who is asked in a round, how replies are combined, and with how few a round still counts.

    Which strategy it is, and its hyper-parameters, are the keys of `StrategySettings`.

    Attributes:
        weighting: By declared patients, or every site alike.
        min_sites: A round needs so many releases.
        fraction: Share of the ready sites that a round asks, rounded up, never fewer than ``min_sites``. The
            draw is public and amplifies no privacy.
        target_sites: Instead of ``fraction``, how many sites a round asks.
        deadline_seconds: Longest wait for a round's replies.
        retries: How often a site is asked again within a round after its answer was lost (or, without
            privacy, after it failed): the same request, which costs no budget.
        round_retries: How often a round with too few releases is asked for again before the run stops (and
            can be resumed). A release that is stored is sent again; a training that failed is charged anew.
        late: What becomes of a release after the deadline: ``drop`` it, or use it in a later round as
            ``stale``, its weight multiplied by (1 + rounds it is old) ** -staleness-exponent. A site that is
            late is not asked anew until its release has been used, as long as there are enough others.
        staleness_exponent: 0 lets an old update weigh as much as a new one.
    """

    weighting: Literal["declared", "equal"] = "declared"
    min_sites: int = Field(default=2, ge=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    target_sites: int | None = Field(default=None, ge=1)
    deadline_seconds: float = Field(default=3600.0, gt=0)
    retries: int = Field(default=1, ge=0, le=10)
    round_retries: int = Field(default=0, ge=0, le=10)
    late: Literal["drop", "stale"] = "drop"
    staleness_exponent: float = Field(default=0.5, ge=0, le=10)

    @model_validator(mode="after")
    def _enough_to_combine(self) -> Self:
        if self.min_sites < self.fewest_sites:
            raise ValueError(
                f"strategy {self.name!r} cannot combine fewer than {self.fewest_sites} releases: raise "
                f"min-sites = {self.min_sites}"
            )
        return self

    @model_validator(mode="after")
    def _stale_is_a_summand(self) -> Self:
        if self.late == "stale" and not self.is_sum:
            raise ValueError(
                f"strategy {self.name!r} looks at what each site released in this very round: with it, late "
                "has to be 'drop'"
            )
        return self

    @model_validator(mode="after")
    def _one_count(self) -> Self:
        if self.target_sites is None:
            return self
        if self.fraction < 1:
            raise ValueError("name one of: fraction, target-sites")
        if self.target_sites < self.min_sites:
            raise ValueError(
                f"target-sites = {self.target_sites} asks fewer than min-sites = {self.min_sites} needs"
            )
        return self

    def asked_of(self, ready: int) -> int:
        """How many of so many ready sites a round asks."""
        share = math.ceil(round(self.fraction * ready, 9))  # 0.07 of 100 is 7, whatever the last bit says
        return min(ready, max(self.min_sites, share if self.target_sites is None else self.target_sites))


class SecureAggregation(Settings):
    """Updates and prototypes are summed under masks, so that the coordinator learns no site's by itself.

    Attributes:
        threshold: Fewest sites of a sum, and how many it takes to unmask one; without it, the smallest safe
            one: more than half of the sites asked, and at least ``strategy.min-sites``.
        value_range: Largest magnitude of a value in an update; one beyond it is refused by its site. That of
            prototypes follows from the declared patients.
        step_seconds: Longest wait for one of the four steps after the training.
        skip_failed: Pass over a round of which no sum was made however often it was repeated: the weights
            stay, and what it cost its sites stays spent. False: the run stops, and can be resumed.
        sites: Public key of each site (its ``site.pub``). A simulation reads them from its sites' folders.
    """

    threshold: int | None = Field(default=None, ge=2)
    value_range: float = Field(default=1.0, ge=2**-32, le=2**32)
    step_seconds: float = Field(default=300.0, gt=0)
    skip_failed: bool = False
    sites: dict[str, PublicKey] = Field(default_factory=dict)

    @staticmethod
    def least_threshold(asked: int, min_sites: int) -> int:
        """The smallest that is safe among so many sites."""
        return max(2, min_sites, asked // 2 + 1)

    @model_validator(mode="after")
    def _own_keys(self) -> Self:
        if len(set(self.sites.values())) < len(self.sites):
            raise ValueError("two sites have one key: ask each for its own site.pub")
        return self

    def require_fit(self, strategy: Strategy, share: Share) -> None:
        """Refuse settings of which no sum can be made.

        Raises:
            ValueError: naming the setting and the remedy.
        """
        if not strategy.is_sum:
            raise ValueError(
                f"strategy {strategy.name!r} looks at single updates, and secure-aggregation hides them: "
                f"name one of {', '.join(sorted(SUMMED))}"
            )
        if share.wire != "fp32":
            raise ValueError(f"share.wire {share.wire!r} cannot be summed under masks: with them, 'fp32'")
        if strategy.late != "drop":
            raise ValueError(
                "a late update fits under no other round's masks: strategy.late has to be 'drop'"
            )
        if self.threshold is None:
            return
        if self.threshold < strategy.min_sites:
            raise ValueError(
                f"secure-aggregation.threshold = {self.threshold} lets a sum be of fewer than min-sites = "
                f"{strategy.min_sites}: raise it"
            )
        asked = strategy.asked_of(len(self.sites))
        if self.sites and not asked // 2 < self.threshold <= asked:
            raise ValueError(
                f"secure-aggregation.threshold = {self.threshold} has to be more than half of the {asked} "
                "sites that a round asks, and at most all of them"
            )


Metric = Literal[
    "retrieval.image_to_text.r1",
    "retrieval.image_to_text.r5",
    "retrieval.image_to_text.r10",
    "retrieval.text_to_image.r1",
    "retrieval.text_to_image.r5",
    "retrieval.text_to_image.r10",
    "zero_shot.macro_auroc",
]


class Evaluation(Settings):
    """When the global model is evaluated, on which data of the coordinator's, and what follows from it.

    Attributes:
        every: Rounds between evaluations; the start and the last round are always evaluated.
        data: Public data for a deployed coordinator. A simulation evaluates on the held-out patients
            of all its sites.
        metric: Names the best checkpoint, which is kept: the one with the largest value.
        stop_after: So many evaluations in a row that are no better than the best end the run; 0: all rounds
            are trained. In a simulation that choice is made on held-out patients, so figures of its best
            round are flattered, and no epsilon covers them.
    """

    every: int = Field(default=1, ge=1)
    data: PublicData | None = None
    metric: Metric = "retrieval.image_to_text.r10"
    stop_after: int = Field(default=0, ge=0)


class Checkpoints(Settings):
    """Which checkpoints stay; the last and the best always do.

    Attributes:
        keep: So many of the newest.
        keep_every: Rounds that are a multiple of it, too; 0: none.
    """

    keep: int = Field(default=3, ge=1)
    keep_every: int = Field(default=0, ge=0)


class SimulationPolicy(Settings):
    """Policy of the sites that a simulation cuts out of one table, with the defaults of a site's file."""

    require_dp: bool = True
    epsilon_max: float = Field(default=8.0, gt=0)
    min_patients: int = Field(default=20, ge=2)
    max_sample_rate: float = Field(default=0.5, gt=0, le=1)
    max_rounds: int = Field(default=1000, ge=1)


class SitePolicy(Settings):
    """What one site cut from a table holds otherwise than `SimulationPolicy` says."""

    epsilon_max: float | None = Field(default=None, gt=0)
    epsilon_run: float | None = Field(default=None, gt=0)
    min_noise_multiplier: float | None = Field(default=None, gt=0)


class Cut(Settings):
    """Sites that a seed makes of one pool of patients, ``site-1`` and on; no patient is in two.

    Attributes:
        sites: How many.
        label: Column whose values the sites are to have in unequal shares; a patient counts by the most
            frequent one.
        alpha: Concentration of the Dirichlet distribution of those shares: 0.1 makes sites of one or two
            values, 100 next to no difference. Without it patients are dealt out at random.
        size_skew: Site k gets a share of the patients proportional to k ** -size-skew.
    """

    sites: int = Field(ge=1, le=10_000)
    label: str | None = None
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    size_skew: float = Field(default=0.0, ge=0, le=5)

    @model_validator(mode="after")
    def _skew_of_something(self) -> Self:
        if (self.label is None) != (self.alpha is None):
            raise ValueError("label and alpha belong together: which column is skewed, and how much")
        return self


class Missing(Settings):
    """Shares of a site's patients who lack something; who they are is drawn.

    Attributes:
        labels: Without any label, for evaluation.
        reports: Whose images have no report; they are left out of the cohort. 1 is a site of images alone.
        images: Whose reports have no image; they are left out of the cohort. 1 is a site of reports alone.
    """

    labels: float = Field(default=0.0, ge=0, le=1)
    reports: float = Field(default=0.0, ge=0, le=1)
    images: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _pairs_are_left(self) -> Self:
        if self.reports + self.images >= 1 and {self.reports, self.images} != {0.0, 1.0}:
            raise ValueError(
                "a cohort is made of images with their reports, and this site would have no pair: let "
                "reports + images be below 1, or one of them 1 and the other 0"
            )
        return self

    @property
    def modality(self) -> Literal["pairs", "images", "texts"]:
        """What the site's cohort is then made of."""
        return "images" if self.reports == 1 else "texts" if self.images == 1 else "pairs"


class Simulation(Settings):
    """Where a simulation's sites are: a folder of site folders, or one table cut by a column.

    Attributes:
        sites: Folder whose sub-folders hold a ``site.toml`` each. Asked for differences between sites, the
            simulation makes one table of all their packed pairs, with the column ``site``, and cuts that.
        table: Image table (CSV).
        by: Column of the table that names the site of a row; taken as it is.
        image_size: Pixels the sites pack images at, for a table.
        policy: Policy of the sites cut from a table.
        policies: By site, what differs from it.
        cut: Instead of ``by``, sites made for a study.
        scanner_shift: How far the sites' images differ in grey curve and sharpness; 1 is about what the
            synthetic hospitals' scanners differ by.
        missing: By site, what it lacks.
        models: By site, the model of its own that it trains where prototypes alone are shared.
        seed: Decides every draw of ``cut``, ``scanner_shift`` and ``missing``.
    """

    sites: Path | None = None
    table: Path | None = None
    by: str = "fl_client"
    image_size: int = Field(default=128, ge=16)
    policy: SimulationPolicy = SimulationPolicy()
    policies: dict[str, SitePolicy] = Field(default_factory=dict)
    cut: Cut | None = None
    scanner_shift: float = Field(default=0.0, ge=0, le=2)
    missing: dict[str, Missing] = Field(default_factory=dict)
    models: dict[str, OwnModel] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)

    @property
    def changed(self) -> bool:
        """Whether the pairs of the sites are other than their source has them."""
        return self.cut is not None or self.scanner_shift > 0 or bool(self.missing)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.table is None) == (self.sites is None):
            raise ValueError("name one of: sites, table")
        return self

    @model_validator(mode="after")
    def _policies_of_new_sites(self) -> Self:
        if (self.policies or self.models) and self.sites is not None and not self.changed:
            key = "policies" if self.policies else "models"
            raise ValueError(f"{key} are for sites cut from a table: those in a folder have their own")
        return self


class Federation(Settings):
    """The whole file. Relative paths are relative to the file's folder."""

    version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    model: CommonModel = CommonModel()
    public_start: PublicStart | None = None
    share: Share = Share()
    objective: Objective = Objective()
    prototypes: Prototypes | None = None
    losses: Losses | None = None
    centre: Centre | None = None
    privacy: Privacy
    training: Training = Training()
    strategy: Strategy = Strategy()
    secure_aggregation: SecureAggregation | None = None
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _claims_are_sound(self) -> Self:
        if self.privacy.mode == "dp" and self.objective.name == "infonce":
            raise ValueError(
                "objective.name 'infonce' couples the patients of a batch, so no epsilon can be claimed "
                "for it; use objective.name = 'anchored', or privacy.mode = 'none' and no claim"
            )
        if self.privacy.mode == "none" and self.training.optimizer == "dp-adambc":
            raise ValueError(
                "training.optimizer 'dp-adambc' subtracts noise, and privacy.mode = 'none' adds none"
            )
        if self.privacy.mode == "none" and self.objective.name != "infonce":
            raise ValueError("without privacy every site trains objective.name = 'infonce': set it")
        self.strategy.require_training(
            optimizer=self.training.optimizer, schedule=self.training.schedule, epochs=self.training.epochs
        )
        if self.strategy.name in ("scaffold", "feddyn") and self.share.moves_by_turns:
            raise ValueError(
                f"strategy {self.strategy.name!r} remembers how a site moved every weight, and LoRA factors "
                "that are trained by turns stand still in between: set share.lora-train = 'b'"
            )
        if self.secure_aggregation is not None:
            self._require_secure_sums(self.secure_aggregation)
        if self.evaluation.stop_after and self.evaluation.data is None and self.simulation is None:
            raise ValueError("evaluation.stop-after needs evaluations: name public data in evaluation.data")
        if "public" in self.anchor_sources and self.public_start is None:
            raise ValueError("objective.anchors-from 'public' takes them from public-start: name its data")
        if self.prototypes is not None and not self.objective.uses_anchors:
            raise ValueError(
                "prototypes are anchors, and this objective has none: they need objective.name = 'anchored' "
                "or, without privacy, soft-positives or soft-targets"
            )
        if self.strategy.needs_losses and (self.privacy.mode, self.objective.name) != ("dp", "anchored"):
            raise ValueError(
                f"strategy {self.strategy.name!r} weighs sites by losses that they release with "
                "privacy: it needs privacy.mode = 'dp' and objective.name = 'anchored'"
            )
        if self.losses is not None and not self.strategy.needs_losses:
            raise ValueError(f"strategy {self.strategy.name!r} uses no losses: remove the table")
        if self.centre is not None and self.share.part != "image-head":
            raise ValueError(
                f"the centre is of the features that share.part 'image-head' is trained on, and part "
                f"{self.share.part!r} uses none: remove the table"
            )
        if self.prototypes is not None and self.objective.prototypes is not None:
            raise ValueError("name one: objective.prototypes, of before, or a table of new prototypes")
        if self.share.part == "prototypes":
            self._require_prototypes_alone()
        if self.privacy.mode == "dp" and self.training.epochs is not None:
            raise ValueError("training.epochs would tell a site's size: with privacy, say training.steps")
        if self.privacy.mode == "dp" and self.training.keep_optimizer:
            raise ValueError("training.keep-optimizer is only for privacy.mode = 'none'")
        return self

    def _require_prototypes_alone(self) -> None:
        needed = {
            "privacy.mode = 'dp', or its models would be given away": self.privacy.mode == "dp",
            "a table [prototypes] that says which concepts": self.prototypes is not None,
            "prototypes.every = 1, as nothing else is new": self.prototypes is None
            or self.prototypes.every == 1,
            "no objective.soft-targets: its concepts are stated by labels": self.objective.soft_targets
            is None,
            "training.rounds of at least 2: the first goes by the prompts": self.training.rounds > 1,
            "strategy.name = 'fedavg', as no updates are combined": self.strategy.name == "fedavg",
            "strategy.late = 'drop', for the same reason": self.strategy.late == "drop",
            "evaluation.stop-after = 0, as there is no common model": not self.evaluation.stop_after,
            "no secure-aggregation, which hides updates of weights": self.secure_aggregation is None,
        }
        for what, given in needed.items():
            if not given:
                raise ValueError(f"share.part = 'prototypes' needs {what}")

    def _require_secure_sums(self, secure: SecureAggregation) -> None:
        secure.require_fit(self.strategy, self.share)
        if self.share.part == "image-head":
            raise ValueError(
                "part 'image-head' needs the centre of all images, which would leave every site unmasked: "
                "name another share.part, or remove secure-aggregation"
            )
        if not secure.sites and self.simulation is None:
            raise ValueError("secure-aggregation.sites has to name every site's public key (site.pub)")

    @property
    def anchor_sources(self) -> tuple[AnchorSource, ...]:
        """Where the anchors come from, in turn."""
        if self.objective.anchors_from is not None:
            return self.objective.anchors_from
        return ("prompts", "noise") if self.public_start is None else ("public",)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; every path in it becomes absolute.

        Raises:
            SettingsError: naming the file, the key and what is expected there.
        """
        read = super().load(path)
        return read._anchored_at(path.resolve().parent)

    def _anchored_at(self, folder: Path) -> Self:
        changes: dict[str, Settings] = {}
        for name in ("public_start", "objective", "simulation"):
            table: Settings | None = getattr(self, name)
            if table is not None:
                changes[name] = _absolute(table, folder)
        if self.simulation is not None:
            own = {site: model.below(folder) for site, model in self.simulation.models.items()}
            changes["simulation"] = changes["simulation"].model_copy(update={"models": own})
        if self.evaluation.data is not None:
            data = _absolute(self.evaluation.data, folder)
            changes["evaluation"] = self.evaluation.model_copy(update={"data": data})
        changes["model"] = self.model.below(folder)
        return self.model_copy(update=changes)

    def public_settings(self) -> dict[str, Any]:
        """The settings as they may be shown to anyone: JSON-ready, without a path of this machine."""
        shown = self.model_dump(mode="json", by_alias=True, exclude={"simulation"}, exclude_none=True)
        for table in (shown.get("public-start", {}), shown["evaluation"].get("data", {})):
            for source in PairSource.path_keys():
                table.pop(source, None)
        shown["model"]["encoder"] = Path(self.model.encoder).name
        if self.objective.prototypes is not None:
            shown["objective"]["prototypes"] = self.objective.prototypes.name
        return shown

    def _prototype_plan(self) -> PrototypePlan | None:
        if self.prototypes is None:
            return None
        return self.prototypes.plan(wire="bf16" if self.secure_aggregation is None else "fp32")

    def _loss_plan(self) -> LossPlan | None:
        if not self.strategy.needs_losses:
            return None
        losses = self.losses or Losses()
        blind = 2 * math.log(1 + self.objective.anchors)
        return LossPlan(
            noise_multiplier=losses.noise_multiplier,
            max_loss=blind if losses.max_loss is None else losses.max_loss,
        )

    def _centre_plan(self) -> CentrePlan | None:
        return (self.centre or Centre()).plan() if self.share.part == "image-head" else None

    def plan(self) -> TrainingPlan:
        """What every site is asked to do in every round."""
        return TrainingPlan(
            part=self.share.part,
            lora_rank=self.share.lora_rank,
            lora_train=self.share.lora_train,
            prompt_tokens=self.share.prompt_tokens,
            personal=self.share.keep,
            wire=self.share.wire,
            proximal=self.strategy.proximal,
            prototypes=self._prototype_plan(),
            losses=self._loss_plan(),
            centre=self._centre_plan(),
            objective=self.objective.name,
            inverse_temperature=self.objective.inverse_temperature,
            anchors=self.objective.anchors,
            loss=self.objective.form,
            logit_bias=self.objective.logit_bias,
            soft_positives=self.objective.soft_positives,
            soft_targets=self.objective.soft_targets,
            groups=self.objective.groups,
            privacy=self.privacy.mode,
            epsilon=self.privacy.epsilon,
            max_grad_norm=self.privacy.max_grad_norm,
            rounds=self.training.rounds,
            steps=self.training.steps,
            epochs=self.training.epochs,
            batch=self.training.batch,
            sample_rate=self.training.sample_rate,
            learning_rate=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
            schedule=self.training.schedule,
            keep_optimizer=self.training.keep_optimizer,
            optimizer=self.training.optimizer,
            studies_per_patient=self.training.studies_per_patient,
            augment=self.training.augment,
            seed=self.training.seed,
        )


def _absolute(table: Settings, folder: Path) -> Settings:
    if isinstance(table, PairSource):
        return table.relative_to(folder)
    paths = {name: folder / value for name, value in table if isinstance(value, Path)}
    return table.model_copy(update=paths)
