"""A plan says what a run costs, and what counting it otherwise would have said: golden rows and order."""

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy.accounting as accounting
from privacy.accounting import PoissonGaussian, epsilon
from privacy.errors import ImpossiblePlan, NoiseOutOfRange
from privacy.mechanism import Kind
from privacy.planning import DROWNED, Plan, make_plan
from privacy.regime import share_of_lift


def forward(**changes: Any) -> Plan:
    """q = 0.01, T = 2000, noise multiplier 1, delta = 1e-5: epsilon 2.585."""
    constants = {
        "patients_declared": 10_000,
        "batch": 100,
        "steps": 2_000,
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        **changes,
    }
    return make_plan(**constants)


def backward(**changes: Any) -> Plan:
    return forward(**{"noise_multiplier": None, "epsilon": 8.0, **changes})


def concerns(plan: Plan) -> dict[str, str]:
    return {concern.about: concern.text for concern in plan.concerns}


def test_a_plan_costs_what_the_accountant_says_of_its_steps() -> None:
    plan = forward(mechanism="anchored", max_grad_norm=0.3)
    event = PoissonGaussian(sample_rate=0.01, noise_multiplier=1.0, steps=2_000)
    assert plan.epsilon == epsilon([event], delta=1e-5) == pytest.approx(2.585, rel=1e-3)
    assert plan.sample_rate == 0.01
    assert plan.epochs == pytest.approx(20)
    assert (plan.sensitivity, plan.noise_std) == (0.3, 0.3)


# Mixtures of Gaussians at grid 1e-3: q = 0.01, noise multiplier 1, T = 2000, delta = 1e-5, 2.58 per study.
@pytest.mark.parametrize(
    ("studies", "expected"), [(1, 2.585), (2, 5.705), (3, 9.221), (5, 17.332), (10, 43.455)]
)
def test_what_a_study_level_epsilon_means_for_a_patient_with_several_studies(
    studies: int, expected: float
) -> None:
    found = forward().epsilon_if_studies_were_drawn(studies)
    assert expected * (1 - 1e-4) <= found <= expected * 1.01


def test_k_times_epsilon_would_be_too_little_for_k_studies() -> None:
    plan = forward()
    assert plan.epsilon_if_studies_were_drawn(10) > 10 * plan.epsilon


def test_without_sampling_k_studies_are_one_gaussian_of_k_times_the_sensitivity() -> None:
    plan = forward(batch=10_000, noise_multiplier=10.0, steps=20)
    nearer = PoissonGaussian(sample_rate=1.0, noise_multiplier=2.0, steps=20)
    expected = epsilon([nearer], delta=1e-5)
    assert expected * 0.999 <= plan.epsilon_if_studies_were_drawn(5) <= expected * 1.01


def test_replacing_one_patient_costs_more_than_adding_or_removing_one() -> None:
    assert forward().epsilon_replace_one == pytest.approx(4.194, rel=1e-3)


def test_without_sampling_replacing_one_is_a_gaussian_of_twice_the_sensitivity() -> None:
    plan = forward(batch=10_000, noise_multiplier=10.0, steps=20)
    twice = PoissonGaussian(sample_rate=1.0, noise_multiplier=5.0, steps=20)
    assert plan.epsilon_replace_one == pytest.approx(epsilon([twice], delta=1e-5), rel=2e-3)


# One noise, accounted as C and as 2C: q = 0.01, T = 1000, delta = 1e-5.
@pytest.mark.parametrize(
    ("noise", "as_c", "as_2c"), [(0.6, 7.43, 69.8), (0.8, 3.14, 27.7), (1.0, 1.83, 13.4), (1.2, 1.30, 7.43)]
)
def test_microbatch_at_the_same_noise_costs_what_twice_the_sensitivity_says(
    noise: float, as_c: float, as_2c: float
) -> None:
    costs = {"anchored": pytest.approx(as_c, rel=5e-3), "microbatch": pytest.approx(as_2c, rel=5e-3)}
    anchored = forward(steps=1_000, noise_multiplier=noise)
    microbatch = forward(steps=1_000, noise_multiplier=noise / 2, mechanism="microbatch", groups=25)
    assert anchored.noise_std == microbatch.noise_std
    assert anchored.epsilon_by_mechanism == microbatch.epsilon_by_mechanism == costs
    assert microbatch.epsilon == microbatch.epsilon_by_mechanism["microbatch"]
    assert microbatch.sensitivity == 2 * microbatch.max_grad_norm


@settings(max_examples=4, deadline=None)
@given(
    batch=st.sampled_from([1, 20, 500, 2_000]),
    noise_multiplier=st.sampled_from([0.5, 0.8, 1.5, 4.0]),
    steps=st.sampled_from([1, 30, 1_000]),
)
def test_more_steps_a_larger_batch_or_less_noise_never_cost_less(
    batch: int, noise_multiplier: float, steps: int
) -> None:
    def cost(**changes: Any) -> float:
        given = {"batch": batch, "noise_multiplier": noise_multiplier, "steps": steps}
        return forward(**{"patients_declared": 2_000, **given, **changes}).epsilon

    base = cost() * (1 - 1e-6) - 1e-9
    assert cost(steps=2 * steps) >= base
    assert cost(batch=min(2_000, 2 * batch)) >= base
    assert cost(noise_multiplier=0.9 * noise_multiplier) >= base


