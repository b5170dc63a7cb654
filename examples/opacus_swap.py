"""A plain Opacus script with the two lines that change, on a classifier and on CLIP.

The data are random and the models small: what is shown is the script, and that epsilon stays what it was.
"""

from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from encoders.clip import build
from encoders.objectives import anchored_loss
from encoders.parts import trainable_part

# from opacus import PrivacyEngine
from privacy.opacus_swap import BookKeepingPrivacyEngine as PrivacyEngine  # the first line that changed

DELTA, EPOCHS = 1e-5, 2


def train_classifier() -> tuple[float, float]:
    """Returns the last loss and epsilon."""
    images, labels = torch.randn(512, 1, 16, 16), torch.randint(4, (512,))
    model: Any = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)
    )
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion: Any = nn.CrossEntropyLoss()
    loader: Any = DataLoader(TensorDataset(images, labels), batch_size=64)

    privacy_engine = PrivacyEngine()
    # model, optimizer, loader = privacy_engine.make_private(
    model, optimizer, criterion, loader = privacy_engine.make_private(  # the second: criterion out, and in
        module=model,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    last = float("nan")
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            last = loss.item()
    return last, privacy_engine.get_epsilon(DELTA)


class AnchoredLoss(nn.Module):
    """Each pair against its own partner and public anchors: a contrastive loss that may carry an epsilon."""

    def __init__(self, text_anchors: Tensor, image_anchors: Tensor) -> None:
        super().__init__()
        self.register_buffer("text_anchors", text_anchors)
        self.register_buffer("image_anchors", image_anchors)

    def forward(self, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """One loss a pair: the criterion has no ``reduction``, so it must not take the mean itself."""
        image_embeddings, text_embeddings = embeddings
        return anchored_loss(
            image_embeddings,
            text_embeddings,
            text_anchors=self.get_buffer("text_anchors"),
            image_anchors=self.get_buffer("image_anchors"),
            masked=torch.zeros(len(image_embeddings), len(self.get_buffer("text_anchors")), dtype=torch.bool),
            inverse_temperature=10.0,
        )


def train_clip() -> tuple[float, float]:
    """Returns the last loss and epsilon. CLIP's own loss, in-batch InfoNCE, would be refused."""
    encoder = build("tiny", image_size=32, max_tokens=8, seed=0, inverse_temperature=10.0)
    model: Any = trainable_part(encoder, "full", lora_rank=1).module
    images = torch.randint(256, (64, 32, 32), dtype=torch.uint8)
    texts = torch.randint(1000, (64, 8))
    texts[:, -1] = encoder.tokenizer.eos_token_id
    anchors = F.normalize(torch.randn(2, 16, 128), dim=-1)
    optimizer: Any = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    loader: Any = DataLoader(TensorDataset(images, texts), batch_size=16)

    privacy_engine = PrivacyEngine()
    # model, optimizer, loader = privacy_engine.make_private(
    model, optimizer, criterion, loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        criterion=AnchoredLoss(*anchors),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    last = float("nan")
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss = criterion(model(*batch))
            loss.backward()
            optimizer.step()
            last = loss.item()
    return last, privacy_engine.get_epsilon(DELTA)


def main() -> None:
    """Train both and say what was spent."""
    for name, train in (("classifier", train_classifier), ("CLIP", train_clip)):
        loss, epsilon = train()
        typer.echo(f"{name}: loss {loss:.3f}, epsilon {epsilon:.2f} at delta {DELTA:g}")


if __name__ == "__main__":
    main()
