"""The anchored loss decomposes over pairs, and the checks that say so fire on every loss that does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from encoders.objectives import anchored_loss, infonce_loss, same_meaning

Rows = Callable[[Tensor, Tensor], Tensor]
BATCH, WIDTH, BANK = 5, 16, 7
TEXTS = st.lists(st.text("abc, .", max_size=12), min_size=1, max_size=5)


def units(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def anchored(
    images: Tensor, texts: Tensor, *, scale: float = 10.0, masked: Tensor | None = None, bank: int = 50
) -> Tensor:
    nothing = torch.zeros(len(images), BANK, dtype=torch.bool)
    return anchored_loss(
        images,
        texts,
        text_anchors=units(BANK, bank),
        image_anchors=units(BANK, bank + 1),
        masked=nothing if masked is None else masked,
        inverse_temperature=scale,
    )


def infonce_rows(images: Tensor, texts: Tensor) -> Tensor:
    logits = 10 * images @ texts.T
    return 0.5 * (torch.logsumexp(logits, 1) + torch.logsumexp(logits, 0)) - logits.diagonal()


def detached_negatives(images: Tensor, texts: Tensor) -> Tensor:
    """In-batch negatives without gradient: what a gradient probe alone would let pass."""
    positive = 10 * (images * texts).sum(-1)
    logits = 10 * images @ texts.detach().T
    others = logits.masked_fill(torch.eye(len(images), dtype=torch.bool), -torch.inf)
    return torch.logsumexp(torch.cat([positive[:, None], others], 1), 1) - positive


def siglip_rows(images: Tensor, texts: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * (10 * images @ texts.T - 5)).sum(1)


def gradient_coupling(loss: Rows, seed: int) -> float:
    """Largest derivative of a row's loss by another row's embeddings."""
    images, texts = (units(BATCH, seed + side).requires_grad_() for side in (0, 1))
    losses, worst = loss(images, texts), 0.0
    for row in range(BATCH):
        others = torch.arange(BATCH) != row
        for part in torch.autograd.grad(losses[row], (images, texts), retain_graph=True):
            worst = max(worst, float(part[others].abs().max()))
    return worst


def value_coupling(loss: Rows, seed: int) -> float:
    """Largest change of the first row's loss when every other row is replaced."""
    images, texts = units(BATCH, seed), units(BATCH, seed + 1)
    others = [torch.cat([own[:1], units(BATCH - 1, seed + 2 + i)]) for i, own in enumerate((images, texts))]
    return abs(float(loss(images, texts)[0] - loss(*others)[0]))


def leaving_coupling(loss: Rows, seed: int) -> float:
    """Largest change of the rows that stay when others leave."""
    images, texts = units(BATCH, seed), units(BATCH, seed + 1)
    return max(
        float((loss(images, texts)[:stay] - loss(images[:stay], texts[:stay])).abs().max())
        for stay in range(1, BATCH)
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 14.3, 100.0]))
def test_a_pair_is_untouched_by_the_other_pairs(seed: int, scale: float) -> None:
    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return anchored(images, texts, scale=scale)

    assert gradient_coupling(loss, seed) == 0
    assert value_coupling(loss, seed) == 0
    # Matrix products of another height may round differently.
    assert leaving_coupling(loss, seed) <= 1e-6 * scale


@pytest.mark.parametrize("loss", [infonce_rows, siglip_rows])
def test_both_checks_fire_on_in_batch_negatives(loss: Rows) -> None:
    assert gradient_coupling(loss, 0) > 1e-2
    assert value_coupling(loss, 0) > 1e-3
    assert leaving_coupling(loss, 0) > 1e-3


def test_detached_in_batch_negatives_pass_the_gradient_check_and_fail_on_values() -> None:
    assert gradient_coupling(detached_negatives, 0) == 0
    assert value_coupling(detached_negatives, 0) > 1e-2
    assert leaving_coupling(detached_negatives, 0) > 1e-2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 14.3]))
def test_the_anchored_loss_is_its_formula(seed: int, scale: float) -> None:
    images, texts = units(BATCH, seed), units(BATCH, seed + 1)
    for row, loss in enumerate(anchored(images, texts, scale=scale)):
        image, text = images[row].double().numpy(), texts[row].double().numpy()
        own = scale * image @ text
        sides = (units(BANK, 50).numpy() @ image, units(BANK, 51).numpy() @ text)
        expected = sum(np.log(np.exp(own) + np.exp(scale * side).sum()) - own for side in sides) / 2
        assert float(loss) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), masked=st.lists(st.booleans(), min_size=BANK, max_size=BANK))