@settings(max_examples=4, deadline=None)
@given(
    noise_multiplier=st.sampled_from([0.6, 1.0, 3.0]),
    batch=st.sampled_from([10, 300, 2_000]),
    steps=st.sampled_from([1, 40]),
)
def test_other_ways_to_count_never_say_less_than_the_promise(
    noise_multiplier: float, batch: int, steps: int
) -> None:
    plan = forward(patients_declared=2_000, noise_multiplier=noise_multiplier, batch=batch, steps=steps)
    assert plan.epsilon <= plan.epsilon_replace_one
    two, three = (plan.epsilon_if_studies_were_drawn(count) for count in (2, 3))
    assert plan.epsilon <= two <= three
    assert plan.epsilon <= plan.epsilon_by_mechanism["microbatch"]


def test_renyi_accountants_stand_beside_and_are_looser() -> None:
    others = forward().renyi_epsilons
    assert set(others) == {"Google RDP", "Opacus RDP"}
    assert all(2.585 < value < 2.585 * 1.17 for value in others.values())


@pytest.mark.parametrize(
    ("target", "batch", "mechanism"),
    [(8.0, 400, "anchored"), (8.0, 400, "microbatch")],
)
def test_noise_from_epsilon_keeps_it_and_is_what_epsilon_follows_from(
    target: float, batch: int, mechanism: Kind
) -> None:
    plan = backward(epsilon=target, batch=batch, steps=60, mechanism=mechanism)
    assert target * 0.995 < plan.epsilon <= target
    again = forward(
        batch=batch, steps=60, mechanism=mechanism, noise_multiplier=plan.noise_multiplier, delta=plan.delta
    )
    assert again == plan


def test_both_mechanisms_need_the_same_multiplier_and_microbatch_twice_the_noise() -> None:
    anchored, microbatch = (
        backward(batch=400, steps=60, mechanism=kind, groups=groups)
        for kind, groups in (("anchored", None), ("microbatch", 20))
    )
    assert anchored.epsilon == microbatch.epsilon
    assert microbatch.noise_std == 2 * anchored.noise_std


def test_epochs_become_whole_steps() -> None:
    assert forward(steps=None, epochs=20).steps == 2_000
    assert forward(steps=None, epochs=1e-6).steps == 1
    assert forward(steps=None, epochs=0.999).steps == 100


def test_delta_follows_from_the_declared_size() -> None:
    assert forward(delta=None).delta == 1e-5
    assert forward(delta=None, patients_declared=10_001).delta == 1e-6


def test_noise_grows_with_the_root_of_the_weights_and_shrinks_with_patients_and_sites() -> None:
    known = {"parameters": 10_000, "max_grad_norm": 0.1}
    assert forward().noise_to_signal is None
    assert forward(**known).noise_to_signal == pytest.approx(1.0)  # 1 x 0.1 x 100 / (100 x 0.1)
    assert forward(**{**known, "parameters": 40_000}).noise_to_signal == pytest.approx(2.0)
    assert forward(**known, sites=4).noise_to_signal == pytest.approx(0.5)
    assert forward(**{**known, "batch": 200}).noise_to_signal == pytest.approx(0.5)


def test_groups_are_fewer_vectors_under_twice_the_noise() -> None:
    known = {"parameters": 10_000, "mechanism": "microbatch"}
    assert forward(**known).noise_to_signal is None
    assert forward(**known, groups=25).noise_to_signal == pytest.approx(8.0)
    assert forward(**known, groups=1_000).noise_to_signal == pytest.approx(2.0)  # most of them are empty


def test_a_sound_plan_raises_no_concern() -> None:
    assert forward(parameters=10_000).concerns == ()


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"delta": 1.1e-5}, "delta", r"above 1/\(10 x 10,000\).* take 1e-05 or less"),
        ({"noise_multiplier": 0.5, "delta": 1e-6}, "epsilon", "is weak.*more noise or fewer steps"),
        (
            {"parameters": 10**10},
            "noise",
            r"10,000 patients are too few.* 1000\.0 times the largest gradient.* [\d,]+ such hospitals.*LoRA",
        ),
        ({"patients_declared": 499, "batch": 1, "steps": 1}, "patients", "499 patients are few"),
        ({"batch": 5_001, "steps": 1, "noise_multiplier": 5.0}, "sample_rate", "draws 50% of all"),
        ({"batch": 0.5}, "batch", r"expects 0\.5 patients: most steps release noise"),
    ],
)
def test_a_concern_names_the_value_and_the_remedy(changes: dict[str, Any], about: str, words: str) -> None:
    found = concerns(forward(**changes))
    assert list(found) == [about]
    assert re.search(words, found[about])


