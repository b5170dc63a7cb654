"""The anchored loss decomposes over pairs, and the checks that say so fire on every loss that does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from encoders.objectives import (
    SAME_MEANING,
    anchored_loss,
    anchored_sigmoid_loss,
    grouped_infonce_loss,
    infonce_loss,
    prototype_loss,
    same_meaning,
    soft_positives,
    soft_targets,
    text_similarity,
)

Rows = Callable[[Tensor, Tensor], Tensor]
Doubles = NDArray[np.float64]
BATCH, WIDTH, BANK = 5, 16, 7
BIAS = -2.5
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


def softmax_form(images: Tensor, texts: Tensor, *, seed: int = 0, scale: float = 10.0) -> Tensor:
    return anchored_loss(images, texts, **bank_of(images, seed), inverse_temperature=scale)


def sigmoid_form(images: Tensor, texts: Tensor, *, seed: int = 0, scale: float = 10.0) -> Tensor:
    return anchored_sigmoid_loss(
        images, texts, **bank_of(images, seed), inverse_temperature=scale, logit_bias=BIAS
    )


def bank_of(images: Tensor, seed: int) -> dict[str, Tensor]:
    """A bank, and masks and positives that are functions of each row's image alone."""
    directions = units(2 * BANK, seed + 90).to(images.dtype)
    marks = images.detach() @ directions.T
    return {
        "text_anchors": units(BANK, seed + 50).to(images.dtype),
        "image_anchors": units(BANK, seed + 51).to(images.dtype),
        "masked": marks[:, :BANK] > 0.2,
        "positives": (2 * marks[:, BANK:]).clamp(0, 1),
    }


def log_sigmoid(logit: float) -> float:
    return -float(np.log1p(np.exp(-logit)))


def written_softmax(own: float, anchors: Doubles, masked: NDArray[np.bool_], positives: Doubles) -> float:
    logits = [own, *(z for z, out in zip(anchors, masked, strict=True) if not out)]
    targets = [1.0, *(p for p, out in zip(positives, masked, strict=True) if not out)]
    shares = np.array(targets) / sum(targets)
    return -float(np.sum(shares * np.log(np.exp(logits) / np.sum(np.exp(logits))))) / 2


def written_sigmoid(own: float, anchors: Doubles, masked: NDArray[np.bool_], positives: Doubles) -> float:
    total = -log_sigmoid(own + BIAS)  # half of it for each side
    for logit, out, positive in zip(anchors + BIAS, masked, positives, strict=True):
        if not out:
            total -= positive * log_sigmoid(logit) + (1 - positive) * log_sigmoid(-logit)
    return total / 2


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


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    form=st.sampled_from([softmax_form, sigmoid_form]),
)
def test_masks_and_soft_positives_leave_it_untouched_too(
    seed: int, scale: float, form: Callable[..., Tensor]
) -> None:
    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return form(images, texts, seed=seed, scale=scale)

    assert gradient_coupling(loss, seed) == 0
    assert value_coupling(loss, seed) == 0
    assert leaving_coupling(loss, seed) <= 2e-6 * scale


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 14.3]))
@pytest.mark.parametrize(
    ("form", "written"), [(softmax_form, written_softmax), (sigmoid_form, written_sigmoid)]
)
def test_masks_and_soft_positives_enter_as_the_formula_says(
    form: Callable[..., Tensor], written: Callable[..., float], seed: int, scale: float
) -> None:
    images, texts = units(BATCH, seed).double(), units(BATCH, seed + 1).double()
    bank = {name: value.numpy() for name, value in bank_of(images, seed).items()}
    losses = form(images, texts, seed=seed, scale=scale)
    assert losses.dtype == torch.float64
    for row, (image, text) in enumerate(zip(images.numpy(), texts.numpy(), strict=True)):
        own = scale * image @ text
        expected = sum(
            written(own, scale * anchors @ side, bank["masked"][row], bank["positives"][row])
            for anchors, side in ((bank["text_anchors"], image), (bank["image_anchors"], text))
        )
        assert float(losses[row]) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("form", [anchored_loss, anchored_sigmoid_loss])
