"""What a site keeps ready is what its plan asks for."""

from pathlib import Path
from typing import Any

import numpy as np

from client.answers import answer_train
from client.site import packed_cohort
from client.workbench import training_data
from encoders.objectives import same_meaning, soft_positives, text_similarity
from encoders.parts import trainable_part
from tests.encoders.micro import micro_encoder
from tests.small_hospitals import ready, request

ANCHORS = ("Clear lungs. No pleural effusion.", "Cardiomegaly.")


def test_anchors_that_say_the_same_are_left_out_or_where_the_plan_says_so_right_to_a_degree(
    hospitals: Path,
) -> None:
    folder = hospitals / "hospitals" / "site-1"
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    cohort = packed_cohort(folder)
    texts = [cohort.texts[row] for row in cohort.train()]
    hard, soft = training_data(folder, part, ANCHORS), training_data(folder, part, ANCHORS, 0.25)
    assert hard.positives is None
    assert np.array_equal(hard.masked.numpy(), same_meaning(texts, ANCHORS))
    assert soft.positives is not None
    expected = soft_positives(text_similarity(texts, ANCHORS), least=0.25)
    assert np.array_equal(soft.positives.numpy(), expected)
    assert (expected > 0).any()
    assert not soft.masked.any()


def test_a_site_trains_every_objective_form_and_optimizer_that_may_claim(hospitals: Path) -> None:
    site = ready(hospitals / "hospitals" / "site-1")
    asked: list[dict[str, Any]] = [
        {"objective": "microbatch", "groups": 3, "optimizer": "sgd"},
        {"loss": "sigmoid", "logit_bias": -1.0, "optimizer": "dp-adambc"},
        {"soft_positives": 0.5},
    ]
    updates = [
        answer_train(site, request(server_round=number, epsilon=2.0, **changes)).update
        for number, changes in enumerate(asked, start=1)
    ]
    assert all(np.isfinite(value).all() for update in updates for value in update.values())
    charged = [row.body["request"] for row in site.ledger().rows() if row.body["event"] == "reserved"]
    stated = [(body["kind"], body["sensitivity"] / body["max_grad_norm"]) for body in charged]
    assert stated == [("microbatch", 2.0), ("anchored", 1.0), ("anchored", 1.0)]
