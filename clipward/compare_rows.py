"""The arms of a comparison in figures: one row an arm, a mean and an interval over its seeds."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from scipy.stats import t

from clipward.compare_arms import Kind
from clipward.compare_runs import Outcome
from server.federation import Metric

MEASURES: tuple[str, ...] = get_args(Metric)
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Of all seeds.
        margin: Half of the 95 % interval of Student's t over seeds; None: one seed tells nothing of it.
    """

    mean: float
    margin: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Estimate | None":
        """The estimate from one value a seed; None of none."""
        known = list(values)
        if not known:
            return None
        mean = statistics.fmean(known)
        if len(known) == 1:
            return cls(mean=mean, margin=None)
        quantile = float(t.ppf((1 + LEVEL) / 2, len(known) - 1))
        return cls(mean=mean, margin=quantile * statistics.stdev(known) / math.sqrt(len(known)))

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside the interval."""
        return self.margin is not None and abs(self.mean) > self.margin


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm over all its seeds.

    Attributes:
        setting: What it shares with the arms that it is compared with.
        name: What it is called there.
        kind: Federation, pooled, or a site alone.
        site: Who is alone.
        values: By measure and seed; what was not measured is absent.
        measures: By measure, the estimate over seeds.
        chances: By measure, what guessing reaches.
        bytes_up: Mean of all rounds and sites together; None where no update travels.
        bytes_down: The other way.
        seconds: Mean.
        epsilon: Largest over seeds and sites; None: no privacy.
        delta: Its delta.
        sites: Fewest sites that trained.
        problem: Why a seed has no figures.
    """

    setting: str
    name: str
    kind: Kind
    site: str | None
    values: Mapping[str, Mapping[int, float]]
    measures: Mapping[str, Estimate]
    chances: Mapping[str, float]
    bytes_up: float | None
    bytes_down: float | None
    seconds: float | None
    epsilon: float | None
    delta: float | None
    sites: int | None
    problem: str | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Row":
        """The row of one arm's seeds, of which there is at least one."""
        arm = outcomes[0].arm
        figures = {one.arm.seed: one.figures for one in outcomes if one.figures is not None}
        known = list(figures.values())
        evaluations = {seed: one.evaluation for seed, one in figures.items()}
        values = {
            measure: found for measure in MEASURES if (found := _by_seed(evaluations, value_of, measure))
        }
        chances = {
            measure: found for measure in values if (found := _by_seed(evaluations, chance_of, measure))
        }
        travels = arm.kind == "federation"
        return cls(
            setting=arm.setting,
            name=arm.name,
            kind=arm.kind,
            site=arm.site,
            values=values,
            measures={
                measure: estimate
                for measure, found in values.items()
                if (estimate := Estimate.of(found.values())) is not None
            },
            chances={measure: statistics.fmean(found.values()) for measure, found in chances.items()},
            bytes_up=_mean(one.bytes_up for one in known) if travels else None,
            bytes_down=_mean(one.bytes_down for one in known) if travels else None,
            seconds=_mean(one.seconds for one in known),
            epsilon=max((one.epsilon for one in known if one.epsilon is not None), default=None),
            delta=max((one.delta for one in known if one.delta is not None), default=None),
            sites=min((one.sites for one in known), default=None),
            problem=next((one.problem for one in outcomes if one.problem is not None), None),
        )

    def gain_over(self, other: "Row", measure: str) -> Estimate | None:
        """This arm minus the other, seed by seed: arms of one seed share their start."""
        mine, theirs = self.values.get(measure, {}), other.values.get(measure, {})
        return Estimate.of(mine[seed] - theirs[seed] for seed in mine if seed in theirs)


def rows_of(outcomes: Iterable[Outcome]) -> list[Row]:
    """One row an arm, in the order of the first of its seeds."""
    groups: dict[tuple[str, str, str | None], list[Outcome]] = {}
    for outcome in outcomes:
        arm = outcome.arm
        groups.setdefault((arm.setting, arm.name, arm.site), []).append(outcome)
    return [Row.of(group) for group in groups.values()]


def by_setting(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of equal setting, in the order of the first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    yield from groups.items()


def value_of(evaluation: Mapping[str, Any], measure: str) -> float | None:
    """The number at a path such as ``retrieval.image_to_text.r10``."""
    found: Any = evaluation
    for key in measure.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def chance_of(evaluation: Mapping[str, Any], measure: str) -> float | None:
    """What guessing reaches by the same measure."""
    parent, name = measure.rsplit(".", 1)
    return value_of(evaluation, f"{parent}.chance" if name == "macro_auroc" else f"{parent}.chance_{name}")


def _by_seed(evaluations: Mapping[int, Mapping[str, Any]], read: Any, measure: str) -> dict[int, float]:
    found = {seed: read(evaluation, measure) for seed, evaluation in evaluations.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None