def test_patients_differentiated_alone_or_together_agree(form: Callable[..., Tensor]) -> None:
    images, texts = (units(BATCH, side).double() for side in (0, 1))
    bank = bank_of(images, 0)
    anchors = {side: bank[side] for side in ("text_anchors", "image_anchors")}
    extra = {"logit_bias": BIAS} if form is anchored_sigmoid_loss else {}

    def total(images: Tensor, texts: Tensor, masked: Tensor, positives: Tensor) -> Tensor:
        return form(
            images, texts, **anchors, masked=masked, positives=positives, inverse_temperature=10.0, **extra
        ).sum()

    def alone(*row: Tensor) -> Tensor:
        return total(*(value[None] for value in row))

    rows = (images, texts, bank["masked"], bank["positives"])
    for ours, expected in zip(
        torch.func.vmap(torch.func.grad(alone, argnums=(0, 1)))(*rows),
        torch.func.grad(total, argnums=(0, 1))(*rows),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", [anchored_loss, anchored_sigmoid_loss])
def test_a_positive_anchor_attracts_and_a_negative_repels(form: Callable[..., Tensor]) -> None:
    images = units(1, 0).requires_grad_()
    bank = {"text_anchors": units(1, 5), "image_anchors": units(1, 6)}
    extra = {"logit_bias": 0.0} if form is anchored_sigmoid_loss else {}
    pulls = []
    for positive in (0.0, 1.0):
        nothing = torch.zeros(1, 1, dtype=torch.bool)
        losses = form(
            images,
            units(1, 1),
            **bank,
            masked=nothing,
            inverse_temperature=1.0,
            positives=torch.full((1, 1), positive),
            **extra,
        )
        (gradient,) = torch.autograd.grad(losses.sum(), images)
        pulls.append(-float((gradient * bank["text_anchors"]).sum()))
    assert pulls[0] < pulls[1]


@pytest.mark.parametrize("form", [anchored_loss, anchored_sigmoid_loss])
@pytest.mark.parametrize("rows", [0, 2])
def test_no_positives_are_positives_of_zero_and_no_rows_are_no_losses(
    form: Callable[..., Tensor], rows: int
) -> None:
    extra = {"logit_bias": BIAS} if form is anchored_sigmoid_loss else {}
    bank = {
        "text_anchors": units(BANK, 5),
        "image_anchors": units(BANK, 6),
        "masked": torch.zeros(rows, BANK, dtype=torch.bool),
        "inverse_temperature": 7.0,
        **extra,
    }
    without = form(units(rows, 0), units(rows, 1), **bank)
    assert without.shape == (rows,)
    assert torch.equal(
        without, form(units(rows, 0), units(rows, 1), **bank, positives=torch.zeros(rows, BANK))
    )


def test_in_the_sigmoid_form_masked_anchors_have_no_influence() -> None:
    kept = torch.tensor([True, False, True, True, False, False, True])
    masked = (~kept).expand(3, BANK)
    positives = torch.rand(3, BANK, generator=torch.Generator().manual_seed(0))

    def loss(columns: Tensor) -> Tensor:
        return anchored_sigmoid_loss(
            units(3, 0),
            units(3, 1),
            text_anchors=units(BANK, 5)[columns],
            image_anchors=units(BANK, 6)[columns],
            masked=masked[:, columns],
            positives=positives[:, columns],
            inverse_temperature=9.0,
            logit_bias=BIAS,
        )

    torch.testing.assert_close(loss(torch.ones(BANK, dtype=torch.bool)), loss(kept))


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


@pytest.mark.parametrize("form", [anchored_loss, anchored_sigmoid_loss])
@pytest.mark.parametrize("side", ["text_anchors", "image_anchors"])
def test_a_bank_with_gradient_is_refused(side: str, form: Callable[..., Tensor]) -> None:
    banks = {"text_anchors": units(BANK, 0), "image_anchors": units(BANK, 1)}
    banks[side].requires_grad_()
    extra = {"logit_bias": BIAS} if form is anchored_sigmoid_loss else {}
    with pytest.raises(ValueError, match="anchors must be built under no_grad"):
        form(
            units(2, 2),
            units(2, 3),
            **banks,
            masked=torch.zeros(2, BANK, dtype=torch.bool),
            inverse_temperature=1.0,
            **extra,
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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), scale=st.sampled_from([1.0, 14.3]))
def test_infonce_with_soft_targets_is_cross_entropy_to_shares_of_them(
    seed: int, rows: int, scale: float
) -> None:
    images, texts = units(rows, seed).double(), units(rows, seed + 1).double()
    rng = np.random.default_rng(seed)
    targets = rng.random((rows, rows)) * (rng.random((rows, rows)) < 0.6) + np.eye(rows)
    same = (rng.random((rows, rows)) < 0.3) | np.eye(rows, dtype=bool)
    logits, total = scale * images.numpy() @ texts.numpy().T, 0.0
    for z, t, s in ((logits, targets, same), (logits.T, targets.T, same.T)):
        for row in range(rows):
            rivals = [other for other in range(rows) if t[row, other] > 0 or not s[row, other]]
            shares = t[row] / t[row].sum()
            total -= sum(
                shares[other] * np.log(np.exp(z[row, other]) / np.exp(z[row, rivals]).sum())
                for other in rivals
            )
    ours = infonce_loss(
        images,
        texts,
        same_text=torch.from_numpy(same),
        inverse_temperature=scale,
        soft_targets=torch.from_numpy(targets),
    )
    assert float(ours) == pytest.approx(total / 2 / rows, rel=1e-10, abs=1e-10)


