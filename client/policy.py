"""The hospital's rules, applied before anything else is done with a request."""

import time

from client.errors import Refused
from client.site import Site
from privacy.accounting import noise_multiplier_for
from privacy.errors import NoiseOutOfRange
from privacy.mechanism import AnchoredDpSgd, Mechanism
from strategies.messages import RefusalCode, TrainingPlan, TrainRequest


def check_plan(site: Site, request: TrainRequest) -> None:
    """Refuse what the site does not do, from the request alone.

    Raises:
        Refused: POLICY or DEADLINE, with the rule that says so.
    """
    plan, policy = request.plan, site.settings.policy
    rules = {
        f"part {plan.part!r} is not among policy.parts": plan.part not in policy.parts,
        "policy.require-dp is set and the plan has no privacy": policy.require_dp and plan.privacy == "none",
        "in-batch negatives couple patients: no epsilon can be claimed; use the anchored objective": (
            plan.privacy == "dp" and plan.objective != "anchored"
        ),
        "without privacy only the infonce objective is trained": (
            plan.privacy == "none" and plan.objective != "infonce"
        ),
        "with privacy every site takes the same public number of steps: epochs would tell its size": (
            plan.privacy == "dp" and plan.epochs is not None
        ),
        "with privacy a round depends on nothing but its request: no optimizer is kept": (
            plan.privacy == "dp" and plan.keep_optimizer
        ),
        "a plan with privacy names an epsilon": plan.privacy == "dp" and plan.epsilon is None,
        "round is past the plan's last": request.server_round > plan.rounds,
    }
    for reason, broken in rules.items():
        if broken:
            raise Refused(RefusalCode.POLICY, reason)
    if request.deadline_unix_seconds is not None and time.time() > request.deadline_unix_seconds:
        raise Refused(RefusalCode.DEADLINE, "the deadline has passed: the reply would not be used")


def mechanism_for(site: Site, plan: TrainingPlan) -> Mechanism:
    """The noise this site adds so that the whole run costs its patients at most the plan's epsilon.

    Everything in it follows from public constants: the plan, the declared size, the policy.

    Raises:
        Refused: POLICY, where the plan would draw too many patients or add too little noise.
    """
    policy = site.settings.policy
    sample_rate = plan.batch / site.settings.cohort.patients_declared
    if sample_rate > policy.max_sample_rate:
        reason = f"sample rate {sample_rate:.3g} is above policy.max-sample-rate {policy.max_sample_rate}"
        raise Refused(RefusalCode.POLICY, reason)
    if plan.epsilon is None:
        raise Refused(RefusalCode.POLICY, "a plan with privacy names an epsilon")
    try:
        noise_multiplier = noise_multiplier_for(
            epsilon=plan.epsilon, delta=site.delta, sample_rate=sample_rate, steps=plan.rounds * plan.steps
        )
    except NoiseOutOfRange as error:
        raise Refused(RefusalCode.POLICY, str(error)) from error
    if noise_multiplier < policy.min_noise_multiplier:
        least = policy.min_noise_multiplier
        reason = f"noise multiplier {noise_multiplier:.3g} is below policy.min-noise-multiplier {least}"
        raise Refused(RefusalCode.POLICY, reason)
    return AnchoredDpSgd(
        max_grad_norm=plan.max_grad_norm,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=plan.steps,
    )
