"""Plain contrastive training: every pair has its turn, the loss goes down, the same seed gives the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoders.fitting import (
    ANCHOR_REFRESH_STEPS,
    LARGEST_GRADIENT,
    Pairs,
    PublicBank,
    fit_infonce,
    shuffled_batches,
)
from encoders.objectives import infonce_loss, prototype_loss, soft_targets
from encoders.parts import TrainablePart, trainable_part
from tests.encoders.micro import micro_encoder, random_images

TEXTS = ["clear lungs", "large heart", "Clear lungs", "pleural effusion", "no pneumothorax"]
IMAGES = random_images(len(TEXTS))


def part_of() -> TrainablePart:
    return trainable_part(micro_encoder(), "full", lora_rank=1)


def loss_of(part: TrainablePart, pairs: Pairs) -> float:
    keys = pairs.text_keys
    with torch.no_grad():
        embeddings = part.module(pairs.images, pairs.texts)
        return float(
            infonce_loss(*embeddings, same_text=keys[:, None] == keys[None, :], inverse_temperature=5.0)
        )


def fit(
    part: TrainablePart, *, steps: int, augmented: bool = False, learning_rate: float = 0.01
) -> list[int]:
    seen: list[int] = []
    fit_infonce(
        part,
        Pairs.of(part, IMAGES, TEXTS),
        optimizer=torch.optim.SGD(list(part.parameters().values()), lr=learning_rate),
        steps=steps,
        batch=5,
        inverse_temperature=5.0,
        augmented=augmented,
        rng=np.random.default_rng(0),
        on_step=seen.append,
    )
    return seen


def test_pairs_know_which_texts_are_equal() -> None:
    pairs = Pairs.of(part_of(), IMAGES, TEXTS)
    assert pairs.text_keys.tolist() == [0, 1, 0, 2, 3]
    assert len(pairs) == len(pairs.images) == len(pairs.texts) == 5


def test_the_loss_goes_down_and_every_step_is_told() -> None:
    part = part_of()
    pairs = Pairs.of(part, IMAGES, TEXTS)
    before = loss_of(part, pairs)
    assert fit(part, steps=30, learning_rate=0.2) == list(range(30))
    assert loss_of(part, pairs) < 0.7 * before


@pytest.mark.parametrize("augmented", [False, True])
def test_the_same_seed_gives_the_same_weights(augmented: bool) -> None:
    first, second = part_of(), part_of()
    for part in (first, second):
        fit(part, steps=2, augmented=augmented)
    for name, value in first.arrays().items():
        assert np.array_equal(value, second.arrays()[name])


def test_a_step_is_no_longer_than_the_largest_gradient() -> None:
    part = part_of()
    before = part.arrays()
    fit(part, steps=1, learning_rate=1.0)
    moved = sum(float(((value - before[name]) ** 2).sum()) for name, value in part.arrays().items())
    assert 0 < moved**0.5 <= LARGEST_GRADIENT * 1.001


def test_public_texts_are_asked_for_beside_the_batch_and_embedded_anew() -> None:
    """One step's loss is the batch's plus the public texts', and steps later they have the newer weights."""
    part = part_of()
    _, public = part.inputs(IMAGES[:1], ["pleural effusion", "clear lungs"])
    embedded: list[torch.Tensor] = []
    embed = part.module.embed_texts

    def watched(inputs: torch.Tensor) -> torch.Tensor:
        result = embed(inputs)
        if len(inputs) == 2:
            assert not result.requires_grad
            embedded.append(result)
        return result

    part.module.embed_texts = watched  # type: ignore[method-assign]
    fit_infonce(
        part,
        Pairs.of(part, IMAGES, TEXTS),
        optimizer=torch.optim.SGD(list(part.parameters().values()), lr=0.1),
        steps=ANCHOR_REFRESH_STEPS + 1,
        batch=5,
        inverse_temperature=5.0,
        augmented=False,
        rng=np.random.default_rng(0),
        public=PublicBank(texts=public, shares=torch.tensor([[0, 1], [0, 0], [0, 1], [1, 0], [0, 0.5]])),
    )
    first, second = embedded
    assert not torch.equal(first, second)


def test_images_are_asked_for_prototypes_of_texts_and_texts_for_those_of_images() -> None:
    """The first step's gradient is that of the batch's loss and of two `prototype_loss`es."""
    part, pairs = part_of(), Pairs.of(part_of(), IMAGES, TEXTS)
    _, public = part.inputs(IMAGES[:1], ["pleural effusion", "clear lungs"])
    units = [torch.eye(3, part.encoder.width), -torch.eye(3, part.encoder.width)]
    images, texts = part.module(pairs.images, pairs.texts)
    anchors = torch.cat([part.module.embed_texts(part.trimmed(public)), units[1]]).detach()
    shares = soft_targets(texts, anchors, inverse_temperature=10.0)
    keys = pairs.text_keys
    loss = infonce_loss(images, texts, same_text=keys[:, None] == keys[None, :], inverse_temperature=5.0)
    for embeddings, bank, own in ((images, anchors, shares), (texts, units[0], shares[:, 2:])):
        loss = (
            loss
            + prototype_loss(
                embeddings,
                anchors=bank,
                masked=torch.zeros_like(own, dtype=torch.bool),
                positives=own,
                inverse_temperature=5.0,
            ).mean()
        )
    weights = list(part.parameters().values())
    expected = torch.autograd.grad(loss, weights)
    length = torch.linalg.vector_norm(torch.stack([value.norm() for value in expected]))
    before = [value.detach().clone() for value in weights]
    fit_infonce(
        part,
        pairs,
        optimizer=torch.optim.SGD(weights, lr=1.0),
        steps=1,
        batch=5,
        inverse_temperature=5.0,
        augmented=False,
        rng=np.random.default_rng(0),
        public=PublicBank(texts=public, shares=10.0, prototypes=(units[0], units[1])),
    )
    for value, first, gradient in zip(weights, before, expected, strict=True):
        moved = gradient * min(1.0, LARGEST_GRADIENT / float(length))
        torch.testing.assert_close(first - value.detach(), moved, atol=1e-5, rtol=1e-3)


@given(rows=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_pass_is_all_rows_once_in_parts_of_about_the_batch(rows: int, batch: int, seed: int) -> None:
    batches = shuffled_batches(rows, batch=batch, rng=np.random.default_rng(seed))
    parts = max(1, round(rows / batch))
    for _ in range(2):
        once = [next(batches) for _ in range(parts)]
        assert sorted(np.concatenate(once)) == list(range(rows))
        assert max(map(len, once)) - min(map(len, once)) <= 1


def test_passes_are_in_new_orders() -> None:
    batches = shuffled_batches(50, batch=50, rng=np.random.default_rng(0))
    assert next(batches).tolist() != next(batches).tolist()