def test_soft_targets_turn_equal_texts_from_left_out_into_positives() -> None:
    images, texts = units(2, 0), units(1, 1).expand(2, WIDTH)
    same = torch.ones(2, 2, dtype=torch.bool)

    def loss(**changes: Tensor) -> Tensor:
        return infonce_loss(images, texts, same_text=same, inverse_temperature=5.0, **changes)

    assert float(loss()) == 0
    assert float(loss(soft_targets=torch.ones(2, 2))) >= np.log(2) - 1e-6  # two equal partners: their entropy
    assert float(loss(soft_targets=torch.eye(2))) == float(loss())


def grouped(images: Tensor, texts: Tensor, negatives: Tensor) -> Tensor:
    return grouped_infonce_loss(images, texts, negatives=negatives, inverse_temperature=10.0)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), keys=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_a_group_by_itself_is_infonce(seed: int, keys: list[int]) -> None:
    images, texts, numbers = units(len(keys), seed), units(len(keys), seed + 1), torch.tensor(keys)
    same = numbers[:, None] == numbers
    expected = infonce_loss(images, texts, same_text=same, inverse_temperature=10.0)
    torch.testing.assert_close(grouped(images[None], texts[None], ~same[None])[0].mean(), expected)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_group_is_untouched_by_other_groups_and_a_pair_without_negatives_has_no_loss(seed: int) -> None:
    images, texts = units(6, seed).view(2, 3, -1), units(6, seed + 1).view(2, 3, -1)
    negatives = torch.ones(2, 3, 3, dtype=torch.bool)
    negatives[:, 2] = negatives[:, :, 2] = False
    together = grouped(images, texts, negatives)
    torch.testing.assert_close(together[:1], grouped(images[:1], texts[:1], negatives[:1]))
    assert together[:, 2] == pytest.approx([0, 0], abs=1e-5)
    without_it = grouped(images[:, :2], texts[:, :2], negatives[:, :2, :2])
    torch.testing.assert_close(together[:, :2], without_it)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, others=TEXTS, anchors=TEXTS)
def test_how_alike_a_text_is_depends_on_that_text_alone(
    texts: list[str], others: list[str], anchors: list[str]
) -> None:
    rows = text_similarity(texts, anchors)
    assert rows.shape == (len(texts), len(anchors))
    assert rows.dtype == np.float32
    assert ((rows >= 0) & (rows <= 1)).all()
    assert np.array_equal(text_similarity(others + texts, anchors)[len(others) :], rows)
    assert np.array_equal(rows >= SAME_MEANING, same_meaning(texts, anchors))
    np.testing.assert_allclose(text_similarity(anchors, texts), rows.T, atol=1e-6)