def test_masked_anchors_have_no_influence(seed: int, masked: list[bool]) -> None:
    rows = torch.tensor([masked, masked])
    kept = ~rows[0]
    images, texts = (units(2, seed + side).requires_grad_() for side in (0, 1))
    losses = anchored(images, texts, masked=rows)
    without = anchored_loss(
        images,
        texts,
        text_anchors=units(BANK, 50)[kept],
        image_anchors=units(BANK, 51)[kept],
        masked=rows[:, kept],
        inverse_temperature=10.0,
    )
    torch.testing.assert_close(losses, without)
    for ours, expected in zip(
        torch.autograd.grad(losses.sum(), (images, texts)),
        torch.autograd.grad(without.sum(), (images, texts)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_with_every_anchor_masked_there_is_nothing_to_learn() -> None:
    images, texts = (units(3, side).requires_grad_() for side in (0, 1))
    losses = anchored(images, texts, masked=torch.ones(3, BANK, dtype=torch.bool))
    assert torch.equal(losses, torch.zeros(3))
    for part in torch.autograd.grad(losses.sum(), (images, texts)):
        assert torch.equal(part, torch.zeros_like(part))


def test_a_closer_pair_and_farther_anchors_lower_the_loss() -> None:
    images, texts = units(1, 0), units(1, 1)
    assert anchored(images, images) < anchored(images, texts)


@pytest.mark.parametrize("side", ["text_anchors", "image_anchors"])
def test_a_bank_with_gradient_is_refused(side: str) -> None:
    banks = {"text_anchors": units(BANK, 0), "image_anchors": units(BANK, 1)}
    banks[side].requires_grad_()
    with pytest.raises(ValueError, match="anchors must be built under no_grad"):
        anchored_loss(
            units(2, 2),
            units(2, 3),
            **banks,
            masked=torch.zeros(2, BANK, dtype=torch.bool),
            inverse_temperature=1.0,
        )


def test_a_bank_encoded_inside_a_functional_gradient_is_refused_too() -> None:
    def loss(weight: Tensor) -> Tensor:
        bank = units(BANK, 0) @ weight
        nothing = torch.zeros(2, BANK, dtype=torch.bool)
        return anchored_loss(
            units(2, 2),
            units(2, 3),
            text_anchors=bank,
            image_anchors=bank,
            masked=nothing,
            inverse_temperature=1.0,
        ).sum()

    with pytest.raises(ValueError, match="anchors must be built under no_grad"):
        torch.func.grad(loss)(torch.eye(WIDTH))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keys=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 14.3]),
)
def test_infonce_is_the_published_loss_without_duplicates(seed: int, keys: list[int], scale: float) -> None:
    images, texts = units(len(keys), seed), units(len(keys), seed + 1)
    same = torch.tensor(keys)[:, None] == torch.tensor(keys)[None, :]
    total = 0.0
    for row, key in enumerate(keys):
        rivals = [other for other, its in enumerate(keys) if other == row or its != key]
        u, v = images.double().numpy(), texts.double().numpy()
        own = scale * u[row] @ v[row]
        total += np.log(sum(np.exp(scale * u[row] @ v[other]) for other in rivals)) - own
        total += np.log(sum(np.exp(scale * u[other] @ v[row]) for other in rivals)) - own
    ours = infonce_loss(images, texts, same_text=same, inverse_temperature=scale)
    assert float(ours) == pytest.approx(total / 2 / len(keys), abs=1e-5)


def test_pairs_of_one_text_only_have_nothing_to_learn() -> None:
    same = torch.ones(4, 4, dtype=torch.bool)
    assert float(infonce_loss(units(4, 0), units(4, 1), same_text=same, inverse_temperature=5.0)) == 0


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, others=TEXTS, anchors=TEXTS)
def test_what_a_text_matches_depends_on_that_text_alone(
    texts: list[str], others: list[str], anchors: list[str]
) -> None:
    rows = same_meaning(texts, anchors)
    assert rows.shape == (len(texts), len(anchors))
    assert np.array_equal(same_meaning(others + texts, anchors)[len(others) :], rows)
    for column, anchor in enumerate(anchors):
        assert np.array_equal(same_meaning(texts, [anchor])[:, 0], rows[:, column])


def test_the_same_words_mean_the_same_and_other_words_do_not() -> None:
    anchors = ["Clear lungs.", "no pleural effusion", "large heart", "words never seen"]
    found = same_meaning(["clear LUNGS", "effusion pleural no", "pleural effusion", ""], anchors)
    assert found.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, False, False],
        [False, False, False, False],
    ]


def test_no_texts_match_nothing() -> None:
    assert same_meaning([], ["clear lungs"]).shape == (0, 1)
