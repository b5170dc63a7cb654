"""Refusals that are certain before the first round, told where the sites' rules lie too: in a simulation."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from client.errors import Refused
from client.policy import foreseen
from client.site import Site
from server.federation import Federation, SimulationPolicy, SitePolicy
from server.rounds import Start
from strategies.messages import Phase, TrainingPlan, TrainRequest

logger = logging.getLogger(f"clipward.{__name__}")

NAMED_SITES = 5
ASKED: dict[Phase, str] = {
    "train": "to train",
    "prototypes": "for prototypes",
    "losses": "for a mean loss",
    "centre": "for the centre of its images",
}
# What the run's own file can do about a rule of a site's policy; about the others it can do nothing.
IN_THE_RUN = {
    "parts": "change share.part",
    "objectives": "change objective.name",
    "prototypes": "leave out the table [prototypes], and change share.part where that is image-head",
    "require-dp": "set privacy.mode to dp",
    "max-rounds": "lower training.rounds",
    "max-steps": "lower training.steps or epochs",
    "max-release-bytes": "change share.part or share.wire",
    "max-sample-rate": "lower training.batch or sample-rate",
    "min-noise-multiplier": "raise the release's noise-multiplier",
    "epsilon-max": "lower privacy.epsilon",
    "runs": "change name",
}
# Where a simulation's file holds rules of the sites that it makes, by the keys that the table has.
IN_THE_SIMULATION = {
    field.alias: table
    for table, model in (("policies", SitePolicy), ("policy", SimulationPolicy))
    for field in model.model_fields.values()
}


@dataclass(frozen=True, kw_only=True)
class CertainRefusal:
    """What sites will refuse as often as they are asked.

    Attributes:
        sites: Their names, at least one.
        asked: What they refuse.
        reason: The value and the rule.
        remedy: What can be done about it; empty: the reason says it, or nothing can.
    """

    sites: tuple[str, ...]
    asked: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        names, more = ", ".join(self.sites[:NAMED_SITES]), len(self.sites) - NAMED_SITES
        who = f"site {names}" if len(self.sites) == 1 else f"sites {names}"
        others = f" and {more} more" if more > 0 else ""
        return f"{who}{others} will refuse {self.asked}: {self.reason}" + (self.remedy and f": {self.remedy}")


def certain_refusals(federation: Federation, sites: Iterable[Site], start: Start) -> list[CertainRefusal]:
    """All that is certain of what the run asks, sites with one rule to refuse by together.

    Args:
        federation: The run's settings.
        sites: Whom it will ask.
        start: Its round 0.
    """
    plan = federation.plan()
    request = TrainRequest(
        run=federation.name, server_round=1, bundle=start.bundle.digest, plan=plan, arrays=start.arrays
    )
    phases = _phases(plan)
    groups: dict[tuple[str, tuple[Phase, ...]], dict[str, Refused]] = {}
    for site in sites:
        for refused, refused_in in _of_site(site, request, phases):
            groups.setdefault((refused.rule or refused.reason, refused_in), {})[site.name] = refused
    return [
        _told(federation, refusals, asked="every round" if refused_in == phases else _requests(refused_in))
        for (_, refused_in), refusals in groups.items()
    ]


def warn_of(refusal: CertainRefusal) -> None:
    """Say it in the log."""
    logger.warning("%s", refusal)


def _phases(plan: TrainingPlan) -> tuple[Phase, ...]:
    """All that a run asks a site for."""
    besides: dict[Phase, object] = {
        "prototypes": plan.prototypes,
        "losses": plan.losses,
        "centre": plan.centre,
    }
    return ("train", *(phase for phase, asked in besides.items() if asked is not None))


def _of_site(
    site: Site, request: TrainRequest, phases: Sequence[Phase]
) -> list[tuple[Refused, tuple[Phase, ...]]]:
    """Each refusal of one site, and in which phases."""
    found: dict[str, tuple[Refused, tuple[Phase, ...]]] = {}
    for phase in phases:
        first = replace(request, phase=phase, server_round=_first_round(request.plan, phase))
        for refused in foreseen(site, first):
            _, before = found.get(str(refused), (refused, ()))
            found[str(refused)] = refused, (*before, phase)
    return list(found.values())


def _first_round(plan: TrainingPlan, phase: Phase) -> int:
    """In which the phase is asked for the first time."""
    if phase != "prototypes":
        return 1
    return next((each for each in range(1, plan.rounds + 1) if plan.releases_prototypes(each)), 1)


def _requests(phases: Iterable[Phase]) -> str:
    return "every request " + " and ".join(ASKED[phase] for phase in phases)


def _told(federation: Federation, refusals: dict[str, Refused], *, asked: str) -> CertainRefusal:
    """Refusals of several sites by one rule as one; where their values differ, with the first's."""
    first, *others = refusals.items()
    site, refused = first
    differ = any(other.reason != refused.reason for _, other in others)
    return CertainRefusal(
        sites=tuple(refusals),
        asked=asked,
        reason=f"{refused.reason} at {site}" if differ else refused.reason,
        remedy=_remedy(federation, refused.rule, sites=tuple(refusals)),
    )


def _remedy(federation: Federation, rule: str | None, *, sites: Sequence[str]) -> str:
    if rule is None:
        return ""
    simulation, verb = federation.simulation, _verb(rule)
    theirs = f"have the hospital{'s' if len(sites) > 1 else ''} {verb} policy.{rule}"
    if simulation is not None and (simulation.table is not None or simulation.changed):
        own = [
            simulation.policies.get(site, SitePolicy()).model_dump(by_alias=True).get(rule) for site in sites
        ]
        # Every simulation writes the files of these sites anew, and what is said of one outweighs the rest.
        table = "policies" if all(own) else IN_THE_SIMULATION.get(rule)
        theirs = f"{verb} {rule} in [simulation.{table}]" if table else ""
    return " or ".join(each for each in (IN_THE_RUN.get(rule, ""), theirs) if each)


def _verb(rule: str) -> str:
    return "raise" if "max" in rule else "lower" if "min" in rule else "change"
