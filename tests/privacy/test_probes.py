"""Whatever couples the rows of a batch is refused by name; what keeps them apart passes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.objectives import anchored_loss, anchored_sigmoid_loss, grouped_infonce_loss, infonce_loss
from privacy.engine import Batch, PatientLosses
from privacy.errors import UnsoundTraining
from privacy.probes import refuse_coupling, refuse_mixed_rows

ROWS, STUDIES, SIZE, WIDTH, SCALE = 5, 2, 6, 8, 14.3
Call = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Towers(nn.Module):
    """Two small towers; ``between`` lies in the first."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(SIZE, WIDTH)
        self.between = between or nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.texts = nn.Linear(SIZE, WIDTH)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.second(self.between(self.first(images)))
        return F.normalize(hidden, dim=-1), F.normalize(self.texts(texts), dim=-1)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(ROWS, STUDIES, SIZE, generator=generator),
        "texts": torch.randn(ROWS, STUDIES, SIZE, generator=generator),
    }


def embedded(call: Call, given: Batch) -> tuple[Tensor, Tensor]:
    return call(given["images"].flatten(0, 1), given["texts"].flatten(0, 1))


def a_row_each(losses: Tensor, given: Batch) -> Tensor:
    return losses.view(len(given["images"]), STUDIES).mean(1)


def bank(seed: int = 2) -> Tensor:
    return F.normalize(torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def anchored(call: Call, given: Batch) -> Tensor:
    images, texts = embedded(call, given)
    masked = torch.zeros(len(images), 7, dtype=torch.bool)
    sides = {"text_anchors": bank(2), "image_anchors": bank(3)}
    return a_row_each(anchored_loss(images, texts, masked=masked, inverse_temperature=SCALE, **sides), given)


def sigmoid(call: Call, given: Batch) -> Tensor:
    images, texts = embedded(call, given)
    losses = anchored_sigmoid_loss(
        images,
        texts,
        text_anchors=bank(2),
        image_anchors=bank(3),
        masked=torch.zeros(len(images), 7, dtype=torch.bool),
        positives=torch.full((len(images), 7), 0.3),
        inverse_temperature=SCALE,
        logit_bias=-5.0,
    )
    return a_row_each(losses, given)


def in_groups(call: Call, given: Batch) -> Tensor:
    """The studies of a row see each other: an objective of groups."""
    images, texts = (side.view(-1, STUDIES, WIDTH) for side in embedded(call, given))
    negatives = torch.ones(len(images), STUDIES, STUDIES, dtype=torch.bool)
    return grouped_infonce_loss(images, texts, negatives=negatives, inverse_temperature=SCALE).sum(1)


@pytest.mark.parametrize("loss", [anchored, sigmoid, in_groups])
@pytest.mark.parametrize("between", [None, nn.Identity(), nn.GroupNorm(2, WIDTH), nn.Dropout(0.5).eval()])
def test_what_keeps_rows_apart_passes(loss: PatientLosses, between: nn.Module | None) -> None:
    refuse_coupling(Towers(between), loss, batch())


# --- planted couplings of the loss --------------------------------------------------------------------------


def infonce(call: Call, given: Batch, *, detached: bool = False, scale: float = SCALE) -> Tensor:
    images, texts = embedded(call, given)
    others_images, others_texts = (images.detach(), texts.detach()) if detached else (images, texts)
    own = scale * (images * texts).sum(-1)
    itself = torch.eye(len(images), dtype=torch.bool)
    losses = torch.zeros(len(images))
    for one, others in ((images, others_texts), (texts, others_images)):
        negatives = (scale * one @ others.T).masked_fill(itself, -torch.inf)
        losses = losses + torch.logsumexp(torch.cat([own[:, None], negatives], 1), 1) - own
    return a_row_each(losses, given)


def detached_infonce(call: Call, given: Batch) -> Tensor:
    return infonce(call, given, detached=True)


def hot_infonce(call: Call, given: Batch) -> Tensor:
    return infonce(call, given, scale=100.0)


def siglip(call: Call, given: Batch) -> Tensor:
    images, texts = embedded(call, given)
    signs = 2 * torch.eye(len(images)) - 1
    return a_row_each(-F.logsigmoid(signs * (SCALE * images @ texts.T - 10)).sum(1), given)


def mean_over_the_batch(call: Call, given: Batch) -> Tensor:
    return anchored(call, given) / len(given["images"])


class Queue:
    """MoCo's: negatives are what came before."""

    def __init__(self) -> None:
        self.keys = F.normalize(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4)), dim=-1)

    def __call__(self, call: Call, given: Batch) -> Tensor:
        images, texts = embedded(call, given)
        masked = torch.zeros(len(images), len(self.keys), dtype=torch.bool)
        sides = {"text_anchors": self.keys, "image_anchors": self.keys}
        losses = anchored_loss(images, texts, masked=masked, inverse_temperature=SCALE, **sides)
        self.keys = torch.cat([self.keys, texts.detach()])[-64:]
        return a_row_each(losses, given)


