"""What a federation does with the updates of its rounds, by the one name that its file gives it."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from strategies.corrections import Correction, FedDyn, Proximal, Scaffold
from strategies.messages import Arrays
from strategies.optimizers import FedAdagrad, FedAdam, FedYogi, Momentum, Plain, ServerOptimizer
from strategies.rules.fairness import Fairness, LossPower, WorstFirst
from strategies.rules.mean import Mean
from strategies.rules.norm_bound import MedianNormBound, NormBound
from strategies.rules.robust import Krum, Median, TrimmedMean, fewest_for_krum, fewest_to_trim
from strategies.rules.rule import CannotCombine, Rule
from strategies.rules.spill import Scratch
from strategies.settings import Settings

StrategyName = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn",
    "median", "trimmed-mean", "krum", "multi-krum", "norm-bound", "q-ffl", "afl", "hospital-dp",
]  # fmt: skip
SUMMED = frozenset({"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"})

if TYPE_CHECKING:  # the one strategy that needs torch, which a coordinator does without
    from strategies.hospital_dp import HospitalDp


class StrategySettings(Settings):
    """Which strategy, and its hyper-parameters; one that the named strategy does not have is refused.

    Attributes:
        name: See docs/strategies.md for each, and for when not to use it.
        proximal_mu: fedprox: strength of the pull back to the start of the round.
        server_learning_rate: fedavgm, fedadam, fedyogi, fedadagrad: the coordinator's step.
        server_momentum: fedavgm.
        beta_1: fedadam, fedyogi: decay of the mean.
        beta_2: fedadam, fedyogi: decay of the square.
        tau: fedadam, fedyogi, fedadagrad: added to the root of the square, in units of a weight's update.
        alpha: feddyn: strength of the regulariser.
        trim_share: trimmed-mean: share of the updates cut from each end.
        attackers: krum, multi-krum: so many malicious sites are expected.
        selected: multi-krum: so many updates are averaged; without it, sites minus attackers minus 2.
        norm_bound: norm-bound: largest norm of an update; without it, the median norm of the round.
        fairness: q-ffl: power of the loss in a site's weight.
        loss_rate: afl: how fast weight moves to the sites with the largest losses.
        floor: afl: share of all weight that is always spread evenly.
        update_norm: hospital-dp: bound C on a hospital's whole update.
        noise_multiplier: hospital-dp: noise standard deviation divided by C.
        hospitals: hospital-dp: how many are invited; the public divisor of their sum.
    """

    name: StrategyName = "fedavg"
    proximal_mu: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    server_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    server_momentum: float | None = Field(default=None, ge=0, lt=1)
    beta_1: float | None = Field(default=None, ge=0, lt=1)
    beta_2: float | None = Field(default=None, ge=0, lt=1)
    tau: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    trim_share: float | None = Field(default=None, gt=0, lt=0.5)
    attackers: int | None = Field(default=None, ge=0)
    selected: int | None = Field(default=None, ge=1)
    norm_bound: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    fairness: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    loss_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    floor: float | None = Field(default=None, ge=0, le=1)
    update_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    hospitals: int | None = Field(default=None, ge=1)

    # What each has, with its default; null: it must be given, or something of its own is done without it.
    DEFAULTS: ClassVar[Mapping[str, Mapping[str, float | None]]] = {
        "fedprox": {"proximal_mu": 0.01},
        "fedavgm": {"server_learning_rate": 1.0, "server_momentum": 0.9},
        "fedadam": {"server_learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
        "fedyogi": {"server_learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
        "fedadagrad": {"server_learning_rate": 0.1, "tau": 1e-3},
        "feddyn": {"alpha": 0.01},
        "trimmed-mean": {"trim_share": 0.2},
        "krum": {"attackers": 1},
        "multi-krum": {"attackers": 1, "selected": None},
        "norm-bound": {"norm_bound": None},
        "q-ffl": {"fairness": 1.0},
        "afl": {"loss_rate": 0.1, "floor": 0.1},
        "hospital-dp": {"update_norm": None, "noise_multiplier": None, "hospitals": None},
    }

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        own = self.DEFAULTS.get(self.name, {})
        for key in dict.fromkeys(key for keys in self.DEFAULTS.values() for key in keys):
            if getattr(self, key) is not None and key not in own:
                has = f"it has {', '.join(map(_kebab, own))}" if own else "it has none"
                raise ValueError(f"strategy {self.name!r} has no {_kebab(key)}: remove the key ({has})")
        return self

    @model_validator(mode="after")
    def _all_of_hospital_dp(self) -> Self:
        missing = [_kebab(key) for key, value in self.parameters.items() if value is None]
        if self.name == "hospital-dp" and missing:
            raise ValueError(f"strategy 'hospital-dp' has no default for {', '.join(missing)}: set it")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The named strategy's own hyper-parameters, as given or by default; part of a run's identity."""
        own = self.DEFAULTS.get(self.name, {})
        given = {key: getattr(self, key) for key in own}
        return {key: own[key] if value is None else value for key, value in given.items()}

    @property
    def proximal(self) -> float:
        """What sites multiply their way from the start of the round by, and add to their gradients."""
        own = self.parameters
        return float(own.get("proximal_mu", own.get("alpha", 0.0)))

    @property
    def fewest_sites(self) -> int:
        """A round with fewer updates cannot be combined: ``min-sites`` must be at least that."""
        if self.name in ("krum", "multi-krum"):
            attackers = fewest_for_krum(self.parameters["attackers"])
            return max(attackers, self.selected or 0)
        if self.name == "trimmed-mean":
            return fewest_to_trim(self.parameters["trim_share"])
        return 3 if self.name == "median" else 1  # the median of two is their mean

    @property
    def is_sum(self) -> bool:
        """Whether the weighted sum of the updates is all it needs; see `Strategy.is_sum`."""
        return self.name in SUMMED

    @property
    def needs_losses(self) -> bool:
        """Whether sites must release a noised loss, charged to their budgets."""
        return self.name in ("q-ffl", "afl")

    def hospital_dp(self, *, rounds: int) -> "HospitalDp":
        """What hospital-dp does in so many rounds, for its accountant and its report.

        Raises:
            CannotCombine: another strategy is named.
        """
        if self.name != "hospital-dp":
            raise CannotCombine(f"strategy {self.name!r} makes no claim about hospitals")
        from strategies.hospital_dp import HospitalDp

        own = self.parameters
        return HospitalDp(
            max_update_norm=own["update_norm"],
            noise_multiplier=own["noise_multiplier"],
            hospitals=own["hospitals"],
            rounds=rounds,
        )

    def require_training(self, *, optimizer: str, schedule: str, epochs: int | None) -> None:
        """Refuse local training whose updates do not mean what the strategy takes them for.

        Raises:
            ValueError: naming the setting and the remedy.
        """
        if self.name != "scaffold":
            return
        reason = (
            "scaffold reads gradients off the updates: update = -(steps times learning rate) * mean gradient"
        )
        if optimizer != "sgd":
            raise ValueError(f"{reason}; with training.optimizer {optimizer!r} that is not so: set 'sgd'")
        if schedule != "constant":
            raise ValueError(f"{reason}; with training.schedule {schedule!r} that is not so: set 'constant'")
        if epochs is not None:
            raise ValueError(
                f"{reason}; with training.epochs sites differ in their steps: set training.steps"
            )


