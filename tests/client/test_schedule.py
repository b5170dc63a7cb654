"""The learning rate over a whole run, and how many steps a round has without privacy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.training import plain_steps, rate_factor
from strategies.messages import TrainingPlan


def plan_of(**changes: object) -> TrainingPlan:
    settings = {
        "part": "full", "objective": "infonce", "privacy": "none", "rounds": 10, "steps": 7, "batch": 8,
        "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0, "studies_per_patient": 1,
        "inverse_temperature": 10.0, "anchors": 1, "augment": False, "lora_rank": 1, "seed": 0,
    }  # fmt: skip
    return TrainingPlan.model_validate(settings | changes)


@given(progress=st.floats(0, 1))
def test_a_constant_schedule_never_changes_the_rate(progress: float) -> None:
    assert rate_factor(plan_of(), progress) == 1.0


def test_a_cosine_rises_for_a_tenth_of_the_run_and_then_falls_to_zero() -> None:
    plan = plan_of(schedule="cosine")
    factors = np.array([rate_factor(plan, progress) for progress in np.linspace(0, 1, 101)])

    assert factors[0] == 0
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert (np.diff(factors[:11]) > 0).all()
    assert (np.diff(factors[10:]) < 0).all()


@pytest.mark.parametrize(("pairs", "steps"), [(1, 1), (8, 2), (20, 5), (200, 50)])
def test_epochs_are_counted_in_the_site_s_own_pairs(pairs: int, steps: int) -> None:
    assert plain_steps(plan_of(epochs=2), pairs=pairs) == steps


def test_without_epochs_every_site_takes_the_same_number_of_steps() -> None:
    assert {plain_steps(plan_of(), pairs=pairs) for pairs in (1, 10, 1000)} == {7}
