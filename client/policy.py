"""The hospital's rules, applied before anything else is done with a request.

What is refused here was decided by the request, by public constants of the site's file and by the clock: no
patient's file was opened, nothing was written into the ledger, and the refusal tells nothing of a patient.
"""

import math
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from client.errors import Refused
from client.limits import METRICS
from client.own_code import code_digest
from client.site import SITE_FILE, Site
from privacy.accounting import PoissonGaussian, noise_multiplier_for
from privacy.errors import NoiseOutOfRange
from privacy.losses import LossRelease
from privacy.mechanism import MECHANISMS, Mechanism
from privacy.prototypes import PrototypeRelease
from strategies.messages import (
    CentrePlan,
    PrototypePlan,
    RefusalCode,
    Release,
    TrainingPlan,
    TrainRequest,
    bytes_of,
)
from strategies.share import released
from strategies.wire import size_of
from tasks.concepts import unknown_names

Rules = dict[str, tuple[bool, str]]


def check_code(site: Site) -> None:
    """Refuse to answer with code that the hospital did not review.

    Raises:
        Refused: POLICY; the text holds the digest to review and allow.
    """
    _apply(_code(site))


def check_run(site: Site, run: str) -> None:
    """Refuse a run, or code, that the hospital did not allow.

    Raises:
        Refused: POLICY, with the rule that says so.
    """
    check_code(site)
    _apply(_runs(site, run))


def check_plan(site: Site, request: TrainRequest, *, clock: Callable[[], float] = time.time) -> None:
    """Refuse what the site does not do, from the request alone.

    Raises:
        Refused: POLICY, BUDGET or DEADLINE, with the rule that says so.
    """
    check_run(site, request.run)
    now = clock()
    for refusal in _objections(site, request, now=now):
        raise refusal
    if request.deadline_unix_seconds is not None and now > request.deadline_unix_seconds:
        raise Refused(RefusalCode.DEADLINE, "the deadline has passed: the reply would not be used")


def foreseen(site: Site, request: TrainRequest) -> list[Refused]:
    """Why the site will refuse the request whenever it comes: every reason, not the first alone.

    That there is none promises nothing: what the clock, the ledger and the patients' files have to say is not
    asked, nor how much noise the training is left with, which takes an accountant seconds.
    """
    plan = request.plan
    rules = _code(site) | _runs(site, request.run)
    found = [*_broken(rules), *_objections(site, request, now=None)]
    if request.phase == "train":
        return [*found, *(_broken(_draws(site, plan)) if plan.privacy == "dp" else ())]
    beside = {"prototypes": plan.prototypes, "losses": plan.losses, "centre": plan.centre}[request.phase]
    if beside is None or plan.privacy == "none":
        return found
    return [*found, *_broken(_noise(site, beside.noise_multiplier))]


def _code(site: Site) -> Rules:
    allowed = site.settings.policy.code
    digest = code_digest() if allowed else ""
    unknown = bool(allowed) and digest not in allowed
    return {"code": (unknown, f"this code has digest {digest}, which is not among policy.code: review it")}


def _runs(site: Site, run: str) -> Rules:
    patterns = site.settings.policy.runs
    named = any(fnmatchcase(run, pattern) for pattern in patterns)
    return {"runs": (not named, f"run {run!r} is none of {', '.join(map(repr, patterns)) or 'no runs'}")}


def _objections(site: Site, request: TrainRequest, *, now: float | None) -> Iterator[Refused]:
    """All that speaks against the request at a moment; null: at any."""
    yield from _broken(_limits(site, request, now=now))
    for reason, unsound in _demands(request).items():
        if unsound:
            yield Refused(RefusalCode.POLICY, reason)
    yield from _without_partners(site, request)
    yield from _broken(_budget(site, request.plan), code=RefusalCode.BUDGET)


def _limits(site: Site, request: TrainRequest, *, now: float | None) -> Rules:
    """By key of the policy: whether the request breaks it, and how."""
    plan, policy = request.plan, site.settings.policy
    declared = site.settings.cohort.patients_declared
    steps = plan.steps
    if plan.epochs is not None:
        steps = math.ceil(plan.epochs * declared / plan.batch_of(declared))
    # Prototypes are as wide as embeddings are, which the model knows: `check_release` counts them.
    out = size_of(released(request), plan.wire) if request.phase == "train" else 0
    return {
        "parts": (plan.part not in policy.parts, f"part {plan.part!r} is not among policy.parts"),
        "objectives": (
            plan.objective not in policy.objectives,
            f"objective {plan.objective!r} is not among policy.objectives",
        ),
        "prototypes": (
            bool(plan.prototypes or plan.centre) and not policy.prototypes,
            "the plan releases prototypes or a centre of features, and policy.prototypes is false",
        ),
        "require-dp": (
            policy.require_dp and plan.privacy == "none",
            "policy.require-dp is set and the plan has no privacy",
        ),
        "min-patients": (
            declared < policy.min_patients,
            f"{declared} patients are declared, policy.min-patients is {policy.min_patients}",
        ),
        "max-rounds": (
            plan.rounds > policy.max_rounds,
            f"the run has {plan.rounds} rounds, policy.max-rounds is {policy.max_rounds}",
        ),
        "max-steps": (
            steps > policy.max_steps,
            f"a round has {steps} steps, policy.max-steps is {policy.max_steps}",
        ),
        "max-release-bytes": (
            out > policy.max_release_bytes,
            f"a release would hold {out} bytes, policy.max-release-bytes is {policy.max_release_bytes}",
        ),
        "quiet-hours": (
            now is not None and policy.quiet_at(now),
            f"no round begins during policy.quiet-hours {policy.quiet_hours} ({policy.timezone})",
        ),
    }