class Strategy:
    """A rule, the coordinator's optimizer and a correction, round after round.

    A round is ``begin``, ``correction_for`` each site that is asked, ``fold`` each update, ``finish``. A
    round that came to nothing is begun again. Until ``finish``, ``state`` is that of the last round: the same
    state, base, updates and order give the same bits.

    Args:
        make_rule: A new rule for arrays shaped as given.
        sums: Whether that rule needs the weighted sum alone.
        optimizer: Moves the weights.
        correction: What sites add to their gradients.
        fairness: Changes the sites' weights; null: they stay as they are.
    """

    def __init__(
        self,
        make_rule: Callable[[Arrays], Rule],
        *,
        sums: bool,
        optimizer: ServerOptimizer,
        correction: Correction,
        fairness: Fairness | None = None,
    ) -> None:
        self._make_rule, self._sums, self._optimizer = make_rule, sums, optimizer
        self._correction, self._fairness = correction, fairness
        self._base: Arrays = {}
        self._folded: set[str] = set()
        self._rule: Rule | None = None

    @property
    def proximal(self) -> float:
        """Strength of the pull back to the start of the round; 0: none."""
        return self._correction.proximal

    @property
    def is_sum(self) -> bool:
        """Whether the weighted sum of the updates is enough.

        Secure aggregation may then hide each update, and fold their mean with the sum of their weights; and
        an update of an earlier round may be folded in beside the site's own. Elsewhere a site counts once: a
        correction would misread the late one, and in a robust rule it would be a second vote.
        """
        return self._sums and not self._correction.per_site and not self.fair

    @property
    def fair(self) -> bool:
        """Whether it weighs sites by losses, which `hear` must be told."""
        return self._fairness is not None

    def hear(self, losses: Mapping[str, float]) -> None:
        """Take losses that sites released with noise: once a round, between ``finish`` and the checkpoint.

        Raises:
            CannotCombine: this strategy uses none, or a loss is not finite.
        """
        if self._fairness is None:
            raise CannotCombine("this strategy uses no losses: do not ask sites to spend budget on them")
        self._fairness.hear(losses)

    def begin(self, base: Arrays) -> None:
        """Start a round from these weights; what an unfinished one took in is forgotten."""
        self._base, self._folded = base, set()
        self._rule = self._make_rule(base)
        self._correction.begin(base)

    def correction_for(self, site: str) -> Arrays | None:
        """What the site adds to its gradients in this round; null: nothing."""
        return self._correction.of(site)

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Take one site's update.

        Raises:
            MessageError: the update is not one of this model, or not finite; it left no trace.
            CannotCombine: the weight is not positive and finite, or a second update came from one site where
                only one can be used.
        """
        if not self.is_sum and site in self._folded:
            raise CannotCombine(
                f"two updates of site {site!r} in one round: this strategy takes one, drop the late one"
            )
        if self._fairness is not None:
            weight = self._fairness.weight(site, weight)
        self._begun.fold(site, update, weight)
        self._correction.take(site, update, weight)
        self._folded.add(site)

    def finish(self) -> Arrays:
        """The new weights.

        Raises:
            CannotCombine: too few updates, or a value does not fit into float32.
        """
        update = self._begun.result()
        self._rule = None  # and the files it holds
        return self._optimizer.step(self._base, self._correction.finish(update))

    def state(self) -> Arrays:
        """What a checkpoint needs to go on; empty where a strategy remembers nothing."""
        return {
            f"{part}/{name}": value
            for part, keeper in self._parts()
            for name, value in keeper.state().items()
        }

    def restore(self, state: Arrays) -> None:
        """Go on from a checkpoint.

        Raises:
            CannotCombine: the state is another strategy's.
        """
        parts = dict(self._parts())
        if foreign := sorted(name for name in state if name.partition("/")[0] not in parts):
            raise CannotCombine(
                f"the state {foreign[0]!r} is not of this strategy: name the one it was saved by"
            )
        for part, keeper in parts.items():
            own = {name: value for name, value in state.items() if name.startswith(f"{part}/")}
            keeper.restore({name.partition("/")[2]: value for name, value in own.items()})

    @property
    def _begun(self) -> Rule:
        if self._rule is None:
            raise CannotCombine("no round has begun: call begin with its weights")
        return self._rule

    def _parts(self) -> Iterator[tuple[str, ServerOptimizer | Correction | Fairness]]:
        yield "optimizer", self._optimizer
        yield "correction", self._correction
        if self._fairness is not None:
            yield "fairness", self._fairness


def strategy_of(
    settings: StrategySettings, *, folder: Path, step_length: float = math.nan, memory_bytes: int = 0
) -> Strategy:
    """The strategy that the settings name.

    Args:
        settings: Name and hyper-parameters.
        folder: The coordinator's alone, of this run; made when missing. A round's updates lie there while it
            lasts (twice the model for a mean, all updates for the robust rules), and what scaffold and feddyn
            remember of each site.
        step_length: Learning rate times steps of a round at a site; needed by scaffold alone.
        memory_bytes: The sums of a mean stay in memory where they take at most so many bytes.

    Raises:
        CannotCombine: scaffold without a step length.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = settings.parameters
    rate = own.get("server_learning_rate", 1.0)
    optimizer: ServerOptimizer = Plain(rate=rate)
    correction: Correction = Proximal(own.get("proximal_mu", 0.0))
    fairness: Fairness | None = None
    match settings.name:
        case "fedavgm":
            optimizer = Momentum(rate=rate, momentum=own["server_momentum"])
        case "fedadam" | "fedyogi":
            adaptive = FedAdam if settings.name == "fedadam" else FedYogi
            optimizer = adaptive(rate=rate, beta_1=own["beta_1"], beta_2=own["beta_2"], tau=own["tau"])
        case "fedadagrad":
            optimizer = FedAdagrad(rate=rate, tau=own["tau"])
        case "scaffold":
            correction = Scaffold(folder=folder / "sites", step_length=step_length)
        case "feddyn":
            correction = FedDyn(folder=folder / "sites", alpha=own["alpha"])
        case "q-ffl":
            fairness = LossPower(own["fairness"])
        case "afl":
            fairness = WorstFirst(rate=own["loss_rate"], floor=own["floor"])
    rule, sums = _rule_of(settings, Scratch(most_bytes=memory_bytes))
    return Strategy(
        partial(rule, folder=folder),
        sums=sums,
        optimizer=optimizer,
        correction=correction,
        fairness=fairness,
    )


def _rule_of(settings: StrategySettings, scratch: Scratch) -> tuple[Callable[..., Rule], bool]:
    """What makes the named rule from names, shapes and a folder; whether it sums."""
    own = settings.parameters
    match settings.name:
        case "median":
            return Median, Median.sums
        case "trimmed-mean":
            return partial(TrimmedMean, share=own["trim_share"]), TrimmedMean.sums
        case "krum":
            return partial(Krum, attackers=own["attackers"]), Krum.sums
        case "multi-krum":
            return partial(Krum, attackers=own["attackers"], selected=own["selected"]), Krum.sums
        case "norm-bound" if own["norm_bound"] is None:
            return MedianNormBound, MedianNormBound.sums
        case "norm-bound":
            return partial(NormBound, bound=own["norm_bound"]), NormBound.sums
        case "hospital-dp":
            from privacy.noise import GaussianNoise
            from strategies.hospital_dp import HospitalMean

            mechanism = settings.hospital_dp(rounds=1)  # noise and bound are those of any round
            return partial(HospitalMean, mechanism=mechanism, noise=GaussianNoise()), HospitalMean.sums
        case _:
            return partial(Mean, scratch=scratch), Mean.sums


def _kebab(name: str) -> str:
    return name.replace("_", "-")