def test_thresholds_themselves_are_no_concern() -> None:
    at_the_edge = forward(patients_declared=500, batch=250, steps=1, noise_multiplier=5.0, delta=2e-4)
    assert concerns(at_the_edge) == {}
    drowned = forward(parameters=round(10_000 * DROWNED**2))
    assert drowned.noise_to_signal == DROWNED
    assert concerns(drowned) == {}


def of_the_study(patients: int, epsilon: float, **changes: Any) -> Plan:
    """All weights of the small model in eight large steps, as bench/regime.py trains them."""
    recipe = {"batch": 0.4 * patients, "steps": 8, "parameters": 7_696_896}
    return make_plan(**{"patients_declared": patients, "epsilon": epsilon, **recipe, **changes})


def test_a_hospital_is_warned_where_its_cohort_is_too_small_for_its_epsilon() -> None:
    assert "300 patients are too few for this epsilon" in concerns(of_the_study(300, 1.0))["noise"]
    assert "noise" not in concerns(of_the_study(10_000, 8.0))


def test_more_patients_hospitals_or_epsilon_keep_no_less() -> None:
    plans = [of_the_study(300, 1.0), of_the_study(300, 8.0), of_the_study(3_000, 8.0)]
    plans.append(of_the_study(3_000, 8.0, sites=8))
    kept = [plan.share_of_lift or 0.0 for plan in plans]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    warned = ["noise" in concerns(plan) for plan in plans]
    assert warned == sorted(warned, reverse=True)


def test_what_a_warning_says_would_be_enough_is_enough() -> None:
    few = of_the_study(300, 1.0)
    words = concerns(few)["noise"]
    patients, sites = (
        int(found[1].replace(",", ""))
        for pattern in (r"about ([\d,]+) patients, drawn", r"or ([\d,]+) such hospitals")
        if (found := re.search(pattern, words))
    )
    assert patients > 300
    assert sites > 1
    assert "noise" not in concerns(of_the_study(patients, 1.0, delta=few.delta))
    assert "noise" not in concerns(of_the_study(300, 1.0, sites=sites))


def test_nothing_is_said_of_a_lift_where_the_weights_are_not_known() -> None:
    assert forward().share_of_lift is None
    assert forward(parameters=10_000).share_of_lift == share_of_lift(parameters=10_000, noise_to_signal=1.0)


def test_no_protection_is_infinity_and_no_comparison_is_made_of_it() -> None:
    plan = forward(batch=10_000, noise_multiplier=0.1)
    assert plan.epsilon > 1_000
    assert plan.epsilon_replace_one == plan.epsilon_if_studies_were_drawn(2) == math.inf
    assert "epsilon" in concerns(plan)
    nothing_left = forward(batch=10_000, noise_multiplier=1e-3, steps=100_000)
    assert "is weak" in concerns(nothing_left)["epsilon"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patients_declared": 0}, "patients_declared=0"),
        ({"batch": 0}, r"expected batch=0 patients a step in \(0, 10000\]"),
        ({"batch": 10_001}, "batch=10001"),
        ({"batch": math.nan}, "batch=nan"),
        ({"steps": 0}, "steps=0"),
        ({"epochs": 3.0}, r"expected either steps=2000 or epochs=3\.0"),
        ({"steps": None}, "expected either steps=None or epochs=None"),
        ({"steps": None, "epochs": 0.0}, r"epochs=0\.0"),
        ({"steps": None, "epochs": math.inf}, "epochs=inf"),
        ({"epsilon": 8.0}, r"expected either epsilon=8\.0 or noise_multiplier=1\.0"),
        ({"noise_multiplier": None}, "expected either epsilon=None or noise_multiplier=None"),
        ({"noise_multiplier": None, "epsilon": -1.0}, r"epsilon=-1\.0"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier=0\.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"delta": 1.0}, r"delta=1\.0"),
        ({"delta": 0.0}, r"delta=0\.0"),
        ({"delta": 1e-15}, "too small for steps=2000"),
        ({"mechanism": "infonce"}, "mechanism='infonce' to be one of"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0"),
        ({"groups": 3}, "groups=3 belongs to mechanism='microbatch'"),
        ({"mechanism": "microbatch", "groups": 0}, "groups=0"),
        ({"parameters": 0}, "parameters=0"),
        ({"sites": 0}, "sites=0"),
    ],
)
def test_constants_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ImpossiblePlan, match=message):
        forward(**changes)


def test_a_promise_that_no_noise_keeps_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_MOST_NOISE", 0.2)
    with pytest.raises(NoiseOutOfRange, match="fewer steps"):
        backward(epsilon=0.01, steps=1_001)


def test_a_patient_without_studies_is_nobody() -> None:
    with pytest.raises(ImpossiblePlan, match="studies=0"):
        forward().epsilon_if_studies_were_drawn(0)