def _demands(request: TrainRequest) -> dict[str, bool]:
    """What no policy can allow: the claim would be wrong, or nobody built it."""
    plan = request.plan
    private = plan.privacy == "dp"
    asked_concepts = () if plan.prototypes is None else plan.prototypes.concepts
    sent_concepts = () if request.prototypes is None else request.prototypes.concepts
    return {
        "in-batch negatives couple patients: no epsilon can be claimed; use the anchored objective": (
            private and plan.objective not in MECHANISMS
        ),
        "without privacy only the infonce objective is trained": (
            not private and plan.objective != "infonce"
        ),
        "with privacy every site takes the same public number of steps: epochs would tell its size": (
            private and plan.epochs is not None
        ),
        "with privacy a round depends on nothing but its request: no optimizer is kept": (
            private and plan.keep_optimizer
        ),
        "optimizer 'dp-adambc' subtracts noise, and without privacy there is none: use adamw": (
            not private and plan.optimizer == "dp-adambc"
        ),
        "a plan with privacy names an epsilon": private and plan.epsilon is None,
        "prototypes are asked for, and the plan names none for this round": (
            request.phase == "prototypes" and not plan.releases_prototypes(request.server_round)
        ),
        "prototypes are of concepts that this code does not know: install the coordinator's version": bool(
            unknown_names((*asked_concepts, *sent_concepts))
        ),
        "losses are released with privacy, or not at all": not private and plan.losses is not None,
        "a mean loss is asked for, and the plan names none": request.phase == "losses"
        and plan.losses is None,
        "a centre is asked for, and the plan names none": request.phase == "centre" and plan.centre is None,
        "a centre is of the features that part image-head alone is trained on": (
            plan.centre is not None and plan.part != "image-head"
        ),
        "the centre is asked for once, before the first round": (
            request.phase == "centre" and request.server_round != 1
        ),
        "only the anchored objective gives each patient a loss of their own": (
            plan.losses is not None and plan.objective != "anchored"
        ),
        "round is past the plan's last": request.server_round > plan.rounds,
        "prototypes are all that is shared, and the plan names none": (
            not plan.shares_weights and plan.prototypes is None
        ),
        "a model that nobody else has is trained with privacy, or it could not be embedded with": (
            not plan.shares_weights and not private
        ),
    }


def _without_partners(site: Site, request: TrainRequest) -> Iterator[Refused]:
    """No common model is trained with images, or texts, that have no partner: the site's file says so."""
    modality = site.settings.cohort.modality
    if modality == "pairs" or request.phase == "prototypes" or not request.plan.shares_weights:
        return
    yield Refused(
        RefusalCode.COHORT,
        f"cohort.modality is {modality!r}, and weights for all are trained on pairs: this site takes part in "
        "prototypes, and in whole runs that share prototypes alone",
    )


def _budget(site: Site, plan: TrainingPlan) -> Rules:
    """A run that could not be ended within the budget is not begun."""
    most, cost = site.settings.policy.epsilon_max, _epsilon_of_run(site, plan)
    above = cost is not None and cost > most
    return {"epsilon-max": (above, f"the run's epsilon {cost} is above policy.epsilon-max {most}")}


def _epsilon_of_run(site: Site, plan: TrainingPlan) -> float | None:
    """What the whole run may cost here: what the plan says, or less."""
    least = site.settings.policy.epsilon_run
    return plan.epsilon if plan.epsilon is None or least is None else min(plan.epsilon, least)


def _apply(rules: Rules) -> None:
    for refusal in _broken(rules):
        raise refusal


def _broken(rules: Rules, *, code: RefusalCode = RefusalCode.POLICY) -> Iterator[Refused]:
    for key, (broken, reason) in rules.items():
        if broken:
            remedy = f"to allow it, change policy.{key} in {SITE_FILE}"
            yield Refused(code, reason, rule=key, remedy=remedy)


