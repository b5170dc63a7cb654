"""A row of a batch holds pairs of its own patients alone, each patient with weight 1."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import BatchMaker, TrainingData, made_up_data, rows_by_patient
from encoders.fitting import Pairs
from encoders.parts import TrainablePart, trainable_part
from tests.encoders.micro import TEXTS, micro_encoder, random_colours

ANCHORS = 3
PART: TrainablePart = trainable_part(micro_encoder(), "heads", lora_rank=1)


def numbered(patients: list[int], *, texts: list[int] | None = None, soft: bool = False) -> TrainingData:
    """Pair i has the inputs (i, i, ...), so that a batch shows which pairs it holds."""
    count = len(patients)
    rows = torch.arange(count, dtype=torch.float32)[:, None].expand(count, 4)
    shares = torch.arange(count, dtype=torch.float32)[:, None].expand(count, ANCHORS) / max(1, count)
    return TrainingData(
        pairs=Pairs(images=rows, texts=-rows, text_keys=torch.tensor(texts or list(range(count)))),
        patients=np.array(patients, dtype=np.int64),
        masked=shares > 0.5,
        positives=shares if soft else None,
    )


def maker(data: TrainingData, *, studies: int = 2) -> BatchMaker:
    return BatchMaker(data=data, part=PART, studies=studies, augmented=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=30, deadline=None)
@given(
    patients=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    studies=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_row_holds_up_to_so_many_pairs_of_its_patient_which_weigh_one_together(
    patients: list[int], studies: int, seed: int
) -> None:
    data = numbered(patients, soft=True)
    own = rows_by_patient(data.patients)
    batch = maker(data, studies=studies).of_patients(own, sampling=rng(seed))
    assert len(batch["images"]) == len(own) == len(set(patients))
    for row, pairs in enumerate(own):
        used = batch["weights"][row] > 0
        chosen = batch["images"][row, used, 0].long().tolist()
        assert set(batch["images"][row, :, 0].long().tolist()) == set(chosen) <= set(pairs.tolist())
        assert len(set(chosen)) == len(chosen) == min(studies, len(pairs))
        assert float(batch["weights"][row].sum()) == pytest.approx(1)
        for name, of in (
            ("texts", -data.pairs.images),
            ("masked", data.masked),
            ("positives", data.positives),
        ):
            assert of is not None
            assert torch.equal(batch[name][row, used], of[chosen])


@settings(max_examples=30, deadline=None)
@given(
    patients=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    groups=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    texts=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_a_group_is_a_row_of_its_patients_and_negatives_are_other_patients_with_other_texts(
    patients: list[int], groups: list[int], texts: list[int]
) -> None:
    data = numbered(patients, texts=texts[: len(patients)])
    own, numbers = rows_by_patient(data.patients), sorted(set(patients))
    drawn = np.array(groups[: len(own)])
    batch = maker(data).of_groups(own, drawn, sampling=rng())
    assert len(batch["images"]) == len(set(drawn.tolist()))  # nobody's group is no row
    for row, group in enumerate(sorted(set(drawn.tolist()))):
        members = {number for number, joined in zip(numbers, drawn, strict=True) if joined == group}
        pairs = batch["images"][row, :, 0].long().tolist()
        assert {patients[pair] for pair in pairs} == members
        assert float(batch["weights"][row].sum()) == pytest.approx(len(members))
        for first, second in np.ndindex(len(pairs), len(pairs)):
            real = bool((batch["weights"][row, [first, second]] > 0).all())
            apart = patients[pairs[first]] != patients[pairs[second]]
            expected = real and apart and texts[pairs[first]] != texts[pairs[second]]
            assert bool(batch["negatives"][row, first, second]) == expected


def test_padding_is_never_another_rows_pair_so_that_a_broken_patient_breaks_nobody_else() -> None:
    data = numbered([0, 1, 2, 2])
    data = TrainingData(
        pairs=Pairs(
            images=torch.where(data.pairs.images == 0, math.nan, data.pairs.images),
            texts=data.pairs.texts,
            text_keys=data.pairs.text_keys,
        ),
        patients=data.patients,
        masked=data.masked,
    )
    own = rows_by_patient(data.patients)
    alone = maker(data).of_patients(own, sampling=rng())
    grouped = maker(data).of_groups(own, np.array([0, 1, 1]), sampling=rng())
    assert alone["images"].isnan().flatten(1).any(1).tolist() == [True, False, False]
    assert grouped["images"].isnan().flatten(1).any(1).tolist() == [True, False]


def test_nobody_is_a_batch_of_no_rows() -> None:
    for data in (numbered([0, 1]), numbered([])):
        alone = maker(data).of_patients([], sampling=rng())
        grouped = maker(data).of_groups([], np.empty(0, dtype=np.intp), sampling=rng())
        assert {len(value) for value in (*alone.values(), *grouped.values())} == {0}


def test_rows_are_given_by_patient_in_order() -> None:
    found = [rows.tolist() for rows in rows_by_patient(np.array([7, 2, 7, 2, 5]))]
    assert found == [[1, 3], [4], [0, 2]]
    assert rows_by_patient(np.empty(0, dtype=np.int64)) == []


def test_made_up_images_have_channels_where_the_sites_have() -> None:
    part = trainable_part(micro_encoder(), "full", lora_rank=1)
    data = numbered([0])
    pairs = Pairs.of(part, random_colours(1), list(TEXTS[:1]))
    like = replace(data, pairs=pairs)
    assert made_up_data(part, like=like, patients=3, studies=2).pairs.images.shape == (6, 32, 32, 3)


@pytest.mark.parametrize("kind", ["heads", "image-tower", "lora", "full"])
@pytest.mark.parametrize("soft", [True, False])
def test_made_up_data_has_the_form_of_the_sites_and_nothing_of_it(kind: str, soft: bool) -> None:
    part = trainable_part(micro_encoder(), kind, lora_rank=1)  # type: ignore[arg-type]
    made_up = [
        made_up_data(part, like=numbered(patients, soft=soft), patients=3, studies=2)
        for patients in ([0], [0, 1, 1, 2])
    ]
    assert len(made_up[0].pairs) == len(made_up[0].patients) == 6
    assert made_up[0].masked.shape == (6, ANCHORS)
    assert (made_up[0].positives is not None) == soft
    assert torch.equal(made_up[0].pairs.images, made_up[1].pairs.images)
    assert torch.equal(made_up[0].pairs.texts, made_up[1].pairs.texts)
    assert len(np.unique(made_up[0].pairs.texts.numpy(), axis=0)) == 6
