"""Which weights travel, which a round trains, which every site keeps: by name, on both sides alike."""

from collections.abc import Iterable

from strategies.messages import Arrays, MessageError, Personal, Phase, TrainingPlan, TrainRequest, Wire

_PERSONAL: dict[Personal, tuple[str, ...]] = {
    "norms": ("layer_norm", "layernorm", "layrnorm"),  # as Hugging Face writes them
    "heads": ("visual_projection", "text_projection"),
}
IMAGE_SHIFT = "image_shift"  # of part image-head: it travels to the sites, and nothing trains it
_FACTOR_A, _FACTOR_B = "lora_A", "lora_B"


def personal(names: Iterable[str], plan: TrainingPlan) -> frozenset[str]:
    """Those that every site trains and keeps to itself.

    Source:
        Norms: Li et al. (2021), arXiv:2102.07623 (FedBN). Heads: Arivazhagan et al. (2019), arXiv:1912.00818
        (FedPer).
    """
    if not plan.shares_weights:
        return frozenset(names)
    marks = [mark for kind in plan.personal for mark in _PERSONAL[kind]]
    return frozenset(name for name in names if any(mark in name for mark in marks))


def shared(names: Iterable[str], plan: TrainingPlan) -> frozenset[str]:
    """Those that travel to the sites; the rest is `personal`. None are, where prototypes alone are shared.

    Raises:
        MessageError: none is left.
    """
    names = frozenset(names)
    rest = names - personal(names, plan)
    if not rest and plan.shares_weights:
        raise MessageError(
            f"part {plan.part!r} has nothing to share once {', '.join(plan.personal)} stay at the sites"
        )
    return rest


def released(request: TrainRequest) -> Arrays:
    """Those of the request's arrays of which a release holds an update."""
    names = trained(request.arrays, request.plan, request.server_round)
    return {name: value for name, value in request.arrays.items() if name in names}


def wire_of(request: TrainRequest) -> Wire:
    """The form of the answer."""
    plan = request.plan
    forms: dict[Phase, Wire] = {"train": plan.wire}
    if plan.prototypes is not None:
        forms["prototypes"] = plan.prototypes.wire
    return forms.get(request.phase, "fp32")


def trained(names: Iterable[str], plan: TrainingPlan, server_round: int) -> frozenset[str]:
    """Those of ``names`` that this round trains; of these, the shared ones come back.

    The mean of products of LoRA factors is not the product of their means. It is, when all sites hold one of
    the two factors fixed: so B is trained in odd rounds (it starts at zero, and A has no gradient before) and
    A in even ones, or B alone in all.

    Source:
        By turns: Chen et al. (2025), arXiv:2502.01755 (RoLoRA). B alone: Sun et al. (2024), arXiv:2403.12313
        (FFA-LoRA), where noise on both factors would also be multiplied.
    """
    fixed = _FACTOR_B if plan.lora_train == "alternating" and server_round % 2 == 0 else _FACTOR_A
    return frozenset(name for name in names if fixed not in name and name != IMAGE_SHIFT)