def check_release(site: Site, release: Release) -> Release:
    """The release as it may leave: only facts of ``policy.metrics``, no more bytes than were foreseen.

    This runs on everything that leaves, replays included, so a policy that became stricter holds for what
    was stored before.

    Raises:
        Refused: POLICY; more bytes than `check_plan` counted, so the code that trained is at fault. What
            the round cost stays spent.
    """
    policy = site.settings.policy
    out = bytes_of(release.update)
    reason = f"the release holds {out} bytes, policy.max-release-bytes is {policy.max_release_bytes}"
    _apply({"max-release-bytes": (out > policy.max_release_bytes, reason)})
    withheld = {metric.replace("-", "_"): None for metric in METRICS if metric not in policy.metrics}
    return Release(facts=release.facts.model_copy(update=withheld), update=release.update)


def mechanism_for(site: Site, plan: TrainingPlan) -> Mechanism:
    """The noise this site adds so that the whole run costs its patients at most the plan's epsilon.

    Everything in it follows from public constants: the plan, the declared size, the policy. The site may ask
    for more noise than the plan does (policy.epsilon-run).

    Raises:
        Refused: POLICY, where the plan would draw too many patients or add too little noise.
    """
    _apply(_draws(site, plan))
    epsilon = _epsilon_of_run(site, plan)
    if epsilon is None:
        raise Refused(RefusalCode.POLICY, "a plan with privacy names an epsilon")
    try:
        noise_multiplier = noise_multiplier_for(
            epsilon=epsilon,
            delta=site.delta,
            sample_rate=_sample_rate(site, plan),
            steps=plan.rounds * plan.steps,
            besides=besides(plan),
        )
    except NoiseOutOfRange as error:
        raise Refused(RefusalCode.POLICY, str(error)) from error
    _apply(_noise(site, noise_multiplier))
    return MECHANISMS[plan.objective](
        max_grad_norm=plan.max_grad_norm,
        noise_multiplier=noise_multiplier,
        sample_rate=_sample_rate(site, plan),
        steps=plan.steps,
    )


def _sample_rate(site: Site, plan: TrainingPlan) -> float:
    return plan.share_of(site.settings.cohort.patients_declared)


def prototypes_for(site: Site, plan: TrainingPlan, *, width: int) -> PrototypeRelease:
    """What one round's prototypes release, of embeddings of ``width`` numbers.

    Raises:
        Refused: POLICY; the plan has none, or adds too little noise.
    """
    if plan.prototypes is None:
        raise Refused(RefusalCode.POLICY, "the plan names no prototypes")
    return _sums_for(site, plan, plan.prototypes, concepts=plan.prototypes.concepts, width=width)


def centre_for(site: Site, plan: TrainingPlan, *, width: int) -> PrototypeRelease:
    """What the run's centre releases, of features of ``width`` numbers: it is a prototype of all images.

    Raises:
        Refused: POLICY; the plan has none, or adds too little noise.
    """
    if plan.centre is None:
        raise Refused(RefusalCode.POLICY, "the plan names no centre")
    return _sums_for(site, plan, plan.centre, concepts=("image",), width=width)


def _sums_for(
    site: Site,
    plan: TrainingPlan,
    asked: PrototypePlan | CentrePlan,
    *,
    concepts: tuple[str, ...],
    width: int,
) -> PrototypeRelease:
    if plan.privacy == "dp":
        _apply(_noise(site, asked.noise_multiplier))
    return PrototypeRelease(
        concepts=concepts,
        dimension=width,
        max_norm=asked.max_norm,
        noise_multiplier=asked.noise_multiplier,
        count_weight=asked.count_weight,
    )


def losses_for(site: Site, plan: TrainingPlan) -> LossRelease:
    """What one round's mean loss releases.

    Raises:
        Refused: POLICY; the plan has none, or adds too little noise.
    """
    if plan.losses is None:
        raise Refused(RefusalCode.POLICY, "the plan names no losses")
    _apply(_noise(site, plan.losses.noise_multiplier))
    return LossRelease(max_loss=plan.losses.max_loss, noise_multiplier=plan.losses.noise_multiplier)


def besides(plan: TrainingPlan) -> list[PoissonGaussian]:
    """What the run releases beside the training: plain Gaussian mechanisms, each so many times."""
    times = ((plan.prototypes, plan.prototype_releases), (plan.losses, plan.rounds), (plan.centre, 1))
    return [
        PoissonGaussian(sample_rate=1.0, noise_multiplier=one.noise_multiplier, steps=steps)
        for one, steps in times
        if one is not None and steps
    ]


def _draws(site: Site, plan: TrainingPlan) -> Rules:
    sample_rate, most = _sample_rate(site, plan), site.settings.policy.max_sample_rate
    reason = f"sample rate {sample_rate:.3g} is above policy.max-sample-rate {most}"
    return {"max-sample-rate": (sample_rate > most, reason)}


def _noise(site: Site, noise_multiplier: float) -> Rules:
    least = site.settings.policy.min_noise_multiplier
    reason = f"noise multiplier {noise_multiplier:.3g} is below policy.min-noise-multiplier {least}"
    return {"min-noise-multiplier": (noise_multiplier < least, reason)}
