"""The arms of a comparison: the federation, all data in one place, each site alone; each a run of its own."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from privacy.mechanism import MECHANISMS
from privacy.mechanism import Kind as MechanismName
from server.federation import Federation
from strategies.messages import Part, Shared
from strategies.settings import SettingsError

Mode = Literal["dp", "none"]
Kind = Literal["federation", "pooled", "alone"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is compared; None leaves it as the file has it.

    Attributes:
        privacy: With differential privacy, without, or both.
        parts: What is trained and travels.
        objectives: Losses of the arms with privacy; without it there is one.
        prototypes: The federation with its file's prototypes, without, or both.
        seeds: Of training and, without a public start, of the initial weights.
        epsilon: Of the arms with privacy.
        rounds: Fewer or more of them.
    """

    privacy: tuple[Mode, ...] | None = None
    parts: tuple[Part, ...] | None = None
    objectives: tuple[MechanismName, ...] | None = None
    prototypes: tuple[bool, ...] | None = None
    seeds: tuple[int, ...] | None = None
    epsilon: float | None = None
    rounds: int | None = None

    @classmethod
    def parse(
        cls,
        *,
        privacy: str | None = None,
        share: str | None = None,
        objective: str | None = None,
        prototypes: str | None = None,
        seeds: str | None = None,
        epsilon: float | None = None,
        rounds: int | None = None,
    ) -> "Asked":
        """Read the options of the command line: names with commas between them.

        Raises:
            SettingsError: a name that is not known, or a seed that is no number from 0.
        """
        modes: tuple[Mode, ...] = get_args(Mode)
        switches = {"on": True, "off": False}
        chosen = _chosen(prototypes, "prototypes", tuple(switches))
        return cls(
            privacy=_chosen(privacy, "privacy", modes),
            parts=_chosen(share, "share", PARTS),
            objectives=_chosen(objective, "objective", tuple(MECHANISMS)),
            prototypes=chosen and tuple(switches[word] for word in chosen),
            seeds=None if seeds is None else tuple(dict.fromkeys(map(_seed, seeds.split(",")))),
            epsilon=epsilon,
            rounds=rounds,
        )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a comparison.

    Attributes:
        kind: The federation, all sites' data as one site, or one site alone.
        site: Who is alone.
        federation: The settings it runs with.
    """

    kind: Kind
    site: str | None = None
    federation: Federation

    @property
    def seed(self) -> int:
        """What sets it apart from its repetitions."""
        return self.federation.training.seed

    @property
    def name(self) -> str:
        """What it is called within its setting."""
        if self.kind == "alone":
            return f"{self.site} alone"
        return {"federation": "federation", "pooled": "pooled"}[self.kind] + (
            ", prototypes" if self.federation.prototypes is not None else ""
        )

    @property
    def setting(self) -> str:
        """What it shares with the arms that it is compared with."""
        epsilon, objective = self.federation.privacy.epsilon, self.federation.objective.name
        loss = "microbatch, " if objective == "microbatch" else ""
        return f"{self.federation.share.part}, {loss}" + (
            "no privacy" if epsilon is None else f"ε = {epsilon:g}"
        )


def arms_of(federation: Federation, asked: Asked, sites: Sequence[str]) -> list[Arm]:
    """Every arm of the comparison, those of one setting and seed together.

    Guarantees:
        A site alone trains the same model for as many rounds and steps as in the federation, under the same
        epsilon. The pooled model is shown as many pairs as all sites of a round together: without privacy in
        more steps, with it in larger batches, so that noise and epsilon are a site's. Both are trained as one
        site is, without what only several need: server-side steps, kept weights, smaller wire forms,
        prototypes.

    Args:
        federation: The file.
        asked: What is compared.
        sites: Names of the federation's sites.

    Raises:
        SettingsError: the file lacks what is asked for, or forbids it.
    """
    if federation.share.part == "prototypes":
        raise SettingsError(
            "share.part 'prototypes' leaves no common model to compare: simulate it, and see each site's"
        )
    together = federation.strategy.asked_of(len(sites))
    arms: list[Arm] = []
    for mode, part, objective, seed in product(
        asked.privacy or (federation.privacy.mode,),
        asked.parts or (federation.share.part,),
        asked.objectives or (None,),
        asked.seeds or (None,),
    ):
        if mode == "none" and asked.objectives and objective != asked.objectives[0]:
            continue  # whatever is asked for, without privacy it is one loss
        base = _document(federation, asked, mode=mode, part=part, objective=objective, seed=seed)
        arms += [
            Arm(kind="federation", federation=_parsed(each)) for each in _variants(base, asked, federation)
        ]
        pooled = _pooled(base, together, sites=len(sites))
        arms.append(Arm(kind="pooled", federation=_parsed(pooled)))
        alone = _parsed(_single(base))
        arms += [Arm(kind="alone", site=site, federation=alone) for site in sites]
    return arms


Document = dict[str, Any]


def _document(
    federation: Federation,
    asked: Asked,
    *,
    mode: Mode,
    part: Shared,
    objective: MechanismName | None,
    seed: int | None,
) -> Document:
    """The file's settings with privacy, part, objective, seed and rounds as asked."""
    whole = federation.model_dump(mode="json", by_alias=True, exclude_none=True)
    whole["share"]["part"] = part
    if part != "image-head":
        whole.pop("centre", None)
    training, loss = whole["training"], whole["objective"]
    if asked.rounds is not None:
        training["rounds"] = asked.rounds
    if seed is not None:
        training["seed"] = seed
        if federation.public_start is None:
            whole["model"]["seed"] = seed
    if mode == "dp":
        epsilon = federation.privacy.epsilon if asked.epsilon is None else asked.epsilon
        if epsilon is None:
            raise SettingsError(
                f"{federation.name} names no epsilon: say --epsilon for the arms with privacy"
            )
        whole["privacy"] = {**whole["privacy"], "mode": "dp", "epsilon": epsilon}
        if objective is not None:
            loss["name"] = objective
        elif loss["name"] == "infonce":
            loss["name"] = "anchored"
        training["keep-optimizer"] = False
        training.pop("epochs", None)
    else:
        whole["privacy"] = {"mode": "none"}
        loss["name"] = "infonce"
        if training["optimizer"] == "dp-adambc":
            training["optimizer"] = "adamw"
    if loss["name"] != "anchored":
        loss.pop("prototypes", None)
    return whole