def test_similarity_is_the_cosine_of_word_counts() -> None:
    found = text_similarity(
        ["no effusion, no pneumothorax", "", "clear"], ["No effusion", "", "clear CLEAR lungs", "clear"]
    )
    expected = [[3 / np.sqrt(12), 0, 0, 0], [0, 0, 0, 0], [0, 0, 2 / np.sqrt(5), 1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("texts", "anchors"), [([], ["a"]), (["a"], []), ([], [])])
def test_without_texts_or_anchors_there_is_nothing_to_compare(texts: list[str], anchors: list[str]) -> None:
    assert text_similarity(texts, anchors).shape == (len(texts), len(anchors))
    assert same_meaning(texts, anchors).shape == (len(texts), len(anchors))


def test_positives_grow_from_the_least_similarity_to_the_same_meaning() -> None:
    similarity = np.array([[0.0, 0.5, 0.7, 0.9, 1.0]], dtype=np.float32)
    np.testing.assert_allclose(soft_positives(similarity, least=0.5), [[0, 0, 0.5, 1, 1]], atol=1e-6)
    assert soft_positives(similarity[:0], least=0.0).shape == (0, 5)


@pytest.mark.parametrize("least", [-0.1, 0.9, float("nan")])
def test_a_least_similarity_out_of_range_is_refused(least: float) -> None:
    with pytest.raises(ValueError, match=r"expected least=.* in \[0, 0.9\)"):
        soft_positives(np.zeros((1, 1), dtype=np.float32), least=least)


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


# --- without a partner --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, BIAS])
def test_what_has_no_partner_is_drawn_to_where_it_belongs(bias: float | None) -> None:
    rows, anchors = units(BATCH, 1).double(), units(BANK, 2).double()
    masked = torch.zeros(BATCH, BANK, dtype=torch.bool)
    masked[:, 3] = True
    positives = torch.zeros(BATCH, BANK, dtype=torch.double)
    positives[:, 1], positives[:, 4], positives[:, 3] = 1.0, 0.5, 1.0
    found = prototype_loss(
        rows, anchors=anchors, masked=masked, positives=positives, inverse_temperature=10.0, logit_bias=bias
    )
    seen = [column for column in range(BANK) if column != 3]
    for row, loss in zip(rows, found, strict=True):
        logits = (10.0 * anchors @ row + (bias or 0.0)).numpy()
        if bias is None:
            expected = np.log(np.exp(logits[seen]).sum()) - (logits[1] + 0.5 * logits[4]) / 1.5
        else:
            shares = positives[0].numpy()
            expected = -sum(
                shares[k] * log_sigmoid(logits[k]) + (1 - shares[k]) * log_sigmoid(-logits[k]) for k in seen
            )
        assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_what_belongs_nowhere_pulls_nowhere() -> None:
    rows = units(2, 1).requires_grad_()
    nothing = torch.zeros(2, BANK)
    loss = prototype_loss(
        rows, anchors=units(BANK, 2), masked=nothing > 0, positives=nothing, inverse_temperature=10.0
    )
    (reached,) = torch.autograd.grad(loss.sum(), rows)
    assert not loss.detach().any()
    assert not reached.any()


def test_without_a_partner_a_loss_depends_on_its_own_row_alone() -> None:
    rows = units(BATCH, 1).requires_grad_()
    positives = torch.rand(BATCH, BANK, generator=torch.Generator().manual_seed(3))
    losses = prototype_loss(
        rows, anchors=units(BANK, 2), masked=positives < 0.2, positives=positives, inverse_temperature=10.0
    )
    for number, loss in enumerate(losses):
        (reached,) = torch.autograd.grad(loss, rows, retain_graph=True)
        assert [int(row) for row in reached.abs().sum(1).nonzero()] == [number]


def test_soft_targets_share_one_among_the_anchors_the_nearer_the_more_by_the_own_text_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, anchors = (F.normalize(torch.randn(rows, 6, generator=generator), dim=-1) for rows in (5, 4))
    shares = soft_targets(texts.requires_grad_(), anchors, inverse_temperature=10.0)
    assert not shares.requires_grad
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    near = (texts @ anchors.T).detach()
    torch.testing.assert_close(shares, (10 * near).exp() / (10 * near).exp().sum(1, keepdim=True))
    alone = soft_targets(texts[2:3], anchors, inverse_temperature=10.0)
    torch.testing.assert_close(alone, shares[2:3])


def test_a_prototype_with_gradient_is_refused() -> None:
    nothing = torch.zeros(2, BANK)
    with pytest.raises(ValueError, match="under no_grad"):
        prototype_loss(
            units(2, 1),
            anchors=units(BANK, 2).requires_grad_(),
            masked=nothing > 0,
            positives=nothing,
            inverse_temperature=10.0,
        )