class RunningScale:
    """An adaptive scale, smoothed over all it has seen."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, call: Call, given: Batch) -> Tensor:
        losses = anchored(call, given)
        self.scale = 0.99 * self.scale + 0.01 * float(losses.detach().mean())
        return losses / self.scale


def scalar(call: Call, given: Batch) -> Tensor:
    images, texts = embedded(call, given)
    same = torch.eye(len(images), dtype=torch.bool)
    return infonce_loss(images, texts, same_text=same, inverse_temperature=SCALE)


def anchors_in_the_same_call(call: Call, given: Batch) -> Tensor:
    anchors = torch.randn(ROWS * STUDIES, SIZE, generator=torch.Generator().manual_seed(5))
    images, texts = call(
        torch.cat([given["images"].flatten(0, 1), anchors]),
        torch.cat([given["texts"].flatten(0, 1), anchors]),
    )
    rows = len(images) - len(anchors)
    losses = torch.logsumexp(images[:rows] @ texts[rows:].T, 1) - (images[:rows] * texts[:rows]).sum(1)
    return a_row_each(losses, given)


def anchors_in_a_call_of_their_own(call: Call, given: Batch) -> Tensor:
    images, texts = embedded(call, given)
    anchors = torch.randn(ROWS * STUDIES, SIZE, generator=torch.Generator().manual_seed(5))
    _, encoded = call(anchors, anchors)
    return a_row_each(torch.logsumexp(images @ encoded.T, 1) - (images * texts).sum(1), given)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (infonce, "in-batch negatives, as of InfoNCE and SigLIP, .* use the anchored objective"),
        (hot_infonce, "in-batch negatives"),
        (siglip, "in-batch negatives"),
        (detached_infonce, "detached in-batch negatives, or a mean over the batch"),
        (mean_over_the_batch, "detached in-batch negatives, or a mean over the batch"),
        (Queue(), r"a queue of earlier records \(as of MoCo\) .* use public anchors"),
        (RunningScale(), "a queue of earlier records .* or another memory"),
        (scalar, "expected 5 finite losses of 5 made-up rows, one each, got shape"),
        (anchors_in_the_same_call, "in-batch negatives"),
        (anchors_in_a_call_of_their_own, r"got \[10, 10\] inputs: .* a bank with gradient"),
    ],
)
def test_a_loss_that_couples_rows_is_refused_by_name(loss: PatientLosses, text: str) -> None:
    with pytest.raises(UnsoundTraining, match=text):
        refuse_coupling(Towers(), loss, batch())


@pytest.mark.parametrize("outside", [True, False])
def test_a_bank_with_gradient_is_refused(outside: bool) -> None:
    towers, anchors = Towers(), torch.randn(ROWS * STUDIES, SIZE)
    encoded = towers(anchors, anchors)[1]

    def with_gradient(call: Call, given: Batch) -> Tensor:
        images, texts = embedded(call, given)
        negatives = encoded if outside else towers(anchors, anchors)[1]
        return a_row_each(torch.logsumexp(images @ negatives.T, 1) - (images * texts).sum(1), given)

    with pytest.raises(UnsoundTraining, match=r"a bank of anchors with gradient .* under torch.no_grad"):
        refuse_coupling(towers, with_gradient, batch())


# --- planted couplings of the module ------------------------------------------------------------------------


class Centred(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class Neighbour(nn.Module):
    """Row i takes a hundredth of row i - 1."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows + 1e-2 * rows.roll(1, 0)


@pytest.mark.parametrize("between", [Centred(), Neighbour(), nn.Dropout(0.5)])
def test_a_module_that_mixes_rows_is_refused_with_the_layers_name(between: nn.Module) -> None:
    with pytest.raises(UnsoundTraining, match=r"outputs of layer 'between' for a row changed .* GroupNorm"):
        refuse_coupling(Towers(between), anchored, batch())


def test_a_module_that_mixes_rows_outside_any_layer_is_refused() -> None:
    class Mixing(Towers):
        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            first, second = super().forward(images, texts)
            return first - first.mean(0), second

    with pytest.raises(UnsoundTraining, match="outputs of layer 'Mixing' for a row changed"):
        refuse_mixed_rows(Mixing(), tuple(value.flatten(0, 1) for value in batch().values()))


@pytest.mark.parametrize("trained", [True, False])
def test_batch_normalisation_is_refused_even_when_frozen(trained: bool) -> None:
    towers = Towers(nn.BatchNorm1d(WIDTH).requires_grad_(trained))
    with pytest.raises(UnsoundTraining, match="layer 'between' is BatchNorm1d"):
        refuse_coupling(towers, anchored, batch())


def test_broken_weights_are_refused() -> None:
    towers = Towers()
    with torch.no_grad():
        towers.first.weight.fill_(torch.nan)
    with pytest.raises(UnsoundTraining, match="are not finite: the weights it was given are broken"):
        refuse_coupling(towers, anchored, batch())


def test_one_row_is_nothing_to_probe_with() -> None:
    alone: dict[str, Any] = {name: value[:1] for name, value in batch().items()}
    with pytest.raises(ValueError, match="at least 2 rows to probe, got 1"):
        refuse_coupling(Towers(), anchored, alone)


def test_probes_leave_the_module_as_it_was() -> None:
    towers = Towers()
    refuse_coupling(towers, anchored, batch())
    assert all(value.grad is None for value in towers.parameters())
    assert not any(layer._forward_hooks for layer in towers.modules())
