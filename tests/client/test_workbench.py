"""What a site keeps ready is what its plan asks for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from client import answers
from client.answers import answer_install, answer_train
from client.batches import TrainingData
from client.errors import Refused
from client.objectives import Anchors
from client.site import packed_cohort
from client.training import train_privately
from client.workbench import tokenised, training_data, training_pairs
from encoders.clip import ClipEncoder, build
from encoders.fitting import Pairs
from encoders.objectives import same_meaning, soft_positives, text_similarity
from encoders.parts import PARTS, PartName, TrainablePart, trainable_part
from encoders.tokenizer import TokenisedTexts
from privacy.banks import PrototypeBank
from strategies.messages import Arrays
from tasks.concepts import Studies, members, named_concepts
from tests.encoders.micro import EMBEDDING, micro_encoder
from tests.small_hospitals import bundle, ready, request

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


def shipped_encoder() -> ClipEncoder:
    return build("tiny", image_size=32, max_tokens=24, seed=0, inverse_temperature=10.0)


@pytest.mark.parametrize("kind", PARTS)
def test_a_site_trains_on_the_token_ids_of_its_cohort_which_are_those_of_its_texts(
    kind: PartName, hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hospitals / "hospitals" / "site-1"
    cohort = packed_cohort(folder)
    rows = cohort.train()
    part = trainable_part(shipped_encoder(), kind, prompt_tokens=4)
    anew = Pairs.of(part, cohort.images[rows], [cohort.texts[row] for row in rows])
    with monkeypatch.context() as patch:
        patch.setattr(CLIPTokenizer, "__call__", pytest.fail)  # nothing is tokenised again
        pairs = training_pairs(folder, part).pairs
    assert torch.equal(pairs.texts, anew.texts)
    assert torch.equal(pairs.text_keys, anew.text_keys)


def test_a_model_with_another_tokenizer_is_never_given_the_ids_of_the_cohort(hospitals: Path) -> None:
    folder = hospitals / "hospitals" / "site-1"
    cohort = packed_cohort(folder)
    rows = cohort.train()
    texts = [cohort.texts[row] for row in rows]
    part = trainable_part(micro_encoder(), "full")
    assert tokenised(cohort, rows, part.encoder.tokenizer) == texts
    assert torch.equal(training_pairs(folder, part).pairs.texts, part.encoder.tokenizer(texts))


def test_ids_of_another_vocabulary_in_the_cohort_are_left_alone(hospitals: Path) -> None:
    cohort = packed_cohort(hospitals / "hospitals" / "site-1")
    older = replace(cohort, tokens=replace(cohort.tokens, rules="of another version"))
    tokenizer = shipped_encoder().tokenizer
    assert isinstance(tokenised(cohort, cohort.train(), tokenizer), TokenisedTexts)
    assert isinstance(tokenised(older, cohort.train(), tokenizer), list)


def test_a_prototype_is_as_near_a_report_as_the_nearest_of_its_wordings(hospitals: Path) -> None:
    folder = hospitals / "hospitals" / "site-1"
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    cohort = packed_cohort(folder)
    texts = [cohort.texts[row] for row in cohort.train()]
    wordings = (("Nobody writes this.", texts[0]), ("Consolidation.",))
    hard, soft = (training_data(folder, part, ANCHORS, least, wordings) for least in (None, 0.25))
    assert soft.positives is not None
    assert hard.masked.shape == soft.masked.shape == soft.positives.shape == (len(texts), 4)
    assert np.array_equal(hard.masked[:, :2].numpy(), same_meaning(texts, ANCHORS))
    assert np.array_equal(hard.masked[:, 2].numpy(), same_meaning(texts, wordings[0]).any(1))
    assert hard.masked[0, 2]
    assert not hard.masked.all(0).any()
    nearest = text_similarity(texts, wordings[0]).max(1)
    assert np.array_equal(soft.positives[:, 2].numpy(), soft_positives(nearest, least=0.25))
    expected = soft_positives(text_similarity(texts, wordings[1]), least=0.25)
    assert np.array_equal(soft.positives[:, 3:].numpy(), expected)


def test_a_pair_belongs_to_the_prototypes_of_the_round_that_its_own_labels_and_words_state(
    hospitals: Path,
) -> None:
    folder = hospitals / "hospitals" / "site-1"
    part = trainable_part(micro_encoder(), "heads", lora_rank=1)
    known = training_pairs(folder, part)
    names = ("effusion present", "lung", "axial CT of the head")
    stated = members(named_concepts(names), Studies(known.labels, known.texts))
    assert stated[:, 1].all()
    assert 0 < stated[:, 0].sum() < len(stated)
    hard = training_data(folder, part, ANCHORS, concepts=names)
    assert hard.positives is None
    assert np.array_equal(hard.masked[:, 2:].numpy(), stated > 0)
    soft = training_data(folder, part, ANCHORS, 0.25, concepts=names)
    assert soft.positives is not None
    assert np.array_equal(soft.positives[:, 2:].numpy(), stated)
    assert not soft.masked.any()
    every = training_data(folder, part, ANCHORS, concepts=names, all_partly_right=True)
    assert every.positives is None
    assert every.masked.shape == (len(stated), 5)
    assert not every.masked.any()


def released(*, width: int = EMBEDDING) -> PrototypeBank:
    unit = np.eye(2, width, dtype=np.float32)
    return PrototypeBank(
        concepts=("a", "b"),
        wordings=(("pleural effusion", "effusion"), ("no effusion",)),
        image=unit,
        text=-unit,
    )


def test_a_site_trains_against_the_prototypes_of_its_bundle(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, seen = ready(hospitals / "hospitals" / "site-1"), []

    def spied(part: TrainablePart, data: TrainingData, anchors: Anchors, *rest: Any, **named: Any) -> Arrays:
        wordings = None if anchors.prototypes is None else anchors.prototypes.wordings
        seen.append((len(anchors.images), data.masked.shape[1], wordings))
        return train_privately(part, data, anchors, *rest, **named)

    monkeypatch.setattr(answers, "train_privately", spied)
    for number, bank in enumerate((released(), None), start=1):
        made = replace(bundle(), prototypes=bank)
        answer_install(site, made)
        update = answer_train(site, replace(request(server_round=number), bundle=made.digest)).update
        assert all(np.isfinite(value).all() for value in update.values())
    assert seen == [(3, 5, released().wordings), (3, 3, None)]


@pytest.mark.parametrize("part", ["heads", "full"])
def test_prototypes_for_another_model_are_refused_before_anything_is_charged(
    part: str, hospitals: Path
) -> None:
    site = ready(hospitals / "hospitals" / "site-1")
    odd = replace(bundle(), prototypes=released(width=EMBEDDING + 1))
    answer_install(site, odd)
    with pytest.raises(Refused, match="prototypes of width 9, and the model embeds in 8") as refused:
        answer_train(site, replace(request(part=part), bundle=odd.digest))
    assert refused.value.code == "model"
    assert len(site.ledger().rows()) == 1


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