def _variants(base: Document, asked: Asked, federation: Federation) -> Iterator[Document]:
    """The federation without and with prototypes, which are anchors: without those there are none."""
    table = federation.prototypes
    wanted = asked.prototypes or (table is not None,)
    if asked.prototypes and True in asked.prototypes and table is None:
        raise SettingsError(
            f"{federation.name} has no [prototypes] table: add one, or leave --prototypes out"
        )
    without = {key: value for key, value in base.items() if key != "prototypes"}
    usable = _parsed(without).objective.uses_anchors
    if not usable or False in wanted:
        yield without
    if usable and True in wanted:
        yield base


def _single(base: Document) -> Document:
    """The same training for one site."""
    share = {**base["share"], "keep": [], "wire": "fp32"}
    strategy = {"min-sites": 1, "deadline-seconds": base["strategy"]["deadline-seconds"]}
    without = {key: value for key, value in base.items() if key not in ("prototypes", "losses")}
    return {**without, "share": share, "strategy": strategy}


def _pooled(base: Document, together: int, *, sites: int) -> Document:
    """The same training for all data in one place, of which ``together`` of ``sites`` are seen in a round."""
    training = dict(base["training"])
    if "sample-rate" in training:
        training["sample-rate"] *= together / sites  # a share of all patients is of every site's
    elif "epochs" not in training:
        more = "batch" if base["privacy"]["mode"] == "dp" else "steps"
        training[more] *= together
    return {**_single(base), "training": training}


def _parsed(document: Document) -> Federation:
    return Federation.parse(document, source="an arm of the comparison")


def _chosen(words: str | None, option: str, known: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if words is None:
        return None
    chosen = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    for word in chosen:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"--{option} {word!r} is none of {', '.join(known)}{hint}")
    return chosen


def _seed(word: str) -> int:
    if not word.strip().isdecimal():
        raise SettingsError(f"--seeds {word.strip()!r} is no number from 0: say, for instance, --seeds 1,2,3")
    return int(word)
